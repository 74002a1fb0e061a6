"""The scopes of ``cached()``: for one model, nested; and their reads against plain ones."""

from __future__ import annotations

import contextvars
import copy
import functools
import threading
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import torchkiln
from torchkiln import parametrizations, parametrize
from torchkiln.parametrize import cached

from .counting import Counted, counted, is_kept

# --- one model ----------------------------------------------------------------------------------------------------


def test_a_scope_of_a_model_keeps_its_tensors_alone() -> None:
    inside, outside = counted()[0], counted()[0]
    with cached(nn.Sequential(nn.ReLU(), inside)):
        assert is_kept(inside)
        assert not is_kept(outside)
    assert not is_kept(inside)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_serving_model_evaluates_once(mode: Any) -> None:
    recurrent, calls = counted(nn.GRU(3, 3), "weight_hh_l0")
    layer, more = counted()
    model = nn.Sequential(layer, recurrent).eval()
    x = torch.ones(2, 1, 3)
    expected = model(x)[0].detach()
    calls.clear()
    more.clear()
    with cached(model), mode():
        outputs = [model(x)[0] for _ in range(3)]
    assert (len(calls), len(more)) == (1, 1)
    assert all(torch.equal(output, expected) for output in outputs)


def test_the_output_of_a_serving_model_is_that_of_the_baked_one() -> None:
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(3, 4)), parametrizations.orthogonal(nn.Linear(4, 4))
    )
    baked = copy.deepcopy(model.eval())
    torchkiln.bake(baked)
    x = torch.randn(5, 3)
    with cached(model), torch.inference_mode():
        assert torch.equal(model(x), baked(x))
        assert torch.equal(model(x), baked(x))


def test_a_tensor_registered_inside_is_kept() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with cached(model):
        counted(model[0])
        assert is_kept(model[0])


def test_a_module_that_takes_the_place_of_a_member_has_its_own_values() -> None:
    model = nn.ModuleList([counted()[0]])
    with cached(model), torch.no_grad():
        for value in range(50):
            model[0] = counted()[0]
            model[0].parametrizations.weight.original.fill_(value)
            assert bool((model[0].weight == 2 * value).all())


@pytest.mark.parametrize("outer", [True, False], ids=["model outside", "model inside"])
def test_the_outermost_scope_that_keeps_a_tensor_serves_it(outer: bool) -> None:
    layer = counted()[0]
    scopes = [cached(layer), cached()] if outer else [cached(), cached(layer)]
    with scopes[0]:
        with scopes[1]:
            value = layer.weight
        assert layer.weight is value


def test_a_scope_of_another_model_in_between() -> None:
    layer, other = counted()[0], counted()[0]
    with cached(layer):
        value = layer.weight
        with cached(other):
            assert layer.weight is value
            assert is_kept(other)
        assert not is_kept(other)


def test_scopes_of_models_close_in_any_order() -> None:
    one, two = counted()[0], counted()[0]
    first, second = cached(one), cached(two)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (is_kept(one), is_kept(two)) == (False, True)
    second.__exit__(None, None, None)
    assert (is_kept(one), is_kept(two)) == (False, False)


@pytest.mark.usefixtures("no_collector")
def test_a_scope_is_freed_when_it_closes() -> None:
    layer = counted()[0]
    with cached():
        layer.weight.sum().backward()
        scope = weakref.ref(parametrize._cache)
    with cached():
        assert scope() is None


@pytest.mark.usefixtures("no_collector")
def test_a_value_that_is_computed_again_frees_the_one_before() -> None:
    layer = counted()[0]
    with cached():
        before = weakref.ref(layer.weight)
        nn.init.ones_(layer.parametrizations.weight.original)
        assert before() is not None
        assert is_kept(layer)
        assert before() is None


@pytest.mark.usefixtures("no_collector")
def test_a_chain_that_another_took_the_place_of_leaves_no_value() -> None:
    layer = counted()[0]
    with cached():
        before = weakref.ref(layer.weight)
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        counted(layer)
        assert is_kept(layer)
        assert before() is None


def test_a_copied_context_takes_no_scope_into_another_thread() -> None:
    layer = counted()[0]
    with cached():
        value, seen = layer.weight, []
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(lambda: seen.append(layer.weight),))
        thread.start()
        thread.join()
        assert seen[0] is not value
        assert layer.weight is value


@pytest.mark.parametrize("transform", [torch.func.vmap, torch.func.functionalize, torch.func.grad])
def test_a_value_in_use_is_not_used_within_a_transform(transform: Callable[..., Any]) -> None:
    layer, calls = counted()

    def run(x: Tensor) -> Tensor:
        return (layer.weight * x).sum()

    with cached(), torch.no_grad():
        assert is_kept(layer)
        transform(run)(torch.ones(3) if transform is torch.func.vmap else torch.ones(()))
        assert is_kept(layer)
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore:`torch.jit.trace.* is deprecated:DeprecationWarning")
def test_a_value_in_use_is_not_traced_as_a_constant() -> None:
    layer = counted()[0]
    with cached():
        assert is_kept(layer)
        with pytest.raises(RuntimeError, match="Cannot trace a model while caching parametrizations"):
            torch.jit.trace(layer, torch.ones(1, 3))


def test_a_decorator() -> None:
    layer, calls = counted()

    @cached(layer)
    def run() -> bool:
        return is_kept(layer)

    assert run()
    assert run()
    assert len(calls) == 2


def test_not_a_module() -> None:
    with (
        pytest.raises(TypeError, match=r"cached\(\) expected a module or nothing, got Tensor\."),
        cached(torch.ones(3)),  # type: ignore[arg-type]  # the point
    ):
        pass


# --- what is seen -------------------------------------------------------------------------------------------------


def test_a_chain_that_was_exchanged_while_the_old_one_lives() -> None:
    layer = counted()[0]
    with cached():
        chain, before = layer.parametrizations.weight, layer.weight.detach()
        layer.parametrizations["weight"] = copy.deepcopy(chain)
        layer.parametrizations.weight[0].factor = 3.0
        torch.testing.assert_close(layer.weight, before * 1.5)


def test_bytes_read_as_another_type() -> None:
    layer = counted(nn.Linear(3, 3).half())[0]
    original = layer.parametrizations.weight.original
    with cached():
        _ = layer.weight
        original.data = original.data.view(torch.bfloat16)
        assert layer.weight.dtype == torch.bfloat16


def test_an_attribute_that_cannot_be_compared() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factors = [torch.ones(2)]

        def forward(self, X: Tensor) -> Tensor:
            return X * self.factors[0].sum()

    layer: Any = parametrize.register_parametrization(nn.Linear(3, 3), "weight", Listed())
    with cached():
        before = layer.weight
        layer.parametrizations.weight[0].factors = [torch.full((2,), 2.0)]
        torch.testing.assert_close(layer.weight, before * 2.0)


# --- what has no proof --------------------------------------------------------------------------------------------


def test_inference_tensors_are_not_kept() -> None:
    with torch.inference_mode():
        layer = counted()[0]
        with cached():
            before = layer.weight.clone()
            layer.parametrizations.weight.original.add_(1.0)
            torch.testing.assert_close(layer.weight, before + 2.0)


def test_meta_tensors_are_not_kept() -> None:
    layer = counted(nn.Linear(3, 3, device="meta"))[0]
    with cached():
        assert layer.weight.is_meta
        assert not is_kept(layer)


def add_to_data(tensor: Tensor) -> None:
    tensor.data.add_(1.0)


def add_by_numpy(tensor: Tensor) -> None:
    array = tensor.detach().numpy()
    array += 1.0


uncounted = pytest.mark.parametrize("write", [add_to_data, add_by_numpy])


@uncounted
def test_a_write_that_torch_does_not_count_is_seen_once_it_is_counted(
    write: Callable[[Tensor], None],
) -> None:
    layer = counted()[0]
    original = layer.parametrizations.weight.original
    with cached():
        before = layer.weight
        write(original)
        assert layer.weight is before  # the one exception; see the docstring of cached()
        torch.autograd.graph.increment_version(original)
        torch.testing.assert_close(layer.weight, before + 2.0)


@uncounted
def test_without_a_scope_or_after_it_every_write_is_seen(write: Callable[[Tensor], None]) -> None:
    layer = counted()[0]
    original = layer.parametrizations.weight.original
    with cached():
        before = layer.weight
        write(original)
    torch.testing.assert_close(layer.weight, before + 2.0)
    write(original)
    torch.testing.assert_close(layer.weight, before + 4.0)


@uncounted
def test_between_two_forwards_every_write_is_seen(write: Callable[[Tensor], None]) -> None:
    """The scope of a recurrent layer's own forward ends with it."""
    layer = counted(nn.RNN(3, 3), "weight_hh_l0")[0]
    x, original = torch.ones(2, 1, 3), layer.parametrizations.weight_hh_l0.original
    before = layer(x)[0]
    write(original)
    after = layer(x)[0]
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    assert not torch.equal(before, after)
    assert torch.equal(layer(x)[0], after)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("fused", [False, True])
def test_a_compiled_optimizer_step_is_seen(fused: bool) -> None:
    layer = counted()[0]
    original = layer.parametrizations.weight.original
    optimizer = torch.optim.SGD([original], 0.1, fused=fused)
    original.grad = torch.ones(3, 3)
    graphs = CompileCounterWithBackend("aot_eager")
    step = torch.compile(optimizer.step, backend=graphs)
    with cached():
        for _ in range(4):
            _ = layer.weight
            step()
            torch.testing.assert_close(layer.weight, original * 2.0)
    assert graphs.frame_count <= 1  # the hook that sees the step makes no more graphs


def test_a_step_that_reads_another_tensor_shares_no_graph_with_it() -> None:
    source = parametrizations.weight_norm(nn.Linear(3, 3))

    class Tied(nn.Module):
        def forward(self, X: Tensor) -> Tensor:
            return X + source.weight

    layer: Any = parametrize.register_parametrization(nn.Linear(3, 3), "weight", Tied())
    with cached():
        _ = layer.weight
        source.weight.sum().backward()
        layer.weight.sum().backward()


# --- against reads outside of any scope ---------------------------------------------------------------------------


def outside(layer: nn.Module, name: str) -> Tensor:
    """Read a tensor where no scope is open."""
    value: Tensor = contextvars.Context().run(getattr, layer, name)
    return value


@functools.cache
def models() -> nn.ModuleList:
    torch.manual_seed(0)
    scaled = counted()[0]
    parametrizations.weight_norm(scaled, "bias", dim=None)
    stacked = parametrizations.spectral_norm(parametrizations.orthogonal(nn.Linear(3, 3)))
    return nn.ModuleList([scaled, parametrizations.weight_norm(nn.Linear(3, 3)), stacked])


class Interleaved(RuleBasedStateMachine):
    """Reads, writes, modes, copies and removals, in and out of scopes; each read equals one outside of any."""

    layers = st.integers(0, 2)

    def __init__(self) -> None:
        super().__init__()
        self.model = copy.deepcopy(models())
        self.scopes: list[ExitStack] = []

    def teardown(self) -> None:
        for scope in self.scopes:
            scope.close()
        assert parametrize._cache_enabled == 0

    def originals(self, index: int) -> list[Tensor]:
        return [each for each in self.model[index].parameters() if each.requires_grad]

    @rule(for_model=st.booleans())
    @precondition(lambda self: len(self.scopes) < 3)
    def open(self, for_model: bool) -> None:
        scope = ExitStack()
        scope.enter_context(cached(self.model if for_model else None))
        self.scopes.append(scope)

    @rule(data=st.data())
    @precondition(lambda self: self.scopes)
    def close(self, data: st.DataObject) -> None:
        self.scopes.pop(data.draw(st.integers(0, len(self.scopes) - 1))).close()

    @rule(index=layers, mode=st.sampled_from([torch.enable_grad, torch.no_grad, torch.inference_mode]))
    def read(self, index: int, mode: Any) -> None:
        with mode():
            value, expected = self.model[index].weight, outside(self.model[index], "weight")
        assert torch.equal(value, expected)
        assert value.requires_grad == expected.requires_grad

    @rule(index=layers)
    def run_and_go_back(self, index: int) -> None:
        output = self.model[index](torch.ones(2, 3)).sum()
        if output.requires_grad:
            output.backward()

    @rule(index=layers, kind=st.sampled_from(["single", "foreach", "fused"]))
    def optimize(self, index: int, kind: str) -> None:
        originals = self.originals(index)
        if originals:
            for original in originals:
                original.grad = torch.ones_like(original)
            options = {kind: True} if kind != "single" else {}
            torch.optim.SGD(originals, 0.1, **options).step()  # type: ignore[arg-type]  # one of two booleans

    @rule(index=layers, how=st.sampled_from(["in place", "data", "load", "cast"]))
    def write(self, index: int, how: str) -> None:
        layer = self.model[index]
        if how == "load":
            layer.load_state_dict({key: tensor * 0.9 for key, tensor in layer.state_dict().items()})
        elif how == "cast":
            layer.bfloat16().float()
        else:
            for original in layer.parameters():
                with torch.no_grad():
                    original.mul_(0.9) if how == "in place" else setattr(
                        original, "data", original.data * 0.9
                    )

    @rule(index=layers, training=st.booleans(), trains=st.booleans())
    def mode(self, index: int, training: bool, trains: bool) -> None:
        self.model[index].train(training).requires_grad_(trains)

    @rule(factor=st.floats(0.5, 2.0))
    def attribute(self, factor: float) -> None:
        if parametrize.is_parametrized(self.model[0], "weight"):
            self.model[0].parametrizations.weight[0].factor = factor

    @rule(index=layers)
    def copy(self, index: int) -> None:
        self.model[index] = copy.deepcopy(self.model[index])

    @rule(index=layers)
    def remove_or_register(self, index: int) -> None:
        if parametrize.is_parametrized(self.model[index], "weight"):
            parametrize.remove_parametrizations(self.model[index], "weight")
        else:
            parametrize.register_parametrization(self.model[index], "weight", Counted(1.5))

    @rule()
    def replace_all(self) -> None:
        """New modules, which may take over the ids of the old."""
        self.model = copy.deepcopy(models())

    @invariant()
    def the_other_tensors_are_right(self) -> None:
        bias = self.model[0].bias
        assert torch.equal(bias, outside(self.model[0], "bias"))


TestInterleaved = Interleaved.TestCase
TestInterleaved.settings = settings(max_examples=100, stateful_step_count=25)
