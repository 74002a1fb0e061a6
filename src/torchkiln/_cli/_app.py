"""The commands of the command line, what they print, and the exit status they end with."""

from __future__ import annotations

import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, NoReturn, TextIO, cast

import torch
import typer
from rich.text import Text

import torchkiln
from torchkiln import checkpoint
from torchkiln._cli import _console, _reports
from torchkiln._cli._launch import launched_group
from torchkiln._cli._options import (
    AdapterFolder,
    AdapterWeight,
    Assume,
    Dim,
    Exclude,
    File,
    Include,
    Json,
    KeepGoing,
    NoVerify,
    Out,
    Spelling,
    Verify,
    dims_of,
    pairs_of,
    weighted,
)
from torchkiln._cli._writing import Writing, writes
from torchkiln._core.errors import TorchkilnError, TorchkilnWarning

__all__ = ["run"]

_NO, _USAGE, _INTERRUPTED = 1, 2, 130
_SIGNALLED = 128

# Recent typer carries its own copy of click, older typer imports it: the class is whichever typer itself raises.
_ClickException = cast("type[Exception]", typer.BadParameter.__mro__[2])

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit status; foreseen errors end as a few lines on stderr."""
    _accept_any_name(sys.stdout)
    try:
        with _warnings_on_stderr(), _ended_by_signals():
            words = list(arguments) or ["--help"]
            status = int(app(args=words, prog_name="torchkiln", standalone_mode=False, obj=words) or 0)
    except _ClickException as error:
        status = _refuse_usage(error)
    except (TorchkilnError, OSError) as error:
        status = _refuse(error, status=_NO)
    except (KeyboardInterrupt, typer.Abort):
        status = _INTERRUPTED
    except _Signalled as signalled:
        _console.complain("error", f"ended by {signal.Signals(signalled.number).name}")
        status = _SIGNALLED + signalled.number
    if not arguments:
        return _USAGE
    if status == _INTERRUPTED:
        _console.complain("error", "interrupted")
    return status


@app.callback(invoke_without_command=True)
def torchkiln_command(
    version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the versions of torchkiln and torch.")
    ] = False,
) -> None:
    """Fold norms, orthogonal maps and pruning masks out of checkpoint files, or put norms in, without model code.

    Start with

      torchkiln demo
      torchkiln inspect model.safetensors

    Exit status

      0    done
      1    the answer is no, or a file could not be handled
           (nothing to fold, a difference found, a file refused)
      2    wrong usage, or an extra is not installed
      130  interrupted (143 by SIGTERM, 129 by SIGHUP)
    """
    if version:
        typer.echo(f"torchkiln {torchkiln.__version__} (torch {torch.__version__})")
        raise typer.Exit


@app.command()
def inspect(
    file: File,
    deep: Annotated[
        bool,
        typer.Option(
            "--deep", metavar="", help="Read the values too: NaN, zero rows, lost unit length, open dims."
        ),
    ] = False,
    json: Json = False,
) -> None:
    """Show what FILE holds, what is parametrized or suspicious in it, and what to run next.

    Exit status: 0 for every readable file, also one with nothing to fold; 1 for
    a file that cannot be read.

    Examples

      torchkiln inspect generator.pth.tar
      torchkiln inspect model.safetensors --deep
      torchkiln inspect model.safetensors --json | jq '.rows[].name'
    """
    report = checkpoint.inspect(file, deep=deep)
    if json:
        _console.print_json(report.to_dict())
        return
    screen = _console.console()
    _reports.show_inspection(screen, file, report)
    if report.modules:
        screen.print(Text(f"next: {_next_command(file, report)}"), soft_wrap=True)


@app.command()
@writes
def bake(
    context: typer.Context,
    file: File,
    out: Out,
    adapter: AdapterFolder = None,
    weight: AdapterWeight = None,
    include: Include = None,
    exclude: Exclude = None,
    keep_going: KeepGoing = False,
    verify: Verify = True,
    no_verify: NoVerify = False,
    *,
    writing: Writing,
) -> None:
    """Fold FILE's parametrized tensors to plain ones, and merge adapters into it.

    Everything else passes through bit for bit; FILE itself is never modified.
    OUT appears whole or not at all: after an error, an interruption or a crash
    there is nothing to clean up or to resume, and the command can be run again.
    The processes that torchrun starts bake a directory together.

    Exit status: 0 when OUT is written; 1, and no OUT, where there is nothing to
    fold or a tensor cannot be folded.

    Examples

      torchkiln bake generator.pth.tar -o generator.plain.pth.tar
      torchkiln bake net.pt -o plain.pt --assume '*.proj.weight=cayley'
      torchkiln bake net.pt -o plain.pt --dim '*.weight=0' --force
      torchkiln bake net.pt -o net.safetensors --rename module.= --dtype bfloat16
      torchkiln bake big.safetensors -o plain --max-shard-size 5GB --dry-run
      torchkiln bake base.pt -o new.pt --adapter lora --adapter style --weight 0.5
      torchrun --nproc-per-node 8 -m torchkiln bake step-1000 -o plain
    """
    with launched_group() as group, _console.progress("baking") as progress:
        report = checkpoint.bake(
            file,
            out,
            adapters=weighted(context.obj) if adapter or weight else (),
            include=tuple(include or ()),
            exclude=tuple(exclude or ()),
            keep_going=keep_going,
            verify=verify and not no_verify,
            progress=progress,
            group=group,
            **writing.arguments(),
        )
        first = group is None or group.rank() == 0
    if first:
        _finish_file(report, out, json=writing.json)


@app.command()
@writes
def convert(
    file: File,
    out: Out,
    to: Annotated[
        Spelling | None,
        typer.Option(
            metavar="SPELLING",
            help="The spelling to write, torch, legacy or plain; the one there is if not given.",
        ),
    ] = None,
    weight_norm: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Put a weight norm on the plain tensors named so."),
    ] = None,
    spectral_norm: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Put a spectral norm on the plain tensors named so."),
    ] = None,
    *,
    writing: Writing,
) -> None:
    """Rewrite FILE in another spelling or another format, or put norms in.

    The spellings are torch's parametrizations, the legacy hooks (weight_g and
    weight_v), and plain tensors. The formats are safetensors (one file or
    shards), files of torch.save, and distributed checkpoints.

    Exit status: 0 when OUT is written; 1, and no OUT, where there is nothing to
    convert or a tensor is refused.

    Examples

      torchkiln convert old.pt --to torch -o new.pt
      torchkiln convert net.pt --to torch -o new.pt --weight-norm 'ups.*.weight'
      torchkiln convert model.safetensors -o shards --max-shard-size 5GB
      torchkiln convert step-9000 -o model.safetensors --rename model.=
    """
    with _console.progress("converting") as progress:
        report = checkpoint.convert(
            file,
            out,
            to=to.value if to else None,
            weight_norm=tuple(weight_norm or ()),
            spectral_norm=tuple(spectral_norm or ()),
            progress=progress,
            **writing.arguments(),
        )
    _finish_file(report, out, json=writing.json)


@app.command()
def verify(
    file: File,
    other: Annotated[
        Path | None, typer.Argument(metavar="OTHER", help="The file that must say the same.")
    ] = None,
    assume: Assume = None,
    dim: Dim = None,
    json: Json = False,
) -> None:
    """Check FILE's folds in float64, or against OTHER.

    Every parametrized tensor is computed again in float64, and the largest
    errors are reported. With OTHER both are folded and compared, name by name.

    Exit status: 0 when all agree; 1 where a tensor differs by more than rounding
    explains.

    Examples

      torchkiln verify generator.pth.tar
      torchkiln verify generator.pth.tar generator.plain.pth.tar
    """
    assumed, dims = pairs_of(assume, "--assume", "PATTERN=MAP"), dims_of(dim)
    with _console.progress("verifying", unit="tensors") as progress:
        report = checkpoint.verify(file, other, assume=assumed, dims=dims, progress=progress)
    if json:
        _console.print_json(report.to_dict())
    else:
        _reports.show_verification(_console.console(), report)
    raise typer.Exit(0 if report.ok else _NO)


@app.command()
def demo(
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training images.")] = 20,
    seed: Annotated[int, typer.Option(help="Seed of the split, the weights and the batches.")] = 0,
    keep: Annotated[Path | None, typer.Option(metavar="DIR", help="Leave the two files in DIR.")] = None,
    json: Json = False,
) -> None:
    """Train on real digits, bake the file, compare.

    Needs scikit-learn: pip install 'torchkiln\\[demo]'.

    Exit status: 0 when the plain networks predict the same as the trained one;
    1 when a prediction changed.

    Examples

      torchkiln demo
      torchkiln demo --keep digits
    """
    from torchkiln.demo import run_demo

    try:
        report = run_demo(epochs=epochs, seed=seed, keep=keep, console=None if json else _console.console())
    except ModuleNotFoundError as error:
        raise typer.Exit(_refuse(error, status=_USAGE)) from None
    if json:
        _console.print_json(report.to_dict())
    raise typer.Exit(0 if report.identical else _NO)


def _finish_file(report: checkpoint.FileReport, out: Path, *, json: bool) -> None:
    if json:
        _console.print_json(report.to_dict())
    else:
        _reports.show_file_report(_console.console(), out, report)


def _next_command(file: Path, report: checkpoint.Inspection) -> str:
    """Return the command that the user of ``inspect`` most likely wants, ready to paste."""
    if not report.rows:
        out = str(_beside(file, "normed"))
        return shlex.join(
            ["torchkiln", "convert", str(file), "--to", "torch", "--weight-norm", "PATTERN", "-o", out]
        )
    unknown = {_reports.pattern(row.name) for row in report.rows if "assume=" in row.blocked}
    words = ["torchkiln", "bake", str(file), "-o", str(_beside(file, "plain"))]
    for name in sorted(unknown):
        words += ["--assume", f"{name}=MAP"]
    return shlex.join(words)


def _beside(file: Path, word: str) -> Path:
    """Return ``file`` with ``word`` before its suffix, where ``.pth.tar`` is one suffix."""
    suffix = "".join(file.suffixes[-2:]) if file.suffix == ".tar" else file.suffix
    return file.with_name(f"{file.name.removesuffix(suffix)}.{word}{suffix}")


def _refuse_usage(error: Exception) -> int:
    """Say what is wrong with the words of the command, and how to get help."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "torchkiln"
    message = error.format_message()  # type: ignore[attr-defined]  # every ClickException has it
    message = message.replace("Value error, ", "")  # which is how some versions of typer begin a reason
    if message:
        _console.complain("error", f"{message}\nTry '{command} --help'.")
    return _USAGE


def _refuse(error: Exception, *, status: int) -> int:
    """Print ``error`` on stderr and return ``status``."""
    if isinstance(error, OSError) and not isinstance(error, TorchkilnError) and error.filename is not None:
        _console.complain("error", f"{error.filename}: {error.strerror}")
    else:
        _console.complain("error", error)
    return status


class _Signalled(BaseException):
    """The process was asked to end: what it was writing is removed on the way out, as after control-C."""

    def __init__(self, number: int) -> None:
        self.number = number


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Raise where the system would end the process at once: schedulers and closed terminals send these signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _frame: object) -> NoReturn:
        raise _Signalled(number)

    numbers = [signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else [])]
    usual = {
        number: signal.signal(number, end) for number in numbers if signal.getsignal(number) != signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


@contextmanager
def _warnings_on_stderr() -> Iterator[None]:
    """Print torchkiln's own warnings as one line each, without the line that raised them, and none of torch's."""
    torchs = str(Path(torch.__file__).parent)

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, TorchkilnWarning):
            _console.complain("warning", message)
        elif not filename.startswith(torchs):  # that a kind of tensor is new or old concerns whoever saved it
            usual(message, category, filename, lineno, file, line)

    with warnings.catch_warnings():
        usual = warnings.showwarning
        warnings.simplefilter("always", TorchkilnWarning)
        warnings.showwarning = show
        yield


def _accept_any_name(stream: TextIO) -> None:
    """Let names that the output's encoding has no characters for be printed escaped."""
    if isinstance(stream, TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
