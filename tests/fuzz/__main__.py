"""Coverage-guided fuzzing of the readers: ``python -m tests.fuzz TARGET FOLDER [options of libFuzzer]``.

Needs atheris. FOLDER keeps the corpus, and what was found in files named crash-, timeout- and oom-; put those into
``tests/fuzz/found/TARGET/``, which the tests read on every run.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["torchkiln.checkpoint", "torchkiln._core.spellings"]):
    from torchkiln import checkpoint  # noqa: F401  # what is imported here is what is covered

import torch

from tests.fuzz.targets import TARGETS, read_everything, seeds


def main(name: str, folder: str, *options: str) -> None:
    corpus = Path(folder)
    corpus.mkdir(parents=True, exist_ok=True)
    target, scratch = TARGETS[name], tempfile.TemporaryDirectory()
    for index, seed in enumerate(seeds(name)):
        (corpus / f"seed-{index}").write_bytes(seed)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # torch warns of protocols and of dtypes that damage makes up

    def one_input(data: bytes) -> None:
        read_everything(target, data, Path(scratch.name))

    limits = ("-timeout=20", "-rss_limit_mb=3000", "-max_len=20000", f"-artifact_prefix={corpus}/")
    atheris.Setup([sys.argv[0], *limits, *options, str(corpus)], one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
