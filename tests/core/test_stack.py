"""The stack of one tensor: steps inserted, removed and replaced without touching the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from torchkiln import ParametrizationError, parametrizations, parametrize, stack

from .stacks import Fails, Flat, Halves, Scale, Shift, three


def snapshot(layer: nn.Module) -> list[Any]:
    """What a refused edit must leave."""
    chain: Any = layer.get_submodule("parametrizations.weight")
    tensors = [
        (key, id(tensor), tensor.tolist(), tensor.requires_grad) for key, tensor in chain.named_parameters()
    ]
    settings = (chain.is_tensor, chain.ntensors, chain.unsafe, chain._disabled_steps, chain._step_names)
    modes = [module.training for module in layer.modules()]
    return [type(layer), tensors, list(map(id, chain)), settings, modes, list(layer.state_dict())]


# --- looking ------------------------------------------------------------------------------------------------------


def test_a_stack_is_read_as_a_list_with_names() -> None:
    layer, steps, _ = three()
    assert steps.names == ("a", "b", "c")
    assert len(steps) == 3
    assert list(steps) == list(layer.parametrizations.weight)
    assert steps["b"] is steps[1] is steps[-2]
    assert ("b" in steps, steps[1] in steps, "d" in steps, Scale(1.0) in steps) == (True, True, False, False)


def test_a_stack_prints_its_names_and_what_is_off() -> None:
    _, steps, _ = three()
    steps.disable("b")
    assert repr(steps) == "weight: a, b (disabled), c"
    assert repr(stack(nn.Linear(2, 2), "bias")) == "bias: no steps"


def test_steps_of_the_drop_in_are_called_by_their_function() -> None:
    layer = nn.Linear(4, 4)
    parametrizations.weight_norm(layer)
    parametrizations.spectral_norm(layer)
    parametrizations.orthogonal(layer)
    parametrize.register_parametrization(layer, "weight", Scale(1.0))
    assert stack(layer, "weight").names == ("weight_norm", "spectral_norm", "orthogonal", "Scale")


def test_a_step_that_is_parametrized_itself_keeps_its_name() -> None:
    step = Shift(1.0)
    parametrize.register_parametrization(step, "by", Scale(2.0))
    layer = parametrize.register_parametrization(nn.Linear(2, 2), "weight", step)
    assert stack(layer, "weight").names == ("Shift",)


def test_the_view_stays_good() -> None:
    layer = nn.Linear(2, 2)
    steps = stack(layer, "weight")
    parametrize.register_parametrization(layer, "weight", Scale(2.0))
    assert steps.names == ("Scale",)
    parametrize.remove_parametrizations(layer, "weight")
    assert len(steps) == 0


def test_no_such_tensor() -> None:
    with pytest.raises(
        ParametrizationError, match=r"with name '0\.weight'\nTake the stack from the module that holds"
    ):
        stack(nn.Sequential(nn.Linear(2, 2)), "0.weight")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("d", r"^weight: a, b, c: there is no step 'd'\.$"),
        (3, r"^weight: a, b, c: there is no step 3\.$"),
        (-4, r"^weight: a, b, c: there is no step -4\.$"),
    ],
)
@pytest.mark.parametrize("verb", ["remove", "disable", "enable", "__getitem__", "is_enabled"])
def test_no_such_step(verb: str, key: int | str, message: str) -> None:
    layer, steps, _ = three()
    before = snapshot(layer)
    with pytest.raises(ParametrizationError, match=message):
        getattr(steps, verb)(key)
    assert snapshot(layer) == before


def test_a_name_that_two_steps_have_asks_for_an_index() -> None:
    layer = nn.Linear(2, 2)
    for factor in (1.0, 2.0):
        parametrize.register_parametrization(layer, "weight", Scale(factor))
    with pytest.raises(
        ParametrizationError, match=r"2 steps are called 'Scale'\.\nUse an index, one of \[0, 1\]"
    ):
        stack(layer, "weight").remove("Scale")


def test_names_follow_their_steps_whoever_edits_the_list() -> None:
    layer, steps, _ = three()
    steps.disable("c")
    del layer.parametrizations.weight[0]
    assert repr(steps) == "weight: b, c (disabled)"


# --- remove -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("a", lambda w: 5 * (w + 1)),
        ("b", lambda w: 5 * (2 * w)),
        ("c", lambda w: 2 * w + 1),
        (1, lambda w: 5 * (2 * w)),
        (-1, lambda w: 2 * w + 1),
    ],
)
def test_without_one_step_the_others_compute_as_if_it_had_never_been_there(
    key: int | str, expected: Any
) -> None:
    layer, steps, w = three()
    original, others = (
        layer.parametrizations.weight.original,
        [step for step in steps if step is not steps[key]],
    )
    removed = steps[key]
    assert steps.remove(key) is removed
    assert torch.equal(layer.weight, expected(w))
    assert list(steps) == others
    assert layer.parametrizations.weight.original is original


def test_the_keys_of_the_steps_after_it_move_by_one() -> None:
    layer, steps, _ = three()
    steps.remove("a")
    prefix = "parametrizations.weight."
    keys = [key.removeprefix(prefix) for key in layer.state_dict() if key.startswith(prefix)]
    assert keys == ["original", "0.by", "1.factor"]


@pytest.mark.parametrize("order", [("a", "b", "c"), ("c", "b", "a"), ("b", "a", "c")])
def test_without_any_step_the_module_is_what_it_was(order: tuple[str, ...]) -> None:
    layer, steps, w = three()
    original = layer.parametrizations.weight.original
    for key in order:
        steps.remove(key)
    assert type(layer) is nn.Linear
    assert layer.weight is original
    assert torch.equal(original, w)
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_a_first_step_with_several_originals_leaves_its_value() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    steps = stack(layer, "weight")
    steps.append(Shift(1.0))
    before = layer.weight.detach()
    steps.remove("weight_norm")
    assert torch.equal(layer.weight, before)
    chain: Any = layer.parametrizations.weight  # type: ignore[union-attr]  # Tensor | Module
    assert isinstance(chain.original, nn.Parameter)
    assert [name for name, _ in layer.named_parameters()] == [
        "bias",
        "parametrizations.weight.original",
        "parametrizations.weight.0.by",
    ]
    layer(torch.ones(1, 3)).sum().backward()
    assert chain.original.grad is not None


def test_the_only_step_with_several_originals_leaves_its_value() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    before = layer.weight.detach()
    stack(layer, "weight").remove(0)
    assert type(layer) is nn.Linear
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("kind", ["buffer", "non-persistent buffer", "frozen parameter"])
def test_the_new_original_is_what_the_old_ones_were(kind: str) -> None:
    module: Any = nn.Module()
    if kind == "frozen parameter":
        module.t = nn.Parameter(torch.ones(2), requires_grad=False)
    else:
        module.register_buffer("t", torch.ones(2), persistent=kind == "buffer")
    steps = stack(module, "t")
    steps.append(Halves())
    steps.append(Scale(2.0))
    steps.remove(0)
    original = module.parametrizations.t.original
    assert isinstance(original, nn.Parameter) == (kind == "frozen parameter")
    assert not original.requires_grad
    assert ("parametrizations.t.original" in module.state_dict()) == (kind != "non-persistent buffer")
    assert torch.equal(module.t, torch.full((2,), 2.0))


def test_a_removed_step_that_advanced_leaves_no_hook() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(3, 3))
    steps = stack(layer, "weight")
    steps.append(Scale(2.0))
    hooks = len(layer._forward_hooks)
    steps.remove("spectral_norm")
    plain = parametrize.register_parametrization(nn.Linear(3, 3), "weight", Scale(2.0))
    assert hooks >= len(layer._forward_hooks) == len(plain._forward_hooks)


# --- insert and append --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (1, lambda w: 5 * (2 * w * 3 + 1)),
        ("b", lambda w: 5 * (2 * w * 3 + 1)),
        (0, lambda w: 5 * (2 * w * 3 + 1)),
        ("c", lambda w: 5 * ((2 * w + 1) * 3)),
        (-1, lambda w: 5 * ((2 * w + 1) * 3)),
        (3, lambda w: 5 * (2 * w + 1) * 3),
    ],
)
def test_insert_comes_before_the_key(key: int | str, expected: Any) -> None:
    layer, steps, w = three()
    original, others = layer.parametrizations.weight.original, list(steps)
    new = Scale(3.0)
    steps.insert(key, new, name="new")
    torch.testing.assert_close(layer.weight, expected(w))
    assert steps["new"] is new
    assert [step for step in steps if step is not new] == others
    assert layer.parametrizations.weight.original is original


def test_a_new_first_step_takes_the_original_over() -> None:
    layer, steps, w = three()
    original = layer.parametrizations.weight.original
    steps.insert(0, Shift(7.0), name="first")
    assert steps.names == ("first", "a", "b", "c")
    assert layer.parametrizations.weight.original is original
    torch.testing.assert_close(original.detach(), w - 7)
    torch.testing.assert_close(layer.weight, 5 * (2 * w + 1))


def test_a_new_first_step_may_have_several_originals() -> None:
    layer, steps, w = three()
    steps.insert(0, Halves())
    chain = layer.parametrizations.weight
    assert (chain.is_tensor, chain.ntensors) == (False, 2)
    assert torch.equal(chain.original0, w / 4)
    assert "original" not in chain._parameters
    torch.testing.assert_close(layer.weight, 5 * (2 * w + 1))
    fresh = three()[0]
    stack(fresh, "weight").insert(0, Halves())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh.weight, layer.weight)


def test_nothing_comes_before_a_step_with_several_originals() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    before = snapshot(layer)
    with pytest.raises(
        ParametrizationError, match=r"before 'weight_norm', which starts from 2 tensors\.\nInsert it"
    ):
        stack(layer, "weight").insert(0, Scale(2.0))
    assert snapshot(layer) == before


def test_append_to_a_plain_tensor_is_registration() -> None:
    layer = nn.Linear(2, 2)
    weight = layer.weight
    stack(layer, "weight").append(Scale(2.0), name="mask")
    assert parametrize.is_parametrized(layer, "weight")
    assert stack(layer, "weight").names == ("mask",)
    assert layer.get_parameter("parametrizations.weight.original") is weight


@pytest.mark.parametrize(
    "edit",
    [
        lambda steps, new: steps.append(new),
        lambda steps, new: steps.insert(0, new),
        lambda steps, new: steps.insert(1, new),
        lambda steps, new: steps.replace(0, new),
        lambda steps, new: steps.replace("b", new),
    ],
)
@pytest.mark.parametrize(
    ("make", "message"),
    [(Flat, "may not change the shape"), (Fails, "does not run"), (lambda: Scale, "must be an nn.Module")],
    ids=["shape", "raises", "no module"],
)
def test_a_refused_edit_leaves_no_trace(edit: Any, make: Any, message: str) -> None:
    layer, steps, _ = three()
    layer.eval()
    steps.disable("c")
    new = make()
    before = snapshot(layer)
    with pytest.raises((ParametrizationError, RuntimeError, TypeError, AttributeError), match=message):
        edit(steps, new)
    assert snapshot(layer) == before
    assert not isinstance(new, nn.Module) or new.training


def test_an_optimizer_that_cannot_follow_undoes_the_edit() -> None:
    layer, steps, _ = three()
    before = snapshot(layer)
    with pytest.raises(ParametrizationError, match=r"expected a torch\.optim\.Optimizer"):
        steps.insert(0, Halves(), optimizer=["no optimizer"])  # type: ignore[list-item]
    assert snapshot(layer) == before


@pytest.mark.parametrize("verb", ["append", "insert", "replace"])
def test_a_step_is_in_a_stack_once(verb: str) -> None:
    _, steps, _ = three()
    arguments = [steps[0]] if verb == "append" else [1, steps[0]]
    with pytest.raises(ParametrizationError, match=r"this Scale is in the stack already\.\nAdd a copy"):
        getattr(steps, verb)(*arguments)


@pytest.mark.parametrize("verb", ["append", "insert", "replace"])
def test_a_name_is_given_once(verb: str) -> None:
    _, steps, _ = three()
    arguments = [Scale(1.0)] if verb == "append" else [1, Scale(1.0)]
    with pytest.raises(ParametrizationError, match="there is a step 'c' already"):
        getattr(steps, verb)(*arguments, name="c")


def test_an_unsafe_step_is_not_checked() -> None:
    layer, steps, w = three()
    steps.insert("c", Flat(), unsafe=True)
    assert torch.equal(layer.weight, 5 * (2 * w + 1).flatten())
    assert layer.parametrizations.weight.unsafe


@pytest.mark.parametrize("training", [True, False])
def test_a_new_step_takes_the_modules_mode(training: bool) -> None:
    layer, steps, _ = three()
    layer.train(training)
    steps.insert(1, new := Scale(1.0))
    steps.replace("a", other := Scale(1.0))
    assert (new.training, other.training) == (training, training)


def test_a_new_step_that_advances_is_followed() -> None:
    layer, steps, _ = three()
    donor: Any = parametrizations.spectral_norm(nn.Linear(3, 3))
    steps.insert(1, donor.parametrizations.weight[0])
    before = layer.parametrizations.weight[1]._u.clone()
    layer(torch.ones(1, 3))
    assert not torch.equal(layer.parametrizations.weight[1]._u, before)


# --- replace ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "expected"),
    [("a", lambda w: 5 * (3 * w + 1)), (1, lambda w: 5 * 6 * w), ("c", lambda w: (2 * w + 1) * 3)],
)
def test_replace_changes_one_step(key: int | str, expected: Any) -> None:
    layer, steps, w = three()
    original, names, old = layer.parametrizations.weight.original, steps.names, steps[key]
    assert steps.replace(key, Scale(3.0)) is old
    torch.testing.assert_close(layer.weight, expected(w))
    assert steps.names == names
    assert layer.parametrizations.weight.original is original


def test_replace_and_back_is_as_before() -> None:
    layer, steps, _ = three()
    before = layer.state_dict(), layer.weight
    steps.replace("b", steps.replace("b", Scale(3.0)))
    assert list(layer.state_dict()) == list(before[0])
    assert torch.equal(layer.weight, before[1])


def test_replace_by_class_name_takes_the_new_class_name() -> None:
    layer = parametrize.register_parametrization(nn.Linear(2, 2), "weight", Scale(2.0))
    steps = stack(layer, "weight")
    steps.replace("Scale", Shift(1.0))
    assert steps.names == ("Shift",)
    steps.replace("Shift", Scale(1.0), name="again")
    assert steps.names == ("again",)


def test_a_first_step_with_several_originals_hands_its_value_over() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    steps = stack(layer, "weight")
    steps.append(Scale(2.0))
    before = layer.weight.detach()
    steps.replace("weight_norm", Shift(1.0))
    torch.testing.assert_close(layer.weight.detach(), before)
    assert [name for name, _ in layer.named_parameters()][1] == "parametrizations.weight.original"


def test_a_new_first_step_with_several_originals_is_registered_on_the_original() -> None:
    layer, steps, w = three()
    steps.replace("a", Halves())
    torch.testing.assert_close(layer.weight, 5 * (w + 1))
    steps.replace("a", Scale(3.0))
    torch.testing.assert_close(layer.weight, 5 * (3 * w + 1))
    assert steps.names == ("a", "b", "c")


def test_an_original_that_is_parametrized_takes_the_value_of_a_new_first_step() -> None:
    layer, steps, w = three()
    parametrize.register_parametrization(layer.parametrizations.weight, "original", Shift(3.0))
    steps.insert(0, Shift(7.0))
    torch.testing.assert_close(layer.weight, 5 * (2 * w + 1))
    assert parametrize.is_parametrized(layer.parametrizations.weight, "original")
    with pytest.raises(ParametrizationError, match="original is itself parametrized"):
        steps.insert(0, Halves())
    torch.testing.assert_close(layer.weight, 5 * (2 * w + 1))
