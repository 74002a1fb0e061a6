"""Baking a file: every parametrized tensor gives way to its plain value, everything else stays as it is."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from torchkiln._core.errors import NothingToFoldError
from torchkiln._core.spellings.options import Options
from torchkiln.checkpoint._adapters.folder import Adapter, open_adapters
from torchkiln.checkpoint._adapters.merging import Base, plan_merging
from torchkiln.checkpoint._adapters.writing import Writing
from torchkiln.checkpoint._cast import Casting
from torchkiln.checkpoint._folding import Folding
from torchkiln.checkpoint._io import Group
from torchkiln.checkpoint._open import open_checkpoint
from torchkiln.checkpoint._report import FileReport, Note
from torchkiln.checkpoint._scan import Found, Scan, refuse_blocked, scan
from torchkiln.checkpoint._select import Renaming, picked
from torchkiln.checkpoint._specs import Also
from torchkiln.checkpoint._team import Team
from torchkiln.checkpoint._write import Container, Progress, plan_copy, plan_notes

__all__ = ["bake"]


def bake(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    adapters: Sequence[Adapter | str | os.PathLike[str]] = (),
    force: bool = False,
    assume: Mapping[str, str] | None = None,
    dims: Mapping[str, int | None] | None = None,
    also: Also | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    rename: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
    container: Container | None = None,
    max_shard_size: int | None = None,
    keep_going: bool = False,
    verify: bool = True,
    dry_run: bool = False,
    progress: Progress | None = None,
    group: dist.ProcessGroup | None = None,
) -> FileReport:
    """Write a copy of a checkpoint in which every parametrized tensor is plain.

    The values are those that the model computes with in eval mode, to the bit for float32 and float64 (orthogonal
    weights have those of torch's maps, which torchkiln's equal to rounding); smaller dtypes are computed in float32 and
    rounded once. The new file appears whole or not at all. It is streamed: in
    memory are the tensor being computed and the one being written, however large the file is.

    The processes of a ``group`` bake one checkpoint together: each computes and writes its part of a directory, a
    single file is the first one's. Where one of them fails or ends, all raise, and nothing is left.

    A step without tensors at the end of a chain (a ReLU after a spectral norm) shows only in files that keep the
    module records of ``state_dict()``, as those of ``torch.save`` do and safetensors do not.

    Adapters of PEFT are merged without the model's code too, of the types that PEFT itself can merge; each is added
    with its weight, in float32 or wider and rounded once. Whether every tensor of theirs fits one of the base is
    checked before anything is written.

    Args:
        source: A safetensors file, the index of its shards, a file written by ``torch.save``, or the directory of a
            ``torch.distributed.checkpoint``; it is never modified.
        target: The new file or directory. The suffix ``.safetensors`` asks for that container.
        adapters: Folders of adapters to merge into the file, with weights where they are an :class:`Adapter`.
        force: Replace an existing file; a directory is never replaced.
        assume: Name pattern to what the file cannot say: ``"matrix_exp"``, ``"cayley"`` or ``"householder"`` for
            torch's orthogonal, ``"identity"`` to take an original as it is, ``"data"`` to keep keys that only look
            like parts of a parametrization, ``"weight_norm"`` for a gain and a direction that are both vectors.
        dims: Name pattern to the normalized dim, where shapes leave a choice.
        also: Your own classes, by the names that a file from :func:`torchkiln.checkpoint.save` has for them.
        include: Name patterns of the parametrized tensors to fold; all of them where none is given.
        exclude: Name patterns of parametrized tensors to leave as they are.
        rename: Beginnings of names to what they become, such as ``{"module.": ""}``, for every tensor.
        dtype: The dtype for every tensor of floats.
        container: ``"safetensors"``, ``"torch"`` or ``"dcp"`` (the directory of a distributed checkpoint), where the
            target's name does not say.
        max_shard_size: Write a directory of safetensors shards with at most so many bytes of tensors each, and
            their index.
        keep_going: Leave tensors whose rule is not known as they are, with a warning each, instead of refusing.
        verify: Recompute every folded tensor in another way before it is written, and compare.
        dry_run: Write nothing; report what would be written, from names and shapes alone.
        progress: Called with the bytes of tensors done, their total, and the name of the last one if it was computed.
        group: The processes that make this call together, on a file system that they share; None is this one alone.

    Returns:
        A row for each tensor: what it was, the keys it was read from, and what was assumed.

    Raises:
        CheckpointError: The file cannot be read or written, or a tensor's rule is not known.
        NothingToFoldError: Every tensor is plain already, and no adapter is given; nothing is written.
        OutputExistsError: The target exists and `force` is false.

    Example:
        >>> import tempfile, torch
        >>> from torchkiln import checkpoint
        >>> folder = tempfile.mkdtemp()
        >>> state = {"weight_g": torch.tensor([[10.0]]), "weight_v": torch.tensor([[3.0, 4.0]])}
        >>> torch.save(state, folder + "/model.pt")
        >>> report = checkpoint.bake(folder + "/model.pt", folder + "/plain.pt")
        >>> torch.load(folder + "/plain.pt")
        {'weight': tensor([[6., 8.]])}
    """
    options, renaming, team = Options(assume, dims), Renaming(rename), Team(group)
    with team.together(), open_checkpoint(source) as file, open_adapters(adapters) as opened:
        scanned = scan(file, options, also=also)
        chosen, left = picked(scanned.found, include, exclude, where=str(source))
        if keep_going:
            left += [found for found in chosen if found.blocked]
            chosen = [found for found in chosen if not found.blocked]
        refuse_blocked(chosen, str(source))
        options.check_used(str(source))
        if not chosen and not opened:
            raise NothingToFoldError(_nothing(source, left))
        merging = plan_merging(opened, file, _base(scanned, chosen))
        folding = Folding(renaming, dtype, merging, verify=verify)
        changes = [folding.change(found) for found in chosen]
        plain = _unfolded(scanned, left)
        writing = Writing(file, renaming, dtype, merging, verify=verify)
        changes += writing.changes(plain)
        casting = Casting(file, renaming, dtype)
        changes += casting.changes(plain)
        renaming.check_all(file.groups, changes, str(source))
        plan = plan_copy(file, changes, Path(target), container=container, max_shard_size=max_shard_size)
        plan.check_target(force=force, also=[one.path for adapter in opened for one in adapter.file.inputs])
        size = plan.size if dry_run else plan.write(force=force, progress=progress, team=team)
        folding.learn(team)
        casting.warnings, writing.warnings = team.joined(casting.warnings), team.joined(writing.warnings)
        rows = (*(folding.row(found) for found in chosen), *writing.rows)
        notes = [*scanned.notes, *merging.notes, *_left(left), *folding.warnings(chosen), *writing.warnings]
        notes += [*casting.notes(changes), *plan_notes(file, plan, dry_run=dry_run)]
        kept = len(file.entries) - sum(len(found.keys) for found in chosen) - len(writing.rows)
    return FileReport(str(source), str(target), rows, kept, tuple(notes), size, dry_run)


def _nothing(source: object, left: Sequence[Found]) -> str:
    if left:
        return f"{source}: none of its {len(left)} parametrized tensors is to be folded; nothing was written."
    return f"{source}: every tensor is plain already; nothing was written."


def _base(scanned: Scan, chosen: Sequence[Found]) -> Base:
    """Return what adapters can change: tensors that are plain, and those that are being folded."""
    base = {group: {key: group.entries[key] for key in keys} for group, keys in scanned.plain.items()}
    for found in chosen:
        base[found.group][found.item.name] = found.item.entry
    return base


def _unfolded(scanned: Scan, left: Sequence[Found]) -> dict[Group, list[str]]:
    """Return the keys that are not folded, by group."""
    keys = {group: list(plain) for group, plain in scanned.plain.items()}
    for found in left:
        keys[found.group] += found.keys
    return keys


def _left(left: Sequence[Found]) -> list[Note]:
    return [
        Note("warning", found.name, f"not folded: {found.blocked}")
        if found.blocked
        else Note("info", found.name, f"{found.name}: {found.item.spelling} is left as it is")
        for found in left
    ]
