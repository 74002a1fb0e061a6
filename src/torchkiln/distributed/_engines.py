"""What the mechanism asks of the engines, handed to the files that know; each is imported when it is in use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from torchkiln._core.sharded import is_sharded, share

__all__ = ["Engines"]


class Engines:
    """The engines of torch, as :mod:`torchkiln._core.engine` wants them."""

    def prepare(self, modules: Sequence[nn.Module], intent: str | None) -> None:
        """Reshard what FSDP holds gathered, and see that all ranks that train ``modules`` come with ``intent``."""
        groups = []
        if _uses_fsdp():
            from torchkiln.distributed import _fsdp

            _fsdp.reshard(modules)
        if intent is not None:
            from torchkiln.distributed import _agreement

            groups += [ranks for mesh in _meshes(modules) for ranks in _agreement.ranks_of_mesh(mesh)]
            if not groups and dist.get_world_size() > 1:
                from torchkiln.distributed import _ddp

                wrappers = _ddp.find_wrappers(modules)
                groups += [tuple(dist.get_process_group_ranks(one.process_group)) for one in wrappers]
            _agreement.agree(intent, groups)

    def take_in(self, module: nn.Module, step: nn.Module) -> Callable[[], None]:
        """Let the step's tensors be those of the first rank, and under FSDP shard its parameters."""
        before = [(one, name, tensor) for one in step.modules() for name, tensor in one._parameters.items()]
        like = next((one for one in _tensors(module) if is_sharded(one)), None)
        if like is not None:
            for tensor in (*step.parameters(), *step.buffers()):
                share(tensor.detach(), like)
        if _uses_fsdp():
            from torchkiln.distributed import _fsdp

            _fsdp.shard_step(module, step)

        def undo() -> None:
            for one, name, tensor in before:
                one._parameters[name] = tensor

        return undo

    def balance(self, modules: Sequence[nn.Module]) -> None:
        """Let FSDP's books and the reducer of DDP follow."""
        from torchkiln.distributed import _ddp

        if _uses_fsdp():
            from torchkiln.distributed import _fsdp

            _fsdp.balance(modules)
        _ddp.balance(modules)

    def spread(self, modules: Sequence[nn.Module]) -> None:
        """Broadcast what is new under DDP; what is sharded was computed from the same tensors."""
        from torchkiln.distributed import _ddp

        _ddp.spread(modules)

    def versions(self, chain: nn.Module) -> tuple[Any, ...] | None:
        """Ask FSDP's books for the sharded parameters."""
        from torchkiln.distributed import _fsdp

        return _fsdp.versions(chain)


def _uses_fsdp() -> bool:
    return "torch.distributed.fsdp._fully_shard" in sys.modules


def _meshes(modules: Sequence[nn.Module]) -> list[Any]:
    """Return the device meshes that tensors of ``modules``, or of their chains, are sharded over."""
    found: dict[int, Any] = {}
    for module in modules:
        for tensor in _tensors(module):
            if is_sharded(tensor):
                found.setdefault(id(tensor.device_mesh), tensor.device_mesh)
    return list(found.values())


def _tensors(module: nn.Module) -> list[Any]:
    """Return the parameters of ``module`` itself and of its chains."""
    chains = module._modules.get("parametrizations")
    owned = [] if chains is None else list(chains.parameters())
    return [one for one in (*module._parameters.values(), *owned) if one is not None]
