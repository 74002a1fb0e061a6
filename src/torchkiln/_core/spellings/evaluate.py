"""Computing recognised tensors: which dim, in which precision, and what is wrong with the values."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.finite import is_finite
from torchkiln._core.spellings import fold
from torchkiln._core.spellings.entries import Group
from torchkiln._core.spellings.options import Options
from torchkiln._core.spellings.recognise import Recognised
from torchkiln._core.spellings.spelled import Spelled, Step
from torchkiln._core.spellings.torch_style import no_state

__all__ = ["Evaluation", "Evaluator", "Source"]

# How far from 1 rounding leaves the length of u and v, as stored in full precision and in less.
_UNIT_TOLERANCE = 1e-4
_UNIT_TOLERANCE_LOW = 1e-2
# u and v decide between dims only where they align with the matrix of one, and clearly worse with the next.
_CLEAR = 0.9
# How well u and v must align with the original for it to be what the spectral norm was computed from.
_ALIGNED = 1 - 1e-3


class Source(Protocol):
    """Where the values are: an open checkpoint, or a state dict in memory."""

    def read(self, group: Group, key: str) -> Tensor:
        """Return one tensor, which is not written to."""

    def identity(self, group: Group, key: str) -> Hashable:
        """Return a value that is equal for two keys exactly when they hold the same memory."""


@dataclass
class Evaluation:
    """A computed tensor, and what there is to say about it.

    Attributes:
        tensor: In the dtype it was computed in; cast it once.
        dim: The normalized dim of the norm, None for all at once or where the steps have none.
        assumptions: What the file does not prove.
        warnings: What is wrong with the values, each naming a key.
        guessed: Whether neither shapes nor values tell the normalized dim of a spectral norm.
    """

    tensor: Tensor = field(default_factory=lambda: torch.empty(0))
    dim: int | None = None
    assumptions: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    guessed: bool = False


class Evaluator:
    """Computes the tensors of one group.

    Args:
        source: Has the values.
        group: Where the tensors are.
        found: What was recognised in the group.
        options: What the caller knows.
        exact: Compute in float64 by the definitions instead of as torch's modules do.
        fresh: What the source returns is new memory each time, so that none of it needs to be copied.
    """

    def __init__(
        self,
        source: Source,
        group: Group,
        *,
        found: Recognised,
        options: Options,
        exact: bool = False,
        fresh: bool = False,
    ) -> None:
        self._source, self._group, self._found, self._options = source, group, found, options
        self._exact, self._fresh = exact, fresh

    @torch.no_grad()
    def __call__(self, item: Spelled) -> Evaluation:
        """Compute one tensor.

        Raises:
            CheckpointError: The rule is not known, or `dims` names a dim that does not fit.
        """
        if item.blocked:
            raise CheckpointError(self._group.full_name(item.blocked))
        result = Evaluation(assumptions=list(item.assumptions))
        described = next((step for step in item.steps if step.described is not None), None)
        if described is not None:
            return self._take(described, item, result)
        result.tensor = self._read(item.originals[-1], result)
        try:
            for step in item.steps:
                self._apply(step, item, result)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, and not in its __all__
            name = self._group.full_name(item.name)
            raise CheckpointError(f"{name}: {item.spelling} cannot be computed: {error}.") from error
        return self._finished(item, result)

    def _take(self, step: Step, item: Spelled, result: Evaluation) -> Evaluation:
        """Take the steps that the file describes, in the dtypes that it holds: each step decides what it widens."""
        assert step.described is not None
        start = item.originals[0].rpartition(".")[0] + "."
        originals = [self._stored(key, result) for key in item.originals]
        state = {key.removeprefix(start): self._stored(key, result) for key in step.state}
        result.tensor = step.described.compute(originals, state)
        return self._finished(item, result)

    def _stored(self, key: str, result: Evaluation) -> Tensor:
        if key in self._found.spelled:
            return self._read(key, result)
        tensor = self._source.read(self._group, key).detach()
        return tensor if self._fresh else tensor.clone()

    def _finished(self, item: Spelled, result: Evaluation) -> Evaluation:
        if not result.warnings and not is_finite(result.tensor):
            result.warnings.append(f"{self._group.full_name(item.name)}: has values that are not finite")
        return result

    def identity(self, item: Spelled) -> Hashable:
        """Return a value that is equal for two tensors computed alike from the same memory."""
        spelled = self._found.spelled
        inputs = tuple(
            self.identity(spelled[key]) if key in spelled else self._source.identity(self._group, key)
            for key in item.inputs
        )
        steps = (
            (step.kind, step.map, step.described and step.described.text, self.choice(step, item))
            for step in item.steps
        )
        return tuple(steps), inputs

    def choice(self, step: Step, item: Spelled) -> tuple[bool, int | None]:
        """Return whether the caller chose the dim of a step, and which one.

        Raises:
            CheckpointError: `dims` names a dim that does not fit.
        """
        if not step.dims:
            return False, None
        return self._options.dim_of(item.name, fitting=step.dims, ndim=len(item.entry.shape))

    def _read(self, key: str, result: Evaluation) -> Tensor:
        inner = self._found.spelled.get(key)
        if inner is not None:
            evaluation = self(inner)
            result.assumptions += evaluation.assumptions
            result.warnings += evaluation.warnings
            return evaluation.tensor
        tensor = self._source.read(self._group, key).detach()
        wide = fold.compute_dtype(tensor.dtype)
        if self._exact:
            wide = torch.promote_types(wide, torch.float64)
        # A copy even where nothing is cast: memory mapped from a file is aligned otherwise than a model's, and
        # matrix products may round by alignment.
        return tensor.to(wide, copy=not self._fresh)

    def _apply(self, step: Step, item: Spelled, result: Evaluation) -> None:
        if step.kind == "weight_norm":
            self._weight_norm(step, item, result)
        elif step.kind == "spectral_norm":
            self._spectral_norm(step, item, result)
        elif step.kind == "orthogonal":
            base = self._read(step.state[0], result) if step.state else None
            assert step.map is not None
            if step.map == "householder":
                self._look_at_signs(item.originals[-1], result)
            result.tensor = fold.orthogonal(result.tensor, base, step.map)
        elif step.kind == "pruning":
            result.tensor = fold.apply_mask(result.tensor, self._read(step.state[0], result))

    def _look_at_signs(self, key: str, result: Evaluation) -> None:
        """Warn where torch's map multiplies columns by 0: it cuts off what is behind the point of the diagonal."""
        signs = result.tensor.diagonal(dim1=-2, dim2=-1)
        lost = int((signs.trunc() == 0).sum())
        if lost:
            result.warnings.append(
                f"{self._group.full_name(key)}: {lost} of {signs.numel()} on the diagonal are between -1 and 1 (weight "
                "decay?): torch's map makes columns of zeros there, torchkiln's goes by their signs. If it was trained "
                "with torchkiln, bake the model"
            )

    def _weight_norm(self, step: Step, item: Spelled, result: Evaluation) -> None:
        g, v = self._read(item.originals[0], result), result.tensor
        result.dim = self._dim(step, item, result)
        dtype = torch.promote_types(g.dtype, v.dtype)
        rule = fold.exact_weight_norm if self._exact else fold.weight_norm
        # Before there is the result: of large tensors each copy counts.
        none = self._directionless(item.originals, v, result.dim) if self._exact else None
        result.tensor = rule(g.to(dtype), v.to(dtype), result.dim)
        if none is None and not is_finite(result.tensor):  # as after a division by the norm of such a slice
            none = self._directionless(item.originals, v, result.dim)
        if none is not None:
            self._fill(item.originals[1], none, result)

    def _directionless(self, originals: Sequence[str], v: Tensor, dim: int | None) -> Tensor:
        stored = [self._group.entries.get(key) for key in originals]
        dtypes = [fold.compute_dtype(entry.dtype) if entry else v.dtype for entry in stored]
        # Squares can vanish in the dtype that the norm is computed in, and not in that of the exact one.
        return fold.directionless(v.to(torch.promote_types(*dtypes)), dim)

    def _fill(self, key: str, none: Tensor, result: Evaluation) -> None:
        """Put zeros, as the weight norm of torchkiln does, where that of torch divides by zero."""
        slices = none.flatten().nonzero().flatten().tolist()
        if slices:
            result.tensor = result.tensor.masked_fill(none, 0)
            which = "is all zero" if result.dim is None else f"is zero at {_some(slices)} of dim {result.dim}"
            name = self._group.full_name(key)
            result.warnings.append(f"{name}: {which}, and so is the weight; torch computes NaN there")

    def _spectral_norm(self, step: Step, item: Spelled, result: Evaluation) -> None:
        if not step.state:
            result.tensor = torch.nn.functional.normalize(result.tensor, dim=0, eps=1e-12)
            return
        u, v = (self._unit(key, result) for key in step.state)
        result.dim = self._spectral_dim(step, item, u=u, v=v, result=result)
        assert result.dim is not None
        self._check_skipped(item, u=u, v=v, result=result)
        rule = fold.exact_spectral_norm if self._exact else fold.spectral_norm
        W = result.tensor
        result.tensor = rule(W, u.to(W.dtype), v.to(W.dtype), result.dim)
        if not is_finite(result.tensor) and not W.any():
            result.tensor = W
            name = self._group.full_name(item.originals[0])
            result.warnings.append(f"{name}: is all zero, and so is the weight; torch computes NaN there")

    def _unit(self, key: str, result: Evaluation) -> Tensor:
        vector = self._read(key, result)
        length = float(torch.linalg.vector_norm(vector.to(torch.promote_types(vector.dtype, torch.float64))))
        stored = (
            self._found.spelled[key].entry if key in self._found.spelled else self._group.entries[key]
        ).dtype
        if abs(length - 1) <= (
            _UNIT_TOLERANCE if fold.compute_dtype(stored) == stored else _UNIT_TOLERANCE_LOW
        ):
            return vector
        result.warnings.append(
            f"{self._group.full_name(key)}: length {length:.6g} instead of 1 (averaged weights?); used as if it were 1"
        )
        return vector / length

    def _dim(self, step: Step, item: Spelled, result: Evaluation) -> int | None:
        chosen, dim = self.choice(step, item)
        if chosen:
            return dim
        if len(step.dims) > 1:
            result.assumptions.append("the gain is one number: one norm over the whole tensor")
        return step.dims[0]

    def _spectral_dim(
        self, step: Step, item: Spelled, *, u: Tensor, v: Tensor, result: Evaluation
    ) -> int | None:
        chosen, dim = self.choice(step, item)
        if chosen:
            return dim
        if len(step.dims) == 1:
            return step.dims[0]
        fit = {d: _alignment(fold.matrix(result.tensor, d), u, v) for d in step.dims if d is not None}
        best, second = sorted(fit, key=lambda d: -fit[d])[:2]
        fitting = " and ".join(map(str, step.dims))
        if fit[best] >= _CLEAR and fit[second] <= _CLEAR * fit[best]:
            result.assumptions.append(f"dims {fitting} fit the shapes; u and v fit dim {best}")
            return best
        likely = self._options.likely_dim(item.name)
        if likely in step.dims:
            return likely
        result.guessed = True
        result.assumptions.append(
            f"dims {fitting} fit the shapes, and u and v do not tell: took {step.dims[0]}"
        )
        return step.dims[0]

    def _check_skipped(self, item: Spelled, *, u: Tensor, v: Tensor, result: Evaluation) -> None:
        """Require evidence that steps which keep nothing in the file compute nothing.

        Power iteration leaves u or v as the image of the other under the W it saw. If the original is that W,
        nothing came before.
        """
        if not item.skipped or self._options.says(item.name, "identity"):
            return
        assert result.dim is not None
        if not _alignment(fold.matrix(result.tensor, result.dim), u, v) >= _ALIGNED:
            raise CheckpointError(self._group.full_name(no_state(item.name, item.skipped)))
        result.assumptions.append(
            f"step {_some(item.skipped)} keeps nothing in the file; u and v fit without it"
        )


def _alignment(M: Tensor, u: Tensor, v: Tensor) -> float:
    """How well u and v look like what a power iteration on `M` left: 1 if one of them is the image of the other."""
    u, v = u.to(M.dtype), v.to(M.dtype)
    Mv, Mu = torch.mv(M, v), torch.mv(M.mH, u)
    smaller = min(float(torch.linalg.vector_norm(Mv)), float(torch.linalg.vector_norm(Mu)))
    return float(torch.vdot(u, Mv).abs()) / smaller if smaller else 0.0


def _some(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:3]))
    return shown if len(numbers) <= 3 else f"{shown} and {len(numbers) - 3} more"
