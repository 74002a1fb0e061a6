"""``evaluate_together``: one batched call for equal layers, with the values and gradients of single ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchkiln
from torchkiln import parametrizations, parametrize
from torchkiln.parametrizations import orthogonal, spectral_norm, weight_norm

MAPS = ["matrix_exp", "cayley", "householder"]
X = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


def model_of(*shapes: tuple[int, int], **options: Any) -> nn.Sequential:
    layers = [orthogonal(nn.Linear(k, n, dtype=torch.float64), **options) for n, k in shapes]
    model = nn.Sequential(*layers)
    with torch.no_grad():
        for layer in layers:
            original = layer.parametrizations.weight.original
            original.add_(torch.randn_like(original).tril(-1) / 2)
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of the matrices that are evaluated."""
    shapes: list[tuple[int, ...]] = []
    plain = parametrizations._Orthogonal._at

    def noted(self: Any, X: Tensor, base: Tensor | None) -> Tensor:
        shapes.append(tuple(X.shape))
        return plain(self, X, base)

    monkeypatch.setattr(parametrizations._Orthogonal, "_at", noted)
    return shapes


def gradients(model: nn.Module) -> list[Tensor]:
    return list(torch.autograd.grad(model(X).square().sum(), list(model.parameters())))


@pytest.mark.parametrize("orthogonal_map", MAPS)
@pytest.mark.parametrize("use_trivialization", [True, False])
@pytest.mark.parametrize("shape", [(4, 4), (4, 1), (1, 4)], ids=str)
def test_values_and_gradients_are_those_of_single_layers(
    shape: tuple[int, int], orthogonal_map: str, use_trivialization: bool
) -> None:
    model = model_of(
        *[shape, shape[::-1]] * 3, orthogonal_map=orthogonal_map, use_trivialization=use_trivialization
    )
    if shape[1] == 1:
        model.insert(0, nn.Linear(4, 1, dtype=torch.float64))
    expected, apart = model(X), gradients(model)
    with torchkiln.evaluate_together(model):
        torch.testing.assert_close(model(X), expected)
        torch.testing.assert_close(gradients(model), apart)


def test_equal_layers_are_one_call(calls: list[tuple[int, ...]]) -> None:
    model = model_of((4, 4), (4, 4), (5, 4), (4, 5), (4, 4))
    calls.clear()
    with torchkiln.evaluate_together(model):
        model(X)
        model(X)
    assert calls == [(3, 4, 4), *[(5, 4), (4, 5)] * 2]


def test_an_optimizer_step_is_seen_and_a_backward_pass_frees_the_graph_once(
    calls: list[tuple[int, ...]],
) -> None:
    model, alone = model_of((4, 4), (4, 4)), model_of((4, 4), (4, 4))
    alone.load_state_dict(model.state_dict())
    calls.clear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with torchkiln.evaluate_together(model):
        for _ in range(3):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    assert calls == [(2, 4, 4)] * 3
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        alone(X).square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(model.state_dict(), alone.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.parametrizations.weight.original.requires_grad_(False),
        lambda layer: parametrize.register_parametrization(layer, "weight", nn.Tanh()),
        lambda layer: torchkiln.stack(layer, "weight").disable(0),
        lambda layer: layer.parametrizations.weight[0].register_forward_hook(lambda *_: None),
        lambda layer: layer.parametrizations.weight.register_forward_hook(lambda *_: None),
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ],
    ids=["frozen", "two steps", "disabled", "hook on the step", "hook on the chain", "removed"],
)
@pytest.mark.parametrize("inside", [True, False])
def test_a_layer_that_is_different_is_evaluated_alone(
    change: Any, inside: bool, calls: list[tuple[int, ...]]
) -> None:
    model = model_of((4, 4), (4, 4), (4, 4))
    if not inside:
        change(model[1])
    with torchkiln.evaluate_together(model):
        if inside:
            change(model[1])
        calls.clear()
        value = model(X)
        assert (3, 4, 4) not in calls
    torch.testing.assert_close(model(X), value)


def test_other_parametrizations_are_evaluated_as_ever() -> None:
    model = nn.Sequential(*[weight_norm(nn.Linear(4, 4, dtype=torch.float64)) for _ in range(2)])
    expected = model(X)
    with torchkiln.evaluate_together(model):
        assert torch.equal(model(X), expected)
        assert model[0].weight is not model[0].weight


def test_what_a_batch_does_not_pay_for_is_evaluated_as_ever(calls: list[tuple[int, ...]]) -> None:
    large = [orthogonal(nn.Linear(129, 129)) for _ in range(2)]
    norms = [
        *[spectral_norm(nn.Linear(129, 129)) for _ in range(10)],
        *[spectral_norm(nn.Linear(4, 4)) for _ in range(9)],
    ]
    model = nn.Sequential(*large, *norms, orthogonal(nn.Linear(3, 3)))
    calls.clear()
    with torchkiln.evaluate_together(model):
        assert all(layer.weight is not layer.weight for layer in model)
    assert calls == [(129, 129)] * 4 + [(3, 3)] * 2


def test_inference_mode_keeps_its_values(calls: list[tuple[int, ...]]) -> None:
    model = model_of((4, 4), (4, 4)).eval()
    expected = model(X)
    calls.clear()
    with torchkiln.evaluate_together(model), torch.inference_mode():
        torch.testing.assert_close(model(X), expected)
        torch.testing.assert_close(model(X), expected)
    assert calls == [(2, 4, 4)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "make", [lambda: nn.Linear(4, 4), lambda: nn.Conv1d(3, 3, 3, padding=1)], ids=["linear", "conv"]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_spectral_norm_advances_and_divides_as_single_layers_do(
    make: Any, training: bool, dtype: torch.dtype
) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        layers = [spectral_norm(make().to(dtype)) for _ in range(10)]
        models.append(nn.Sequential(*layers).train(training))
    together, alone = models
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    x = torch.randn(2, 3, 4, dtype=dtype)
    for _ in range(3):
        with torchkiln.evaluate_together(together):
            together(x).square().sum().backward()
        alone(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(together.state_dict(), alone.state_dict())


@pytest.mark.parametrize("dim", [0, 1])
def test_spectral_norm_has_the_derivatives_of_single_layers(dim: int) -> None:
    layers = [spectral_norm(nn.Linear(4, 4, dtype=torch.float64), dim=dim).eval() for _ in range(10)]
    originals = [layer.parametrizations.weight.original for layer in layers]

    def derivatives() -> list[Tensor]:
        loss = torch.stack([layer.weight.pow(3).sum() for layer in layers]).sum()
        first = torch.autograd.grad(loss, originals, create_graph=True)
        penalty = torch.stack([gradient.square().sum() for gradient in first]).sum()
        return [*first, *torch.autograd.grad(penalty, originals)]

    alone = derivatives()
    with torchkiln.evaluate_together(nn.Sequential(*layers)):
        assert layers[0].weight is layers[0].weight
        torch.testing.assert_close(derivatives(), alone)


def test_spectral_norm_of_zeros_is_zero() -> None:
    layers = [spectral_norm(nn.Linear(4, 4, dtype=torch.float64)) for _ in range(10)]
    nn.init.zeros_(layers[0].parametrizations.weight.original)
    with torchkiln.evaluate_together(nn.Sequential(*layers)):
        assert torch.equal(layers[0].weight, torch.zeros(4, 4, dtype=torch.float64))
        torch.testing.assert_close(
            torch.linalg.matrix_norm(layers[1].weight, 2).item(), 1.0, atol=0.05, rtol=0
        )


def test_it_wants_a_module() -> None:
    with pytest.raises(TypeError, match=r"evaluate_together\(\) expected a module, got list\."):
        torchkiln.evaluate_together([]).__enter__()  # type: ignore[arg-type]  # the point
