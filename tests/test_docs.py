"""Every example that a reader can see is run: README and other Markdown, docstrings, the examples folder.

In a Markdown file the blocks run in order, in one namespace and one empty working directory: ``python``
blocks are executed, or checked as a session if they begin with ``>>>``; ``sh`` blocks run with the package's
command on the path; ``text`` is not run. A block that installs has the line ``<!-- ci: NAME -->`` above it and
is run, word for word, by .ci/run.
"""

from __future__ import annotations

import doctest
import importlib
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SRC = ROOT / "src" / "torchkiln"
DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "src/**/*.md", "benchmarks/**/*.md", "examples/**/*.md")
    for path in ROOT.glob(pattern)
)
# One is started by torchrun: tests/distributed/test_launched.py.
EXAMPLES = sorted(set((ROOT / "examples").glob("*.py")) - {ROOT / "examples" / "fsdp2_train.py"})
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
FENCE = re.compile(r"(?:^<!-- ci: (?P<ci>\w+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """One fenced block: where it starts, what it is, and the name under which .ci/run runs it, if it does."""

    line: int
    language: str
    text: str
    ci: str | None


def blocks_of(document: str) -> list[Block]:
    return [
        Block(document.count("\n", 0, found.start("text")) + 1, found["language"], found["text"], found["ci"])
        for found in FENCE.finditer(document)
    ]


def run_session(text: str, namespace: dict[str, object], *, name: str, line: int = 0) -> None:
    """Check one ``>>>`` session, and raise with doctest's own account of the first difference."""
    test = doctest.DocTestParser().get_doctest(text, namespace, name, name, line)
    test.globs = namespace  # the parser copies; a later block needs what this one defines
    said: list[str] = []
    result = doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.append, clear_globs=False)
    assert result.failed == 0, "".join(said)


def run_shell(text: str) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"


def run_document(document: str, name: str) -> int:
    """Run what can be run here, in order, and return how many blocks that was."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    here = [block for block in blocks_of(document) if block.ci is None and block.language not in ("", "text")]
    for block in here:
        if block.language == "sh":
            run_shell(block.text)
        elif block.language == "python" and block.text.startswith(">>>"):
            run_session(block.text, namespace, name=name, line=block.line)
        elif block.language == "python":
            exec(compile("\n" * (block.line - 1) + block.text, name, "exec"), namespace)
        else:
            pytest.fail(f"{name}:{block.line}: cannot run {block.language!r}, only python and sh")
    return len(here)


# --- Markdown ----------------------------------------------------------------------------------------

# These start the command a dozen times.
SLOW = {"docs/checkpoints.md", "docs/files.md"}


def _documents() -> Iterator[object]:
    for path in DOCUMENTS:
        name = path.relative_to(ROOT).as_posix()
        yield pytest.param(path, id=name, marks=[pytest.mark.slow] if name in SLOW else [])


@pytest.mark.parametrize("path", list(_documents()))
def test_markdown(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_document(path.read_text(), str(path))


@pytest.mark.parametrize(
    ("document", "complaint"),
    [
        ("```python\nassert 1 == 2\n```\n", "assert"),
        ("```python\nx = 1\n```\ntext\n```python\n>>> x\n2\n```\n", "Failed example:"),
        ("```sh\ntorchkiln no-such-command\n```\n", "no-such-command"),
        ("```ruby\nx\n```\n", "cannot run 'ruby'"),
    ],
)
def test_markdown_can_fail(document: str, complaint: str) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)) as caught:
        run_document(document, "offender.md")
    assert complaint in str(caught.value) or complaint == "assert"


def test_readme_shows_something_to_run() -> None:
    assert {"python", "sh"} <= {block.language for block in blocks_of((ROOT / "README.md").read_text())}


def test_readme_and_contributing_are_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) < 150
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) < 80


# --- what .ci/run takes from the README --------------------------------------------------------------


def ci_blocks() -> dict[str, str]:
    return {block.ci: block.text for block in blocks_of((ROOT / "README.md").read_text()) if block.ci}


def test_ci_runs_every_marked_block() -> None:
    called = re.findall(r"^readme (\w+)$", (ROOT / ".ci" / "run").read_text(), re.M)
    assert sorted(called) == sorted(ci_blocks()) == ["demo", "tests"]


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_ci_reads_the_readme_word_for_word(name: str) -> None:
    done = subprocess.run([ROOT / ".ci" / "readme-block", name], capture_output=True, text=True, check=True)
    assert done.stdout == ci_blocks()[name]


def test_ci_does_not_run_a_block_that_is_not_there() -> None:
    done = subprocess.run([ROOT / ".ci" / "readme-block", "nothing"], capture_output=True, check=False)
    assert done.returncode == 1
    assert "README.md has no block <!-- ci: nothing -->" in done.stderr.decode()


@pytest.mark.parametrize("name", ["demo", "tests"])
def test_ci_installs_go_through_the_constraints(name: str) -> None:
    installs = re.findall(r"pip install .*", ci_blocks()[name])
    assert installs
    assert all(" -c constraints.txt " in install for install in installs)


# --- docstrings --------------------------------------------------------------------------------------


def modules_with_examples() -> list[str]:
    """The dotted names of the package's modules, private ones included, that have a docstring example."""
    paths = sorted(path for path in SRC.rglob("*.py") if ">>> " in path.read_text())
    names = [".".join(path.relative_to(SRC.parent).with_suffix("").parts) for path in paths]
    return [name.removesuffix(".__init__") for name in names]


@pytest.mark.parametrize("name", modules_with_examples())
def test_docstrings(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    examples = doctest.DocTestFinder(exclude_empty=True).find(importlib.import_module(name))
    said: list[str] = []
    results = [doctest.DocTestRunner(optionflags=FLAGS).run(example, out=said.append) for example in examples]
    assert not said, "".join(said)
    assert sum(result.attempted for result in results) > 0


def test_docstring_can_fail() -> None:
    with pytest.raises(AssertionError, match="Failed example:"):
        run_session(">>> 1 + 1\n3\n", {}, name="offender")


# --- examples ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path)])
    runpy.run_path(str(path), run_name="__main__")
