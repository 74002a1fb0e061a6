"""How many bytes tensors hold at the most while something runs, counted exactly, on any device."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["peak_bytes"]


class _Meter(TorchDispatchMode):
    """Keeps the storages that operations return, weakly, and the largest sum of their sizes."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.storages: dict[int, weakref.ref[Any]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # what it does with its local tensors comes here then
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self.known:
                    self.storages[storage._cdata] = weakref.ref(storage)
        self.note()
        return result

    def note(self) -> None:
        live = [storage for ref in self.storages.values() if (storage := ref()) is not None]
        self.peak = max(self.peak, sum(storage.nbytes() for storage in live))


def peak_bytes(call: Callable[[], Any], known: list[Tensor]) -> int:
    """Return the largest number of bytes of tensors made by ``call``; those of ``known`` were there before."""
    with _Meter(known) as meter:
        call()
        meter.note()
    return meter.peak
