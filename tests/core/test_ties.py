"""Tied parameters: registration refuses with both names, or keeps them tied; nothing changes behind another's back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchkiln
from torchkiln import ParametrizationError, TorchkilnWarning, parametrize
from torchkiln._core import ties
from torchkiln.parametrizations import orthogonal, spectral_norm, weight_norm


class Symmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.triu() + X.triu(1).mT

    def right_inverse(self, A: Tensor) -> Tensor:
        return A.triu()


class Halves(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b

    def right_inverse(self, X: Tensor) -> tuple[Tensor, Tensor]:
        return X / 2, X / 2


class Double(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X * 2


class Language(nn.Module):
    """An embedding, and an output layer tied to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(tokens))
        return out


TOKENS = torch.tensor([0, 1, 2, 3])
STEPS = {"symmetric": Symmetric, "halves": Halves, "double": Double}
each_step = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


def kept_tied(step: nn.Module | None = None) -> Language:
    model = Language()
    return_ = parametrize.register_parametrization(model.head, "weight", step or Symmetric(), tied_in=model)
    assert return_ is model.head
    return model


def bits(model: nn.Module) -> dict[str, list[Any]]:
    return {key: value.tolist() for key, value in model.state_dict().items()}


# --- refused ------------------------------------------------------------------------------------------------------


@each_step
@pytest.mark.parametrize("owner", ["head", "embedding"])
def test_registration_on_one_of_two_is_refused_with_both_names(step: type[nn.Module], owner: str) -> None:
    model = Language()
    before = bits(model)
    names = {"head": "Linear.weight", "embedding": "Embedding.weight"}
    other = names["embedding" if owner == "head" else "head"]
    text = rf"^{names[owner]} is the same parameter as {other}: parametrizing one of them would untie them\."
    with pytest.raises(ParametrizationError, match=text):
        parametrize.register_parametrization(getattr(model, owner), "weight", step())
    assert bits(model) == before
    assert not parametrize.is_parametrized(model.head)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("norm", [weight_norm, spectral_norm, orthogonal])
def test_the_built_ins_refuse_as_well(norm: Callable[[nn.Module], nn.Module]) -> None:
    model = Language()
    with pytest.raises(
        ParametrizationError, match=r"Linear\.weight is the same parameter as Embedding\.weight"
    ):
        norm(model.head)


def test_two_names_in_one_module_are_refused_with_both() -> None:
    module = nn.Module()
    module.a = module.b = nn.Parameter(torch.eye(3))
    with pytest.raises(ParametrizationError, match=r"^Module\.a is the same parameter as Module\.b:"):
        parametrize.register_parametrization(module, "a", Symmetric())


def test_the_names_are_paths_in_the_model_that_is_given() -> None:
    model, outside = Language(), nn.Linear(4, 4)
    outside.weight = model.head.weight
    with pytest.raises(ParametrizationError, match=r"^head\.weight is the same parameter as Linear\.weight:"):
        parametrize.register_parametrization(model.head, "weight", Symmetric(), tied_in=model)


def test_a_variable_or_an_optimizer_is_no_tie() -> None:
    layer = nn.Linear(4, 4)
    variable, optimizer = [layer.weight], torch.optim.SGD(layer.parameters(), lr=0.1)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    assert layer.parametrizations.weight.original is variable[0]
    assert optimizer.param_groups[0]["params"][0] is variable[0]


@pytest.mark.usefixtures("no_collector")
def test_a_module_that_nobody_can_reach_is_no_tie() -> None:
    layer, lost = nn.Linear(4, 4), nn.Linear(4, 4)
    lost.weight = layer.weight
    lost.itself = [lost]
    del lost
    parametrize.register_parametrization(layer, "weight", Symmetric())
    assert parametrize.is_parametrized(layer)


def test_a_copy_is_no_tie() -> None:
    layer = nn.Linear(4, 4)
    other = copy.deepcopy(layer)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    assert not parametrize.is_parametrized(other)


def test_a_tie_that_was_made_after_the_last_look_is_found() -> None:
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    held = [layer.weight]
    parametrize.register_parametrization(layer, "weight", Double())
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    other.weight = held[0]
    with pytest.raises(ParametrizationError, match="would untie them"):
        parametrize.register_parametrization(layer, "weight", Double())


def test_parameters_that_only_their_module_holds_cost_no_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("searched")

    monkeypatch.setattr(ties, "_search", never)
    for norm in (weight_norm, spectral_norm, orthogonal):
        norm(layer := nn.Linear(4, 4))
        layer(torch.ones(1, 4)).sum().backward()
        torchkiln.bake(layer)
    rnn = nn.LSTM(3, 4)
    weight_norm(rnn, "weight_hh_l0")
    parametrize.remove_parametrizations(rnn, "weight_hh_l0")


def test_an_optimizer_costs_one_search_for_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    searches, search = [], ties._search
    monkeypatch.setattr(ties, "_search", lambda *given: (searches.append(1), search(*given))[1])
    for index in range(10):
        parametrize.register_parametrization(model[index], "weight", Symmetric())
    assert len(searches) == 1
    assert len(optimizer.param_groups[0]["params"]) == 20


# --- kept tied ----------------------------------------------------------------------------------------------------


@each_step
def test_tied_in_parametrizes_both_with_one_original(step: type[nn.Module]) -> None:
    model = kept_tied(step())
    head, embedding = model.head.parametrizations.weight, model.embedding.parametrizations.weight
    assert head[0] is embedding[0]
    assert head is not embedding
    assert all(a is b for a, b in zip(head.parameters(), embedding.parameters(), strict=True))
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert len(list(model.parameters())) == len(list(head.parameters())) + 1


@each_step
def test_they_stay_tied_in_training_copies_and_files(step: type[nn.Module]) -> None:
    model = kept_tied(step())
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = one.head.weight.detach().clone()
        optimizer = torch.optim.Adam(one.parameters(), lr=0.1)
        one(TOKENS).square().sum().backward()
        optimizer.step()
        assert torch.equal(one.head.weight, one.embedding.weight)
        assert not torch.equal(one.head.weight, before)


def test_the_gradient_is_that_of_the_tied_plain_model() -> None:
    plain = Language()
    model = copy.deepcopy(plain)
    parametrize.register_parametrization(model.head, "weight", Halves(), tied_in=model)
    for one in (plain, model):
        one(TOKENS).square().sum().backward()
    torch.testing.assert_close(model.head.parametrizations.weight.original0.grad, plain.head.weight.grad)


def test_an_assignment_reaches_both() -> None:
    model = kept_tied()
    model.embedding.weight = torch.eye(4)
    assert torch.equal(model.head.weight, torch.eye(4))


def test_a_further_step_goes_to_both_or_is_refused() -> None:
    model = kept_tied()
    with pytest.raises(
        ParametrizationError, match=r"^Linear\.weight is the same parameter as Embedding\.weight"
    ):
        parametrize.register_parametrization(model.head, "weight", Double())
    parametrize.register_parametrization(model.head, "weight", Double(), tied_in=model)
    assert [len(one.parametrizations.weight) for one in (model.head, model.embedding)] == [2, 2]
    assert torch.equal(model.head.weight, model.embedding.weight)


def test_the_optimizer_follows_a_tied_registration() -> None:
    model = Language()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    parametrize.register_parametrization(model.head, "weight", Halves(), tied_in=model, optimizer=optimizer)
    chain = model.head.parametrizations.weight
    expected = [chain.original0, chain.original1, model.head.bias]
    assert list(map(id, optimizer.param_groups[0]["params"])) == list(map(id, expected))


class Refusing(nn.Embedding):
    """Cannot be parametrized: its class has no room for a subclass."""

    def register_module(self, *_: Any) -> None: ...

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "parametrizations":
            raise TypeError("no parametrizations here")
        super().__setattr__(name, value)


def test_a_failure_at_the_second_module_leaves_both() -> None:
    model = Language()
    model.embedding = Refusing(4, 4)
    model.head.weight = model.embedding.weight
    before = bits(model), list(map(id, model.parameters())), type(model.head)
    with pytest.raises(TypeError, match="no parametrizations here"):
        parametrize.register_parametrization(model.head, "weight", Symmetric(), tied_in=model)
    assert (bits(model), list(map(id, model.parameters())), type(model.head)) == before


@each_step
def test_bake_keeps_the_tie_and_the_place(step: type[nn.Module]) -> None:
    model = kept_tied(step())
    expected = model.head.weight.detach().clone()
    report = torchkiln.bake(model)
    assert model.head.weight is model.embedding.weight
    assert torch.equal(model.head.weight, expected)
    assert list(model.state_dict()) == list(Language().state_dict())
    assert [row.tied for row in report] == [("head.weight",), ("embedding.weight",)]


def test_restore_keeps_the_tie() -> None:
    model = kept_tied()
    torchkiln.restore(model)
    assert model.head.weight is model.embedding.weight


def test_summary_names_what_is_tied() -> None:
    head = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Symmetric())
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "head": head})
    model["embedding"].weight = head.parametrizations.weight.original
    (row,) = report = torchkiln.summary(model)
    assert row.tied == ("embedding.weight",)
    assert str(report).splitlines()[1].endswith("parameters  tied to")
    assert str(report).splitlines()[3].endswith("16          embedding.weight")


# --- what others hold does not change -----------------------------------------------------------------------------


@each_step
def test_removal_on_one_leaves_the_other_and_says_so(step: type[nn.Module]) -> None:
    model = kept_tied(step())
    expected = model.head.weight.detach().clone()
    text = r"^Linear\.weight gets a parameter of its own, and is no longer tied to Embedding\.weight\."
    with pytest.warns(TorchkilnWarning, match=text) as caught:
        parametrize.remove_parametrizations(model.head, "weight")
    assert caught[0].filename == __file__
    assert torch.equal(model.head.weight, expected)
    assert torch.equal(model.embedding.weight, expected)
    assert parametrize.is_parametrized(model.embedding)


def test_removal_does_not_change_a_plain_holder() -> None:
    head = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Double())
    embedding = nn.Embedding(4, 4)
    embedding.weight = head.parametrizations.weight.original
    plain, value = embedding.weight.detach().clone(), head.weight.detach().clone()
    with pytest.warns(TorchkilnWarning, match=r"no longer tied to Embedding\.weight"):
        parametrize.remove_parametrizations(head, "weight")
    assert torch.equal(embedding.weight, plain)
    assert torch.equal(head.weight, value)


def test_the_original_comes_back_tied() -> None:
    head = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Double())
    embedding = nn.Embedding(4, 4)
    embedding.weight = head.parametrizations.weight.original
    parametrize.remove_parametrizations(head, "weight", leave_parametrized=False)
    assert head.weight is embedding.weight


def test_bake_does_not_change_a_holder_outside_of_the_model() -> None:
    head = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Double())
    outside = nn.Embedding(4, 4)
    outside.weight = head.parametrizations.weight.original
    plain, value = outside.weight.detach().clone(), head.weight.detach().clone()
    torchkiln.bake(nn.Sequential(head))
    assert torch.equal(outside.weight, plain)
    assert torch.equal(head.weight, value)


def test_modules_with_transferred_originals_are_removed_apart() -> None:
    source = parametrize.register_parametrization(nn.Linear(4, 4), "weight", Double())
    target = parametrize.transfer_parametrizations_and_params(source, nn.Linear(4, 4))
    value = source.weight.detach().clone()
    with pytest.warns(TorchkilnWarning, match="no longer tied"):
        parametrize.remove_parametrizations(target, "weight")
    assert torch.equal(source.weight, value)
    assert torch.equal(target.weight, value)
