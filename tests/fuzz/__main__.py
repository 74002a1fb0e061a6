"""Coverage-guided fuzzing of the readers: ``python -m tests.fuzz TARGET FOLDER [options of libFuzzer]``.

Needs atheris. FOLDER keeps the corpus, and what was found in files named crash-, timeout- and oom-; put those into
``tests/fuzz/found/TARGET/``, which the tests read on every run. Without arguments it names the targets.
"""

from __future__ import annotations

import pickle
import sys
import tempfile
import types
import warnings
from pathlib import Path

import atheris
import torch
from torch import _weights_only_unpickler

with atheris.instrument_imports(include=["torchkiln"]):
    from torchkiln import checkpoint  # noqa: F401  # what is imported here is what is covered

from tests.fuzz.mutation import PICKLED, mutated
from tests.fuzz.targets import TARGETS, read_everything, seeds


def main(name: str, folder: str, *options: str) -> None:
    corpus = Path(folder)
    corpus.mkdir(parents=True, exist_ok=True)
    target, scratch = TARGETS[name], tempfile.TemporaryDirectory()
    for index, seed in enumerate(seeds(name)):
        (corpus / f"seed-{index}").write_bytes(seed)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch warns of protocols and of dtypes that damage makes up
    _instrument_unpicklers()

    def one_input(data: bytes) -> None:
        read_everything(target, data, Path(scratch.name))

    def mutator(data: bytes, size: int, seed: int) -> bytes:
        return mutated(data, size, seed, bytewise=atheris.Mutate)

    limits = ("-timeout=20", "-rss_limit_mb=2000", "-max_len=20000", f"-artifact_prefix={corpus}/")
    by_opcodes = {"custom_mutator": mutator} if name in PICKLED else {}
    atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], one_input, **by_opcodes)
    atheris.Fuzz()


def _instrument_unpicklers() -> None:
    """Cover the two loops over opcodes as well, which came with what was imported before."""
    loops = (pickle._Unpickler, _weights_only_unpickler.Unpickler)  # type: ignore[attr-defined]  # in Python
    for function in (function for loop in loops for function in vars(loop).values()):
        if isinstance(function, types.FunctionType):
            atheris.instrument_func(function)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(*sys.argv[1:])
    else:
        sys.stdout.write("\n".join(TARGETS) + "\n")
