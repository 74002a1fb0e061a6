"""``functional_call`` by plain names: what torch's does with names, and what it cannot."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import torchkiln

X = torch.linspace(-1, 1, 6).reshape(2, 3)


def model() -> nn.Module:
    normed = torchkiln.parametrizations.weight_norm(nn.Linear(3, 3))
    return nn.Sequential(normed, torchkiln.parametrizations.spectral_norm(nn.Linear(3, 2))).eval()


def plain(of: nn.Module) -> dict[str, Tensor]:
    copied = copy.deepcopy(of)
    torchkiln.bake(copied)
    return dict(copied.named_parameters())


def test_a_strict_call_takes_the_tensors_of_the_baked_model() -> None:
    first, second = model(), model()
    assert torch.equal(torchkiln.functional_call(first, plain(second), X, strict=True), second(X))


def test_plain_names_and_originals_mix() -> None:
    first, second = model(), model()
    state = second.state_dict()
    given = {name: state[name] for name in state if not name.startswith("0.parametrizations")}
    given["0.weight"] = second[0].weight.detach()
    assert torch.equal(torchkiln.functional_call(first, given, (X,), strict=True), second(X))


def test_several_mappings_and_keywords() -> None:
    first, second = model(), model()
    weight, rest = plain(second), {}
    rest["1.weight"] = weight.pop("1.weight")
    assert torch.equal(torchkiln.functional_call(first, (weight, rest), None, {"input": X}), second(X))


def test_a_model_without_parametrizations_is_called_as_by_torch() -> None:
    layer = nn.Linear(3, 2)
    given = {"weight": torch.ones(2, 3)}
    ours, theirs = (
        call(layer, given, (X,)) for call in (torchkiln.functional_call, torch.func.functional_call)
    )
    assert torch.equal(ours, theirs)


def test_missing_and_unexpected_names_are_refused_as_by_torch() -> None:
    layer, given = nn.Linear(3, 2), {"weight": torch.ones(2, 3), "scale": torch.ones(2)}
    with pytest.raises(RuntimeError) as theirs:
        torch.func.functional_call(layer, given, (X,), strict=True)
    with pytest.raises(RuntimeError) as ours:
        torchkiln.functional_call(layer, given, (X,), strict=True)
    assert str(ours.value) == str(theirs.value)


def test_a_missing_computed_tensor_is_named_by_its_originals() -> None:
    with pytest.raises(
        RuntimeError, match=r"Missing key\(s\): '0.bias', '0.parametrizations.weight.original0'"
    ):
        torchkiln.functional_call(model(), {}, (X,), strict=True)


def test_a_tensor_given_twice_is_refused() -> None:
    given = {"0.weight": torch.eye(3), "0.parametrizations.weight.original0": torch.ones(3, 1)}
    with pytest.raises(
        ValueError, match=r"0\.parametrizations\.weight\.original0\.\nGive the one or the others"
    ):
        torchkiln.functional_call(model(), given, (X,))


def test_a_name_in_two_mappings_is_refused() -> None:
    with pytest.raises(ValueError, match=r"'0\.bias' is in two"):
        torchkiln.functional_call(model(), ({"0.bias": torch.ones(3)}, {"0.bias": torch.ones(3)}), (X,))


def test_gradients_reach_the_given_tensor_and_no_original() -> None:
    normed = model()
    weight = torch.eye(3, requires_grad=True)
    torchkiln.functional_call(normed, {"0.weight": weight}, (X,)).sum().backward()
    assert weight.grad is not None
    assert normed[0].parametrizations.weight.original1.grad is None
