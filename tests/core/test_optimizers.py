"""Optimizers follow a registration and a removal: groups, places, state; those not passed warn at their next step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import torchkiln
from torchkiln import TorchkilnWarning, parametrize
from torchkiln.parametrizations import orthogonal, weight_norm

Make = Callable[[Any], optim.Optimizer]
OPTIMIZERS: dict[str, Make] = {
    "sgd": partial(optim.SGD, lr=0.1),
    "momentum": partial(optim.SGD, lr=0.1, momentum=0.9),
    "momentum_fused": partial(optim.SGD, lr=0.1, momentum=0.9, fused=True),
    "adam": partial(optim.Adam, lr=0.1, foreach=False),
    "adam_foreach": partial(optim.Adam, lr=0.1, foreach=True),
    "adam_fused": partial(optim.Adam, lr=0.1, fused=True, amsgrad=True),
    "adamw": partial(optim.AdamW, lr=0.1, weight_decay=0.1),
    "adamw_fused": partial(optim.AdamW, lr=0.1, fused=True),
    "nadam": partial(optim.NAdam, lr=0.1),
    "rmsprop": partial(optim.RMSprop, lr=0.1, momentum=0.9, centered=True),
    "adagrad": partial(optim.Adagrad, lr=0.1, initial_accumulator_value=0.5),
    "adagrad_fused": partial(optim.Adagrad, lr=0.1, fused=True),
    "adafactor": partial(optim.Adafactor, lr=0.1),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Halves(nn.Module):
    """Two originals, both half of the tensor: registering and removing change no bit."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def right_inverse(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return X / 2, X / 2


class Gain(nn.Module):
    """A step with a parameter of its own."""

    def __init__(self, gain: nn.Parameter | None = None) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3, 1)) if gain is None else gain

    def forward(self, X: Tensor) -> Tensor:
        return X * self.gain


class Turned(nn.Module):
    """The value lies in memory by columns."""

    def forward(self, X: Tensor) -> Tensor:
        return X.t().contiguous().t()


class Widen(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.double()


class Failing(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X[:1]


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def train(layer: nn.Module, optimizer: optim.Optimizer, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        layer(X.to(next(layer.parameters()).dtype)).square().sum().backward()
        optimizer.step()


def trained(make: Make) -> tuple[nn.Linear, optim.Optimizer]:
    layer = nn.Linear(4, 3)
    optimizer = make(layer.parameters())
    train(layer, optimizer, 3)
    return layer, optimizer


def contents(optimizer: optim.Optimizer) -> list[Any]:
    """What must stay bit for bit after a failure: objects, options and state."""
    groups = [
        (id(group), id(group["params"]), list(map(id, group["params"]))) for group in optimizer.param_groups
    ]
    state = copy.deepcopy(optimizer.state_dict())
    return [*groups, [id(p) for p in optimizer.state], repr(state)]


def held(optimizer: optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def assert_is(found: list[Any], expected: list[Any]) -> None:
    assert [id(one) for one in found] == [id(one) for one in expected]


# --- groups and state ---------------------------------------------------------------------------------------------


@each_optimizer
def test_weight_norm_takes_the_weights_place_and_state(make: Make) -> None:
    layer, optimizer = trained(make)
    state = copy.deepcopy(optimizer.state[layer.weight])
    parametrize.register_parametrization(
        layer,
        "weight",
        weight_norm(nn.Linear(4, 3)).parametrizations.weight[0],
        optimizer=optimizer,
        unsafe=True,
    )
    chain = layer.parametrizations.weight
    assert_is(held(optimizer), [chain.original0, chain.original1, layer.bias])
    assert repr(optimizer.state.get(chain.original1, {})) == repr(state)
    fresh = optimizer.state.get(chain.original0, {})
    assert float(fresh.get("step", 0)) == 0
    before = [p.detach().clone() for p in layer.parameters()]
    train(layer, optimizer)
    assert not any(torch.equal(p, old) for p, old in zip(layer.parameters(), before, strict=True))


@each_optimizer
def test_a_folded_weight_takes_the_state_of_its_direction(make: Make) -> None:
    layer = weight_norm(nn.Linear(4, 3))
    optimizer = make(layer.parameters())
    train(layer, optimizer, 3)
    state = copy.deepcopy(optimizer.state.get(layer.parametrizations.weight.original1, {}))
    parametrize.remove_parametrizations(layer, "weight", optimizer=optimizer)
    assert_is(held(optimizer), [layer.bias, layer.weight])
    assert repr(optimizer.state.get(layer.weight, {})) == repr(state)
    assert set(optimizer.state) <= {layer.bias, layer.weight}
    before = layer.weight.detach().clone()
    train(layer, optimizer)
    assert not torch.equal(layer.weight, before)


@each_optimizer
def test_in_and_out_again_is_as_if_nothing_had_been(make: Make) -> None:
    layer, optimizer = trained(make)
    torch.manual_seed(0)
    plain = copy.deepcopy(layer)
    control = make(plain.parameters())
    control.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    parametrize.register_parametrization(layer, "weight", Halves(), optimizer=optimizer)
    parametrize.remove_parametrizations(layer, "weight", optimizer=optimizer)
    train(layer, optimizer, 3)
    train(plain, control, 3)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.bias, plain.bias)


@each_optimizer
def test_one_original_is_the_same_object_with_the_same_state(make: Make) -> None:
    layer, optimizer = trained(make)
    before = contents(optimizer)
    parametrize.register_parametrization(layer, "weight", nn.Identity(), optimizer=optimizer)
    assert contents(optimizer) == before
    parametrize.remove_parametrizations(layer, "weight", optimizer=optimizer)
    assert contents(optimizer) == before


def test_each_heir_has_state_of_its_own() -> None:
    layer, optimizer = trained(OPTIMIZERS["adam"])
    parametrize.register_parametrization(layer, "weight", Halves(), optimizer=optimizer)
    chain = layer.parametrizations.weight
    first, second = (optimizer.state[p] for p in (chain.original0, chain.original1))
    assert first["exp_avg"].data_ptr() != second["exp_avg"].data_ptr()
    assert first["step"].data_ptr() != second["step"].data_ptr()


def test_groups_keep_their_options_and_identity() -> None:
    layer = nn.Linear(4, 3)
    groups = [{"params": [layer.bias], "lr": 0.5}, {"params": [layer.weight], "weight_decay": 0.3}]
    optimizer = optim.AdamW(groups, lr=0.1)
    scheduler = optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    kept = list(map(id, optimizer.param_groups))
    orthogonal(layer)
    parametrize.remove_parametrizations(layer, "weight", optimizer=optimizer)
    parametrize.register_parametrization(layer, "weight", Halves(), optimizer=optimizer)
    train(layer, optimizer)
    scheduler.step()
    assert list(map(id, optimizer.param_groups)) == kept
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.05]
    assert optimizer.param_groups[1]["weight_decay"] == 0.3
    chain = layer.parametrizations.weight
    assert_is(optimizer.param_groups[1]["params"], [chain.original0, chain.original1])


def test_lengths_and_directions_in_groups_of_their_own() -> None:
    layer = weight_norm(nn.Linear(4, 3))
    g, v = layer.parametrizations.weight.original0, layer.parametrizations.weight.original1
    optimizer = optim.SGD([{"params": [g]}, {"params": [layer.bias, v], "weight_decay": 0.1}], lr=0.1)
    parametrize.remove_parametrizations(layer, "weight", optimizer=optimizer)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 2]
    assert_is(optimizer.param_groups[1]["params"], [layer.bias, layer.weight])
    train(layer, optimizer)


def test_names_in_the_groups_follow() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3))
    optimizer = optim.SGD(model.named_parameters(), lr=0.1)
    parametrize.register_parametrization(model[1], "weight", Halves(), optimizer=optimizer)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert names == [
        "0.weight",
        "0.bias",
        "1.parametrizations.weight.original0",
        "1.parametrizations.weight.original1",
        "1.bias",
    ]
    assert {name: id(p) for name, p in zip(names, held(optimizer), strict=True)} == {
        name: id(p) for name, p in model.named_parameters()
    }
    parametrize.remove_parametrizations(model[1], "weight", optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "0.bias", "1.weight", "1.bias"]


def test_the_name_of_a_tensor_that_stays_follows_too() -> None:
    layer = nn.Linear(4, 3)
    optimizer = optim.SGD(layer.named_parameters(), lr=0.1)
    parametrize.register_parametrization(layer, "weight", nn.Identity(), optimizer=optimizer)
    assert optimizer.param_groups[0]["param_names"] == ["parametrizations.weight.original", "bias"]


def test_several_optimizers() -> None:
    layer = nn.Linear(4, 3)
    first, second = optim.SGD([layer.weight], lr=0.1), optim.Adam([layer.bias], lr=0.1)
    parametrize.register_parametrization(layer, "weight", Halves(), optimizer=[first, second])
    assert len(held(first)) == 2
    assert_is(held(second), [layer.bias])


def test_a_steps_own_parameters_join_and_leave() -> None:
    layer, optimizer = trained(OPTIMIZERS["adam"])
    parametrize.register_parametrization(layer, "weight", Gain(), optimizer=optimizer)
    chain = layer.parametrizations.weight
    gain = chain[0].gain
    assert_is(held(optimizer), [chain.original, gain, layer.bias])
    parametrize.register_parametrization(layer, "weight", second := Gain(), optimizer=optimizer)
    assert_is(held(optimizer), [chain.original, second.gain, gain, layer.bias])
    train(layer, optimizer)
    parametrize.remove_parametrizations(layer, "weight", optimizer=optimizer)
    assert_is(held(optimizer), [layer.weight, layer.bias])
    assert set(optimizer.state) == {layer.weight, layer.bias}


def test_a_frozen_parameter_of_a_step_does_not_join() -> None:
    layer, optimizer = trained(OPTIMIZERS["adam"])
    step = Gain().requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", step, optimizer=optimizer)
    assert_is(held(optimizer), [layer.parametrizations.weight.original, layer.bias])


def test_a_parameter_that_the_module_still_has_stays() -> None:
    layer = nn.Linear(4, 3)
    layer.gain = nn.Parameter(torch.ones(3, 1))
    optimizer = optim.SGD(layer.parameters(), lr=0.1)
    parametrize.register_parametrization(layer, "weight", Gain(layer.gain), optimizer=optimizer)
    parametrize.remove_parametrizations(layer, "weight", optimizer=optimizer)
    assert_is(held(optimizer), [layer.weight, layer.bias, layer.gain])


def test_the_state_follows_into_another_dtype() -> None:
    layer, optimizer = trained(OPTIMIZERS["adam"])
    parametrize.register_parametrization(layer, "weight", Widen(), unsafe=True)
    expected = optimizer.state[layer.parametrizations.weight.original]["exp_avg"].double()
    parametrize.remove_parametrizations(layer, "weight", optimizer=optimizer)
    state = optimizer.state[layer.weight]
    assert layer.weight.dtype is torch.float64
    assert torch.equal(state["exp_avg"], expected)
    assert state["step"].dtype is torch.float32
    assert_is(held(optimizer), [layer.weight, layer.bias])


def test_state_of_another_shape_is_dropped() -> None:
    layer, optimizer = trained(OPTIMIZERS["adam"])
    weight = layer.weight
    parametrize.register_parametrization(layer, "weight", nn.Flatten(0), unsafe=True)
    parametrize.remove_parametrizations(layer, "weight", optimizer=optimizer)
    assert layer.weight is weight
    assert weight.shape == (12,)
    assert weight not in optimizer.state


def test_lbfgs_starts_anew() -> None:
    layer = nn.Linear(4, 3)
    optimizer = optim.LBFGS(layer.parameters(), lr=0.1)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = layer(X).square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    parametrize.register_parametrization(layer, "weight", Halves(), optimizer=optimizer)
    before = loss().item()
    optimizer.step(loss)
    assert loss().item() < before


def test_a_scaler_and_a_closure_go_on() -> None:
    layer, optimizer = trained(OPTIMIZERS["adam_fused"])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(layer(X).square().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    parametrize.register_parametrization(layer, "weight", Halves(), optimizer=optimizer)
    optimizer.zero_grad()
    before = layer.weight.detach().clone()
    scaler.scale(layer(X).square().sum()).backward()
    scaler.step(optimizer)
    assert not torch.equal(layer.weight, before)


# --- all or nothing -----------------------------------------------------------------------------------------------


@each_optimizer
def test_a_refused_registration_leaves_the_optimizer(make: Make) -> None:
    layer, optimizer = trained(make)
    before = contents(optimizer)
    with pytest.raises(torchkiln.ParametrizationError, match="may not change the shape"):
        parametrize.register_parametrization(layer, "weight", Failing(), optimizer=optimizer)
    assert contents(optimizer) == before


class Stubborn(optim.Adam):
    """Cannot tell its state."""

    @property
    def state(self) -> Any:
        if vars(self).get("armed"):
            raise RuntimeError("no state")
        return self.__dict__["_state"]

    @state.setter
    def state(self, value: Any) -> None:
        self.__dict__["_state"] = value


@pytest.mark.parametrize("verb", ["register", "append", "remove", "bake"])
def test_an_optimizer_that_fails_leaves_module_and_optimizers(verb: str) -> None:
    layer = nn.Linear(4, 3)
    if verb != "register":
        parametrize.register_parametrization(layer, "weight", Halves())
    good, bad = OPTIMIZERS["adam"](layer.parameters()), Stubborn(layer.parameters(), lr=0.1)
    train(layer, good)
    train(layer, bad)
    before = contents(good), list(layer.state_dict()), list(map(id, layer.parameters())), type(layer)
    bad.armed = True
    calls: dict[str, Callable[[], Any]] = {
        "register": lambda: parametrize.register_parametrization(
            layer, "weight", Halves(), optimizer=[good, bad]
        ),
        "append": lambda: parametrize.register_parametrization(
            layer, "weight", Gain(), optimizer=[good, bad]
        ),
        "remove": lambda: parametrize.remove_parametrizations(layer, "weight", optimizer=[good, bad]),
        "bake": lambda: torchkiln.bake(layer, optimizer=[good, bad]),
    }
    with pytest.raises(RuntimeError, match="no state"):
        calls[verb]()
    assert (
        contents(good),
        list(layer.state_dict()),
        list(map(id, layer.parameters())),
        type(layer),
    ) == before


def test_what_is_no_optimizer_is_refused_by_name() -> None:
    layer = nn.Linear(4, 3)
    with pytest.raises(
        torchkiln.ParametrizationError, match=r"expected a torch.optim.Optimizer or several, got int"
    ):
        parametrize.register_parametrization(layer, "weight", Halves(), optimizer=[3])
    assert list(dict(layer.named_parameters())) == ["weight", "bias"]


# --- layout -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("passed", [True, False])
@pytest.mark.parametrize("bakes", [True, False])
def test_fused_kernels_see_one_layout(passed: bool, bakes: bool) -> None:
    def run(make: Make) -> Tensor:
        torch.manual_seed(0)
        layer, optimizer = trained(make)
        follows = optimizer if passed else None
        parametrize.register_parametrization(layer, "weight", Turned(), optimizer=follows)
        layer(X).square().sum().backward()
        if bakes:
            with pytest.warns(TorchkilnWarning, match="every baked value is that of its original"):
                torchkiln.bake(layer, optimizer=follows)
        else:
            parametrize.remove_parametrizations(layer, "weight", optimizer=follows)
        assert layer.weight.stride() == (1, 3)
        optimizer.step()  # with the gradient of before
        train(layer, optimizer, 2)
        return layer.weight

    torch.testing.assert_close(
        run(OPTIMIZERS["adamw_fused"]), run(partial(optim.AdamW, lr=0.1, foreach=False))
    )
