"""Containers: what is around the tensors comes through as it was, and damaged files are named as such."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from tests.checkpoint.cases import same_bits
from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError


def normed() -> dict[str, torch.Tensor]:
    return {"weight_g": torch.rand(4, 1), "weight_v": torch.randn(4, 6)}


def test_nested_content_passes_through(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3).t()  # strides of its own
    model = OrderedDict({f"module.{key}": value for key, value in normed().items()})
    content: dict[str, Any] = {
        "state_dict": model,
        "alias": model,
        "epoch": 3,
        "name": "run",
        "lr": [0.1, (1, None, True)],
        "rng": torch.arange(5, dtype=torch.uint8),
        7: {"deep": [{"tensor": tensor, "size": torch.Size([2, 3]), "dtype": torch.float16}]},
    }
    content["self"] = content
    torch.save(content, tmp_path / "in.pt")
    report = checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    read = torch.load(tmp_path / "out.pt")
    assert list(read) == list(content)
    assert list(read["state_dict"]) == ["module.weight"]
    assert read["alias"] is read["state_dict"]
    assert read["self"] is read
    assert type(read["state_dict"]) is OrderedDict
    assert (read["epoch"], read["name"], read["lr"]) == (3, "run", [0.1, (1, None, True)])
    inner = read[7]["deep"][0]
    assert same_bits(inner["tensor"], tensor)
    assert inner["tensor"].stride() == tensor.stride()
    assert (inner["size"], inner["dtype"]) == (torch.Size([2, 3]), torch.float16)
    assert report.rows[0].name == "state_dict.module.weight"
    assert report.passed_through == 2


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64], ids=str
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_other_tensors_keep_their_bits(dtype: torch.dtype, suffix: str, tmp_path: Path) -> None:
    other = torch.randn(5, 2).to(dtype)
    state = {"before": other, **normed(), "nan": torch.tensor([torch.nan, -0.0])}
    if suffix == ".pt":
        torch.save(state, tmp_path / "in.pt")
    else:
        safetensors.torch.save_file(state, tmp_path / "in.safetensors")
    checkpoint.bake(tmp_path / f"in{suffix}", tmp_path / "out.pt")
    read = torch.load(tmp_path / "out.pt")
    assert same_bits(read["before"], other)
    assert same_bits(read["nan"], state["nan"])


def test_key_order_is_kept(tmp_path: Path) -> None:
    torch.save({"z": torch.ones(1), **normed(), "a": torch.ones(1)}, tmp_path / "in.pt")
    checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    assert list(torch.load(tmp_path / "out.pt")) == ["z", "weight", "a"]


def test_safetensors_metadata_is_kept(tmp_path: Path) -> None:
    metadata = {"format": "pt", "licence": "none"}
    safetensors.torch.save_file(normed(), tmp_path / "in.safetensors", metadata=metadata)
    assert checkpoint.inspect(tmp_path / "in.safetensors").metadata == metadata
    checkpoint.bake(tmp_path / "in.safetensors", tmp_path / "out.safetensors")
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == metadata


def test_safetensors_to_torch_says_that_metadata_is_left_out(tmp_path: Path) -> None:
    safetensors.torch.save_file(normed(), tmp_path / "in.safetensors", metadata={"format": "pt"})
    report = checkpoint.bake(tmp_path / "in.safetensors", tmp_path / "out.pt")
    assert [note.text for note in report.notes] == [
        "the safetensors metadata has no place in a torch file and is left out"
    ]


def test_flat_torch_file_to_safetensors(tmp_path: Path) -> None:
    tied = torch.randn(3, 4)
    torch.save({**normed(), "a": tied, "b": tied, "c": tied.t(), "d": tied[1]}, tmp_path / "in.pt")
    checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.safetensors")
    read = safetensors.torch.load_file(tmp_path / "out.safetensors")
    assert set(read) == {"weight", "a", "b", "c", "d"}
    assert same_bits(read["c"], tied.t())
    assert same_bits(read["d"], tied[1])
    with safetensors.safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"model": normed()}, "a mapping under 'model'"),
        ({**normed(), "epoch": 3}, "an int under 'epoch'"),
        ([normed()], "a list at the top"),
    ],
)
def test_nested_torch_file_does_not_fit_safetensors(content: Any, found: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match=f"the source has {found}"):
        checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["in.pt"]


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    layer = nn.utils.weight_norm(nn.Linear(6, 4))
    state = nn.ModuleDict({"a": layer, "b": layer}).state_dict()
    torch.save(state, tmp_path / "in.pt")
    checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    read = torch.load(tmp_path / "out.pt")
    assert read["a.weight"].data_ptr() == read["b.weight"].data_ptr()
    assert read["a.bias"].data_ptr() == read["b.bias"].data_ptr()


def test_equal_tensors_of_unlike_rules_are_not_tied(tmp_path: Path) -> None:
    g, v = torch.rand(1, 1), torch.randn(1, 6)
    state = {"a_g": g, "a_v": v, "b_orig": v, "b_mask": torch.ones(1, 6)}
    torch.save(state, tmp_path / "in.pt")
    checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    read = torch.load(tmp_path / "out.pt")
    assert read["a"].data_ptr() != read["b"].data_ptr()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_parameters_stay_parameters(requires_grad: bool, tmp_path: Path) -> None:
    state = {key: nn.Parameter(value, requires_grad=requires_grad) for key, value in normed().items()}
    torch.save(state, tmp_path / "in.pt")
    checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    weight = torch.load(tmp_path / "out.pt")["weight"]
    assert isinstance(weight, nn.Parameter)
    assert weight.requires_grad == requires_grad


def test_several_state_dicts_in_one_file(tmp_path: Path) -> None:
    content = {
        "generator": normed(),
        "ema": [normed(), {"x.weight_g": torch.ones(2, 1), "x.weight_v": torch.ones(2, 2)}],
    }
    torch.save(content, tmp_path / "in.pt")
    report = checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    assert [row.name for row in report.rows] == ["generator.weight", "ema.0.weight", "ema.1.x.weight"]


def wrong() -> dict[str, torch.Tensor]:
    return {
        "a.weight_g": torch.ones(2, 1),
        "a.weight_v": torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
        "b.weight_orig": torch.eye(3)[:2],
        "b.weight_u": torch.ones(2),
        "b.weight_v": torch.tensor([1.0, 0.0, 0.0]),
        "c.parametrizations.weight.original": torch.eye(2),
        "c.parametrizations.weight.0.base": torch.eye(2),
    }


def test_what_is_wrong_is_said_with_the_names_around_it(tmp_path: Path) -> None:
    torch.save({"ema": {"net": wrong()}}, tmp_path / "in.pt")
    report = checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt", keep_going=True)
    starts = [note.text.split(":")[0] for note in report.notes if note.level == "warning"]
    assert starts == ["not folded", "ema.net.a.weight_v", "ema.net.b.weight_u"]
    (blocked,) = (note.text for note in report.notes if note.text.startswith("not folded"))
    assert "not folded: ema.net.c.parametrizations.weight.0.base: which orthogonal map" in blocked
    with pytest.raises(
        CheckpointError, match=r"in\.pt: ema\.net\.c\.parametrizations\.weight\.0\.base: which"
    ):
        checkpoint.bake(tmp_path / "in.pt", tmp_path / "again.pt")
    found = checkpoint.inspect(tmp_path / "in.pt", deep=True).notes
    assert [note.text.split(":")[0] for note in found if note.level == "warning"] == [
        "ema.net.a.weight_v",
        "ema.net.b.weight_u",
        "ema.net.c.parametrizations.weight.0.base",
    ]


def test_files_from_before_torch_1_6(tmp_path: Path) -> None:
    torch.save({"model": normed()}, tmp_path / "in.pth", _use_new_zipfile_serialization=False)
    inspection = checkpoint.inspect(tmp_path / "in.pth")
    assert (inspection.container, len(inspection.rows)) == ("torch legacy", 1)
    checkpoint.bake(tmp_path / "in.pth", tmp_path / "out.pth")
    assert zipfile.is_zipfile(tmp_path / "out.pth")
    assert list(torch.load(tmp_path / "out.pth")["model"]) == ["weight"]


def legacy(content: object, path: Path) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def test_legacy_files_are_read_tensor_by_tensor(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {
        **normed(),
        "tied": whole,
        "same": whole,
        "view": whole[1:, ::2],
        "empty": torch.empty(0, 3),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "number": torch.tensor(3, dtype=torch.int64),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    source = legacy({"model": state, "epoch": 3}, tmp_path / "in.pt")
    report = checkpoint.bake(source, tmp_path / "out.pt")
    assert not [note for note in report.notes if "into memory" in note.text]
    read, told = torch.load(tmp_path / "out.pt"), torch.load(source)["model"]
    assert read["epoch"] == 3
    assert all(same_bits(read["model"][key], told[key]) for key in state.keys() - normed().keys())
    assert isinstance(read["model"]["parameter"], nn.Parameter)
    assert read["model"]["tied"].data_ptr() == read["model"]["same"].data_ptr()


@pytest.mark.parametrize("new", [False, True])
def test_files_of_sparse_tensors_are_read_whole(new: bool, tmp_path: Path) -> None:
    state = {**normed(), "sparse": torch.eye(3).to_sparse()}
    torch.save(state, tmp_path / "in.pt", _use_new_zipfile_serialization=new)
    report = checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    checkpoint.inspect(tmp_path / "in.pt", deep=True)
    assert [note for note in report.notes if note.text.startswith("read whole into memory")]
    assert torch.equal(torch.load(tmp_path / "out.pt")["sparse"].to_dense(), torch.eye(3))


@pytest.mark.parametrize("cut", [1, 50, 200, 400])
def test_truncated_legacy_files_are_refused(cut: int, tmp_path: Path) -> None:
    source = legacy({**normed(), "large": torch.randn(100)}, tmp_path / "in.pt")
    source.write_bytes(source.read_bytes()[:-cut])
    with pytest.raises(CheckpointError, match=r"in\.pt: truncated or corrupt torch file"):
        checkpoint.inspect(source)


def test_optimizer_state_is_pointed_out(tmp_path: Path) -> None:
    model = nn.utils.weight_norm(nn.Linear(3, 4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(2, 3)).sum().backward()
    optimizer.step()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    report = checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    assert [note.text for note in report.notes] == [
        "optimizer state is kept as it is, and belongs to the parametrized tensors"
    ]
    kept = torch.load(tmp_path / "out.pt")["optimizer"]["state"]
    assert same_bits(kept[0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


def test_names_do_not_decide_the_container(tmp_path: Path) -> None:
    safetensors.torch.save_file(normed(), tmp_path / "model.pt")
    torch.save(normed(), tmp_path / "model.safetensors")
    assert checkpoint.inspect(tmp_path / "model.pt").container == "safetensors"
    assert checkpoint.inspect(tmp_path / "model.safetensors").container == "torch zip"


def test_bare_tensor_is_a_checkpoint_with_nothing_to_fold(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "mel.pt")
    inspection = checkpoint.inspect(tmp_path / "mel.pt")
    assert (inspection.tensors, inspection.rows) == (1, ())
    assert inspection.notes[0].text == "every tensor is plain: there is nothing to fold"


def chunked(folder: Path, *, offsets: tuple[int, int]) -> Path:
    """Write a tensor as two processes would, each its half."""
    halves = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.arange(6.0, 12.0).reshape(2, 3)}
    safetensors.torch.save_file(halves, folder / "halves.safetensors")
    checkpoint.convert(folder / "halves.safetensors", folder / "in", container="dcp")
    metadata = pickle.loads((folder / "in" / ".metadata").read_bytes())
    whole = metadata.state_dict_metadata.pop("a")
    (chunk,), (other,) = whole.chunks, metadata.state_dict_metadata.pop("b").chunks
    chunk.offsets, other.offsets = (torch.Size([offset, 0]) for offset in offsets)
    whole.size, whole.chunks[:] = torch.Size([4, 3]), [chunk, other]
    metadata.state_dict_metadata["whole"] = whole
    places = dict(metadata.storage_data)
    metadata.storage_data = {
        type(index)("whole", one.offsets): places[index]
        for index, one in zip(places, (chunk, other), strict=True)
    }
    metadata.planner_data = {"whole": ("whole",)}
    (folder / "in" / ".metadata").write_bytes(pickle.dumps(metadata))
    return folder / "in"


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_chunks_of_several_processes_are_one_tensor(suffix: str, tmp_path: Path) -> None:
    checkpoint.convert(chunked(tmp_path, offsets=(0, 2)), tmp_path / f"out{suffix}")
    load = safetensors.torch.load_file if suffix == ".safetensors" else torch.load
    assert same_bits(load(tmp_path / f"out{suffix}")["whole"], torch.arange(12.0).reshape(4, 3))


@pytest.mark.parametrize("offsets", [(0, 1), (1, 0), (0, 3)])
def test_chunks_that_overlap_or_leave_a_gap_are_refused(offsets: tuple[int, int], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has chunks that overlap|has a chunk outside of its shape"):
        checkpoint.inspect(chunked(tmp_path, offsets=offsets))


@pytest.mark.parametrize("target", ["out.pt", "out.safetensors", "again"])
@pytest.mark.parametrize("layout", ["shards", "dcp"])
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_equal_places_in_several_files_are_not_one_tensor(layout: str, target: str, tmp_path: Path) -> None:
    state = {name: torch.randn(4, 4) for name in "abc"}
    source = tmp_path / layout
    source.mkdir()
    if layout == "dcp":
        writer = dcp.FileSystemWriter(source, single_file_per_rank=False)
        dcp.save(state, storage_writer=writer, no_dist=True)
    else:
        for name, value in state.items():
            safetensors.torch.save_file({name: value}, source / f"{name}.safetensors")
        index = {"weight_map": {name: f"{name}.safetensors" for name in state}}
        (source / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint.convert(source, tmp_path / target)
    checkpoint.convert(tmp_path / target, tmp_path / "last.safetensors")
    read = safetensors.torch.load_file(tmp_path / "last.safetensors")
    assert all(same_bits(read[name], value) for name, value in state.items())
    assert checkpoint.verify(source, tmp_path / target).ok


# Refused --------------------------------------------------------------------------------------------------------------


def truncated(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


@pytest.mark.parametrize("keep", [0.2, 0.5, 0.99])
@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_truncated_files(kind: str, keep: float, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if kind == "safetensors":
        safetensors.torch.save_file(normed(), path)
    else:
        torch.save({**normed(), "w": torch.randn(99)}, path, _use_new_zipfile_serialization=kind == "zip")
    truncated(path, keep)
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        checkpoint.inspect(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        checkpoint.inspect(tmp_path / "none.pt")


def test_directory(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="got a directory"):
        checkpoint.inspect(tmp_path)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "the file is empty"),
        (b"hello, world" * 9, "no known format"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (json.dumps({"weight_map": {}}).encode(), "looks like JSON"),
        (pickle.dumps({"a": 1}), "a pickle that torch.save did not write"),
    ],
)
def test_files_that_are_no_checkpoints(data: bytes, text: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=text):
        checkpoint.inspect(path)


def test_zip_that_torch_did_not_write(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(CheckpointError, match=r"not one that torch\.save wrote"):
        checkpoint.inspect(tmp_path / "model.pt")


def test_a_shard_that_is_missing_is_named_with_its_index(tmp_path: Path) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"weight": "model-00001.safetensors"}}))
    with pytest.raises(
        CheckpointError, match=r"index\.json: names the shard model-00001\.safetensors, which is not th"
    ):
        checkpoint.inspect(index)


def test_a_file_without_tensors(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "in.pt")
    report = checkpoint.inspect(tmp_path / "in.pt")
    assert str(report).splitlines() == [
        f"{tmp_path / 'in.pt'}: torch zip, {report.size_bytes:,} bytes, 0 tensors",
        "note: it holds no tensors: there is nothing to fold",
    ]


def test_torchscript(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/data.pkl", b"")
        archive.writestr("model/code/layer.py", b"import os\n" * 100, zipfile.ZIP_DEFLATED)
        archive.writestr("model/constants.pkl", b"")
    with pytest.raises(CheckpointError, match="is a TorchScript archive"):
        checkpoint.inspect(tmp_path / "model.pt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "name"),
    [(nn.Linear(2, 2), "torch.nn.modules.linear.Linear"), ({"path": Path("a")}, "pathlib")],
    ids=["module", "path"],
)
def test_files_that_need_code(content: object, name: str, legacy: bool, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=f"loading it would run code: {name}") as caught:
        checkpoint.inspect(tmp_path / "model.pt")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 3
