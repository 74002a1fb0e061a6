"""Folded tensors, computed when the writer asks for them, with what there is to say of each."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from torchkiln._core.spellings.evaluate import Evaluation
from torchkiln.checkpoint._adapters.merging import Merging, Step
from torchkiln.checkpoint._check import check, check_block, magnitude, overflows
from torchkiln.checkpoint._io import Change, Entry, Made
from torchkiln.checkpoint._report import Folded, Note
from torchkiln.checkpoint._rows import Rowwise, folding
from torchkiln.checkpoint._scan import Found, known_dim
from torchkiln.checkpoint._select import Renaming
from torchkiln.checkpoint._team import Team

__all__ = ["Folding", "dtype_name"]


# A file does not say whose module it was trained in.
_ORTHOGONAL = "computed by torch's map, to the bit; a model under torchkiln's has it to rounding"


def dtype_name(dtype: torch.dtype) -> str:
    """Return what to call a dtype.

    Example:
        >>> dtype_name(torch.float32)
        'float32'
    """
    return str(dtype).removeprefix("torch.")


def _too_large(found: Found, dtype: torch.dtype) -> str:
    return f"{found.name}: has values beyond the range of {dtype_name(dtype)}, which become infinite"


@dataclass
class Folding:
    """Computes tensors when the writer asks for them, and remembers what there is to say of each.

    Attributes:
        rename: The new names.
        dtype: What every float becomes; None leaves each its own.
        merging: What adapters change in the tensors once they are folded.
        verify: Whether to compute each in another way too, and compare.
    """

    rename: Renaming
    dtype: torch.dtype | None
    merging: Merging
    verify: bool
    _said: dict[Hashable, Evaluation] = field(default_factory=dict)

    def change(self, found: Found) -> Change:
        """Return what is to take the place of a parametrized tensor's keys."""
        item, steps = found.item, self._steps(found)
        by_rows = None if steps else folding(found)
        # Tensors tied before are tied after: the same memory in, the same memory out.
        made = Made(
            Entry(item.entry.shape, self._dtype(found)),
            lambda: self._whole(found),
            like=found.keys,
            memory=(found.evaluate.identity(item), tuple(steps)),
            name=found.name,
            blocks=None if by_rows is None else lambda: self._by_rows(found, by_rows),
        )
        return Change(found.group, found.keys, {self.rename(item.name): made}, before=found.labels)

    def _steps(self, found: Found) -> list[Step]:
        return self.merging.of(found.group, found.item.name)

    def _dtype(self, found: Found) -> torch.dtype:
        own = found.item.entry.dtype
        return self.dtype if self.dtype is not None and own.is_floating_point else own

    def _whole(self, found: Found) -> Tensor:
        result = found.evaluate(found.item)
        value = result.tensor.to(self._dtype(found)).contiguous()
        if self.verify:
            check(found, value, result)
        found.forget()
        if steps := self._steps(found):
            value = self.merging.merged(
                found.name, result.tensor, steps, dtype=value.dtype, verify=self.verify
            )
        if overflows(value, result.tensor):
            result.warnings.append(_too_large(found, value.dtype))
        self._remember(found, result)
        return value

    def _by_rows(self, found: Found, by_rows: Rowwise) -> Iterator[Tensor]:
        dtype, finite, fits = self._dtype(found), True, True
        result = Evaluation(dim=by_rows.dim, assumptions=list(found.item.assumptions))
        for computed, inputs in by_rows.blocks():
            scale = magnitude(computed)
            if not math.isfinite(scale):
                finite = False
                computed = computed if by_rows.fill is None else by_rows.fill(computed, *inputs)
            value = computed.to(dtype)
            if value is not computed or not finite:
                scale = magnitude(value)
                fits = fits and not overflows(value, computed)
            if self.verify:
                check_block(found, value, by_rows.difference(value, *inputs), scale=scale)
            result.tensor = computed
            yield value
        if not finite:  # rare, and what is wrong shows in the whole
            result = found.evaluate(found.item)
            found.forget()
        if not fits:
            result.warnings.append(_too_large(found, dtype))
        self._remember(found, result)

    def _remember(self, found: Found, result: Evaluation) -> None:
        # What is said of a tensor is kept, its values are not.
        result.tensor = torch.empty(0, dtype=result.tensor.dtype)
        self._said[found.evaluate.identity(found.item)] = result

    def learn(self, team: Team) -> None:
        """Take over what the other processes of a team have to say of the tensors that they computed."""
        for said in team.exchange(self._said):
            self._said |= said

    def row(self, found: Found) -> Folded:
        """Return the report's row of a tensor, from names and shapes alone where it was not computed."""
        item, dtype = found.item, self._dtype(found)
        said = self._said.get(found.evaluate.identity(item))
        computed = said.tensor.dtype if said else dtype
        steps = self._steps(found)
        return Folded(
            name=found.name,
            spelling=" + ".join([item.spelling, *(step.kind for step in steps)]),
            shape=item.entry.shape,
            dtype=dtype_name(dtype),
            keys=(*found.keys, *self.merging.keys(found.group, item.name)),
            written=(self.rename(item.name),),
            dim=said.dim if said else known_dim(found),
            assumptions=tuple(said.assumptions) if said else item.assumptions,
            notes=(
                *(() if computed == dtype else (f"computed in {dtype_name(computed)}, rounded once",)),
                *((_ORTHOGONAL,) if any(step.kind == "orthogonal" for step in item.steps) else ()),
            ),
        )

    def warnings(self, found: Sequence[Found]) -> list[Note]:
        """Return what is wrong with the values that were computed."""
        said = [(one, self._said.get(one.evaluate.identity(one.item))) for one in found]
        return [Note("warning", one.name, text) for one, result in said if result for text in result.warnings]
