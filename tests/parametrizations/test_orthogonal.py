"""``orthogonal`` gives torch's numbers, names and errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from parametrize.oracle import OURS, TORCH, Impl, beyond_torch

from .agreement import assert_agree, assert_close, assert_same_error, assert_same_names, both

MAPS = ["matrix_exp", "cayley", "householder"]
SHAPES = {
    "square": (4, 4),
    "tall": (5, 3),
    "wide": (3, 5),
    "column": (4, 1),
    "row": (1, 4),
    "one": (1, 1),
    "batch of square": (2, 3, 3),
    "batch of tall": (2, 4, 3),
    "batch of wide": (2, 3, 4),
    "two batches": (2, 1, 4, 2),
}
EVERY_SHAPE = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
EVERY_MAP = pytest.mark.parametrize("orthogonal_map", MAPS)
BOTH_WAYS = pytest.mark.parametrize("use_trivialization", [True, False], ids=["base", "no base"])


class Holder(nn.Module):
    """One tensor of any shape."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape, dtype=dtype))


def orthogonal(module: nn.Module, impl: Impl, *arguments: object, **options: object) -> nn.Module:
    return impl.N.orthogonal(module, *arguments, **options)


def gram_error(Q: Tensor) -> float:
    """How far the columns, or the rows of a wide matrix, are from orthonormal."""
    Q = Q.mT if Q.shape[-2] < Q.shape[-1] else Q
    return (Q.mH @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max().item()


@EVERY_SHAPE
@EVERY_MAP
@BOTH_WAYS
def test_registration(shape: tuple[int, ...], orthogonal_map: str, use_trivialization: bool) -> None:
    theirs, ours = both(
        lambda impl: orthogonal(
            Holder(shape), impl, "weight", orthogonal_map, use_trivialization=use_trivialization
        )
    )
    assert_agree(ours, theirs)
    assert gram_error(ours.weight) < 1e-13


@EVERY_SHAPE
@EVERY_MAP
@BOTH_WAYS
def test_away_from_the_start(shape: tuple[int, ...], orthogonal_map: str, use_trivialization: bool) -> None:
    theirs, ours = both(
        lambda impl: orthogonal(
            Holder(shape), impl, "weight", orthogonal_map, use_trivialization=use_trivialization
        )
    )
    noise = torch.randn(shape, dtype=torch.float64) / 2
    if orthogonal_map == "householder":
        noise = noise.tril(-1)  # its diagonal holds signs
    with torch.no_grad():
        theirs.parametrizations.weight.original.add_(noise)
    ours.load_state_dict(theirs.state_dict())
    assert_agree(ours, theirs)
    assert gram_error(ours.weight) < 1e-13


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley"])
@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (2, 4), (2, 3, 2)], ids=str)
@BOTH_WAYS
def test_complex(shape: tuple[int, ...], orthogonal_map: str, use_trivialization: bool) -> None:
    theirs, ours = both(
        lambda impl: orthogonal(
            Holder(shape, torch.complex128),
            impl,
            orthogonal_map=orthogonal_map,
            use_trivialization=use_trivialization,
        )
    )
    assert_agree(ours, theirs)
    with torch.no_grad():
        theirs.parametrizations.weight.original.add_(torch.randn(shape, dtype=torch.complex128) / 2)
    ours.load_state_dict(theirs.state_dict())
    assert_agree(ours, theirs)
    assert gram_error(ours.weight) < 1e-13


@EVERY_SHAPE
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_default_map(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    theirs, ours = both(lambda impl: orthogonal(Holder(shape, dtype), impl))
    mine, expected = (module.parametrizations.weight[0].orthogonal_map for module in (ours, theirs))
    assert mine.name == expected.name
    assert_agree(ours, theirs)


@EVERY_SHAPE
@EVERY_MAP
def test_an_orthogonal_start_is_kept(shape: tuple[int, ...], orthogonal_map: str) -> None:
    def make(impl: Impl) -> nn.Module:
        module = Holder(shape)
        wide = shape[-2] < shape[-1]
        start = module.weight.detach().mT if wide else module.weight.detach()
        Q = torch.linalg.qr(start).Q
        module.start = Q.mT if wide else Q
        module.weight.data.copy_(module.start)
        return orthogonal(module, impl, orthogonal_map=orthogonal_map)

    theirs, ours = both(make)
    assert_agree(ours, theirs)
    assert_close(ours.weight.detach(), ours.start)


@EVERY_SHAPE
@EVERY_MAP
def test_assignment(shape: tuple[int, ...], orthogonal_map: str) -> None:
    def make(impl: Impl) -> nn.Module:
        module = orthogonal(Holder(shape), impl, orthogonal_map=orthogonal_map)
        module.weight = torch.randn(shape, dtype=torch.float64)
        return module

    theirs, ours = both(make)
    assert_agree(ours, theirs)


@EVERY_SHAPE
def test_assignment_without_a_base(shape: tuple[int, ...]) -> None:
    def make(impl: Impl) -> nn.Module:
        module = orthogonal(Holder(shape), impl, orthogonal_map="householder", use_trivialization=False)
        module.weight = torch.randn(shape, dtype=torch.float64)
        return module

    theirs, ours = both(make)
    assert_agree(ours, theirs)
    assert all(
        tensor.is_contiguous() for tensor in ours.state_dict().values()
    )  # torch's cannot be saved by safetensors


@EVERY_MAP
@BOTH_WAYS
@pytest.mark.parametrize("shape", [(4, 4), (5, 3), (3, 5)], ids=str)
def test_training(shape: tuple[int, int], orthogonal_map: str, use_trivialization: bool) -> None:
    theirs, ours = both(
        lambda impl: orthogonal(
            Holder(shape), impl, orthogonal_map=orthogonal_map, use_trivialization=use_trivialization
        )
    )
    target = torch.randn(shape, dtype=torch.float64)
    for module in (theirs, ours):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            (module.weight - target).square().sum().backward()
            optimizer.step()
    assert_agree(ours, theirs)
    assert gram_error(ours.weight) < 1e-13


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("source", "target"), [(TORCH, OURS), (OURS, TORCH)], ids=["to ours", "to torch"])
@EVERY_MAP
@BOTH_WAYS
def test_state_dicts_move(
    source: Impl, target: Impl, orthogonal_map: str, use_trivialization: bool, trained: bool
) -> None:
    options = {"orthogonal_map": orthogonal_map, "use_trivialization": use_trivialization}
    giver, taker = (
        orthogonal(nn.Linear(3, 5, dtype=torch.float64), impl, **options) for impl in (source, target)
    )
    if trained:
        with torch.no_grad():
            giver.parametrizations.weight.original.add_(torch.randn(5, 3, dtype=torch.float64).tril(-1))
    assert repr(taker.load_state_dict(giver.state_dict())) == "<All keys matched successfully>"
    assert_close(taker.weight.detach(), giver.weight.detach())


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (lambda: nn.Conv2d(3, 2, 2, dtype=torch.float64), "weight"),
        (lambda: nn.RNNCell(3, 3, dtype=torch.float64), "weight_hh"),
        (lambda: nn.Linear(3, 4, bias=False, dtype=torch.float64), "weight"),
    ],
    ids=["convolution", "recurrent", "linear"],
)
def test_modules(module: object, name: str) -> None:
    theirs, ours = both(lambda impl: orthogonal(module(), impl, name))
    assert_agree(ours, theirs, name)


def test_buffer() -> None:
    def make(impl: Impl) -> nn.Module:
        module = nn.Module()
        module.register_buffer("basis", torch.randn(4, 3, dtype=torch.float64))
        return orthogonal(module, impl, "basis")

    theirs, ours = both(make)
    assert_same_names(ours, theirs)
    assert_close(ours.basis, theirs.basis)


def test_on_a_parametrized_tensor() -> None:
    def make(impl: Impl) -> nn.Module:
        module = impl.N.weight_norm(Holder((4, 3)))
        return orthogonal(module, impl, orthogonal_map="householder")

    theirs, ours = both(make)
    assert_same_names(ours, theirs)


@pytest.mark.parametrize("training", [True, False])
def test_training_mode(training: bool) -> None:
    theirs, ours = both(lambda impl: orthogonal(Holder((3, 3)).train(training), impl))
    assert_same_names(ours, theirs)


@EVERY_MAP
@pytest.mark.parametrize("leave_parametrized", [True, False])
def test_removal(orthogonal_map: str, leave_parametrized: bool) -> None:
    def make(impl: Impl) -> nn.Module:
        module = orthogonal(Holder((4, 3)), impl, orthogonal_map=orthogonal_map)
        return impl.P.remove_parametrizations(module, "weight", leave_parametrized=leave_parametrized)

    theirs, ours = both(make)
    assert type(ours) is Holder
    assert_close(ours.weight.detach(), theirs.weight.detach())


@pytest.mark.parametrize(
    "call",
    [
        lambda impl: orthogonal(nn.Linear(3, 4), impl, "missing"),
        lambda impl: orthogonal(nn.Linear(3, 4, bias=False), impl, "bias"),
        lambda impl: orthogonal(nn.Linear(3, 4), impl, "in_features"),
        lambda impl: orthogonal(nn.Linear(3, 4), impl, "bias"),
        lambda impl: orthogonal(nn.Linear(3, 4), impl, orthogonal_map="polar"),
        lambda impl: orthogonal(Holder((3, 3), torch.complex64), impl, orthogonal_map="householder"),
        lambda impl: setattr(orthogonal(Holder((3, 3)), impl), "weight", torch.zeros(2, 2)),
        lambda impl: setattr(
            orthogonal(Holder((3, 3)), impl, use_trivialization=False),
            "weight",
            torch.eye(3, dtype=torch.float64),
        ),
        lambda impl: setattr(
            orthogonal(Holder((3, 3)), impl, orthogonal_map="cayley", use_trivialization=False),
            "weight",
            torch.eye(3, dtype=torch.float64),
        ),
    ],
    ids=[
        "missing",
        "none",
        "no tensor",
        "vector",
        "unknown map",
        "complex householder",
        "shape",
        "exponential without base",
        "cayley without base",
    ],
)
def test_errors(call: object) -> None:
    assert_same_error(call)


@beyond_torch("torch has no kernels for these", raises=(RuntimeError, TypeError))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@EVERY_MAP
def test_low_precision(impl: Impl, orthogonal_map: str, dtype: torch.dtype) -> None:
    module = orthogonal(Holder((4, 3), dtype), impl, orthogonal_map=orthogonal_map)
    assert module.weight.dtype is dtype
    assert gram_error(module.weight.double()) < 8 * torch.finfo(dtype).eps
    module.weight.sum().backward()
    assert module.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("shape", [(4, 4), (4, 2), (2, 4)], ids=str)
def test_gradcheck(shape: tuple[int, int], orthogonal_map: str) -> None:
    module = orthogonal(Holder(shape), OURS, orthogonal_map=orthogonal_map)
    start = module.parametrizations.weight.original.detach()
    step = module.parametrizations.weight[0]
    noise = (torch.randn(shape, dtype=torch.float64) / 4).tril(-1).requires_grad_()
    assert torch.autograd.gradcheck(lambda X: step(start + X.tril(-1)), noise)
