"""Row 13: one call folds a whole model, whatever computed its tensors; or folds it for a while only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import prune

import torchkiln

from .table import Impl, fails_on, row


class Noisy(nn.Module):
    """Random in training mode."""

    def forward(self, X: Tensor) -> Tensor:
        return X * torch.rand_like(X) if self.training else X * 2


def mixed(impl: Impl) -> nn.Sequential:
    """A layer of every spelling, with weights that training has moved since the vectors were last computed."""
    torch.manual_seed(0)
    model = nn.Sequential(
        impl.N.weight_norm(nn.Linear(4, 4)),
        impl.N.spectral_norm(nn.Linear(4, 4)),
        utils.weight_norm(nn.Linear(4, 4)),
        utils.spectral_norm(nn.Linear(4, 4)),
        prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5),
        impl.N.orthogonal(nn.Linear(4, 4)),
        nn.Linear(4, 2),
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.randn(8, 4)).square().sum().backward()
    optimizer.step()
    return model


def fold(impl: Impl, model: nn.Module) -> Any:
    """Fold the model; on torch with the loop over all modules that users write."""
    if impl.name == "torchkiln":
        return torchkiln.bake(model)
    for module in model.modules():
        if impl.P.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]  # Tensor | Module
                impl.P.remove_parametrizations(module, name)
    return None


def output(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(x)
    model.train()
    return result


@row(13, "125064", torch="a loop over parametrizations leaves the hook-based norms and the pruning")
def test_13_keys_and_classes_are_plain(impl: Impl) -> None:
    model = mixed(impl)
    fold(impl, model)
    plain = nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)], nn.Linear(4, 2))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert list(map(type, model)) == list(map(type, plain))
    assert not any(layer._forward_pre_hooks for layer in model)
    plain.load_state_dict(model.state_dict())


@row(13, "executorch 22078", torch="removal in training mode runs a power iteration")
def test_13_outputs_stay(impl: Impl) -> None:
    model, x = mixed(impl), torch.randn(5, 4)
    before = output(model, x)
    fold(impl, model)
    assert torch.equal(output(model, x), before)


@row(13, "125064", torch="removal in training mode draws the numbers of a random step")
def test_13_no_random_number_is_drawn(impl: Impl) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    impl.P.register_parametrization(model[0], "weight", Noisy())
    state = torch.get_rng_state()
    fold(impl, model)
    assert torch.equal(torch.get_rng_state(), state)


@row(
    13,
    "125064",
    torch="removal in training mode runs a power iteration, here of vectors that are used elsewhere",
)
def test_13_no_power_iteration_runs(impl: Impl) -> None:
    kept, model = impl.N.spectral_norm(nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4))
    impl.P.register_parametrization(model[0], "weight", kept.parametrizations.weight[0])
    before = {key: value.clone() for key, value in kept.state_dict().items()}
    fold(impl, model)
    assert all(torch.equal(value, before[key]) for key, value in kept.state_dict().items())


@row(13, "vllm-omni 6927", torch="there is no report")
def test_13_a_report_says_what_was_folded(impl: Impl) -> None:
    report = fold(impl, mixed(impl))
    assert report is not None
    assert [(row.path, row.what) for row in report] == [
        ("0.weight", "weight_norm"),
        ("1.weight", "spectral_norm"),
        ("2.weight", "weight_norm (hook)"),
        ("3.weight", "spectral_norm (hook)"),
        ("4.weight", "prune (L1Unstructured)"),
        ("5.weight", "orthogonal"),
    ]


@row(13, "125064", torch="the layers before the one that fails stay folded")
def test_13_all_or_nothing(impl: Impl) -> None:
    class Fails(nn.Module):
        works = True

        def forward(self, X: Tensor) -> Tensor:
            if not self.works:
                raise RuntimeError("does not run")
            return X

    model = mixed(impl)
    step = Fails()
    impl.P.register_parametrization(model[6], "weight", step)
    step.works = False
    before = [(name, id(p)) for name, p in model.named_parameters()]
    with pytest.raises(RuntimeError, match="does not run"):
        fold(impl, model)
    assert [(name, id(p)) for name, p in model.named_parameters()] == before


# --- for a while ------------------------------------------------------------------------------------------------------

ABSENT = fails_on("torch", "there is no such context", AttributeError)


def folded_for_a_while(impl: Impl, model: nn.Module) -> Any:
    owner: Any = torchkiln if impl.name == "torchkiln" else impl.P
    return owner.baked(model)


@pytest.mark.parametrize("training", [pytest.param(True, marks=ABSENT), pytest.param(False, marks=ABSENT)])
@row(13, "executorch 22078")
def test_13_folded_for_inference_and_exactly_back(impl: Impl, training: bool) -> None:
    model, x = mixed(impl), torch.randn(5, 4)
    expected = output(model, x)
    model.train(training)
    optimizer = torch.optim.Adam(model.parameters())
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    types = [type(module) for module in model.modules()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad(), folded_for_a_while(impl, model):
        assert {type(module) for module in model.modules()} == {nn.Sequential, nn.Linear}
        assert all(key.split(".")[1] in ("weight", "bias") for key in model.state_dict())
        assert torch.equal(model(x), expected)
    assert [id(p) for p in model.parameters()] == held
    assert [type(module) for module in model.modules()] == types
    assert all(module.training is training for module in model.modules())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@row(13, "executorch 22078", torch="there is no such context", raises=AttributeError)
def test_13_training_a_model_folded_for_a_while_is_no_silent_loss(impl: Impl) -> None:
    model = mixed(impl)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    context = folded_for_a_while(impl, model)
    with (
        pytest.raises(
            torchkiln.ParametrizationError, match=r"changed, or given a gradient, inside baked\(\)"
        ),
        context,
    ):
        model(torch.randn(5, 4)).sum().backward()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
