"""What a live model asks a state dict for: its parametrized tensors, those that torch's hooks compute, and the rest."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from torchkiln._core.spellings import fold as rules
from torchkiln._core.spellings.spelled import Kind
from torchkiln._core.spellings.targets import ChainTarget, Encoded, Target, default_dim, plain_targets
from torchkiln.models._find import folds_of, walk
from torchkiln.models._fold import Fold
from torchkiln.models._hooks import HookFold

__all__ = ["hook_kind", "targets_by_prefix"]


def targets_by_prefix(model: nn.Module) -> Iterator[tuple[str, list[Target]]]:
    """Yield every module's prefix and tensors; a shared module comes under each of its prefixes."""
    for prefix, module in walk(model, "", frozenset()):
        computed = [_target(fold, prefix) for fold in folds_of(module).values()]
        taken = {key for target in computed for key in target.stored}
        plain = [target for target in plain_targets(module, prefix) if target.name not in taken]
        yield prefix, computed + plain


def hook_kind(fold: HookFold) -> Kind:
    """Return what a hook of torch's computes."""
    if isinstance(fold.hook, WeightNorm):
        return "weight_norm"
    return "spectral_norm" if isinstance(fold.hook, SpectralNorm) else "pruning"


def _target(fold: Fold, prefix: str) -> Target:
    return (
        HookTarget(fold, prefix)
        if isinstance(fold, HookFold)
        else ChainTarget(fold.module, fold.name, prefix)
    )


class HookTarget(Target):
    """A tensor that a hook of torch's computes."""

    def __init__(self, fold: HookFold, prefix: str) -> None:
        self.name = prefix + fold.name
        self._hook, self._kind = fold.hook, hook_kind(fold)
        self._parts = {prefix + part: cast(Tensor, getattr(fold.module, part)) for part in fold.parts}
        self._inner = {prefix + part: _target(inner, prefix) for part, inner in fold.inner.items()}
        self.stored = {
            key: tensor
            for part, own in self._parts.items()
            for key, tensor in (self._inner[part].stored if part in self._inner else {part: own}).items()
        }
        self.kind = None if self._inner else self._kind
        self.shape, self.default_dim = fold.known_shape(), default_dim(fold.module)

    def encode(self, value: Tensor, *, dtype: torch.dtype | None) -> Encoded:
        like = list(self._parts.values())[1 if self._kind == "weight_norm" else 0]
        dtype = dtype or like.dtype
        with torch.no_grad():
            W = value.to(value.device if like.is_meta else like.device, rules.compute_dtype(dtype))
            tensors: dict[str, Tensor] = {}
            computed: list[Tensor] = []
            for part, tensor in zip(self._parts, self._split(W, dtype), strict=True):
                inner = self._inner.get(part)
                encoded = Encoded({part: tensor}) if inner is None else inner.encode(tensor, dtype=dtype)
                tensors |= encoded.tensors
                computed.append(tensor if encoded.loaded is None else encoded.loaded)
            if any(tensor.is_meta for tensor in computed):
                # A mask without data stays for torch to report as missing.
                return Encoded({key: one for key, one in tensors.items() if one.is_meta == value.is_meta})
            return Encoded(tensors, self._value(computed, W.dtype).to(dtype))

    def _split(self, W: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Return the parts for the value ``W``, in the order of their names."""
        now = tuple(self._parts.values())
        if self._kind == "pruning":
            return W.to(dtype), now[1]
        if W.is_meta:
            return tuple(torch.empty_like(part, device="meta", dtype=dtype) for part in now)
        if self._kind == "weight_norm":
            g, v = rules.split_gain(W, self._dim())
            return g.to(dtype), v.to(dtype)
        u, v, _ = rules.singular_pair(_at_least_matrix(W), self._dim() or 0)
        return W.to(dtype), u.to(dtype), v.to(dtype)

    def _value(self, parts: list[Tensor], dtype: torch.dtype) -> Tensor:
        """Compute what the hook computes."""
        if self._kind == "pruning":
            return rules.apply_mask(parts[0].to(dtype), parts[1])
        wide = [part.to(dtype) for part in parts]
        if self._kind == "weight_norm":
            g, v = wide
            return rules.weight_norm(g, v, self._dim())
        W, u, v = wide
        return rules.spectral_norm(_at_least_matrix(W), u, v, self._dim() or 0).reshape(W.shape)

    def _dim(self) -> int | None:
        dim: Any = self._hook.dim
        return None if dim == -1 and self._kind == "weight_norm" else int(dim)


def _at_least_matrix(W: Tensor) -> Tensor:
    return W.unsqueeze(-1) if W.ndim == 1 else W
