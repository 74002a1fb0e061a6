"""What the fuzzers call: each target makes a checkpoint of some bytes, and everything torchkiln reads is read.

Whatever the bytes are, a reader may refuse them with a :class:`CheckpointError`, and may do nothing else: no other
exception, no more memory than the file explains, no file outside of the folder.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from tests.fuzz.distributed import archived, dcp_data, dcp_layout, dcp_metadata, dcp_pickles, dcp_seeds
from torchkiln import checkpoint
from torchkiln._core.errors import TorchkilnError

__all__ = ["TARGETS", "Target", "read_everything", "seeds"]

Target = Callable[[bytes, Path], Path]


def safetensors_file(data: bytes, folder: Path) -> Path:
    """The whole file."""
    path = folder / "model.safetensors"
    path.write_bytes(data)
    return path


def safetensors_header(data: bytes, folder: Path) -> Path:
    """The header alone, with its length before it and as many bytes after it as the first two of `data` say."""
    body = int.from_bytes(data[:2], "little")
    text = data[2:]
    return safetensors_file(len(text).to_bytes(8, "little") + text + bytes(body), folder)


def index_file(data: bytes, folder: Path) -> Path:
    """The index of shards, of which one lies beside it."""
    safetensors.torch.save_file(_state(), folder / "one.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_bytes(data)
    return path


def torch_file(data: bytes, folder: Path) -> Path:
    """The whole file, zip or legacy."""
    path = folder / "model.pt"
    path.write_bytes(data)
    return path


def torch_pickle(data: bytes, folder: Path) -> Path:
    """The pickle in an archive that is right otherwise."""
    return torch_file(archived(data), folder)


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        safetensors_file,
        safetensors_header,
        index_file,
        torch_file,
        torch_pickle,
        dcp_metadata,
        dcp_layout,
        dcp_pickles,
        dcp_data,
    )
}


def read_everything(target: Target, data: bytes, folder: Path) -> bool:
    """Make the file of a target, and do with it what can be done; return whether it was a checkpoint.

    Args:
        target: One of :data:`TARGETS`.
        data: What the fuzzer has made up.
        folder: An empty folder, which is made; files of an earlier call are overwritten.
    """
    folder.mkdir(exist_ok=True)
    path = target(data, folder)
    try:
        checkpoint.inspect(path, deep=True)
        checkpoint.convert(path, folder / "copy.pt", force=True)
        checkpoint.bake(path, folder / "baked.pt", force=True, keep_going=True)
    except TorchkilnError:
        return (folder / "copy.pt").exists()
    return True


def seeds(name: str) -> Iterator[bytes]:
    """Yield right inputs of a target, for a fuzzer to begin with."""
    tensors = safetensors.torch.save(_state(), metadata={"format": "pt"})
    header = int.from_bytes(tensors[:8], "little")
    if name == "safetensors_file":
        yield tensors
    elif name == "safetensors_header":
        yield (len(tensors) - 8 - header).to_bytes(2, "little") + tensors[8 : 8 + header]
    elif name == "index_file":
        yield json.dumps({"metadata": {}, "weight_map": dict.fromkeys(_state(), "one.safetensors")}).encode()
    elif name.startswith("torch_"):
        for content in (_state(), {"model": {"a": nn.Parameter(torch.ones(2))}, "n": [1, (2.0, None)]}):
            buffer = io.BytesIO()
            torch.save(content, buffer)
            with zipfile.ZipFile(buffer) as archive:
                whole = name == "torch_file"
                yield buffer.getvalue() if whole else archive.read("archive/data.pkl")
        if name == "torch_file":
            buffer = io.BytesIO()
            torch.save(_state(), buffer, _use_new_zipfile_serialization=False)
            yield buffer.getvalue()
    else:
        yield from dcp_seeds(name)


def _state() -> dict[str, Tensor]:
    return {"w_g": torch.ones(2, 1), "w_v": torch.ones(2, 3), "h": torch.ones(2, dtype=torch.float16)}
