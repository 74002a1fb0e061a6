"""The stack of one tensor: steps switched off and on; copies, optimizers, ties, torch's chains, compiled forwards."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize as torch_parametrize

import torchkiln
from torchkiln import ParametrizationError, parametrizations, parametrize, stack

from .stacks import Halves, Scale, Shift, three

# --- disable and enable -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["a"], lambda w: 5 * (w + 1)),
        (["b"], lambda w: 5 * (2 * w)),
        (["c"], lambda w: 2 * w + 1),
        ([0, "c"], lambda w: w + 1),
        (["a", "b", "c"], lambda w: w),
        ([], lambda w: 5 * (2 * w + 1)),
    ],
)
def test_a_disabled_step_is_passed_by(keys: list[int | str], expected: Any) -> None:
    layer, steps, w = three()
    full, state = layer.weight, layer.state_dict()
    steps.disable(*keys)
    assert torch.equal(layer.weight, expected(w))
    assert list(layer.state_dict()) == list(state)
    assert [steps.is_enabled(name) for name in "abc"] == [
        name not in keys and index not in keys for index, name in enumerate("abc")
    ]
    steps.disable(*keys)
    steps.enable(*keys)
    assert torch.equal(layer.weight, full)


def test_disabled_in_a_block() -> None:
    layer, steps, w = three()
    steps.disable("a")
    with steps.disabled("a", "b"):
        assert torch.equal(layer.weight, 5 * w)
    assert torch.equal(layer.weight, 5 * (w + 1))
    with pytest.raises(KeyError), steps.disabled("b"):
        raise KeyError
    assert repr(steps) == "weight: a (disabled), b, c"
    with steps.disabled("c"), steps.disabled("b", "c"):
        assert torch.equal(layer.weight, w)
    assert repr(steps) == "weight: a (disabled), b, c"


def test_a_step_removed_inside_a_block_is_forgotten() -> None:
    layer, steps, w = three()
    with steps.disabled("a", "b"):
        steps.remove("b")
    assert repr(steps) == "weight: a, c"
    assert torch.equal(layer.weight, 5 * (2 * w))


def test_the_setting_moves_with_the_step() -> None:
    layer, steps, w = three()
    steps.disable("b")
    steps.insert(0, Scale(7.0))
    steps.remove("a")
    assert torch.equal(layer.weight, 5 * (7 * w))


def test_assigning_goes_by_what_is_enabled() -> None:
    layer = nn.Linear(2, 2)
    steps = stack(layer, "weight")
    steps.append(Shift(1.0))
    steps.append(Scale(2.0))  # no right inverse
    steps.disable("Scale")
    layer.weight = torch.zeros(2, 2)
    assert torch.equal(layer.get_parameter("parametrizations.weight.original"), torch.full((2, 2), -1.0))


@pytest.mark.parametrize(
    "fold", [torchkiln.bake, lambda layer: parametrize.remove_parametrizations(layer, "weight")]
)
def test_removing_goes_by_what_is_enabled(fold: Any) -> None:
    layer, steps, w = three()
    steps.disable("b")
    fold(layer)
    assert torch.equal(layer.weight, 5 * (2 * w))


def test_the_summary_says_what_is_disabled() -> None:
    layer, steps, _ = three()
    steps.disable("b")
    assert [row.what for row in torchkiln.summary(layer)] == ["Scale, Shift (disabled), Scale"]


def test_a_disabled_step_does_not_advance_and_gets_no_gradient() -> None:
    layer = parametrizations.spectral_norm(nn.Linear(3, 3))
    steps = stack(layer, "weight")
    steps.append(Shift(1.0))
    u = layer.get_buffer("parametrizations.weight.0._u").clone()
    with steps.disabled(0, 1):
        layer(torch.ones(1, 3)).sum().backward()
    assert torch.equal(layer.get_buffer("parametrizations.weight.0._u"), u)
    assert layer.get_parameter("parametrizations.weight.1.by").grad is None
    assert layer.get_parameter("parametrizations.weight.original").grad is not None


def test_a_cached_value_knows_the_setting() -> None:
    layer, steps, w = three()
    with parametrize.cached():
        assert torch.equal(layer.weight, 5 * (2 * w + 1))
        with steps.disabled("b"):
            assert torch.equal(layer.weight, 5 * (2 * w))
        assert torch.equal(layer.weight, 5 * (2 * w + 1))


def test_a_step_that_makes_one_tensor_of_several_cannot_be_passed_by() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(ParametrizationError, match="'weight_norm' makes one tensor of 2"):
        stack(layer, "weight").disable("weight_norm")


def test_a_step_that_is_there_twice_cannot_be_switched() -> None:
    layer, step = nn.Linear(3, 3), Scale(2.0)
    for _ in range(2):
        parametrize.register_parametrization(layer, "weight", step)
    with pytest.raises(ParametrizationError, match="0 is in the stack more than once"):
        stack(layer, "weight").disable(0)


def test_all_keys_are_looked_up_before_any_is_switched() -> None:
    _, steps, _ = three()
    with pytest.raises(ParametrizationError, match="no step 'd'"):
        steps.disable("a", "d")
    assert steps.is_enabled("a")


def test_a_state_dict_does_not_have_the_setting() -> None:
    layer, steps, w = three()
    other, others, _ = three()
    steps.disable("b")
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.weight, 5 * (2 * w + 1))
    others.disable("a")
    layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight, 5 * (2 * w))


def through_pickle(layer: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(layer))


def through_a_file(layer: nn.Module) -> Any:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_a_file])
def test_copies_have_the_names_and_the_setting_and_are_independent(duplicate: Any) -> None:
    layer, steps, w = three()
    steps.disable("b")
    twin = duplicate(layer)
    others = stack(twin, "weight")
    assert repr(others) == "weight: a, b (disabled), c"
    others.enable("b")
    others.remove("a")
    assert torch.equal(twin.weight, 5 * (w + 1))
    assert repr(steps) == "weight: a, b (disabled), c"
    assert torch.equal(layer.weight, 5 * (2 * w))
    assert repr(duplicate(steps)) == repr(steps)


def test_transfer_takes_the_names_and_the_setting_along() -> None:
    layer, steps, _ = three()
    steps.disable("b")
    other = parametrize.transfer_parametrizations_and_params(layer, nn.Linear(3, 3))
    assert repr(stack(other, "weight")) == "weight: a, b (disabled), c"
    assert torch.equal(other.weight, layer.weight)  # type: ignore[arg-type]  # Tensor | Module


def test_the_setting_is_seen_by_all_threads() -> None:
    layer, steps, w = three()
    seen: list[Tensor] = []
    with steps.disabled("b"):
        thread = threading.Thread(target=lambda: seen.append(layer.weight.detach()))
        thread.start()
        thread.join()
    assert torch.equal(seen[0], 5 * (2 * w))


# --- optimizers and ties ------------------------------------------------------------------------------------------


def test_an_optimizer_follows() -> None:
    layer, steps, _ = three()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
    steps.insert(0, Halves(), optimizer=optimizer)
    steps.remove("b", optimizer=optimizer)
    steps.append(Shift(2.0), optimizer=optimizer)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in layer.parameters()}


def test_an_optimizer_left_behind_says_so() -> None:
    layer = parametrizations.weight_norm(nn.Linear(3, 3))
    steps = stack(layer, "weight")
    steps.append(Scale(2.0))
    optimizer = torch.optim.SGD([p for name, p in layer.named_parameters() if "original" in name], lr=0.1)
    steps.remove(0)
    with pytest.warns(torchkiln.TorchkilnWarning, match="does not train Linear.weight"):
        optimizer.step()


@pytest.mark.parametrize(
    "edit",
    [
        lambda steps, **options: steps.insert(0, Halves(), **options),
        lambda steps, **options: steps.remove("a", **options),
    ],
    ids=["insert", "remove"],
)
def test_tied_tensors_are_edited_together_or_not_at_all(edit: Any) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 4), "head": nn.Linear(4, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    steps = stack(model["head"], "weight")
    steps.append(Scale(2.0), name="a", tied_in=model)
    steps.append(Shift(1.0), name="b", tied_in=model)
    before = model["head"].weight
    with pytest.raises(ParametrizationError, match="is the same parameter as"):
        edit(steps)
    assert torch.equal(model["head"].weight, before)
    edit(steps, tied_in=model)
    assert torch.equal(model["head"].weight, model["embedding"].weight)
    assert repr(stack(model["embedding"], "weight")) == repr(steps)
    assert len(list(model.parameters())) == len(list(model["head"].parameters()))


# --- torch's chains, compile ------------------------------------------------------------------------------------------


def test_chains_of_torch_can_be_edited_and_not_switched() -> None:
    layer: Any = nn.Linear(3, 3)
    w = layer.weight.detach().clone()
    for step in (Scale(2.0), Shift(1.0), Scale(5.0)):
        torch_parametrize.register_parametrization(layer, "weight", step)
    steps = stack(layer, "weight")
    with pytest.raises(
        ParametrizationError, match=r"registered by torch\.nn\.utils\.parametrize.*\nRegister it with"
    ):
        steps.disable(1)
    steps.remove("Shift")
    assert torch.equal(layer.weight, 5 * (2 * w))
    steps.insert(1, Scale(3.0), name="x")
    steps.replace(0, Halves())
    torch.testing.assert_close(layer.weight, 5 * (3 * w))
    assert steps.names == ("Halves", "x", "Scale")


class Both(nn.Module):
    """Its forward switches a step off and on again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = three()[0]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        full: Tensor = self.layer(x)
        with stack(self.layer, "weight").disabled("b"):
            return full, self.layer(x)


def test_switching_inside_a_compiled_forward_is_one_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    torch.compiler.reset()
    counter = CompileCounter()
    model, x = Both(), torch.ones(2, 3)
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(2):
        for got, expected in zip(compiled(x), model(x), strict=True):
            torch.testing.assert_close(got, expected)
    assert counter.frame_count == 1
    assert stack(model.layer, "weight").is_enabled("b")
