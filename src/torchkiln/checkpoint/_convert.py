"""Converting a file between spellings: renaming keys where the numbers stay, splitting plain tensors where asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from torchkiln._core.errors import CheckpointError, NothingToFoldError
from torchkiln._core.spellings.options import Options, Patterns
from torchkiln._core.spellings.spelled import Norm, Style, norm_keys
from torchkiln.checkpoint._atomic import check_target
from torchkiln.checkpoint._bake import Progress, bake, container_notes
from torchkiln.checkpoint._io import Change, CheckpointFile, Entry, Group, Label, open_checkpoint, write_copy
from torchkiln.checkpoint._report import FileReport, Folded, Note
from torchkiln.checkpoint._scan import Found, Scan, scan
from torchkiln.checkpoint._split import split

__all__ = ["convert"]

# The tensors to write for one tensor, and notes on them.
Made = tuple[tuple[Tensor, ...], tuple[str, ...]]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    to: Literal["legacy", "plain", "torch"],
    force: bool = False,
    weight_norm: Sequence[str] = (),
    spectral_norm: Sequence[str] = (),
    assume: Mapping[str, str] | None = None,
    dims: Mapping[str, int | None] | None = None,
    progress: Progress | None = None,
) -> FileReport:
    """Write a copy of a checkpoint in another spelling.

    Between the torch and the legacy spelling keys are renamed and every number stays. A plain tensor goes under a
    norm where a pattern names it: under weight norm its value is kept, under spectral norm it is divided by its
    largest singular value from then on, as when a module is put under spectral norm.

    Args:
        source: A safetensors file or a file written by ``torch.save``; it is never modified.
        target: The new file. The suffix ``.safetensors`` asks for that container.
        to: ``"torch"`` (``parametrizations.t.original``), ``"legacy"`` (``t_g``, ``t_orig``), or ``"plain"``, which
            is :func:`bake`.
        force: Replace an existing target.
        weight_norm: Name patterns of plain tensors, of two or more dimensions, to put under weight norm.
        spectral_norm: The same for spectral norm.
        assume: As for :func:`bake`.
        dims: Name pattern to normalized dim, of plain tensors too; 0 where none is given.
        progress: Called with the number of tensors done, their total, and the name of the last one.

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
    if to == "plain":
        if weight_norm or spectral_norm:
            raise CheckpointError(
                'to="plain" removes norms; weight_norm and spectral_norm put them in. Pass one.'
            )
        return bake(source, target, force=force, assume=assume, dims=dims, progress=progress)
    if to not in ("legacy", "torch"):
        raise CheckpointError(f'to: expected "torch", "legacy" or "plain", got {to!r}.')
    target = Path(target)
    with open_checkpoint(source) as file:
        check_target(target, source=file.path, force=force)
        options = Options(assume, dims)
        scanned = scan(file, options)
        jobs = [*_renamings(scanned, to), *_splittings(file, scanned, to, norms, options)]
        _check(jobs, source=str(source), to=to, norms=norms, options=options)
        rows = _Rows(len(jobs), progress)
        changes = [rows.change(job) for job in jobs]
        notes = (*scanned.notes, *_kept(scanned, to), *container_notes(file, target))
        size = write_copy(file, changes, target, force=force)
    kept = len(file.entries) - sum(len(job.keys) for job in jobs)
    return FileReport(str(source), str(target), tuple(rows.rows), kept, notes, size)


@dataclass(frozen=True)
class _Job:
    """One tensor to rewrite: the keys it has, those it gets, how their values are made, and from which memory."""

    group: Group
    name: str
    spelling: str
    entry: Entry
    keys: tuple[str, ...]
    written: tuple[str, ...]
    make: Callable[[], Made]
    memory: Hashable
    before: tuple[Label, ...]
    after: tuple[Label, ...]
    dim: int | None = None
    assumptions: tuple[str, ...] = ()


class _Rows:
    """Collects report rows as the writer asks for tensors."""

    def __init__(self, total: int, progress: Progress | None) -> None:
        self._total, self._progress = total, progress
        self.rows: list[Folded] = []
        self._shared: dict[Hashable, Made] = {}

    def change(self, job: _Job) -> Change:
        return Change(job.group, job.keys, lambda: self._make(job), before=job.before, after=job.after)

    def _make(self, job: _Job) -> dict[str, Tensor]:
        # Tensors tied before are tied after: the same memory in, the same memory out.
        if job.memory not in self._shared:
            self._shared[job.memory] = job.make()
        tensors, notes = self._shared[job.memory]
        name = job.group.full_name(job.name)
        dtype = str(job.entry.dtype).removeprefix("torch.")
        self.rows.append(
            Folded(
                name,
                job.spelling,
                job.entry.shape,
                dtype,
                job.keys,
                job.written,
                job.dim,
                job.assumptions,
                notes,
            )
        )
        if self._progress is not None:
            self._progress(len(self.rows), self._total, name)
        return dict(zip(job.written, tensors, strict=True))


# Renaming -------------------------------------------------------------------------------------------------------------


def _norm_of(found: Found) -> Norm | None:
    """The norm of a tensor that both styles can spell: one step, on originals that are in the file themselves."""
    item = found.item
    kind = item.steps[0].kind if len(item.steps) == 1 and len(found.parts) == 1 and not item.skipped else None
    return kind if kind in ("spectral_norm", "weight_norm") and not found.blocked else None


def _renamings(scanned: Scan, to: Style) -> Iterator[_Job]:
    for found in scanned.found:
        norm = _norm_of(found)
        if (
            norm is None
            or found.item.style == to
            or len(found.item.inputs) != len(norm_keys(found.item.name, to, norm))
        ):
            continue
        (label,) = found.labels
        yield _Job(
            group=found.group,
            name=found.item.name,
            spelling=found.item.spelling,
            entry=found.item.entry,
            keys=found.keys,
            written=norm_keys(found.item.name, to, norm),
            make=_reading(found),
            memory=found.evaluate.identity(found.item),
            before=found.labels,
            after=(Label(label.prefix, label.tensor, to, norm),),
            assumptions=found.item.assumptions,
        )


def _reading(found: Found) -> Callable[[], Made]:
    return lambda: (tuple(found.read(key) for key in found.item.inputs), ())


def _kept(scanned: Scan, to: Style) -> Iterator[Note]:
    for found in scanned.found:
        if found.item.style != to and _norm_of(found) is None:
            text = f"{found.name}: {found.item.spelling} has no {to} spelling; its keys are kept"
            yield Note("info", found.name, text)


# Splitting plain tensors ----------------------------------------------------------------------------------------------


def _splittings(
    file: CheckpointFile, scanned: Scan, to: Style, norms: Mapping[Norm, Patterns], options: Options
) -> Iterator[_Job]:
    for group, keys in scanned.plain.items():
        local = options.within(group.path)
        for key in keys:
            norm = _asked(group, key, norms)
            if norm is not None:
                yield _splitting(file, group, key, norm=norm, to=to, options=local)


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


def _splitting(
    file: CheckpointFile, group: Group, key: str, *, norm: Norm, to: Style, options: Options
) -> _Job:
    entry = group.entries[key]
    dim, assumptions = _chosen_dim(key, entry, norm, options)
    prefix, dot, tensor = key.rpartition(".")
    return _Job(
        group=group,
        name=key,
        spelling="plain",
        entry=entry,
        keys=(key,),
        written=norm_keys(key, to, norm),
        memory=(file.identity(group, key), norm, dim),
        make=lambda: split(file.read(group, key), dim, norm=norm, name=group.full_name(key)),
        before=(),
        after=(Label(prefix + dot, tensor, to, norm),),
        dim=dim,
        assumptions=assumptions,
    )


def _chosen_dim(key: str, entry: Entry, norm: Norm, options: Options) -> tuple[int | None, tuple[str, ...]]:
    fitting: tuple[int | None, ...] = tuple(range(len(entry.shape)))
    fitting += (None,) if norm == "weight_norm" else ()
    chosen, dim = options.dim_of(key, fitting=fitting, ndim=len(entry.shape))
    if chosen:
        return dim, ()
    # A convolution's kernel does not show whether it is transposed, which matters to torch's default.
    hint = "; torch uses 1 if this is a transposed convolution" * (
        norm == "spectral_norm" and len(entry.shape) > 2
    )
    return 0, (f"dim 0{hint}",)


def _check(
    jobs: Sequence[_Job], *, source: str, to: str, norms: Mapping[Norm, Patterns], options: Options
) -> None:
    for argument, patterns in norms.items():
        if patterns.unused:
            raise CheckpointError(
                f'{argument}: "{patterns.unused[0]}" matches no plain tensor of {source} with two or more dimensions.'
            )
    options.check_used(source)
    if not jobs:
        raise NothingToFoldError(
            f"{source}: nothing to convert to the {to} spelling; nothing was written.\n"
            "Plain tensors need weight_norm or spectral_norm patterns."
        )
    for job in jobs:
        taken = set(job.group.entries).difference(job.keys).intersection(job.written)
        if taken:
            raise CheckpointError(
                f"{source}: {job.name} would be written to {min(taken)}, which is there already."
            )
