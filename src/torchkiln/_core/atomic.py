"""All or nothing: a module is as it was when a change to it fails half way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from torchkiln._core.chain import set_data
from torchkiln._core.engine import balance

__all__ = ["all_or_nothing"]


@contextmanager
def all_or_nothing(module: nn.Module, *tensors: Tensor) -> Iterator[None]:
    """Put back ``module``'s class, tensors and submodules, and the data of ``tensors``, if the block raises."""
    cls = type(module)
    data = [(tensor, tensor.detach(), _version(tensor)) for tensor in tensors]
    containers: list[Any] = [
        module._parameters,
        module._buffers,
        module._non_persistent_buffers_set,
        module._modules,
    ]
    if "parametrizations" in module._modules:
        containers.append(module._modules["parametrizations"]._modules)  # type: ignore[union-attr]  # it is no None
    contents = [container.copy() for container in containers]
    try:
        yield
    except BaseException:
        for container, content in zip(containers, contents, strict=True):
            container.clear()
            container.update(content)
        object.__setattr__(module, "__class__", cls)
        for tensor, before, version in data:
            # Writing unchanged data back would count as a write, and end graphs that have saved the tensor.
            if _version(tensor) != version:
                set_data(tensor, before)
        balance([module])
        raise


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
