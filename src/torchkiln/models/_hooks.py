"""The computed tensors of torch's older, hook-based functions: weight norm, spectral norm and pruning.

Their hooks compute the tensor before each forward pass and leave it on the module as a plain attribute. Here the hook
object is asked for the value, and taken out with everything that it left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod, PruningContainer
from torch.nn.utils.spectral_norm import (
    SpectralNorm,
    SpectralNormLoadStateDictPreHook,
    SpectralNormStateDictHook,
)
from torch.nn.utils.weight_norm import WeightNorm

from torchkiln._core.chain import register_tensor
from torchkiln.models._fold import Fold, slots_of

__all__ = ["HookFold", "hook_folds"]


class HookFold(Fold):
    """A tensor that a forward pre-hook computes.

    Args:
        module: The module with the hook.
        name: The name of the tensor that the hook computes.
        hook: The hook.
        word: What to call it.
        originals: Suffixes of the names of the tensors it starts from.
        state: Suffixes of the names of the other tensors it stores.
        evaluate: Computes the tensor from something that has all these as attributes.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        *,
        hook: Any,
        word: str,
        originals: tuple[str, ...],
        state: tuple[str, ...] = (),
        evaluate: Callable[[Any], Tensor],
    ) -> None:
        self.module = self.holder = module
        self.name, self.hook, self.word, self.evaluate = name, hook, word, evaluate
        self.api = "prune" if word.startswith("prune") else "hook"
        self.originals = tuple(f"{name}_{suffix}" for suffix in originals)
        self.parts = (*self.originals, *(f"{name}_{suffix}" for suffix in state))
        self.inner = {}

    def words(self) -> list[str]:
        return [self.word]

    @cached_property
    def stored_keys(self) -> list[str]:
        nested = (self.inner[part].stored_keys if part in self.inner else [part] for part in self.parts)
        return [key for keys in nested for key in keys]

    def parameters(self) -> list[nn.Parameter]:
        nested = (
            self.inner[part].parameters() if part in self.inner else [self.module._parameters.get(part)]
            for part in self.parts
        )
        return [tensor for tensors in nested for tensor in tensors if tensor is not None]

    def known_shape(self) -> torch.Size | None:
        return self.shape_of(self.originals[-1])

    def value(self) -> Tensor:
        fresh = {part: fold.value() for part, fold in self.inner.items()}
        return self.evaluate(_Fresh(self.module, fresh)).detach()

    def _take_out(self, tensor: Tensor) -> None:
        pre_hooks = self.module._forward_pre_hooks
        for key in [key for key, hook in pre_hooks.items() if hook is self.hook]:
            del pre_hooks[key]
        _drop_state_dict_hooks(self.module, self.hook)
        vars(self.module).pop(self.name, None)
        position = list(self.module._parameters).index(self.originals[0])
        for part in self.parts:
            del slots_of(self.module, part)[part]
        register_tensor(self.module, self.name, tensor)
        _move_to(self.module._parameters, self.name, position)


class _Fresh:
    """A module seen with some of its tensors replaced by their values of now.

    Where a stored tensor is itself computed by a hook, the module has the value of the last forward pass.
    """

    def __init__(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        self._module = module
        vars(self).update(values)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def hook_folds(module: nn.Module) -> Iterator[HookFold]:
    """Yield a fold for each tensor that a hook of torch's computes on ``module``."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield HookFold(
                module,
                hook.name,
                hook=hook,
                word="weight_norm (hook)",
                originals=("g", "v"),
                evaluate=hook.compute_weight,
            )
        elif isinstance(hook, SpectralNorm):
            yield HookFold(
                module,
                hook.name,
                hook=hook,
                word="spectral_norm (hook)",
                originals=("orig",),
                state=("u", "v"),
                evaluate=partial(hook.compute_weight, do_power_iteration=False),
            )
        elif isinstance(hook, BasePruningMethod):
            yield HookFold(
                module,
                hook._tensor_name,
                hook=hook,
                word=f"prune ({', '.join(_methods(hook))})",
                originals=("orig",),
                state=("mask",),
                evaluate=hook.apply_mask,
            )


def _methods(hook: BasePruningMethod) -> list[str]:
    methods = hook if isinstance(hook, PruningContainer) else [hook]
    return [type(method).__name__ for method in methods]


def _drop_state_dict_hooks(module: nn.Module, hook: object) -> None:
    """Remove the hooks by which the spectral norm ``hook`` versions and reads state dicts."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, wrapped in list(hooks.items()):
            inner = getattr(wrapped, "hook", wrapped)
            kinds = (SpectralNormStateDictHook, SpectralNormLoadStateDictPreHook)
            if isinstance(inner, kinds) and inner.fn is hook:
                del hooks[key]


def _move_to(tensors: dict[str, Any], name: str, position: int) -> None:
    """Move the entry ``name`` of ``tensors``, in place, to ``position``."""
    keys = [key for key in tensors if key != name]
    for key in (name, *keys[position:]):
        tensors[key] = tensors.pop(key)
