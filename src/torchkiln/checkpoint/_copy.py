"""Copying a file into another container, with every tensor as it is but for its name and dtype."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import torch

from torchkiln.checkpoint._cast import Casting
from torchkiln.checkpoint._io import Change, CheckpointFile
from torchkiln.checkpoint._open import open_checkpoint
from torchkiln.checkpoint._report import FileReport, Note
from torchkiln.checkpoint._select import Renaming
from torchkiln.checkpoint._write import Container, Plan, Progress, plan_copy, plan_notes

__all__ = ["Layout", "copied"]


@dataclass(frozen=True)
class Layout:
    """What a new file is to be, and how it is written; see :func:`torchkiln.checkpoint.bake` for each."""

    container: Container | None
    max_shard_size: int | None
    _: KW_ONLY
    force: bool
    dry_run: bool
    progress: Progress | None

    def plan(self, file: CheckpointFile, changes: Sequence[Change], target: Path) -> Plan:
        """Plan a copy of a file with changes."""
        return plan_copy(file, changes, target, container=self.container, max_shard_size=self.max_shard_size)

    def write(self, plan: Plan) -> int:
        """Carry a plan out, if it is to be, and return how many bytes that makes."""
        plan.check_target(force=self.force)
        return plan.size if self.dry_run else plan.write(force=self.force, progress=self.progress)


def copied(
    source: str | os.PathLike[str],
    target: Path,
    layout: Layout,
    *,
    rename: Mapping[str, str] | None,
    dtype: torch.dtype | None,
) -> FileReport:
    """Copy a file.

    Args:
        source: As for :func:`torchkiln.checkpoint.bake`.
        target: The new file or directory.
        layout: What it is to be.
        rename: Beginnings of names to what they become.
        dtype: The dtype for every tensor of floats.

    Raises:
        CheckpointError: As for :func:`torchkiln.checkpoint.bake`.
    """
    renaming = Renaming(rename)
    with open_checkpoint(source) as file:
        casting = Casting(file, renaming, dtype)
        changes = list(casting.changes({group: list(group.entries) for group in file.groups}))
        renaming.check_all(file.groups, changes, str(source))
        plan = layout.plan(file, changes, target)
        size = layout.write(plan)
        remarks = [Note("info", "", remark) for remark in file.remarks]
        notes = (*remarks, *casting.notes(changes), *plan_notes(file, plan, dry_run=layout.dry_run))
        return FileReport(str(source), str(target), (), len(file.entries), notes, size, layout.dry_run)
