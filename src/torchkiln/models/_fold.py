"""One computed tensor, whatever computes it: the questions and the one change that the verbs need."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.chain import (
    ParametrizationList,
    chains_of,
    enabled_steps,
    original_names,
    steps_of,
    within,
)
from torchkiln._core.remove import put_back
from torchkiln._core.restack import is_in
from torchkiln._core.stack import word_for

__all__ = ["ChainFold", "Fold", "slots_of"]


class Fold(ABC):
    """A tensor of a module that is computed from other tensors.

    Attributes:
        module: The module that owns the computed tensor.
        name: The tensor's name.
        api: Who put the computation there.
        holder: The module that stores the tensors it is computed from.
        originals: Names, on the holder, of the tensors it starts from.
        parts: The originals, and the holder's registered state that the computation needs, such as a mask.
        inner: Those parts that are themselves computed, by name.
    """

    module: nn.Module
    name: str
    api: str
    holder: nn.Module
    originals: tuple[str, ...]
    parts: tuple[str, ...]
    inner: dict[str, Fold]

    def nested(self) -> Iterator[Fold]:
        """Yield this fold and all inside it."""
        yield self
        for fold in self.inner.values():
            yield from fold.nested()

    def leaves(self) -> list[Tensor]:
        """Return the stored tensors that the computation starts from, through all that is nested."""
        found: list[Any] = []
        for name in self.originals:
            found += self.inner[name].leaves() if name in self.inner else [getattr(self.holder, name)]
        return [tensor for tensor in found if isinstance(tensor, Tensor)]

    def survivor(self) -> Tensor | None:
        """Return the one stored tensor that can become the tensor again, or None where there are several."""
        leaves = self.leaves()
        return leaves[0] if len(leaves) == 1 else None

    def what(self) -> str:
        """Return what computes the tensor, innermost first."""
        return ", ".join([*(fold.what() for fold in self.inner.values()), *self.words()])

    def take_out(self, tensor: Tensor) -> None:
        """Leave ``tensor`` under the tensor's name, and nothing of what computed it."""
        for fold in self.inner.values():
            fold.take_out(fold.leaves()[0])
        self._take_out(tensor)

    def shape_of(self, original: str) -> torch.Size | None:
        """Return the shape of an original, None where it is computed and its shape not known."""
        if original in self.inner:
            return self.inner[original].known_shape()
        shape: torch.Size = getattr(self.holder, original).shape
        return shape

    @abstractmethod
    def words(self) -> list[str]:
        """Return a word for each step of this level."""

    @cached_property
    @abstractmethod
    def stored_keys(self) -> list[str]:
        """The state-dict keys, relative to the module, that store the tensor."""

    @abstractmethod
    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that store the tensor, those of the steps included.

        Found anew each time: one that is kept looks as if somebody else held it.
        """

    @abstractmethod
    def known_shape(self) -> torch.Size | None:
        """Return the computed tensor's shape where it is known without computing."""

    @abstractmethod
    def value(self) -> Tensor:
        """Compute the tensor, with memory of its own; the caller sees to modes and grad."""

    @abstractmethod
    def _take_out(self, tensor: Tensor) -> None:
        """Do so on this level; what is inside is plain by now."""


def slots_of(module: nn.Module, name: str) -> dict[str, Any]:
    """Return the dict of ``module``, parameters or buffers, that has ``name``."""
    return module._parameters if name in module._parameters else module._buffers


# The steps that keep the tensor's shape whatever their chain is allowed to do.
_KEEP_SHAPE = {"orthogonal", "spectral_norm", "weight_norm"}


class ChainFold(Fold):
    """A tensor under ``parametrizations``, registered by torchkiln or by torch."""

    def __init__(self, module: nn.Module, name: str, *, inner: dict[str, Fold]) -> None:
        self.module, self.name = module, name
        self.chain: Any = chains_of(module)[name]
        self.api = "torchkiln" if isinstance(self.chain, ParametrizationList) else "torch"
        self.holder = self.chain
        self.originals = self.parts = tuple(original_names(self.chain))
        self.inner = {original: fold for original, fold in inner.items() if original in self.originals}

    def words(self) -> list[str]:
        enabled = enabled_steps(self.chain)
        return [
            word_for(step) if is_in(enabled, step) else f"{word_for(step)} (disabled)"
            for step in steps_of(self.chain)
        ]

    @cached_property
    def stored_keys(self) -> list[str]:
        return [f"parametrizations.{self.name}.{key}" for key in self.chain.state_dict(keep_vars=True)]

    def parameters(self) -> list[nn.Parameter]:
        found = (p for one in within(self.chain) for p in one._parameters.values() if p is not None)
        return list({id(p): p for p in found}.values())

    def known_shape(self) -> torch.Size | None:
        words = self.words()
        if self.chain.unsafe and not set(words) <= _KEEP_SHAPE:
            return None
        if words[0] == "weight_norm":
            return self.shape_of("original1")
        return self.shape_of("original") if self.chain.is_tensor else None

    def value(self) -> Tensor:
        # A copy: a step may return its input, a view, or a tensor that it keeps.
        value: Tensor = self.chain().detach().clone()
        return value

    def _take_out(self, tensor: Tensor) -> None:
        put_back(self.module, self.name, tensor)
        _drop_legacy_hook(self.module, self.name)


def _drop_legacy_hook(module: nn.Module, name: str) -> None:
    """Remove the hook by which torch's weight norm reads the older keys: a closure, which no pickle can hold."""
    for key, wrapped in list(module._load_state_dict_pre_hooks.items()):
        hook = getattr(wrapped, "hook", wrapped)
        from_torch = getattr(hook, "__qualname__", "") == "weight_norm.<locals>._weight_norm_compat_hook"
        if from_torch and inspect.getclosurevars(hook).nonlocals.get("name") == name:
            del module._load_state_dict_pre_hooks[key]
