"""Converting a file between spellings: renaming keys where the numbers stay, splitting plain tensors where asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError, NothingToFoldError
from torchkiln._core.spellings.options import Options, Patterns
from torchkiln._core.spellings.spelled import Norm, Style, norm_keys
from torchkiln.checkpoint._bake import bake
from torchkiln.checkpoint._cast import Casting
from torchkiln.checkpoint._copy import Layout, copied
from torchkiln.checkpoint._io import Change, CheckpointFile, Entry, Group, Kept, Label, Made
from torchkiln.checkpoint._open import open_checkpoint
from torchkiln.checkpoint._report import FileReport, Folded, Note
from torchkiln.checkpoint._scan import Found, Scan, scan
from torchkiln.checkpoint._select import Renaming
from torchkiln.checkpoint._specs import Also
from torchkiln.checkpoint._split import split
from torchkiln.checkpoint._write import Container, Progress, plan_notes

__all__ = ["convert"]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Literal["legacy", "plain", "torch"] | None = None,
    force: bool = False,
    weight_norm: Sequence[str] = (),
    spectral_norm: Sequence[str] = (),
    assume: Mapping[str, str] | None = None,
    dims: Mapping[str, int | None] | None = None,
    also: Also | None = None,
    rename: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    container: Container | None = None,
    max_shard_size: int | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> FileReport:
    """Write a copy of a checkpoint in another spelling, another container, or both.

    Between the torch and the legacy spelling keys are renamed and every number stays. A plain tensor goes under a
    norm where a pattern names it: under weight norm its value is kept, under spectral norm it is divided by its
    largest singular value from then on, as when a module is put under spectral norm.

    Args:
        source: As for :func:`bake`; it is never modified.
        target: The new file or directory. The suffix ``.safetensors`` asks for that container.
        to: ``"torch"`` (``parametrizations.t.original``), ``"legacy"`` (``t_g``, ``t_orig``), or ``"plain"``, which
            is :func:`bake`; None to keep every spelling.
        force: Replace an existing target.
        weight_norm: Name patterns of plain tensors, of two or more dimensions, to put under weight norm.
        spectral_norm: The same for spectral norm.
        assume: As for :func:`bake`.
        dims: Name pattern to normalized dim, of plain tensors too; 0 where none is given.
        also: As for :func:`bake`.
        rename: As for :func:`bake`; patterns are for the names before.
        dtype: As for :func:`bake`.
        container: As for :func:`bake`.
        max_shard_size: As for :func:`bake`.
        dry_run: As for :func:`bake`.
        progress: As for :func:`bake`.

    Returns:
        A row for each tensor rewritten.

    Raises:
        CheckpointError: The file cannot be read or written, or a pattern fits no tensor.
        NothingToFoldError: No tensor would change its spelling; nothing is written.
        OutputExistsError: The target exists and `force` is false.

    Example:
        >>> import tempfile, torch
        >>> from torchkiln import checkpoint
        >>> folder = tempfile.mkdtemp()
        >>> torch.save(torch.nn.Linear(2, 3).state_dict(), folder + "/plain.pt")
        >>> report = checkpoint.convert(folder + "/plain.pt", folder + "/norm.pt", to="torch", weight_norm=["weight"])
        >>> list(torch.load(folder + "/norm.pt"))
        ['parametrizations.weight.original0', 'parametrizations.weight.original1', 'bias']
    """
    norms: dict[Norm, Patterns] = {
        "weight_norm": Patterns(weight_norm),
        "spectral_norm": Patterns(spectral_norm),
    }
    layout = Layout(container, max_shard_size, force=force, dry_run=dry_run, progress=progress)
    if to in (None, "plain"):
        _refuse_norms(to, norms)
    if to is None:
        Options(assume, dims).check_used(str(source))
        return copied(source, Path(target), layout, rename=rename, dtype=dtype)
    if to == "plain":
        return bake(
            source,
            target,
            force=force,
            assume=assume,
            dims=dims,
            also=also,
            rename=rename,
            dtype=dtype,
            container=container,
            max_shard_size=max_shard_size,
            dry_run=dry_run,
            progress=progress,
        )
    if to not in ("legacy", "torch"):
        raise CheckpointError(f'to: expected "torch", "legacy" or "plain", got {to!r}.')
    options = Options(assume, dims)
    with open_checkpoint(source) as file:
        scanned, casting = scan(file, options, also=also), Casting(file, Renaming(rename), dtype)
        jobs = [
            *_renamings(scanned, to, casting),
            *_splittings(scanned, to, casting, norms=norms, options=options),
        ]
        _check(scanned, jobs, source=str(source), to=to, norms=norms)
        options.check_used(str(source))
        changes = [job.change() for job in jobs] + list(casting.changes(_others(file, jobs)))
        if rename:
            casting.rename.check_all(file.groups, changes, str(source))
        else:
            _check_free(jobs, str(source))
        plan = layout.plan(file, changes, Path(target))
        size = layout.write(plan)
        notes = (*scanned.notes, *_kept(scanned, to), *casting.notes(changes))
        notes += tuple(plan_notes(file, plan, dry_run=dry_run))
        kept = len(file.entries) - sum(len(job.keys) for job in jobs)
    return FileReport(str(source), str(target), tuple(job.row() for job in jobs), kept, notes, size, dry_run)


def _others(file: CheckpointFile, jobs: Sequence[_Job]) -> dict[Group, list[str]]:
    """Return the keys that are not rewritten, by group."""
    taken = {(job.group, key) for job in jobs for key in job.keys}
    return {group: [key for key in group.entries if (group, key) not in taken] for group in file.groups}


def _refuse_norms(to: str | None, norms: Mapping[Norm, Patterns]) -> None:
    for norm, patterns in norms.items():
        if patterns.unused and to is None:
            raise CheckpointError(f'{norm}: needs to="torch" or to="legacy", the spelling to put it in.')
        if patterns.unused:
            raise CheckpointError(f'to="plain" removes norms; {norm} puts them in. Pass one.')


# What is rewritten ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One tensor to rewrite: the keys it has, what takes their place, and what there is to say of it."""

    group: Group
    name: str
    spelling: str
    entry: Entry
    keys: tuple[str, ...]
    outputs: Mapping[str, Kept | Made]
    dtype: torch.dtype
    before: tuple[Label, ...]
    after: tuple[Label, ...]
    dim: int | None = None
    assumptions: tuple[str, ...] = ()
    notes: Callable[[], tuple[str, ...]] = tuple

    def change(self) -> Change:
        return Change(self.group, self.keys, self.outputs, before=self.before, after=self.after)

    def row(self) -> Folded:
        return Folded(
            self.group.full_name(self.name),
            self.spelling,
            self.entry.shape,
            str(self.dtype).removeprefix("torch."),
            self.keys,
            tuple(self.outputs),
            self.dim,
            self.assumptions,
            self.notes(),
        )


# Renaming -------------------------------------------------------------------------------------------------------------


def _norm_of(found: Found) -> Norm | None:
    """The norm of a tensor that both styles can spell: one step, on originals that are in the file themselves."""
    item = found.item
    kind = item.steps[0].kind if len(item.steps) == 1 and len(found.parts) == 1 and not item.skipped else None
    return kind if kind in ("spectral_norm", "weight_norm") and not found.blocked else None


def _renamings(scanned: Scan, to: Style, casting: Casting) -> Iterator[_Job]:
    for found in scanned.found:
        norm, item = _norm_of(found), found.item
        if norm is None or item.style == to:
            continue
        keys = norm_keys(casting.rename(item.name), to, norm)
        if len(item.inputs) != len(keys):
            continue
        yield _Job(
            group=found.group,
            name=item.name,
            spelling=item.spelling,
            entry=item.entry,
            keys=found.keys,
            outputs={
                key: casting.of(found.group, source) for key, source in zip(keys, item.inputs, strict=True)
            },
            dtype=casting.dtype_of(item.entry),
            before=found.labels,
            after=(_label(casting.rename(item.name), to, norm),),
            assumptions=item.assumptions,
        )


def _label(name: str, to: Style, norm: Norm) -> Label:
    prefix, dot, tensor = name.rpartition(".")
    return Label(prefix + dot, tensor, to, norm)


def _kept(scanned: Scan, to: Style) -> Iterator[Note]:
    for found in scanned.found:
        if found.item.style != to and _norm_of(found) is None:
            text = f"{found.name}: {found.item.spelling} has no {to} spelling; its keys are kept"
            yield Note("info", found.name, text)


# Splitting plain tensors ----------------------------------------------------------------------------------------------


def _splittings(
    scanned: Scan, to: Style, casting: Casting, *, norms: Mapping[Norm, Patterns], options: Options
) -> Iterator[_Job]:
    for group, keys in scanned.plain.items():
        local = options.within(group.path)
        for key in keys:
            norm = None if casting.file.unusual(group, key) else _asked(group, key, norms)
            if norm is not None:
                yield _splitting(casting, group, key, norm=norm, to=to, options=local)


def _asked(group: Group, key: str, norms: Mapping[Norm, Patterns]) -> Norm | None:
    entry = group.entries[key]
    if len(entry.shape) < 2 or not entry.dtype.is_floating_point or 0 in entry.shape:
        return None
    matched = {
        norm: pattern for norm, one in norms.items() if (pattern := one.match(key, group.full_name(key)))
    }
    if len(matched) == 2:
        raise CheckpointError(
            f"{group.full_name(key)}: matched for weight_norm and for spectral_norm. Narrow one of the patterns."
        )
    for norm, pattern in matched.items():
        norms[norm].use(pattern)
        return norm
    return None


def _splitting(casting: Casting, group: Group, key: str, *, norm: Norm, to: Style, options: Options) -> _Job:
    entry, name = group.entries[key], casting.rename(key)
    dim, assumptions = _chosen_dim(key, entry, norm, options)
    halves = _Halves(casting, group, key, norm=norm, dim=dim)
    return _Job(
        group=group,
        name=key,
        spelling="plain",
        entry=entry,
        keys=(key,),
        outputs=halves.outputs(norm_keys(name, to, norm)),
        dtype=casting.dtype_of(entry),
        before=(),
        after=(_label(name, to, norm),),
        dim=dim,
        assumptions=assumptions,
        notes=halves.notes,
    )


class _Halves:
    """What one plain tensor is split into: computed once, at the first of the parts, and gone with the last."""

    def __init__(self, casting: Casting, group: Group, key: str, *, norm: Norm, dim: int | None) -> None:
        self._casting, self._group, self._key, self._norm, self._dim = casting, group, key, norm, dim
        self._parts: dict[int, Tensor] = {}
        self._notes: tuple[str, ...] = ()

    def outputs(self, keys: tuple[str, ...]) -> dict[str, Kept | Made]:
        shapes = self._shapes()
        memory = (self._casting.file.identity(self._group, self._key), self._norm, self._dim)
        dtype = self._casting.dtype_of(self._group.entries[self._key])
        like = (self._key,) if self._norm == "weight_norm" else ()
        made = [
            Made(
                Entry(shape, dtype),
                partial(self._part, index),
                like=like,
                memory=(*memory, index),
                name=self._key,
            )
            for index, shape in enumerate(shapes)
        ]
        kept = [self._casting.of(self._group, self._key)] if self._norm == "spectral_norm" else []
        return dict(zip(keys, [*kept, *made], strict=True))

    def notes(self) -> tuple[str, ...]:
        return self._notes

    def _shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        shape = self._group.entries[self._key].shape
        if self._norm == "weight_norm":
            ones = tuple(size if dim == self._dim else 1 for dim, size in enumerate(shape))
            return (() if self._dim is None else ones), shape
        assert self._dim is not None
        return (shape[self._dim],), (prod(shape) // shape[self._dim],)

    def _part(self, index: int) -> Tensor:
        if index not in self._parts:
            name = self._group.full_name(self._key)
            stored = self._casting.file.read(self._group, self._key)
            dtype = self._casting.dtype_of(self._group.entries[self._key])
            parts, self._notes = split(stored, self._dim, norm=self._norm, name=name, dtype=dtype)
            self._parts = dict(enumerate(parts))
        return self._parts.pop(index).detach().contiguous()


def _chosen_dim(key: str, entry: Entry, norm: Norm, options: Options) -> tuple[int | None, tuple[str, ...]]:
    fitting: tuple[int | None, ...] = tuple(range(len(entry.shape)))
    fitting += (None,) if norm == "weight_norm" else ()
    chosen, dim = options.dim_of(key, fitting=fitting, ndim=len(entry.shape))
    if chosen:
        return dim, ()
    # A convolution's kernel does not show whether it is transposed, which matters to torch's default.
    hint = ", but for transposed convolutions (1)" * (norm == "spectral_norm" and len(entry.shape) > 2)
    return 0, (f"along dim 0, torch's default{hint}",)


def _check(
    scanned: Scan, jobs: Sequence[_Job], *, source: str, to: str, norms: Mapping[Norm, Patterns]
) -> None:
    for argument, patterns in norms.items():
        if patterns.unused:
            raise CheckpointError(
                f'{argument}: "{patterns.unused[0]}" matches no plain tensor of {source} with two or more dimensions.'
            )
    if not jobs:
        already = sum(found.item.style == to and _norm_of(found) is not None for found in scanned.found)
        why = (
            f", which {already} {'tensor has' if already == 1 else 'tensors have'} already" if already else ""
        )
        raise NothingToFoldError(
            f"{source}: nothing to convert to the {to} spelling{why}; nothing was written.\n"
            "Plain tensors need weight_norm or spectral_norm patterns."
        )


def _check_free(jobs: Sequence[_Job], source: str) -> None:
    for job in jobs:
        taken = set(job.group.entries).difference(job.keys).intersection(job.outputs)
        if taken:
            raise CheckpointError(
                f"{source}: {job.name} would be written to {min(taken)}, which is there already."
            )
