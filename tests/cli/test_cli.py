"""The command line: exit statuses, what goes to stdout and what to stderr, terminals, pipes and interruptions."""

from __future__ import annotations

import errno
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
import torch
from torch import nn

from tests.cli.conftest import Run, Terminal
from torchkiln import checkpoint, parametrizations
from torchkiln._cli import main

ESCAPE = "\x1b"
COMMANDS = ("inspect", "bake", "convert", "verify", "demo")


def _weight_normed(path: Path, name: str) -> Path:
    torch.save({f"{name}_g": torch.ones(3, 1), f"{name}_v": torch.ones(3, 4)}, path)
    return path


class Planted:
    """Stands for a class of somebody else's code inside a file."""


# --- exit statuses ------------------------------------------------------------------------------------------------


def test_bake_writes_the_file_and_succeeds(run: Run, blocks: Path, tmp_path: Path) -> None:
    result = run("bake", blocks, "-o", "out.pt")
    assert (result.status, result.err) == (0, "")
    assert "13 tensors rewritten" in result.out
    assert not [key for key in torch.load(tmp_path / "out.pt") if "parametrizations" in key]


def test_inspect_succeeds_on_a_plain_file(run: Run, plain: Path) -> None:
    result = run("inspect", plain)
    assert (result.status, result.err) == (0, "")
    assert "nothing to fold" in result.out


def test_bake_of_a_plain_file_is_status_1(run: Run, plain: Path, tmp_path: Path) -> None:
    result = run("bake", plain, "-o", "out.pt")
    assert (result.status, result.out) == (1, "")
    assert re.match(r"error: .*plain\.pt: .*nothing", result.err)
    assert not (tmp_path / "out.pt").exists()


def test_bake_keeps_an_existing_output_unless_forced(run: Run, blocks: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pt"
    out.write_text("mine")
    refused = run("bake", blocks, "-o", out)
    assert (refused.status, refused.out, out.read_text()) == (1, "", "mine")
    assert "--force" in refused.err
    assert run("bake", blocks, "-o", out, "--force").status == 0
    assert torch.load(out)


@pytest.mark.parametrize("command", [["inspect"], ["bake", "-o", "out.pt"], ["verify"]], ids=lambda c: c[0])
@pytest.mark.parametrize("kind", ["missing", "folder", "text", "needs code"])
def test_a_file_that_cannot_be_handled_is_status_1_in_three_lines(
    run: Run, tmp_path: Path, command: list[str], kind: str
) -> None:
    path = tmp_path / "input.pt"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("not a checkpoint")
    elif kind == "needs code":
        torch.save({"weight": Planted()}, path)
    result = run(*command, path)
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("error: ")
    assert 1 <= len(result.err.splitlines()) <= 3
    assert "input.pt" in result.err
    assert ("Planted" in result.err) == (kind == "needs code")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["fold", "a.pt"], "No such command 'fold'"),
        (["inspect"], "Missing argument 'FILE'"),
        (["inspect", "a.pt", "--shallow"], "No such option"),
        (["bake", "a.pt"], "Missing option"),
        (["convert", "a.pt", "-o", "b.pt", "--to", "keras"], "'keras' is not one of"),
        (["bake", "a.pt", "-o", "b.pt", "--dim", "*.weight=first"], "whole number"),
        (["bake", "a.pt", "-o", "b.pt", "--dim", "3"], "PATTERN=N"),
        (["bake", "a.pt", "-o", "b.pt", "--assume", "cayley"], "PATTERN=MAP"),
        (["bake", "a.pt", "-o", "b.pt", "--dim", "w=0", "--dim", "w=1"], "given twice"),
    ],
)
def test_wrong_usage_is_status_2(run: Run, words: list[str], said: str) -> None:
    result = run(*words)
    assert (result.status, result.out) == (2, "")
    assert said in result.err
    assert len(result.err.splitlines()) == 2
    assert "--help" in result.err


def test_no_words_at_all_show_the_help_and_are_wrong_usage(run: Run) -> None:
    result = run()
    assert result.status == 2
    assert "Usage: torchkiln" in result.out + result.err


def test_the_version(run: Run) -> None:
    result = run("--version")
    assert (result.status, result.err) == (0, "")
    assert re.fullmatch(r"torchkiln \d+\.\d+\.\d+ \(torch .+\)\n", result.out)


# --- the verbs ----------------------------------------------------------------------------------------------------


def test_the_command_that_inspect_names_runs(run: Run, blocks: Path) -> None:
    last = run("inspect", blocks).out.splitlines()[-1]
    words = shlex.split(last.removeprefix("next: "))
    assert words[:2] == ["torchkiln", "bake"]
    assert run(*words[1:]).status == 0
    assert run("verify", blocks, words[-1]).status == 0


def test_inspect_names_a_file_with_a_double_suffix_and_blanks(run: Run, tmp_path: Path) -> None:
    path = _weight_normed(tmp_path / "my net.pth.tar", "weight")
    words = shlex.split(run("inspect", path).out.splitlines()[-1])
    assert words[-1] == str(tmp_path / "my net.plain.pth.tar")


@pytest.mark.parametrize("key", ["a.parametrizations.weight.original", "a.weight_orig"])
def test_inspect_asks_what_a_lone_original_is(key: str, run: Run) -> None:
    torch.save(
        {"model": {key: torch.randn(3, 3), "b.weight_g": torch.ones(3, 1), "b.weight_v": torch.randn(3, 3)}},
        "in.pt",
    )
    words = shlex.split(run("inspect", "in.pt").out.splitlines()[-1].removeprefix("next: "))
    assert words[-1] == "model.a.weight=MAP"
    assert run(*words[1:-1], "model.a.weight=identity").status == 0
    assert set(torch.load("in.plain.pt")["model"]) == {"a.weight", "b.weight"}


def test_inspect_asks_for_the_orthogonal_map(run: Run, tmp_path: Path) -> None:
    model = parametrizations.orthogonal(nn.Linear(3, 3), orthogonal_map="cayley")
    torch.save({f"net.3.{key}": value for key, value in model.state_dict().items()}, tmp_path / "net.pt")
    assert "--assume 'net.*.weight=MAP'" in run("inspect", "net.pt").out
    refused = run("bake", "net.pt", "-o", "out.pt")
    assert (refused.status, "--assume net.3.weight=" in refused.err) == (1, True)
    assert run("bake", "net.pt", "-o", "out.pt", "--assume", "net.*.weight=cayley").status == 0
    torch.testing.assert_close(torch.load("out.pt")["net.3.weight"], model.weight.detach())


def test_dim_settles_what_the_shapes_leave_open(run: Run, tmp_path: Path) -> None:
    layer = parametrizations.spectral_norm(nn.Linear(4, 4), dim=1)
    torch.save(layer.state_dict(), tmp_path / "s.pt")
    assert run("bake", "s.pt", "-o", "out.pt", "--dim", "weight=1").status == 0
    torch.testing.assert_close(torch.load("out.pt")["weight"], layer.eval().weight.detach())


def test_dim_none_is_one_norm_over_the_whole_tensor(run: Run, tmp_path: Path) -> None:
    torch.save({"weight_g": torch.ones(1, 1), "weight_v": torch.ones(1, 4)}, tmp_path / "row.pt")
    assert run("bake", "row.pt", "-o", "out.pt", "--dim", "weight=none").status == 0
    torch.testing.assert_close(torch.load("out.pt")["weight"], torch.full((1, 4), 0.5))


def test_convert_goes_to_legacy_and_back(run: Run, plain: Path) -> None:
    assert run("convert", plain, "--to", "legacy", "--weight-norm", "weight", "-o", "legacy.pt").status == 0
    assert set(torch.load("legacy.pt")) == {"weight_g", "weight_v", "bias"}
    assert run("convert", "legacy.pt", "--to", "torch", "-o", "torch.pt").status == 0
    assert run("convert", "torch.pt", "--to", "plain", "-o", "again.pt").status == 0
    assert run("verify", plain, "again.pt").status == 0


def test_convert_puts_a_spectral_norm_in(run: Run, plain: Path) -> None:
    assert run("convert", plain, "--to", "torch", "--spectral-norm", "weight", "-o", "normed.pt").status == 0
    assert "parametrizations.weight.0._u" in torch.load("normed.pt")


def test_verify_says_no_where_two_files_differ(run: Run, blocks: Path, tmp_path: Path) -> None:
    run("bake", blocks, "-o", "out.pt")
    changed = torch.load(tmp_path / "out.pt")
    changed["blocks.7.weight"][0, 0] += 1
    torch.save(changed, tmp_path / "changed.pt")
    assert run("verify", blocks, "out.pt").status == 0
    result = run("verify", blocks, "changed.pt")
    assert (result.status, result.err) == (1, "")
    assert re.search(r"blocks\.7\.weight .*NOT OK", result.out)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_what_torch_says_of_kinds_of_tensors_is_not_repeated(run: Run) -> None:
    torch.save({"w_g": torch.ones(2, 1), "w_v": torch.ones(2, 3), "c": torch.eye(2).to_sparse_csr()}, "in.pt")
    result = run("bake", "in.pt", "-o", "out.pt")
    assert (result.status, result.err) == (0, "")


def test_verify_says_once_what_is_wrong(run: Run, tmp_path: Path) -> None:
    torch.save({"net": {"w_g": torch.ones(2, 1), "w_v": torch.zeros(2, 3)}}, tmp_path / "in.pt")
    result = run("verify", "in.pt")
    assert (result.status, result.err) == (1, "")
    assert result.out.count("net.w_v: is zero at 0, 1 of dim 0") == 1
    assert result.out.rstrip().endswith("not ok: 1 of 1 tensor")


# --- what is printed ----------------------------------------------------------------------------------------------


def test_inspect_shows_equal_blocks_as_one_line(run: Run, blocks: Path) -> None:
    out = run("inspect", blocks).out
    assert re.search(r"blocks\.\*\.weight +x 12 +torch weight_norm +3 x 4 ", out)
    assert "blocks.3.weight" not in out
    assert re.search(r"last\.weight  ", out)


def test_json_has_every_row_and_nothing_else_on_stdout(run: Run, blocks: Path) -> None:
    result = run("inspect", blocks, "--json")
    report = json.loads(result.out)
    assert report == json.loads(json.dumps(checkpoint.inspect(blocks).to_dict()))
    assert len(report["rows"]) == 13
    assert result.err == ""


@pytest.mark.parametrize(
    "words",
    [
        ["bake", "blocks.pt", "-o", "out.pt"],
        ["convert", "blocks.pt", "--to", "legacy", "-o", "out.pt"],
        ["verify", "blocks.pt"],
    ],
    ids=lambda words: words[0],
)
def test_json_of_the_other_verbs(run: Run, blocks: Path, words: list[str]) -> None:
    result = run(*words, "--json")
    assert (result.status, result.err) == (0, "")
    assert len(json.loads(result.out)["rows"]) >= 13


def test_json_of_a_refused_file_leaves_stdout_empty(run: Run, plain: Path) -> None:
    result = run("bake", plain, "-o", "out.pt", "--json")
    assert (result.status, result.out) == (1, "")
    assert result.err.startswith("error: ")


@pytest.mark.parametrize(
    "words", [["inspect", "blocks.pt"], ["bake", "blocks.pt", "-o", "o.pt"], ["verify", "blocks.pt"]]
)
def test_a_pipe_gets_no_escape_codes(run: Run, blocks: Path, words: list[str]) -> None:
    result = run(*words)
    assert ESCAPE not in result.out + result.err


def test_a_pipe_gets_long_names_whole(run: Run, tmp_path: Path) -> None:
    name = ".".join(["encoder_layer"] * 30) + ".weight"
    _weight_normed(tmp_path / "long.pt", name)
    assert re.search(rf"^ *{re.escape(name)} ", run("inspect", "long.pt").out, flags=re.MULTILINE)


def test_names_in_a_file_cannot_drive_the_terminal(run: Run, tmp_path: Path) -> None:
    _weight_normed(tmp_path / "evil.pt", f"conv{ESCAPE}[2J.[red]weight")
    result = run("inspect", "evil.pt")
    assert ESCAPE not in result.out
    assert r"conv\x1b[2J.[red]weight" in result.out


# --- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_each_command_has_examples_and_exit_statuses(run: Run, command: str) -> None:
    result = run(command, "--help")
    assert (result.status, result.err) == (0, "")
    assert "Examples" in result.out
    assert f"  torchkiln {command}" in result.out
    assert "Exit status" in result.out


def test_the_main_help_documents_the_exit_statuses_and_names_every_command(run: Run) -> None:
    out = run("--help").out
    assert "130  interrupted" in out
    assert all(re.search(rf"^\W*{command} ", out, flags=re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "demo"])
def test_the_examples_in_the_help_are_right_usage(run: Run, command: str) -> None:
    lines = re.findall(rf"^ *(torchkiln {command} .*)$", run(command, "--help").out, flags=re.MULTILINE)
    assert lines
    # None of the files exists, so right usage ends with status 1 and wrong usage with status 2.
    assert {run(*shlex.split(line.partition("|")[0])[1:]).status for line in lines} == {1}


# --- terminals ----------------------------------------------------------------------------------------------------


def _until_closed(screen: IO[bytes]) -> bytes:
    """Read once; a pseudo-terminal that nobody writes to any more says so by an error on Linux, by nothing on macOS."""
    try:
        return screen.read(4096)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b""


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, run: Run) -> Terminal:
    """Put a pseudo-terminal in place of one of the streams; the returned function reads what was written to it."""

    def put(stream: str) -> Callable[[], str]:
        controller, device = pty.openpty()
        file = open(device, "w", encoding="utf-8")  # noqa: SIM115  # it lives as long as the test
        monkeypatch.setattr(sys, stream, file)

        def read() -> str:
            file.close()
            with open(controller, "rb", buffering=0) as screen:
                return b"".join(iter(lambda: _until_closed(screen), b"")).decode()

        return read

    monkeypatch.setenv("TERM", "xterm-256color")
    return put


COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3[0-8]|9[0-7])(?:;\d+)*m")


@pytest.mark.parametrize(
    ("variable", "value", "coloured"),
    [("TERM", "xterm-256color", True), ("TERM", "dumb", False), ("NO_COLOR", "1", False)],
)
def test_colour_only_where_the_terminal_wants_it(
    blocks: Path,
    terminal: Terminal,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str,
    coloured: bool,
) -> None:
    monkeypatch.setenv(variable, value)
    read = terminal("stdout")
    assert main(["inspect", str(blocks)]) == 0
    assert bool(COLOUR.search(read())) == coloured


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("length", [2, 12])
def test_a_terminal_gets_lines_that_fit_and_names_that_are_not_cut(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch, width: int, length: int
) -> None:
    name = ".".join(["encoder_layer"] * length) + ".weight"
    monkeypatch.setenv("COLUMNS", str(width))
    _weight_normed(tmp_path / "long.pt", name)
    read = terminal("stdout")
    assert main(["inspect", "long.pt"]) == 0
    lines = re.sub(r"\x1b\[[0-9;]*m", "", read()).splitlines()
    table = lines[1:-1]
    assert max(map(len, table)) <= width
    assert any("legacy" in line and "3 x 4" in line for line in table)
    assert name in "".join(line.partition(" ")[0] for line in table)


def test_long_work_shows_a_bar_on_a_terminal(run: Run, blocks: Path, terminal: Terminal) -> None:
    read = terminal("stderr")
    assert main(["bake", str(blocks), "-o", "out.pt"]) == 0
    assert "baking" in read()


# --- missing extras, interruptions, closed pipes --------------------------------------------------------------------


def _process(code: str, *words: object) -> subprocess.Popen[str]:
    program = f"import sys\n{code}\nfrom torchkiln._cli import main\nsys.exit(main())"
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("package", ["rich", "typer"])
def test_without_its_extra_the_command_says_what_to_install(package: str) -> None:
    process = _process(f"sys.modules[{package!r}] = None", "--version")
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (2, "")
    assert err == f"torchkiln: the command line needs {package}: pip install 'torchkiln[cli]'\n"


def test_another_missing_module_is_not_blamed_on_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchkiln._cli._app", None)
    with pytest.raises(ModuleNotFoundError, match="_app"):
        main(["--version"])


def test_an_interruption_inside_a_verb_ends_with_status_130(
    run: Run, blocks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*words: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "bake", interrupted)
    result = run("bake", blocks, "-o", "out.pt")
    assert (result.status, result.out) == (130, "")
    assert result.err.strip() == "error: interrupted"


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_control_c_ends_the_process_cleanly() -> None:
    # What runs the tests may ignore the signal, and then so would the process.
    listening = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    process = _process(listening, "demo", "--epochs", 100_000)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert (process.returncode, err.strip()) == (130, "error: interrupted")


def test_a_reader_that_went_away_is_no_error(blocks: Path) -> None:
    process = _process("", "inspect", blocks)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    process.stderr.close()
    assert process.wait(timeout=120) == 141


@pytest.mark.parametrize("command", ["inspect", "bake", "convert", "verify", "demo"])
@pytest.mark.parametrize("width", [80, 120])
def test_the_help_fits_a_terminal(
    width: int, command: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = run(command, "--help").out
    assert max(map(len, out.splitlines())) <= width
    # The explanations have half of the line, and no word of an option or an example is broken.
    assert next(line for line in out.splitlines() if "Print one JSON" in line).index("Print") <= 45
    examples = out.partition("Examples")[2].partition("\u256d")[0].split("\n")
    commands = [line for line in examples if line.strip()]
    assert all(line.strip().startswith(("torchkiln ", "torchrun ")) for line in commands)


def test_the_second_look_is_on_and_can_be_asked_for(run: Run, blocks: Path) -> None:
    assert run("bake", blocks, "-o", "out.pt", "--verify").status == 0
    assert "--verify" not in run("bake", "--help").out.replace("--no-verify", "")
