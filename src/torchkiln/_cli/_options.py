"""The options that commands share, and how their words are read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer

from torchkiln.checkpoint import Adapter

__all__ = [
    "AdapterFolder",
    "AdapterWeight",
    "Assume",
    "Dim",
    "DryRun",
    "Dtype",
    "Exclude",
    "File",
    "Force",
    "Format",
    "Include",
    "Json",
    "KeepGoing",
    "NoVerify",
    "Out",
    "Rename",
    "ShardSize",
    "Spelling",
    "Verify",
    "dims_of",
    "dtype_of",
    "pairs_of",
    "size_of",
    "weighted",
]


class Spelling(str, Enum):
    """The spellings that ``convert`` writes."""

    torch = "torch"
    legacy = "legacy"
    plain = "plain"


class FormatName(str, Enum):
    """The kinds of checkpoint that are written."""

    safetensors = "safetensors"
    torch = "torch"
    dcp = "dcp"


class DtypeName(str, Enum):
    """The dtypes that tensors can be cast to."""

    float64 = "float64"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


File = Annotated[
    Path,
    typer.Argument(
        metavar="FILE",
        help="A safetensors file, the index of its shards, a file that torch.save wrote, or a directory of "
        "torch.distributed.checkpoint.",
    ),
]
Out = Annotated[
    Path,
    typer.Option(
        "--out",
        "-o",
        metavar="OUT",
        help="The file or directory to write; its suffix says the format (.safetensors; .pt, .pth, .bin, ...).",
    ),
]
Force = Annotated[
    bool,
    typer.Option("--force", metavar="", help="Replace OUT if it is a file; a directory is never replaced."),
]
Json = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON document on stdout and nothing else.")
]
Assume = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=MAP",
        help="What the file cannot say of the tensors named so: the orthogonal map (matrix_exp, cayley or "
        "householder), identity to take an original as it is, data to keep keys that only look parametrized.",
    ),
]
Dim = Annotated[
    list[str] | None,
    typer.Option(
        metavar="PATTERN=N", help="The dimension of the norm, none for all, where the shapes leave it open."
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Fold only the tensors named so; * and ? work. May be repeated."),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="PATTERN", help="Leave the tensors named so as they are. May be repeated."),
]
Rename = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OLD=NEW",
        help="Names that begin with OLD begin with NEW; module.= drops a prefix, =net. adds one. May be repeated.",
    ),
]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(
        metavar="DTYPE",
        help="Write every tensor of floats in this dtype, rounded once: float64, float32, float16 or bfloat16.",
    ),
]
Format = Annotated[
    FormatName | None,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help="What to write where OUT's name does not say: safetensors, torch, or dcp (a distributed checkpoint).",
    ),
]
ShardSize = Annotated[
    str | None,
    typer.Option(
        "--max-shard-size",
        metavar="SIZE",
        help="Write OUT as a directory of safetensors shards, each so large at most, and their index: 5GB, 200MB.",
    ),
]
KeepGoing = Annotated[
    bool,
    typer.Option(
        "--keep-going",
        metavar="",
        help="Leave tensors whose rule is not known as they are, with a warning for each.",
    ),
]
# Two options for one answer: a column for the other name of this one alone would squeeze all the help.
Verify = Annotated[bool, typer.Option("--verify", hidden=True)]
NoVerify = Annotated[
    bool,
    typer.Option(
        "--no-verify",
        metavar="",
        help="Write folded tensors without computing each in a second way, and comparing.",
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        metavar="",
        help="Write nothing; print what would be, with sizes and an estimate of the time.",
    ),
]
AdapterFolder = Annotated[
    list[Path] | None,
    typer.Option(
        "--adapter", metavar="DIR", help="The folder of a PEFT adapter to merge into FILE. May be repeated."
    ),
]
AdapterWeight = Annotated[
    list[float] | None,
    typer.Option(
        "--weight", metavar="W", help="How much to add of the adapter named before it: 1 if not given."
    ),
]

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d+)?) *(?P<unit>[kMGT]i?)?B?", re.IGNORECASE)


def size_of(word: str | None) -> int | None:
    """Return a number of bytes.

    Example:
        >>> size_of("5GB"), size_of("1.5 MiB"), size_of("12")
        (5000000000, 1572864, 12)
    """
    if word is None:
        return None
    found = _SIZE.fullmatch(word.strip())
    if found is None:
        raise typer.BadParameter(f"expected a size such as 5GB, got {word!r}", param_hint="--max-shard-size")
    unit = (found["unit"] or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(found["number"]) * base ** " kmgt".index(unit[:1] or " "))


def dtype_of(name: DtypeName | None) -> torch.dtype | None:
    """Return the dtype of a name."""
    return None if name is None else getattr(torch, name.value)


def dims_of(options: Sequence[str] | None) -> dict[str, int | None] | None:
    """Parse ``--dim PATTERN=N``, where ``none`` stands for all dims at once."""
    pairs = pairs_of(options, "--dim", "PATTERN=N")
    if pairs is None:
        return None
    try:
        return {name: None if dim == "none" else int(dim) for name, dim in pairs.items()}
    except ValueError:
        raise typer.BadParameter("expected PATTERN=N, N a whole number or none", param_hint="--dim") from None


def pairs_of(options: Sequence[str] | None, option: str, form: str) -> dict[str, str] | None:
    """Parse the words given to an option that may be repeated, ``PATTERN=VALUE`` each.

    Either side of ``OLD=NEW`` may be empty: a name can lose its beginning, or get one.
    """
    pairs: dict[str, str] = {}
    for word in options or ():
        pattern, sign, value = word.partition("=") if form == "OLD=NEW" else word.rpartition("=")
        if not sign or (form != "OLD=NEW" and not (pattern and value)) or pattern == value == "":
            raise typer.BadParameter(f"expected {form}, got {word!r}", param_hint=option)
        if pairs.setdefault(pattern, value) != value:
            raise typer.BadParameter(f"{pattern!r} is given twice, with two values", param_hint=option)
    return pairs or None


def weighted(words: Sequence[str]) -> list[Adapter]:
    """Return the adapters of a command, each with the weight that stands after it: the parser drops the order.

    Example:
        >>> weighted(["bake", "base", "--adapter", "a", "--adapter=b", "--weight", "0.5"])
        [Adapter(path='a', weight=1.0), Adapter(path='b', weight=0.5)]
    """
    adapters: list[Adapter] = []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, sign, value = word.partition("=")
        value = value if sign else following
        if option == "--adapter":
            adapters.append(Adapter(value))
        elif option == "--weight":
            if not adapters:
                raise typer.BadParameter("stands before any --adapter", param_hint=option)
            adapters[-1] = Adapter(adapters[-1].path, float(value))
    return adapters
