"""What runs on a device asks it for no number: the exponential for one row of them, and for none during a capture.

On the meta device, which has none, every question is an error.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import torchkiln.parametrizations as P
from torchkiln.families._maps import exponential as E
from torchkiln.families._maps import orthogonal as maps
from torchkiln.families._maps.explicit import ExplicitMap
from torchkiln.families._maps.householder import HOUSEHOLDER

EVERY_MAP = pytest.mark.parametrize(
    "f", [maps._EXPONENTIAL, maps._CAYLEY, HOUSEHOLDER], ids=["exponential", "cayley", "householder"]
)
# Square, full, thin, and a batch.
EVERY_SHAPE = pytest.mark.parametrize("shape", [(40, 40), (40, 30), (40, 10), (2, 40, 40)], ids=str)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """Answer the exponential's question for a device that cannot, and note it."""
    asked: list[torch.Size] = []

    def read(numbers: Tensor) -> list[list[float]]:
        asked.append(numbers.shape)
        return [[-1.0, 1.0, -1.0, 1.0]] * (numbers.numel() // 4)

    monkeypatch.setattr(E, "_read", read)
    return asked


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(E, "can_wait", lambda _A: False)


def forward_and_backward(f: ExplicitMap, shape: tuple[int, ...]) -> None:
    X, base = (torch.empty(size, device="meta") for size in (shape, (*shape[:-1], shape[-2])))
    Y, kept = f.value(X, base)
    held = [Y if tensor.numel() == 0 else tensor for tensor in kept]
    assert f.pullback(X, base, held, torch.empty_like(Y)).shape == shape


@EVERY_MAP
@EVERY_SHAPE
def test_a_device_is_waited_for_once_by_the_exponential_alone(
    f: ExplicitMap, shape: tuple[int, ...], reads: list[torch.Size]
) -> None:
    forward_and_backward(f, shape)
    assert reads == ([torch.Size((*shape[:-2], 4))] if f is maps._EXPONENTIAL else [])


@EVERY_MAP
@EVERY_SHAPE
@pytest.mark.usefixtures("capturing")
def test_a_device_is_not_waited_for_while_a_graph_is_captured(f: ExplicitMap, shape: tuple[int, ...]) -> None:
    forward_and_backward(f, shape)


def test_a_wait_is_seen() -> None:
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
        forward_and_backward(maps._EXPONENTIAL, (4, 4))


@pytest.mark.parametrize("shape", [(30, 30), (30, 20), (30, 5), (3, 12, 12)], ids=str)
@pytest.mark.parametrize("norm", [0.0, 1e-6, 0.3, 1, 3, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.usefixtures("capturing")
def test_squarings_that_the_device_chooses_give_the_same(
    shape: tuple[int, ...], norm: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    X = torch.randn(shape, dtype=dtype)
    X = (X * norm / torch.linalg.matrix_norm(maps.skew(X), 2).max()).requires_grad_()
    Q = maps.exponential(X)
    G = torch.randn_like(Q)
    (gradient,) = torch.autograd.grad(Q, X, G)
    monkeypatch.undo()
    expected = maps.exponential(X)
    tolerance = 1e-12 * max(1, norm)
    torch.testing.assert_close(Q, expected, rtol=0, atol=tolerance)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, X, G)[0], rtol=0, atol=20 * tolerance)


@pytest.mark.parametrize("large", [1e4, 1e30, float("nan")])
@pytest.mark.usefixtures("capturing")
def test_more_squarings_than_a_device_may_choose_give_nan(large: float) -> None:
    X = torch.stack([torch.eye(4).roll(1, 0) * scale for scale in (1.0, large)]).requires_grad_()
    small, nothing = maps.exponential(X)
    torch.testing.assert_close(small, torch.matrix_exp(maps.skew(X[0])))
    assert nothing.isnan().all()
    gradient = torch.autograd.grad(small.sum() + nothing.sum(), X)[0]
    assert gradient[0].isfinite().all()
    assert gradient[1].tril(-1).isnan().any()


LAYERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight_norm": P.weight_norm,
    "spectral_norm": P.spectral_norm,
    "spectral_norm, capped": lambda layer: P.spectral_norm(layer, coefficient=2.0, cap=True),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "convolution"])
def test_normalized_layers_do_not_wait(kind: str, training: bool, convolution: bool) -> None:
    plain, shape = (nn.Conv2d(3, 4, 3), (2, 3, 8, 8)) if convolution else (nn.Linear(6, 5), (2, 6))
    layer = LAYERS[kind](plain).to("meta").train(training)
    layer(torch.empty(shape, device="meta")).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())
