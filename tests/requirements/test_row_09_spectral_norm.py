"""Row 9: spectral norm is honest: what is measured on the layer itself, never more than what was asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchkiln import families
from torchkiln.parametrize import register_parametrization

from .table import OURS, Impl, row

SIZE = (5, 6)
CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "same size": lambda: nn.Conv2d(2, 4, 3, padding=1, bias=False),
    "stride": lambda: nn.Conv2d(2, 4, 3, stride=2, padding=1, bias=False),
    "dilation": lambda: nn.Conv2d(2, 4, 3, padding=2, dilation=2, bias=False),
    "groups": lambda: nn.Conv2d(2, 4, 3, padding=1, groups=2, bias=False),
    "circular": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", bias=False),
    "reflect": lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="reflect", bias=False),
    "transposed": lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, bias=False),
}
EVERY_CONVOLUTION = pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)


def gain_of(layer: nn.Module, size: tuple[int, ...] = SIZE) -> float:
    """The largest singular value of the layer's own matrix, from the images of the unit vectors."""
    shape = (layer.in_channels, *size) if isinstance(layer, nn.modules.conv._ConvNd) else (layer.in_features,)
    unit = torch.eye(int(torch.tensor(shape).prod()))
    with torch.no_grad():
        images = layer(unit.view(-1, *shape)).flatten(1)
    return float(torch.linalg.matrix_norm(images.double(), 2))


def normed(impl: Impl, layer: nn.Module, **options: object) -> nn.Module:
    """The layer under the norm of its operator; torch has one for matrices only."""
    if impl != OURS:
        return impl.N.spectral_norm(layer, n_power_iterations=100)
    size = SIZE if options.get("method", "bound") != "bound" else None
    norm = families.ConvSpectralNorm.of(layer, input_size=size, **options)
    return register_parametrization(layer, "weight", norm)


def loud(layer: nn.Module, factor: float = 3.0) -> nn.Module:
    with torch.no_grad():
        layer.weight.mul_(factor)
    return layer


NO_OPERATOR = "the norm is that of a matrix, not of the convolution"


@EVERY_CONVOLUTION
@row(9, "99149", torch=NO_OPERATOR)
def test_09_a_convolution_never_stretches_more_than_its_norm(
    impl: Impl, make: Callable[[], nn.Module]
) -> None:
    layer = normed(impl, loud(make())).eval()
    assert gain_of(layer) <= 1 + 1e-5


@EVERY_CONVOLUTION
@row(9, "99149", torch=NO_OPERATOR)
def test_09_at_one_size_of_images_the_norm_is_met(impl: Impl, make: Callable[[], nn.Module]) -> None:
    layer = normed(impl, loud(make()), method="power", tolerance=1e-4).eval()
    assert gain_of(layer) == pytest.approx(1.0, abs=1e-3)


@row(9, "99149", torch=NO_OPERATOR)
def test_09_circular_convolutions_are_exact(impl: Impl) -> None:
    layer = normed(impl, CONVOLUTIONS["circular"](), method="exact").eval()
    assert gain_of(layer) == pytest.approx(1.0, abs=1e-5)


@row(9, "99149", torch=NO_OPERATOR)
def test_09_the_gain_stays_capped_while_training(impl: Impl) -> None:
    layer = normed(impl, loud(CONVOLUTIONS["same size"]()))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    x = torch.randn(4, 2, *SIZE)
    for _ in range(10):
        optimizer.zero_grad()
        (-layer(x).square().mean()).backward()
        optimizer.step()
        assert gain_of(layer) <= 1 + 1e-5


def matrix_norm(impl: Impl, layer: nn.Module, **options: object) -> nn.Module:
    return impl.N.spectral_norm(layer, **options)


@row(9, "51800", torch="there is no coefficient", raises=TypeError)
def test_09_a_coefficient(impl: Impl) -> None:
    layer = matrix_norm(impl, nn.Linear(6, 5, bias=False), coefficient=2.0, tolerance=1e-5).eval()
    assert gain_of(layer) == pytest.approx(2.0, abs=1e-4)


@pytest.mark.parametrize(("factor", "expected"), [(100.0, 1.0), (0.01, None)], ids=["large", "small"])
@row(9, "51800", torch="there is no cap", raises=TypeError)
def test_09_a_cap_leaves_small_weights_alone(impl: Impl, factor: float, expected: float | None) -> None:
    layer = loud(nn.Linear(6, 5, bias=False), factor)
    plain = gain_of(layer)
    capped = matrix_norm(impl, layer, cap=True, tolerance=1e-5).eval()
    assert gain_of(capped) == pytest.approx(expected or plain, rel=1e-4)


@row(9, "25092", torch="zeros become NaN")
def test_09_zeros_stay_zeros(impl: Impl) -> None:
    layer = loud(nn.Linear(6, 5, bias=False), 0.0)
    layer = impl.N.spectral_norm(layer)
    layer(torch.ones(2, 6)).sum().backward()
    assert layer.weight.eq(0).all()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def other_weight(impl: Impl, layer: nn.Module) -> Tensor:
    """Give a layer in eval mode another weight, as loading only the original does."""
    layer.eval()
    W = torch.randn(5, 6)
    with torch.no_grad():
        layer.parametrizations.weight.original.copy_(W)
    return W


@row(9, "13505", torch="there is no tolerance", raises=TypeError)
def test_09_right_in_eval_before_any_training_step(impl: Impl) -> None:
    layer = matrix_norm(impl, nn.Linear(6, 5, bias=False), tolerance=1e-5)
    other_weight(impl, layer)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    assert gain_of(layer) == pytest.approx(1.0, abs=1e-4)
    torch.testing.assert_close(dict(layer.state_dict()), state, rtol=0, atol=0)


@row(9, "13505", torch="there is no reset", raises=AttributeError)
def test_09_the_vectors_can_be_reset(impl: Impl) -> None:
    layer = impl.N.spectral_norm(nn.Linear(6, 5, bias=False))
    W = other_weight(impl, layer)
    stale = gain_of(layer)
    layer.parametrizations.weight[0].reset(W)
    assert abs(gain_of(layer) - 1) < abs(stale - 1)
    assert gain_of(layer) == pytest.approx(1.0, abs=0.05)


@row(9, "51800", torch="averaged vectors are shorter than 1, and the weight is larger for it")
def test_09_an_average_of_models_keeps_the_norm(impl: Impl) -> None:
    torch.manual_seed(0)
    layer = impl.N.spectral_norm(nn.Linear(20, 20, bias=False))
    averaged = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        (layer(torch.randn(8, 20)) * torch.randn(8, 20)).sum().backward()
        optimizer.step()
        averaged.update_parameters(layer)
    averaged.eval()
    assert averaged.module.parametrizations.weight[0]._u.norm() < 0.95
    assert gain_of(averaged.module) == pytest.approx(1.0, abs=0.02)
