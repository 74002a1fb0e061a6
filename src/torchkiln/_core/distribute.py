"""torch distributes the tensors of a parametrized module: its chains step aside meanwhile, and their originals follow.

``parallelize_module`` and ``distribute_module`` exchange the parameters that a module has by name, which a computed
tensor is none of. They begin by asking the module whether that was done before, and end by noting that it was. Between
the two the module holds plain tensors with the computed values; then each chain is back, with its originals laid out
as its tensor was.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.attributes import parameter_like
from torchkiln._core.chain import chains_of, is_parametrized, original_names
from torchkiln._core.sharded import distributed_like, is_sharded, placements_of, replicated_like, share

__all__ = ["APPLIED", "applied"]

APPLIED = "_distribute_module_applied"
_ASIDE = "_chains_aside"


def _asked(module: nn.Module) -> bool:
    caller = sys._getframe(1)
    by_torch = str(caller.f_globals.get("__name__")).startswith("torch.distributed.tensor")
    done = APPLIED in module.__dict__
    if by_torch and caller.f_code.co_name == "distribute_module" and not done and is_parametrized(module):
        _step_aside(module)
    if not done:
        raise AttributeError(APPLIED)
    return bool(module.__dict__[APPLIED])


def _noted(module: nn.Module, value: bool) -> None:
    module.__dict__[APPLIED] = value
    if _ASIDE in module.__dict__:
        _come_back(module)


# What an injected class has under the name APPLIED.
applied = property(_asked, _noted)


def _step_aside(module: nn.Module) -> None:
    from torchkiln._core.remove import (
        computed_value,
        new_tensor,
    )  # which needs the classes that need this file

    chains = module._modules["parametrizations"]
    plain = {name: new_tensor(computed_value(chain), chain) for name, chain in chains_of(module).items()}
    module._modules["parametrizations"] = None  # its place, for later
    module.__dict__[_ASIDE] = chains
    for name, tensor in plain.items():
        held: dict[str, Any] = module._parameters if isinstance(tensor, nn.Parameter) else module._buffers
        held[name] = tensor


def _come_back(module: nn.Module) -> None:
    chains = module.__dict__.pop(_ASIDE)
    module._modules["parametrizations"] = chains
    for name, chain in chains_of(module).items():
        held: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
        plain = held.pop(name)
        if is_sharded(plain):
            lay_out(chain, plain)


@torch.no_grad()
def lay_out(chain: nn.Module, plain: Tensor) -> None:
    """Distribute the originals of ``chain`` as ``plain``, which stood in its place, is; its steps replicate theirs."""
    chain.__dict__["_placements"] = placements_of(plain)
    for name in original_names(chain):
        held: dict[str, Any] = chain._parameters if name in chain._parameters else chain._buffers
        original = held.get(name)
        if original is not None:
            held[name] = _like(original, distributed_like(original.detach(), plain))
    inner = chains_of(chain) if is_parametrized(chain) else {}
    for other in inner.values():
        lay_out(other, plain)
    steps = [step for name, step in chain.named_children() if name != "parametrizations"]
    for module in (one for step in steps for one in step.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None and not is_sharded(parameter):
                module._parameters[name] = _like(parameter, replicated_like(parameter.detach(), plain))
        for buffer in module._buffers.values():
            if buffer is not None:
                share(buffer, plain)


def _like(original: Tensor, tensor: Tensor) -> Any:
    if isinstance(original, nn.Parameter):
        return parameter_like(tensor, [original], requires_grad=original.requires_grad)
    return tensor
