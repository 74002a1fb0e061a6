"""Norms of operators, against matrices made column by column from torch's own layers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck

from torchkiln import families, parametrizations
from torchkiln._core.errors import ParametrizationError
from torchkiln.families._maps.leading import leading_vector, starting_vector
from torchkiln.parametrize import register_parametrization

Make = Callable[..., nn.Module]
WIDE = torch.float64


def conv(kind: type[nn.Module], *arguments: int, **options: object) -> Callable[[], nn.Module]:
    return lambda: kind(4, 6, *arguments, bias=False, dtype=WIDE, **options)


# A layer, and the size of the images that go in.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (conv(nn.Conv1d, 5, padding=2), (7,)),
    "2d": (conv(nn.Conv2d, 3, padding=1), (5, 6)),
    "3d": (conv(nn.Conv3d, 2, padding=1), (3, 4, 3)),
    "no padding": (conv(nn.Conv2d, 3), (5, 6)),
    "even and same": (conv(nn.Conv2d, 4, padding="same"), (5, 6)),
    "stride": (conv(nn.Conv2d, 3, stride=2, padding=1), (6, 5)),
    "stride that skips": (conv(nn.Conv2d, 2, stride=3), (7, 8)),
    "patches": (conv(nn.Conv2d, 2, stride=2), (6, 4)),
    "dilation and stride": (conv(nn.Conv2d, 3, dilation=2, stride=2, padding=2), (7, 6)),
    "groups": (conv(nn.Conv2d, 3, padding=1, groups=2), (5, 6)),
    "depthwise": (lambda: nn.Conv1d(4, 4, 3, padding=1, groups=4, bias=False, dtype=WIDE), (7,)),
    "circular": (conv(nn.Conv2d, 3, padding=1, padding_mode="circular"), (5, 6)),
    "circular and dilated": (conv(nn.Conv2d, 3, dilation=2, padding=2, padding_mode="circular"), (6, 5)),
    "circular and strided": (conv(nn.Conv2d, 3, stride=2, padding=1, padding_mode="circular"), (6, 4)),
    "circular and even": (conv(nn.Conv1d, 4, padding="same", padding_mode="circular"), (6,)),
    "circular beyond the image": (conv(nn.Conv1d, 5, padding=2, padding_mode="circular"), (3,)),
    "circular, grouped, 3d": (conv(nn.Conv3d, 3, padding=1, groups=2, padding_mode="circular"), (3, 4, 3)),
    "circular that grows": (conv(nn.Conv1d, 3, padding=2, padding_mode="circular"), (6,)),
    "reflect": (conv(nn.Conv2d, 3, padding=1, padding_mode="reflect"), (5, 6)),
    "replicate": (conv(nn.Conv2d, 3, padding=2, dilation=2, padding_mode="replicate"), (5, 6)),
    "transposed": (conv(nn.ConvTranspose2d, 3, stride=2, padding=1, output_padding=1, groups=2), (5, 4)),
    "transposed 1d": (conv(nn.ConvTranspose1d, 3, dilation=2), (7,)),
    "transposed, padded at the end": (conv(nn.ConvTranspose1d, 2, dilation=2, output_padding=1), (7,)),
    "transposed 3d": (conv(nn.ConvTranspose3d, 2, stride=2), (2, 3, 2)),
}
CIRCULANT = [name for name in LAYERS if name.startswith("circular") and name != "circular that grows"]
every_layer = pytest.mark.parametrize("name", LAYERS)
# What torch says of even kernels.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")


def matrix_of(layer: nn.Module, size: tuple[int, ...]) -> Tensor:
    """The layer as a matrix, from the images of the unit vectors."""
    count = layer.in_channels * math.prod(size)
    unit = torch.eye(count, dtype=WIDE).view(count, layer.in_channels, *size)
    return layer(unit).flatten(1).mT


@torch.no_grad()
def norm_of(layer: nn.Module, size: tuple[int, ...]) -> Tensor:
    return torch.linalg.matrix_norm(matrix_of(layer, size), 2)


def normed(name: str, **options: object) -> tuple[nn.Module, tuple[int, ...]]:
    make, size = LAYERS[name]
    layer = make()
    given = None if options.get("method", "bound") == "bound" else size
    norm = families.ConvSpectralNorm.of(layer, input_size=given, **options)
    return register_parametrization(layer, "weight", norm).eval(), size


@every_layer
def test_power_iteration_finds_the_norm_of_the_operator(name: str) -> None:
    layer, size = normed(name, method="power", tolerance=1e-6)
    assert norm_of(layer, size).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("name", CIRCULANT)
def test_the_transfer_function_is_exact_for_circular_convolutions(name: str) -> None:
    layer, size = normed(name, method="exact")
    assert norm_of(layer, size).item() == pytest.approx(1.0, abs=1e-12)


@every_layer
@pytest.mark.parametrize("growth", [1, 2])
def test_the_bound_holds_for_every_size(name: str, growth: int) -> None:
    layer, size = normed(name)
    growth = growth if len(size) < 3 else 1
    assert norm_of(layer, tuple(n * growth for n in size)).item() <= 1 + 1e-12


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("1d", (150,)),
        ("stride", (31, 32)),
        ("transposed", (14, 14)),
        ("groups", (22, 22)),
        ("patches", (4, 4)),
    ],
)
def test_the_bound_is_near_what_large_images_reach(name: str, size: tuple[int, ...]) -> None:
    layer, _ = normed(name, tolerance=0.01)
    M = matrix_of(layer, size).detach()
    largest = torch.linalg.eigvalsh(M @ M.mT if M.shape[0] < M.shape[1] else M.mT @ M)[-1]
    assert largest.sqrt().item() >= 0.92


def test_power_iteration_follows_when_another_frequency_becomes_the_largest() -> None:
    # A circular convolution leads from no frequency to another: only a vector beside the leading one sees the others.
    torch.manual_seed(2)
    layer = nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular", bias=False)
    exact = families.ConvSpectralNorm.of(layer, method="exact", input_size=(8, 8))
    power = families.ConvSpectralNorm.of(layer, method="power", input_size=(8, 8))
    register_parametrization(layer, "weight", power)
    optimizer, errors = torch.optim.Adam(layer.parameters(), lr=1e-2), []
    for _ in range(80):
        optimizer.zero_grad()
        x = torch.randn(8, 3, 8, 8)
        y = layer(x)
        (y * x[:, :1]).mean().neg().backward()
        optimizer.step()
        errors.append(exact.residual(layer.weight).item())
    assert torch.tensor(errors).quantile(0.9).item() < 2e-3


@pytest.mark.parametrize("method", ["exact", "power"])
def test_the_gradient_is_that_of_the_largest_singular_value(method: str) -> None:
    make, size = LAYERS["circular"]
    layer = make()
    norm = families.ConvSpectralNorm.of(layer, method=method, input_size=size, tolerance=1e-9)
    norm.right_inverse(layer.weight)
    W = layer.weight.detach().requires_grad_()
    G = torch.randn_like(W)
    (got,) = torch.autograd.grad(norm.eval()(W), W, G)

    layer.weight.requires_grad_()
    (expected,) = torch.autograd.grad(
        layer.weight / torch.linalg.matrix_norm(matrix_of(layer, size), 2), layer.weight, G
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("method", ["bound", "exact", "power"])
def test_zeros_are_zeros_with_finite_gradients(method: str) -> None:
    layer, size = normed("circular", method=method)
    with torch.no_grad():
        layer.parametrizations.weight.original.zero_()
    layer.train()(torch.ones(1, 4, *size, dtype=WIDE)).sum().backward()
    assert layer.weight.eq(0).all()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


@pytest.mark.parametrize("method", ["bound", "exact", "power"])
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_a_cap_divides_only_what_is_above(method: str, factor: float) -> None:
    make, size = LAYERS["circular"]
    layer = make()
    with torch.no_grad():
        layer.weight.mul_(factor)
    plain = layer.weight.detach().clone()
    given = None if method == "bound" else size
    norm = families.ConvSpectralNorm.of(layer, 0.5, cap=True, method=method, input_size=given)
    register_parametrization(layer, "weight", norm)
    if factor < 1:
        assert torch.equal(layer.weight, plain)
    else:
        assert norm_of(layer, size).item() <= 0.5 * (1 + 1e-3)


def test_training_moves_the_vector_once_for_each_change() -> None:
    layer, size = normed("2d", method="power")
    layer.train()
    step, x = layer.parametrizations.weight[0], torch.randn(2, 4, *size, dtype=WIDE)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.1)
    before = step.v.clone()
    first = layer.weight.detach().clone()
    assert torch.equal(step.v, before)
    layer(x)
    moved = step.v.clone()
    layer(x)
    assert not torch.equal(moved, before)
    assert torch.equal(step.v, moved)
    assert torch.equal(layer.weight, first)
    assert torch.equal(layer.eval().weight, first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("method", ["bound", "exact", "power"])
def test_low_precision(method: str, dtype: torch.dtype) -> None:
    layer, size = normed("circular", method=method)
    layer.to(dtype).train()
    layer(torch.randn(1, 4, *size, dtype=dtype)).sum().backward()
    assert layer.weight.dtype is dtype
    assert layer.parametrizations.weight.original.grad.isfinite().all()
    layer.to(WIDE)
    assert norm_of(layer, size).item() <= 1.01


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: families.ConvSpectralNorm(method="power"), 'method "power" needs input_size'),
        (lambda: families.ConvSpectralNorm(method="fft"), "method must be one of 'bound', 'exact', 'power'"),
        (lambda: families.ConvSpectralNorm(0.0), "needs coefficient > 0, got 0.0"),
        (lambda: families.ConvSpectralNorm.of(nn.Linear(2, 2)), "needs a convolution, got a Linear"),
        (
            lambda: families.ConvSpectralNorm(method="exact", input_size=(5, 5)).project(
                torch.ones(1, 1, 3, 3)
            ),
            "needs circular padding that keeps the size",
        ),
        (
            lambda: families.ConvSpectralNorm().project(torch.ones(3, 3)),
            r"weight of a convolution, got shape \(3, 3\)",
        ),
    ],
    ids=["no size", "method", "coefficient", "linear", "not circulant", "matrix"],
)
def test_refusals(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ParametrizationError, match=text):
        make()


# --- matrices -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [WIDE, torch.complex128])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_spectral_norm_of_a_matrix(dim: int, dtype: torch.dtype) -> None:
    X = torch.randn(4, 3, 5, dtype=dtype)
    W = families.SpectralNorm(2.0, dim=dim, tolerance=1e-7).project(X)
    M = W.movedim(dim, 0).flatten(1)
    assert torch.linalg.matrix_norm(M, 2).item() == pytest.approx(2.0, abs=1e-9)
    torch.testing.assert_close(W / W.norm(), X / X.norm())


def test_spectral_norm_of_a_vector_is_its_length() -> None:
    x = families.SpectralNorm().project(torch.tensor([3.0, 4.0]))
    torch.testing.assert_close(x, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("options", [{}, {"steps": 1}, {"cap": True}, {"dim": 1}], ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_spectral_norm_takes_a_matrix_without_entries(
    shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.empty(shape))
    register_parametrization(layer, "weight", families.SpectralNorm(**options))
    layer.weight.sum().backward()
    assert layer.weight.shape == layer.eval().weight.shape == shape


def test_a_fixed_number_of_steps_is_what_torch_does() -> None:
    """From the same vector: torch's u and v are ours and its image."""
    layer = nn.Linear(6, 5, bias=False, dtype=WIDE)
    norm = families.SpectralNorm(steps=3)
    norm.right_inverse(layer.weight)
    theirs = torch.nn.utils.parametrizations.spectral_norm(
        nn.Linear(6, 5, bias=False, dtype=WIDE), n_power_iterations=3
    )
    W = torch.randn(5, 6, dtype=WIDE)
    with torch.no_grad():
        theirs.parametrizations.weight.original.copy_(W)
        theirs.parametrizations.weight[0]._v.copy_(norm.v)
    expected = theirs.weight
    got = norm(W)
    torch.testing.assert_close(norm.v, theirs.parametrizations.weight[0]._v)
    # The length of W v is at least what torch takes, u W v with the u of before.
    assert (got.norm() <= expected.norm() * (1 + 1e-9)).item()


def test_another_direction_that_becomes_the_largest_is_noticed() -> None:
    """Power iteration alone, once at a singular vector, would stay there: its gain would be 3."""
    layer = nn.Linear(4, 4, bias=False, dtype=WIDE)
    with torch.no_grad():
        layer.weight.copy_(torch.diag(torch.tensor([2.0, 1.0, 0.5, 0.1])))
    parametrizations.spectral_norm(layer, tolerance=1e-6)
    original, x = layer.parametrizations.weight.original, torch.ones(1, 4, dtype=WIDE)
    for _ in range(50):
        with torch.no_grad():
            original.add_(0)
        layer(x)
    with torch.no_grad():
        original.copy_(torch.diag(torch.tensor([1.0, 0.5, 0.1, 3.0])))
    for _ in range(3):
        layer(x)
        with torch.no_grad():
            original.add_(0)
    assert torch.linalg.matrix_norm(layer.weight, 2).item() == pytest.approx(1.0, abs=1e-6)


def test_another_group_that_becomes_the_largest_is_noticed() -> None:
    """No iteration leads from one group to another, and in eval mode nothing has been advanced."""
    layer, size = normed("groups", method="power", tolerance=1e-6)
    with torch.no_grad():
        W = layer.parametrizations.weight.original
        W[:3].mul_(0.1)
        layer(torch.ones(1, 4, *size, dtype=WIDE))
        W[:3].mul_(100.0)
    assert norm_of(layer, size).item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.slow
def test_a_graph_is_right_where_singular_values_are_close() -> None:
    """It cannot look whether it has come far enough; after fifty power iterations it would be off by 0.005."""
    layer = parametrizations.spectral_norm(nn.Linear(128, 10, bias=False, dtype=WIDE), tolerance=1e-6).eval()
    with torch.no_grad():
        U, _, Vh = torch.linalg.svd(torch.randn(10, 128, dtype=WIDE), full_matrices=False)
        layer.parametrizations.weight.original.copy_(
            U @ torch.diag(torch.linspace(0.9, 1.0, 10).double()) @ Vh
        )
    compiled = torch.compile(lambda module: module.weight, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(layer), layer.weight, rtol=1e-6, atol=1e-8)


def test_a_good_vector_is_returned_as_it_is() -> None:
    M = torch.randn(5, 4, dtype=WIDE)
    operator = (lambda v: M @ v), (lambda u: M.mT @ u)
    v = leading_vector(operator, starting_vector((4,), M), steps=1, tolerance=1e-8)
    assert torch.equal(leading_vector(operator, v, steps=1, tolerance=1e-8), v)
    assert torch.equal(leading_vector(operator, 3 * v, steps=0, tolerance=None), (3 * v) / (3 * v).norm())


@pytest.mark.parametrize("gain", [None, 1.5])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_weight_norm_differentiates(dim: int, gain: float | None) -> None:
    family = families.WeightNorm(dim, gain)
    originals = family.right_inverse(torch.randn(3, 4, dtype=WIDE))
    originals = (originals,) if isinstance(originals, Tensor) else originals
    assert gradcheck(family, tuple(one.clone().requires_grad_() for one in originals))


def test_a_fixed_gain_trains_directions_alone() -> None:
    layer = parametrizations.weight_norm(nn.Linear(4, 3), gain=1.0)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    layer(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(3))
    assert not layer.parametrizations.weight.original0.requires_grad


def test_a_layer_of_zeros_can_be_trained_under_weight_norm() -> None:
    layer = nn.Linear(4, 3, bias=False)
    nn.init.zeros_(layer.weight)
    parametrizations.weight_norm(layer)
    assert layer.weight.eq(0).all()
    layer(torch.ones(1, 4)).sum().backward()
    assert layer.parametrizations.weight.original0.grad.ne(0).all()
