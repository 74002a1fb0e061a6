"""Maps with hand-written derivatives: every way of differentiating and recording them gives the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from parametrize.oracle import OURS, TORCH, Impl
from torchkiln.families._maps import orthogonal as maps

# torch's own: forward mode compiles with jit.script, and vmap lacks a batching rule or two.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`torch.jit.script` is deprecated:DeprecationWarning",
    "ignore:There is a performance drop because we have not yet implemented the batching rule:UserWarning",
)

Map = Callable[[Tensor], Tensor]


def around_a_base(f: Callable[[Tensor, Tensor], Tensor]) -> Map:
    def around(X: Tensor) -> Tensor:
        n = X.shape[-2]
        reflected = torch.eye(n, dtype=X.dtype) - 2 / n
        return f(X, reflected.expand(*X.shape[:-1], n))

    return around


_MAPS = {"exponential": maps.exponential, "cayley": maps.cayley, "householder": maps.householder}
EVERY_MAP = pytest.mark.parametrize(
    "f",
    [*_MAPS.values(), *map(around_a_base, _MAPS.values())],
    ids=[*_MAPS, *(f"{name} around a base" for name in _MAPS)],
)
# Square, full, thin, and a batch.
EVERY_SHAPE = pytest.mark.parametrize("shape", [(3, 3), (4, 3), (5, 2), (2, 3, 2)], ids=str)


def free(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype, requires_grad=True)


@EVERY_MAP
@EVERY_SHAPE
def test_first_derivatives(f: Map, shape: tuple[int, ...]) -> None:
    assert gradcheck(f, free(shape), check_forward_ad=True, check_batched_grad=True)


@EVERY_MAP
@EVERY_SHAPE
def test_second_derivatives(f: Map, shape: tuple[int, ...]) -> None:
    assert gradgradcheck(f, free(shape), check_fwd_over_rev=True)


@pytest.mark.parametrize("f", [maps.exponential, maps.cayley], ids=["exponential", "cayley"])
@pytest.mark.parametrize("shape", [(3, 3), (5, 2)], ids=str)
def test_complex_derivatives(f: Map, shape: tuple[int, ...]) -> None:
    X = free(shape, torch.complex128)
    assert gradcheck(f, X, check_forward_ad=True)
    assert gradgradcheck(f, X)


@EVERY_MAP
@pytest.mark.parametrize("shape", [(3, 3), (5, 2)], ids=str)
def test_derivatives_at_the_start(f: Map, shape: tuple[int, ...]) -> None:
    """A is zero there; only the diagonal is not, whose signs the Householder map reads."""
    X = -torch.eye(*shape, dtype=torch.float64)
    X.requires_grad_()
    assert gradcheck(f, X)
    assert gradgradcheck(f, X)


@pytest.mark.parametrize("f", _MAPS.values(), ids=_MAPS)
@pytest.mark.parametrize(
    "shape",
    [(60, 60), (90, 60), (150, 20), (3, 60, 60), (2, 2, 60, 8), (200, 200), (300, 200), (2, 140, 140)],
    ids=str,
)
def test_a_base_multiplies_the_value(f: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    X = torch.randn(shape, dtype=torch.float64) / shape[-2] ** 0.5
    X.requires_grad_()
    base = torch.linalg.qr(torch.randn(*shape[:-1], shape[-2], dtype=X.dtype))[0]
    value, expected = f(X, base), base @ f(X)
    torch.testing.assert_close(value, expected)
    G = torch.randn_like(value)
    torch.testing.assert_close(torch.autograd.grad(value, X, G), torch.autograd.grad(expected, X, G))


def cubes(f: Map) -> Map:
    return lambda X: f(X).pow(3).sum()


@EVERY_MAP
@EVERY_SHAPE
def test_transforms(f: Map, shape: tuple[int, ...]) -> None:
    X = free(shape)
    Xs = torch.stack([X.detach(), 2 * X.detach()])
    (expected,) = torch.autograd.grad(cubes(f)(X), X)
    torch.testing.assert_close(torch.func.grad(cubes(f))(X.detach()), expected)
    torch.testing.assert_close(torch.func.vmap(f)(Xs), torch.stack([f(one) for one in Xs]))
    each = torch.stack([torch.func.grad(cubes(f))(one) for one in Xs])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(cubes(f)))(Xs), each)
    torch.testing.assert_close(
        torch.func.hessian(cubes(f))(X.detach()), torch.func.jacrev(torch.func.grad(cubes(f)))(X.detach())
    )


@pytest.mark.slow
@EVERY_MAP
@EVERY_SHAPE
def test_compiled(f: Map, shape: tuple[int, ...]) -> None:
    torch._dynamo.reset()  # the one function cubes() is compiled for every map and shape, beyond the limit
    X = free(shape)
    compiled: Any = torch.compile(cubes(f), fullgraph=True, backend="aot_eager")
    value, expected = compiled(X), cubes(f)(X)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, X), torch.autograd.grad(expected, X))


@pytest.mark.parametrize("name", _MAPS)
@pytest.mark.parametrize("based", [False, True], ids=["bare", "around a base"])
@pytest.mark.parametrize("shape", [(60, 60), (60, 40), (60, 20), (140, 140), (140, 20), (2, 60, 60)], ids=str)
@pytest.mark.parametrize("in_columns", [False, True], ids=["rows", "columns"])
def test_operators_are_laid_out_as_they_say(
    name: str, shape: tuple[int, ...], *, based: bool, in_columns: bool
) -> None:
    """What the compiler builds on."""
    X = free((*shape[:-2], shape[-1], shape[-2])).mT.detach() if in_columns else free(shape).detach()
    base = torch.eye(shape[-2], dtype=X.dtype).expand(*shape[:-1], shape[-2]) if based else None
    operator: Any = getattr(torch.ops.torchkiln, name)
    torch.library.opcheck(operator.default, (X, base), test_utils=["test_schema", "test_faketensor"])


class Applied(nn.Module):
    def __init__(self, f: Map) -> None:
        super().__init__()
        self.f = f

    def forward(self, X: Tensor) -> Tensor:
        return self.f(X)


@EVERY_MAP
@pytest.mark.parametrize("shape", [(4, 4), (9, 3)], ids=str)
def test_an_exported_map_has_torchs_operators_alone(f: Map, shape: tuple[int, ...]) -> None:
    X = free(shape).detach()
    program = torch.export.export(Applied(f), (X,))
    assert "torchkiln" not in str(program.graph)
    torch.testing.assert_close(program.module()(X), f(X))


def saved_bytes(impl: Impl, shape: tuple[int, int], orthogonal_map: str) -> int:
    """What reading the weight keeps for the backward pass, beside the parameters and buffers."""
    n, k = shape
    layer = impl.N.orthogonal(nn.Linear(k, n, bias=False), orthogonal_map=orthogonal_map)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(shape).tril(-1) / n**0.5)
    held = {tensor.untyped_storage().data_ptr() for tensor in layer.state_dict(keep_vars=True).values()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in held:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        weight = layer.weight
    assert weight.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
@pytest.mark.parametrize("shape", [(64, 64), (64, 50), (128, 16), (16, 128)], ids=str)
def test_no_more_is_saved_than_by_torch(shape: tuple[int, int], orthogonal_map: str) -> None:
    ours, theirs = (saved_bytes(impl, shape, orthogonal_map) for impl in (OURS, TORCH))
    assert ours <= theirs + 64  # a number or two
