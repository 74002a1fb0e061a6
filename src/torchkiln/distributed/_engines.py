"""What the mechanism asks of the engines, handed to the file that knows; each is imported when it is in use."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from torch import nn

__all__ = ["Engines"]


class Engines:
    """The engines of torch, as :mod:`torchkiln._core.engine` wants them."""

    def prepare(self, modules: Sequence[nn.Module], _step: nn.Module | None) -> None:
        """Reshard what FSDP holds gathered."""
        if _uses_fsdp():
            from torchkiln.distributed import _fsdp

            _fsdp.reshard(modules)

    def balance(self, modules: Sequence[nn.Module]) -> None:
        """Let FSDP's books follow."""
        if _uses_fsdp():
            from torchkiln.distributed import _fsdp

            _fsdp.balance(modules)

    def versions(self, chain: nn.Module) -> tuple[Any, ...] | None:
        """Ask FSDP's books for the sharded parameters."""
        from torchkiln.distributed import _fsdp

        return _fsdp.versions(chain)


def _uses_fsdp() -> bool:
    return "torch.distributed.fsdp._fully_shard" in sys.modules
