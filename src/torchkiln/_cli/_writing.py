"""What the commands that write a checkpoint have in common: their options, and what those are to the functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import wraps
from typing import Any, get_type_hints

from torchkiln._cli._options import (
    Assume,
    Dim,
    DryRun,
    Dtype,
    Force,
    Format,
    Json,
    Rename,
    ShardSize,
    dims_of,
    dtype_of,
    pairs_of,
    size_of,
)

__all__ = ["Writing", "writes"]


@dataclass(frozen=True, kw_only=True)
class Writing:
    """The words given to the options that ``bake`` and ``convert`` share."""

    force: Force = False
    assume: Assume = None
    dim: Dim = None
    rename: Rename = None
    dtype: Dtype = None
    format: Format = None
    max_shard_size: ShardSize = None
    dry_run: DryRun = False
    json: Json = False

    def arguments(self) -> dict[str, Any]:
        """Return what they are to ``checkpoint.bake`` and ``checkpoint.convert``.

        Raises:
            BadParameter: A word is not what its option takes.
        """
        return {
            "force": self.force,
            "assume": pairs_of(self.assume, "--assume", "PATTERN=MAP"),
            "dims": dims_of(self.dim),
            "rename": pairs_of(self.rename, "--rename", "OLD=NEW"),
            "dtype": dtype_of(self.dtype),
            "container": self.format.value if self.format else None,
            "max_shard_size": size_of(self.max_shard_size),
            "dry_run": self.dry_run,
        }


def writes(command: Callable[..., None]) -> Callable[..., None]:
    """Let the command line see the fields of :class:`Writing` where a command has the parameter ``writing``."""
    hints = get_type_hints(Writing, include_extras=True)
    shared = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(Writing)
    ]
    signature = inspect.signature(command, eval_str=True)
    own = [parameter for name, parameter in signature.parameters.items() if name != "writing"]

    @wraps(command)
    def run(**words: Any) -> None:
        writing = Writing(**{parameter.name: words.pop(parameter.name) for parameter in shared})
        command(**words, writing=writing)

    run.__signature__ = signature.replace(parameters=[*own, *shared])  # type: ignore[attr-defined]  # read by typer
    return run
