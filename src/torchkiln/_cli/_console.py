"""Where the command line prints: consoles for terminals and pipes, errors, JSON, and a progress bar."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.text import Text

ProgressFunction = Callable[[int, int, str], None]

# A pipe has no width of its own: whoever reads it wants whole names, not names cut at 80 columns.
_PIPE_WIDTH = 4096
_SIGPIPE_STATUS = 141

# The library's messages name its own arguments, which the command line spells as options.
_ARGUMENTS = (
    (re.compile(r'assume=\{"([^"]+)": "([^"]+)"\}'), r"--assume \1=\2"),
    (re.compile(r'assume=\{"([^"]+)": \.\.\.\}'), r"--assume \1=MAP"),
    (re.compile(r'^assume\["([^"]+)"\]'), r"--assume \1"),
    (re.compile(r'^assume(?=: ")'), "--assume"),
    (re.compile(r'(^|: )dims(?=: "| says )'), r"\1--dim"),
    (re.compile(r"\bwith force\b"), "with --force"),
    (re.compile(r"^(include|exclude|rename|dtype)(?=: )"), r"--\1"),
    (re.compile(r"^max_shard_size(?=: )"), "--max-shard-size"),
    (re.compile(r"^container(?=: )"), "--format"),
    (re.compile(r"(?:(?<=^)|(?<= ))(weight|spectral)_norm(?=: | or | patterns)"), r"--\1-norm"),
    (re.compile(r'\bto="(\w+)"'), r"--to \1"),
    (re.compile(r"\bdeep=True\b"), "--deep"),
)


class _Console(Console):
    """A console that ends the process quietly when the reader of its output has gone (``torchkiln ... | head``)."""

    def on_broken_pipe(self) -> NoReturn:
        try:
            super().on_broken_pipe()
        except SystemExit:
            raise SystemExit(_SIGPIPE_STATUS) from None
        raise AssertionError("rich ends the process on a broken pipe")


def console(*, stderr: bool = False) -> Console:
    """Return a console for the process's present stdout or stderr, without a width where that is not a terminal."""
    made = _Console(stderr=stderr, highlight=False, soft_wrap=False)
    if not made.is_terminal:
        made.width = _PIPE_WIDTH
    return made


def printable(text: object) -> str:
    r"""Return ``text`` with control characters escaped: names in a file must not drive the terminal.

    Example:
        >>> printable("conv\x1b[2J.weight")
        'conv\\x1b[2J.weight'
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in str(text)
    )


def in_options(text: object) -> str:
    """Return a message of the library with its arguments as the options that set them.

    Example:
        >>> in_options('Bake it in the model, or pass assume={"conv.weight": "identity"}.')
        'Bake it in the model, or pass --assume conv.weight=identity.'
    """
    message = str(text)
    for written, option in _ARGUMENTS:
        message = written.sub(option, message)
    return message


def complain(kind: str, message: object) -> None:
    """Print ``message`` on stderr after its ``kind`` ("error", "warning")."""
    style = "bold red" if kind == "error" else "bold yellow"
    text = Text.assemble((f"{kind}: ", style), printable(in_options(message)))
    console(stderr=True).print(text, soft_wrap=True)


def print_json(report: Mapping[str, Any]) -> None:
    """Print ``report`` as one JSON document and nothing else."""
    console().out(json.dumps(report, indent=2, allow_nan=False), highlight=False)


@contextmanager
def progress(title: str, *, unit: Literal["bytes", "tensors"] = "bytes") -> Iterator[ProgressFunction | None]:
    """Show a bar on stderr while the body runs; yields None where stderr is no terminal that can redraw a line.

    Args:
        title: What is going on.
        unit: What is counted; of bytes the rate is shown too.
    """
    screen = console(stderr=True)
    if not screen.is_terminal or screen.is_dumb_terminal:
        yield None
        return
    counts = (MofNCompleteColumn(),) if unit == "tensors" else (DownloadColumn(), TransferSpeedColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *counts, TimeRemainingColumn(compact=True))
    with Progress(*columns, console=screen, transient=True) as bars:
        task = bars.add_task(title, total=None)

        def advance(done: int, total: int, key: str) -> None:
            name = f" {printable(key)}" if key else ""
            bars.update(task, completed=done, total=total, description=escape(f"{title}{name}"[:48]))

        yield advance
