"""Read state dicts that were saved under the older, hook-based weight norm."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from torchkiln._core.chain import is_parametrized

__all__ = ["WeightNormKeys", "forget_weight_norm_keys", "read_weight_norm_keys"]


class WeightNormKeys:
    """A load hook that takes ``<name>_g`` and ``<name>_v``, the keys of ``torch.nn.utils.weight_norm``.

    A class rather than a closure, so that the module can be pickled. It does nothing on a module whose tensor has no
    weight norm (any more).
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        old = [f"{prefix}{self.name}_{letter}" for letter in "gv"]
        if is_parametrized(module, self.name) and all(key in state_dict for key in old):
            for i, key in enumerate(old):
                state_dict[f"{prefix}parametrizations.{self.name}.original{i}"] = state_dict.pop(key)


def read_weight_norm_keys(module: nn.Module, name: str) -> None:
    """Let ``module`` load the older keys of its weight-normed tensor ``name``."""
    if not _hooks_for(module, name):
        module.register_load_state_dict_pre_hook(WeightNormKeys(name))  # type: ignore[no-untyped-call]  # torch's


def forget_weight_norm_keys(module: nn.Module, name: str) -> None:
    """Drop the hook, ours or torch's; torch's is a closure, with which the module cannot be pickled."""
    for key in _hooks_for(module, name):
        del module._load_state_dict_pre_hooks[key]


def _hooks_for(module: nn.Module, name: str) -> list[int]:
    hooks = module._load_state_dict_pre_hooks
    return [key for key, wrapped in hooks.items() if _reads(getattr(wrapped, "hook", wrapped), name)]


def _reads(hook: Any, name: str) -> bool:
    if isinstance(hook, WeightNormKeys):
        return hook.name == name
    from_torch = getattr(hook, "__qualname__", "") == "weight_norm.<locals>._weight_norm_compat_hook"
    return from_torch and inspect.getclosurevars(hook).nonlocals.get("name") == name
