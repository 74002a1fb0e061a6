"""Laws over random names, shapes, dims and damage."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from tests.checkpoint.cases import read_file, same_bits, save
from torchkiln import checkpoint
from torchkiln._core.errors import CheckpointError, NothingToFoldError
from torchkiln._core.spellings import fold
from torchkiln._core.spellings.options import Options
from torchkiln._core.spellings.recognise import recognise
from torchkiln._core.spellings.spelled import spectral_norm_dims, weight_norm_dims
from torchkiln.checkpoint._io import Entry, Group

shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
matrices = st.lists(st.integers(1, 4), min_size=2, max_size=4).map(tuple)
words = st.text(st.characters(exclude_characters=".", exclude_categories=["Cs"]), min_size=1, max_size=6)
modules = st.lists(words, max_size=3)


def drawn(data: st.DataObject, shape: tuple[int, ...]) -> tuple[Tensor, int | None]:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    dim = data.draw(st.sampled_from([None, *range(len(shape))]))
    return torch.randn(shape), dim


@given(shapes, st.data())
def test_weight_norm_dims_contain_the_dim_that_made_the_gain(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    v, dim = drawn(data, shape)
    g = torch.norm_except_dim(v, 2, -1 if dim is None else dim)
    assert dim in weight_norm_dims(tuple(g.shape), shape)


@given(shapes, st.data())
def test_every_dim_of_a_gain_with_one_element_means_the_same(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    v, dim = drawn(data, shape)
    g = torch.norm_except_dim(v, 2, -1 if dim is None else dim) * 1.5
    one, *others = (fold.weight_norm(g, v, d) for d in weight_norm_dims(tuple(g.shape), shape))
    for other in others:
        torch.testing.assert_close(other, one)


@given(matrices, st.data())
def test_spectral_norm_dims_contain_the_dim_that_made_the_vectors(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    W, dim = drawn(data, shape)
    assume(dim is not None)
    rows, columns = fold.matrix(W, dim or 0).shape
    assert dim in spectral_norm_dims(shape, (rows,), (columns,))


@given(shapes, st.data())
def test_split_gain_is_the_inverse_of_weight_norm_to_the_bit(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    W, dim = drawn(data, shape)
    assert torch.equal(fold.weight_norm(*fold.split_gain(W, dim), dim), W)


@given(shapes, st.data())
def test_folds_agree_with_their_definitions(shape: tuple[int, ...], data: st.DataObject) -> None:
    v, dim = drawn(data, shape)
    v = v.double()
    g = torch.norm_except_dim(v, 2, -1 if dim is None else dim) * 1.5
    torch.testing.assert_close(fold.weight_norm(g, v, dim), fold.exact_weight_norm(g, v, dim))


@given(matrices, st.data())
def test_singular_pair_gives_norm_one(shape: tuple[int, ...], data: st.DataObject) -> None:
    W, dim = drawn(data, shape)
    W, dim = W.double(), dim or 0
    u, v, sigma = fold.singular_pair(W, dim)
    normed = fold.spectral_norm(W, u, v, dim)
    torch.testing.assert_close(normed, W / sigma)
    torch.testing.assert_close(fold.exact_spectral_norm(W, u, v, dim), normed)


def spelled(style: str, prefix: str, name: str, g: Tensor, v: Tensor) -> dict[str, Tensor]:
    if style == "torch":
        return {
            f"{prefix}parametrizations.{name}.original0": g,
            f"{prefix}parametrizations.{name}.original1": v,
        }
    return {f"{prefix}{name}_g": g, f"{prefix}{name}_v": v}


@given(modules, words, shapes, st.sampled_from(["torch", "legacy"]), st.data())
def test_any_name_under_any_prefix_is_recognised(
    path: list[str], name: str, shape: tuple[int, ...], style: str, data: st.DataObject
) -> None:
    assume("parametrizations" not in path)
    prefix = "".join(f"{word}." for word in path)
    v, dim = drawn(data, shape)
    g = torch.norm_except_dim(v, 2, -1 if dim is None else dim)
    assume(not (style == "legacy" and len(shape) == 1 and g.shape == v.shape))
    state = spelled(style, prefix, name, g, v)
    entries = {key: Entry(tuple(value.shape), value.dtype) for key, value in state.items()}
    (item,) = recognise(Group((), entries), Options()).outermost
    assert (item.name, item.originals) == (prefix + name, tuple(state))


keys = st.lists(words, min_size=1, max_size=4).map(".".join)
endings = st.sampled_from(
    [
        "",
        "_g",
        "_v",
        "_u",
        "_orig",
        "_mask",
        ".original",
        ".original0",
        ".original1",
        ".0._u",
        ".0._v",
        ".1.base",
    ]
)
anything = st.dictionaries(
    st.tuples(st.sampled_from(["", "a.", "parametrizations.w", "a.parametrizations.w"]), endings).map(
        "".join
    ),
    st.sampled_from([(), (1,), (3,), (3, 1), (3, 3), (3, 4)]),
    max_size=8,
)


@given(anything, st.sampled_from([".pt", ".safetensors"]))
def test_bake_folds_refuses_or_finds_nothing(shaped: dict[str, tuple[int, ...]], suffix: str) -> None:
    torch.manual_seed(0)
    state = {key or "x": torch.randn(shape) for key, shape in shaped.items()}
    with tempfile.TemporaryDirectory() as folder:
        source, target = save(state, Path(folder) / f"in{suffix}"), Path(folder) / f"out{suffix}"
        inspection = checkpoint.inspect(source)
        try:
            report = checkpoint.bake(source, target)
        except NothingToFoldError:
            assert not inspection.rows
        except CheckpointError:
            assert inspection.rows
        else:
            baked = read_file(target)
            used = {key for row in report.rows for key in row.keys}
            assert set(baked) == (set(state) - used) | {row.name for row in report.rows}
            assert all(same_bits(baked[key], state[key]) for key in set(state) - used)
            assert checkpoint.verify(source, target).rows


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    state = {"weight_g": torch.ones(3, 1), "weight_v": torch.ones(3, 4), "bias": torch.ones(3)}
    save(state, folder / "a.safetensors")
    torch.save({"model": state, "epoch": 1}, folder / "b.pt")
    torch.save({"model": state}, folder / "c.pt", _use_new_zipfile_serialization=False)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore")  # torch warns about pickle protocols that damage makes up
@given(st.sampled_from(["a.safetensors", "b.pt", "c.pt"]), st.data())
def test_damaged_files_are_read_or_refused(whole: dict[str, bytes], name: str, data: st.DataObject) -> None:
    content = bytearray(whole[name])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.write_bytes(bytes(content))
        with suppress(CheckpointError):  # and nothing else
            assert checkpoint.inspect(path).container
