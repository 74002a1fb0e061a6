"""baked: plain weights for the time of a context, and everything back afterwards."""

from __future__ import annotations

import copy
import io
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import prune

import torchkiln
from torchkiln import ParametrizationError, baked, parametrizations, parametrize

from .build import LAYERS, Scale, anatomy, evaluated, everything, registered

each_layer = pytest.mark.parametrize("kind", LAYERS)
LOST = r"inside baked\(\); the model has its stored tensors back"


def whole(model: nn.Module) -> list[Any]:
    """What must be back: all that ``anatomy`` sees, and the attributes, hooks and optimizer's view of each module."""
    attributes = [
        (name, key, id(value))
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key not in ("training", "_flat_weights")
    ]
    hooks = [
        (name, key, [(handle, id(hook)) for handle, hook in value.items()])
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key.endswith("_hooks") and isinstance(value, dict)
    ]
    parameters = [(name, id(parameter), parameter._version) for name, parameter in model.named_parameters()]
    buffers = [(name, id(buffer), buffer._version) for name, buffer in model.named_buffers()]
    return [anatomy(model), attributes, hooks, parameters, buffers, list(model.state_dict())]


@pytest.fixture
def model() -> nn.Sequential:
    """A model with two normed layers, a plain one and one with statistics."""
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(4, 4)),
        nn.BatchNorm1d(4),
        parametrizations.spectral_norm(nn.Linear(4, 4)),
        nn.Linear(4, 2),
    )


# --- inside -------------------------------------------------------------------------------------------------------


@each_layer
def test_outputs_are_those_of_eval_mode(kind: str) -> None:
    layer, x = LAYERS[kind][0](), torch.randn(5, 4)
    evaluated(layer, x)  # a hook inside a hook is one forward pass behind
    expected = evaluated(layer, x)
    with baked(layer):
        assert torch.equal(evaluated(layer, x), expected)


@each_layer
def test_inside_the_module_is_as_if_it_never_had_a_norm(kind: str) -> None:
    layer = LAYERS[kind][0]()
    with baked(layer) as plain:
        assert plain is layer
        assert type(layer) is nn.Linear
        assert list(layer.state_dict()) == ["weight", "bias"]
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
        assert not layer._forward_pre_hooks
        assert not layer._forward_hooks
        assert type(layer.weight) is nn.Parameter
        assert layer.weight.requires_grad


def test_a_copy_made_inside_is_plain_and_stays_so(model: nn.Module) -> None:
    x = torch.randn(3, 4)
    with baked(model):
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        expected = evaluated(model, x)
    assert list(twin.state_dict()) == list(torchkiln.state_dict(model, spelling="plain"))
    twin(x).sum().backward()
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    twin.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert torch.equal(evaluated(twin, x), expected)


def test_patterns_choose(model: nn.Module) -> None:
    with baked(model, "0.*"):
        assert (type(model[0]).__name__, type(model[2]).__name__) == ("Linear", "ParametrizedLinear")
    with baked(model, exclude="0.*"):
        assert (type(model[0]).__name__, type(model[2]).__name__) == ("ParametrizedLinear", "Linear")


def test_the_plain_model_traces_and_compiles(model: nn.Module) -> None:
    from torch._dynamo.testing import CompileCounter

    x, counter = torch.randn(3, 4), CompileCounter()
    model.eval()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad(), baked(model):
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), model(x))
    assert counter.frame_count == 1


# --- afterwards ---------------------------------------------------------------------------------------------------


@each_layer
@pytest.mark.parametrize("training", [True, False])
def test_everything_is_back(kind: str, training: bool) -> None:
    layer, x = LAYERS[kind][0](), torch.randn(5, 4)
    layer(x)
    layer.train(training)
    before = whole(layer)
    generator = torch.get_rng_state()
    with torch.no_grad(), baked(layer):
        layer(x)
    assert whole(layer) == before
    assert torch.equal(torch.get_rng_state(), generator)


def test_everything_is_back_in_a_model_of_everything() -> None:
    model, x = everything(), torch.randn(5, 4)
    evaluated(model, x)
    expected = evaluated(model, x)
    before = whole(model)
    with torch.no_grad(), baked(model):
        assert torch.equal(evaluated(model, x), expected)
    assert whole(model) == before
    assert torch.equal(evaluated(model, x), expected)


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, GeneratorExit])
def test_an_error_inside_puts_everything_back_and_goes_on(
    model: nn.Module, error: type[BaseException]
) -> None:
    before = whole(model)

    @baked(model)
    def fail() -> None:
        model.get_parameter("0.weight").data.zero_()
        raise error

    with pytest.raises(error):
        fail()
    assert whole(model) == before


def test_a_value_that_is_not_finite_changes_nothing(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_parameter("0.parametrizations.weight.original0").fill_(torch.inf)
    before = whole(model)
    with pytest.raises(ParametrizationError, match=r"^0\.weight: 16 of 16 values"), baked(model):
        pytest.fail("entered")
    assert whole(model) == before


def test_training_goes_on_with_the_same_optimizer(model: nn.Module) -> None:
    twin, x = copy.deepcopy(model), torch.randn(6, 4)
    optimizers = [torch.optim.Adam(one.parameters(), lr=0.1) for one in (model, twin)]
    for _ in range(3):
        for one, optimizer in zip((model, twin), optimizers, strict=True):
            optimizer.zero_grad()
            one(x).square().sum().backward()
            optimizer.step()
        with torch.no_grad(), baked(model.eval()):
            model(x)
        model.train()
    for key, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


def test_modes_set_inside_are_undone_everywhere(model: nn.Module) -> None:
    model.train()
    model[2].parametrizations.weight[0].eval()  # type: ignore[index, union-attr, operator]
    before = [module.training for module in model.modules()]
    with baked(model):
        model.eval()
    assert [module.training for module in model.modules()] == before


def test_contexts_nest(model: nn.Module) -> None:
    before = whole(model)
    with baked(model, "0.*"):
        inside = whole(model)
        with baked(model), baked(model):
            assert type(model[2]) is nn.Linear  # type: ignore[index]
        assert whole(model) == inside
    assert whole(model) == before


def test_a_model_without_computed_tensors_is_left_alone() -> None:
    model = nn.Linear(2, 2)
    before = whole(model)
    with baked(model):
        assert whole(model) == before
        with torch.no_grad():
            model.weight.zero_()
    assert not model.weight.any()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_may_be_entered_and_left_in_any_mode(model: nn.Module, mode: Any) -> None:
    before, x = whole(model), torch.randn(2, 4)
    model.eval()
    with mode(), baked(model):
        expected = model(x)
    with baked(model):
        with mode():
            assert torch.equal(model(x), expected)
        assert model(x).requires_grad
    model.train()
    assert whole(model) == before


def test_tied_originals_share_a_parameter_inside() -> None:
    first, second = registered(Scale())(nn.Linear(4, 4)), registered(Scale())(nn.Linear(4, 4))
    first.parametrizations.weight.original = second.parametrizations.weight.original
    pair = nn.ModuleList([first, second])
    before = whole(pair)
    with baked(pair):
        assert first.weight is second.weight
    assert whole(pair) == before


@pytest.mark.filterwarnings("ignore:.*weights are not part of single contiguous chunk:UserWarning")
@pytest.mark.parametrize(
    "norm", [parametrizations.weight_norm, utils.weight_norm, torch_parametrizations.spectral_norm]
)
def test_recurrent_layers(norm: Any) -> None:
    rnn, x = nn.LSTM(3, 4), torch.randn(5, 2, 3)
    norm(rnn, "weight_hh_l0")
    rnn.eval()
    rnn(x)
    expected, before, flat = rnn(x)[0], whole(rnn), rnn._flat_weights
    with torch.no_grad(), baked(rnn):
        assert torch.equal(rnn(x)[0], expected)
        assert all(isinstance(weight, nn.Parameter) for weight in rnn._flat_weights)
    assert rnn._flat_weights is flat
    assert whole(rnn) == before
    rnn(x)[0].sum().backward()
    assert all(p.grad is not None for p in rnn.parameters())


# --- what is done inside ------------------------------------------------------------------------------------------


def trains(model: Any) -> None:
    model(torch.randn(3, 4)).sum().backward()


def steps(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trains(model)
    optimizer.step()
    optimizer.zero_grad()


def loads(model: Any) -> None:
    model.load_state_dict({key: torch.zeros_like(value) for key, value in model.state_dict().items()})


def assigns(model: Any) -> None:
    model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()}, assign=True)


def replaces(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.zeros(4, 4))
    model[2].weight.data.zero_()


def deletes(model: Any) -> None:
    del model[0].weight
    model[2].weight.requires_grad_(False)


def writes_data(model: Any) -> None:
    for layer in (model[0], model[2]):
        layer.weight.data.clamp_(-0.01, 0.01)


def reparametrizes(model: Any) -> None:
    for layer in (model[0], model[2]):
        parametrize.register_parametrization(layer, "weight", Scale())


@pytest.mark.parametrize(
    "act",
    [
        trains,
        steps,
        loads,
        assigns,
        replaces,
        deletes,
        writes_data,
        reparametrizes,
        nn.Module.double,
        lambda model: model.to("meta"),
        lambda model: [torchkiln.stack(layer, "weight").append(Scale()) for layer in (model[0], model[2])],
    ],
)
def test_what_would_be_lost_is_an_error(model: Any, act: Any) -> None:
    originals = [(p, p.detach().clone()) for p in model.parameters()]
    with pytest.raises(ParametrizationError, match=rf"^0\.weight, 2\.weight.*{LOST}"), baked(model):
        act(model)
    assert type(model[0]).__name__ == type(model[2]).__name__ == "ParametrizedLinear"
    names = [name for name, _ in model.named_parameters()]
    for (p, value), name in zip(originals, names, strict=True):
        if "parametrizations" in name:
            assert model.get_parameter(name) is p
            assert torch.equal(p, value)


def test_another_tensor_parametrized_inside_is_an_error_and_taken_back(model: Any) -> None:
    before = [type(module) for module in model.modules()], list(model.state_dict())
    bias = model[0].bias
    with pytest.raises(ParametrizationError, match=LOST), baked(model):
        parametrize.register_parametrization(model[0], "bias", Scale())
    assert ([type(module) for module in model.modules()], list(model.state_dict())) == before
    assert model[0].bias is bias


def test_a_norm_put_on_and_taken_off_inside_is_none(model: Any) -> None:
    before = whole(model)
    with baked(model):
        parametrize.register_parametrization(model[0], "weight", Scale())
        torchkiln.restore(model[0])
    assert whole(model) == before


def test_many_lost_tensors_are_counted() -> None:
    model = nn.Sequential(*[parametrizations.weight_norm(nn.Linear(2, 2)) for _ in range(5)])
    with (
        pytest.raises(ParametrizationError, match=r"^0\.weight, 1\.weight, 2\.weight and 2 more: "),
        baked(model),
    ):
        model.double()


def test_what_is_done_to_other_tensors_stays(model: Any) -> None:
    class Counter(nn.Linear):
        """A layer that reassigns a buffer and sets attributes."""

        calls: Tensor

        def __init__(self) -> None:
            super().__init__(4, 4)
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            self.last = x
            return super().forward(x)

    counter = parametrizations.weight_norm(Counter())
    model = nn.Sequential(counter, *model)
    statistics = model[2].running_mean.clone()
    with torch.no_grad(), baked(model):
        handle = counter.register_forward_hook(lambda *_: None)
        x = torch.randn(3, 4)
        model(x)
        counter.bias.zero_()
    assert not torch.equal(model[2].running_mean, statistics)
    assert counter.get_buffer("calls") == 1
    assert counter.last is x
    assert handle.id in counter._forward_hooks
    handle.remove()
    assert handle.id not in counter._forward_hooks
    assert not counter.get_parameter("bias").any()


def test_moving_to_where_it_is_loses_nothing(model: nn.Module) -> None:
    model.append(parametrizations.weight_norm(nn.GRU(2, 2), "weight_hh_l0"))  # type: ignore[operator]
    before = whole(model)
    with baked(model):
        model.to("cpu")
        model.float()
    assert whole(model) == before


def test_gradients_of_inputs_are_free(model: nn.Module) -> None:
    x = torch.randn(3, 4, requires_grad=True)
    model.eval()
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    with baked(model):
        (got,) = torch.autograd.grad(model(x).sum(), x)
    torch.testing.assert_close(got, expected)


def test_other_threads_see_the_plain_model(model: Any) -> None:
    seen: list[type] = []
    with baked(model):
        thread = threading.Thread(target=lambda: seen.append(type(model[0])))
        thread.start()
        thread.join()
    assert seen == [nn.Linear]


def test_a_disabled_step_is_left_out() -> None:
    layer = registered(Scale(3.0))(nn.Linear(4, 4))
    torchkiln.stack(layer, "weight").disable("Scale")
    weight = layer.weight.detach().clone()
    before = whole(layer)
    with baked(layer):
        assert torch.equal(layer.weight, weight)
    assert whole(layer) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.complex64])
def test_writes_are_seen_in_every_dtype(dtype: torch.dtype) -> None:
    layer = registered(nn.Identity())(nn.Linear(4, 4))
    layer.parametrizations.weight.original = nn.Parameter(torch.ones(4, 4).to(dtype), dtype.is_complex)
    with pytest.raises(ParametrizationError, match=LOST), torch.no_grad(), baked(layer):
        layer.weight.copy_(torch.zeros(4, 4))


def test_pruning_inside_is_an_error(model: Any) -> None:
    with pytest.raises(ParametrizationError, match=LOST), baked(model):
        prune.l1_unstructured(model[0], "weight", amount=0.5)
    assert not model[0]._forward_pre_hooks
