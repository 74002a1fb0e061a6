"""The options of a copy: which tensors, which names, which dtype, which container, and what a dry run says."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tests.checkpoint.cases import same_bits
from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError, NothingToFoldError, OutputExistsError
from torchkiln._core.spellings import fold
from torchkiln.checkpoint import _rows


def state() -> dict[str, Tensor]:
    return {
        "module.a.weight_g": torch.rand(5, 1) + 0.5,
        "module.a.weight_v": torch.randn(5, 6),
        "module.a.bias": torch.randn(5),
        "module.b.weight_orig": torch.randn(4, 4),
        "module.b.weight_mask": (torch.rand(4, 4) > 0.5).float(),
        "steps": torch.tensor(7),
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    torch.save(state(), tmp_path / "in.pt")
    return tmp_path / "in.pt"


# --- block by block -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (7, 1), (9, 5), (1, 6), (6, 3, 2), (3, 200)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_blocks_have_the_bits_of_the_whole(
    shape: tuple[int, ...], dtype: torch.dtype, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rows, "_BLOCK_BYTES", 64)
    g, v = torch.rand(shape[0], *[1] * (len(shape) - 1)).to(dtype), torch.randn(shape).to(dtype)
    names = ("parametrizations.weight.original0", "parametrizations.weight.original1")
    save = safetensors.torch.save_file if suffix == ".safetensors" else torch.save
    save(dict(zip(names, (g, v), strict=True)), tmp_path / f"in{suffix}")
    checkpoint.bake(tmp_path / f"in{suffix}", tmp_path / "out.pt", dims={"weight": 0})
    wide = fold.compute_dtype(dtype)
    expected = fold.weight_norm(g.to(wide), v.to(wide), 0).to(dtype)
    assert same_bits(torch.load(tmp_path / "out.pt")["weight"], expected)


def test_what_is_wrong_in_one_block_is_said_of_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_rows, "_BLOCK_BYTES", 64)
    v = torch.randn(30, 4)
    v[17] = 0
    torch.save({"w_g": torch.ones(30, 1), "w_v": v}, tmp_path / "in.pt")
    report = checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    (warning,) = (note.text for note in report.notes if note.level == "warning")
    assert warning == "w_v: is zero at 17 of dim 0, and so is the weight; torch computes NaN there"
    assert torch.load(tmp_path / "out.pt")["w"].eq(0).all(1).nonzero().tolist() == [[17]]


@pytest.mark.parametrize("tensor", ["w_v", "w_orig"])
def test_a_wrong_block_is_not_written(tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = {"w_g": torch.ones(9, 1)} if tensor == "w_v" else {"w_mask": torch.ones(9, 4)}
    torch.save({**other, tensor: torch.randn(9, 4)}, tmp_path / "in.pt")
    broken = "_normed" if tensor == "w_v" else "_pruned"
    monkeypatch.setattr(_rows, broken, lambda *inputs: inputs[0] * 0 + torch.randn(9, 4))
    with pytest.raises(CheckpointError, match="computed twice, with different results"):
        checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
    checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt", verify=False)


# --- which tensors, names and dtypes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "folded"),
    [
        ({"include": ["*.a.*"]}, ["module.a.weight"]),
        ({"exclude": ["*.a.*"]}, ["module.b.weight"]),
        ({"include": ["module.*"], "exclude": ["module.b.weight"]}, ["module.a.weight"]),
    ],
)
def test_include_and_exclude(
    options: dict[str, Any], folded: list[str], source: Path, tmp_path: Path
) -> None:
    report = checkpoint.bake(source, tmp_path / "out.pt", **options)
    assert [row.name for row in report.rows] == folded
    before, after = torch.load(source), torch.load(tmp_path / "out.pt")
    assert all(same_bits(after[key], before[key]) for key in set(before) & set(after))
    assert len(after) == len(before) - 1
    assert any("is left as it is" in note.text for note in report.notes)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"include": ["c.*"]}, r'include: "c\.\*" matches no parametrized tensor of .*in\.pt'),
        ({"exclude": ["*.bias"]}, r'exclude: "\*\.bias" matches no parametrized tensor'),
        ({"rename": {"x.": ""}}, r'rename: no tensor of .*in\.pt begins with "x\."'),
        (
            {"rename": {"module.a.weight": "module.b.weight"}},
            "2 tensors would have the name 'module.b.weight'",
        ),
        ({"rename": {"steps": ""}}, "1 tensors would have the name ''"),
        ({"dtype": torch.int8}, r"dtype: expected one of bfloat16, .*, got torch\.int8"),
        ({"container": "onnx"}, "container: expected one of dcp, safetensors, torch, got 'onnx'"),
        ({"max_shard_size": 0}, "max_shard_size: expected at least one byte, got 0"),
        ({"max_shard_size": 9, "container": "torch"}, "shards are written as safetensors, not as torch"),
    ],
)
def test_options_that_fit_nothing_are_refused(options: dict[str, Any], text: str, source: Path) -> None:
    with pytest.raises(CheckpointError, match=text):
        checkpoint.bake(source, source.with_name("out"), **options)
    assert [path.name for path in source.parent.iterdir()] == ["in.pt"]


@pytest.mark.parametrize("suffix", [".onnx", ".gguf", ".h5"])
def test_other_formats_are_not_written_by_name(suffix: str, source: Path) -> None:
    with pytest.raises(CheckpointError, match=rf"out\{suffix}: \{suffix} is the suffix of another format"):
        checkpoint.bake(source, source.with_name(f"out{suffix}"))
    assert [path.name for path in source.parent.iterdir()] == ["in.pt"]


def test_a_spelling_that_is_there_already(source: Path) -> None:
    with pytest.raises(
        NothingToFoldError, match="to the legacy spelling, which 1 tensor has already; nothing"
    ):
        checkpoint.convert(source, source.with_name("out.pt"), to="legacy")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_shards_do_not_get_the_name_of_a_file(suffix: str, source: Path) -> None:
    before = sorted(source.parent.iterdir())
    text = rf"out\{suffix}: shards and their .*index\.json are written as a directory.*\n.*such as .*/out, or"
    with pytest.raises(CheckpointError, match=text):
        checkpoint.bake(source, source.with_name(f"out{suffix}"), max_shard_size=100)
    with pytest.raises(CheckpointError, match=text):
        checkpoint.save(torch.nn.Linear(2, 2), source.with_name(f"out{suffix}"), max_shard_size=100)
    assert sorted(source.parent.iterdir()) == before


def test_everything_excluded_is_nothing_folded(source: Path) -> None:
    with pytest.raises(NothingToFoldError, match="none of its 2 parametrized tensors is to be folded"):
        checkpoint.bake(source, source.with_name("out.pt"), exclude=["*"])


def test_rename_takes_the_longest_beginning(source: Path, tmp_path: Path) -> None:
    report = checkpoint.bake(source, tmp_path / "out.pt", rename={"module.": "", "module.b": "second"})
    assert set(torch.load(tmp_path / "out.pt")) == {"a.weight", "a.bias", "second.weight", "steps"}
    assert [row.written for row in report.rows] == [("a.weight",), ("second.weight",)]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_dtype_is_rounded_once(suffix: str, source: Path, tmp_path: Path) -> None:
    checkpoint.bake(source, tmp_path / "wide.pt")
    checkpoint.bake(source, tmp_path / f"out{suffix}", dtype=torch.bfloat16)
    load = torch.load if suffix == ".pt" else safetensors.torch.load_file
    wide, read = torch.load(tmp_path / "wide.pt"), load(tmp_path / f"out{suffix}")
    assert read["steps"].dtype == torch.int64
    assert all(same_bits(read[key], wide[key].bfloat16()) for key in wide if key != "steps")


def test_values_beyond_the_new_dtype_are_warned_of(tmp_path: Path) -> None:
    plain = torch.tensor([[1e9, 1.0], [torch.inf, 2.0]])
    torch.save(
        {"w_g": torch.full((2, 1), 1e6), "w_v": torch.ones(2, 3), "plain": plain, "inf": plain[1:]},
        tmp_path / "in.pt",
    )
    report = checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt", dtype=torch.float16)
    assert [note.text for note in report.notes if note.level == "warning"] == [
        f"{name}: has values beyond the range of float16, which become infinite" for name in ("w", "plain")
    ]


def test_keep_going_is_never_silent(tmp_path: Path) -> None:
    torch.save(
        {"a_g": torch.ones(3, 1), "a_v": torch.ones(3, 4), "b_orig": torch.ones(2, 2)}, tmp_path / "in.pt"
    )
    with pytest.raises(CheckpointError, match="b_orig: an original without"):
        checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt")
    report = checkpoint.bake(tmp_path / "in.pt", tmp_path / "out.pt", keep_going=True)
    assert set(torch.load(tmp_path / "out.pt")) == {"a", "b_orig"}
    (warning,) = (note for note in report.notes if note.level == "warning")
    assert (warning.name, warning.text.startswith("not folded: b_orig: an original without")) == ("b", True)


# --- dry runs and disks -------------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """Options, and the name of what they write."""

    options: dict[str, Any]
    target: str


PLANNED = [
    Planned({}, "out.pt"),
    Planned({}, "out.safetensors"),
    Planned({"max_shard_size": 100}, "shards"),
    Planned({"container": "dcp"}, "dcp"),
]


@pytest.mark.parametrize("planned", PLANNED, ids=lambda planned: planned.target)
def test_a_dry_run_writes_nothing_and_knows_the_size(planned: Planned, source: Path, tmp_path: Path) -> None:
    target = tmp_path / planned.target
    dry = checkpoint.bake(source, target, dry_run=True, **planned.options)
    assert not target.exists()
    report = checkpoint.bake(source, target, **planned.options)
    assert (dry.dry_run, report.dry_run) == (True, False)
    assert [row.name for row in dry.rows] == [row.name for row in report.rows]
    # The index of shards and the directory of an archive are small change.
    assert abs(dry.bytes_written - report.bytes_written) < 4000
    assert any("188 computed" in note.text or "184 computed" in note.text for note in dry.notes)


def test_a_dry_run_refuses_what_the_run_would(source: Path) -> None:
    source.with_name("out.pt").write_bytes(b"precious")
    with pytest.raises(OutputExistsError):
        checkpoint.bake(source, source.with_name("out.pt"), dry_run=True)


def test_a_full_disk_is_told_before_anything_is_written(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=r"needs [\d,]+ bytes, and 1 are free on its disk"):
        checkpoint.bake(source, source.with_name("out.pt"))


# --- from any container to any ------------------------------------------------------------------------------------


def written(kind: str, folder: Path) -> Path:
    """Write the state as each library does it."""
    tensors = state()
    if kind == "dcp":
        dcp.save(tensors, checkpoint_id=folder / "in", no_dist=True)
        return folder / "in"
    if kind == "torch":
        torch.save(tensors, folder / "in.pt")
        return folder / "in.pt"
    if kind == "safetensors":
        safetensors.torch.save_file(tensors, folder / "in.safetensors")
        return folder / "in.safetensors"
    (folder / "in").mkdir()
    parts = {"one.safetensors": list(tensors)[:3], "two.safetensors": list(tensors)[3:]}
    for name, keys in parts.items():
        safetensors.torch.save_file({key: tensors[key] for key in keys}, folder / "in" / name)
    index = {"metadata": {}, "weight_map": {key: name for name, keys in parts.items() for key in keys}}
    (folder / "in" / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder / "in"


def read_back(kind: str, target: Path) -> dict[str, Tensor]:
    """Read it as each library does it."""
    if kind == "dcp":
        empty = {key: torch.empty_like(value) for key, value in state().items()}
        dcp.load(empty, checkpoint_id=target, no_dist=True)
        return empty
    if kind == "torch":
        loaded: dict[str, Tensor] = torch.load(target, weights_only=True, mmap=True)
        return loaded
    if kind == "safetensors":
        return safetensors.torch.load_file(target)
    index = json.loads((target / "model.safetensors.index.json").read_text())["weight_map"]
    shards = {name: safetensors.torch.load_file(target / name) for name in set(index.values())}
    assert len(shards) > 1
    return {key: shards[name][key] for key, name in index.items()}


KINDS = {
    "safetensors": ("out.safetensors", {}),
    "sharded": ("out", {"max_shard_size": 100}),
    "torch": ("out.pt", {}),
    "dcp": ("out", {"container": "dcp"}),
}


ONE_PROCESS = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@ONE_PROCESS
@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_any_container_becomes_any_other(before: str, after: str, tmp_path: Path) -> None:
    name, options = KINDS[after]
    torch.manual_seed(0)
    source = written(before, tmp_path)
    report = checkpoint.convert(source, tmp_path / name, **options)
    torch.manual_seed(0)
    expected, read = state(), read_back(after, tmp_path / name)
    assert read.keys() == expected.keys()
    assert all(same_bits(read[key], expected[key]) for key in expected)
    assert (report.rows, report.passed_through) == ((), len(expected))


@ONE_PROCESS
@pytest.mark.parametrize("after", KINDS)
@pytest.mark.parametrize("before", KINDS)
def test_a_file_is_baked_from_any_container_into_any(before: str, after: str, tmp_path: Path) -> None:
    name, options = KINDS[after]
    torch.manual_seed(0)
    source = written(before, tmp_path)
    checkpoint.bake(source, tmp_path / name, **options)
    assert checkpoint.inspect(tmp_path / name).tensors == 4
    assert checkpoint.verify(source, tmp_path / name).ok


def test_a_copy_can_rename_and_cast(source: Path, tmp_path: Path) -> None:
    checkpoint.convert(source, tmp_path / "out.pt", rename={"module.": ""}, dtype=torch.float64)
    read = torch.load(tmp_path / "out.pt")
    assert list(read) == [key.removeprefix("module.") for key in state()]
    assert read["a.bias"].dtype == torch.float64


SPELLED = {
    "torch": ["a.parametrizations.weight.original0", "a.parametrizations.weight.original1"],
    "legacy": ["a.weight_g", "a.weight_v"],
}


@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("before", "to"), [("legacy", "torch"), ("torch", "legacy")])
def test_spelling_names_and_dtype_change_in_one_run(
    before: str, to: Any, dtype: torch.dtype | None, source: Path, tmp_path: Path
) -> None:
    if before == "torch":
        checkpoint.convert(source, tmp_path / "new.pt", to="torch")
        source = tmp_path / "new.pt"
    once = checkpoint.convert(source, tmp_path / "once.pt", to=to, rename={"module.": ""}, dtype=dtype)
    checkpoint.convert(source, tmp_path / "first.pt", to=to)
    checkpoint.convert(tmp_path / "first.pt", tmp_path / "second.pt", rename={"module.": ""}, dtype=dtype)
    found, expected = torch.load(tmp_path / "once.pt"), torch.load(tmp_path / "second.pt")
    assert list(found)[:2] == SPELLED[to]
    assert list(found) == list(expected)
    assert all(same_bits(found[key], expected[key]) for key in expected)
    (row,) = once.rows
    assert row.written == tuple(SPELLED[to])
    assert row.dtype == str(dtype or torch.float32).removeprefix("torch.")
    assert not row.keys[0].startswith("a.")


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("dtype", [None, torch.float64, torch.bfloat16], ids=str)
def test_norms_are_put_in_under_new_names_and_dtypes(
    dtype: torch.dtype | None, norm: str, tmp_path: Path
) -> None:
    torch.save({"module.conv.weight": torch.randn(4, 6), "module.bias": torch.ones(2)}, tmp_path / "in.pt")
    options: dict[str, Any] = {norm: ["module.conv.weight"], "rename": {"module.": ""}, "dtype": dtype}
    checkpoint.convert(tmp_path / "in.pt", tmp_path / "out.pt", to="torch", **options)
    checkpoint.convert(tmp_path / "in.pt", tmp_path / "plain.pt", rename={"module.": ""}, dtype=dtype)
    checkpoint.bake(tmp_path / "out.pt", tmp_path / "back.pt")
    back, plain = torch.load(tmp_path / "back.pt"), torch.load(tmp_path / "plain.pt")
    assert list(back) == list(plain) == ["conv.weight", "bias"]
    assert {one.dtype for one in torch.load(tmp_path / "out.pt").values()} == {dtype or torch.float32}
    wide = plain["conv.weight"].double()
    expected = wide if norm == "weight_norm" else wide / torch.linalg.matrix_norm(wide, 2)
    rounding = 2e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(back["conv.weight"].double(), expected, rtol=rounding, atol=rounding)


def test_new_names_that_collide_are_refused(tmp_path: Path) -> None:
    torch.save({"x.weight": torch.randn(3, 2), "y.weight_g": torch.ones(1)}, tmp_path / "in.pt")
    options: dict[str, Any] = {"to": "legacy", "weight_norm": ["x.weight"], "rename": {"x.": "y."}}
    with pytest.raises(CheckpointError, match=r"rename: 2 tensors would have the name 'y\.weight_g'"):
        checkpoint.convert(tmp_path / "in.pt", tmp_path / "out.pt", **options)
    assert not (tmp_path / "out.pt").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"weight_norm": ["*"]}, 'weight_norm: needs to="torch" or to="legacy"'),
        ({"assume": {"*": "identity"}}, 'assume: "\\*" is of no use'),
        ({"to": "torch", "rename": {"a.": ""}}, 'rename: no tensor of .*in.pt begins with "a."'),
        (
            {"to": "torch", "rename": {"module.a": "module.b"}, "weight_norm": ["module.b.*"]},
            "matches no plain tensor",
        ),
    ],
)
def test_a_copy_refuses_what_it_would_ignore(options: dict[str, Any], text: str, source: Path) -> None:
    with pytest.raises(CheckpointError, match=text):
        checkpoint.convert(source, source.with_name("out.pt"), **options)
