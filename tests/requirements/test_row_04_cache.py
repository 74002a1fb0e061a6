"""Row 4: inside ``cached()`` a read returns what it would return outside, whatever happened since the last one."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from .table import Impl, fails_on, row

ISSUE = "geotorch 34"
HERE = "reproduced on torch 2.13"


class Scale(nn.Module):
    """Multiplication by an attribute; adds a buffer where there is one, and one more in training."""

    offset: Tensor | None
    extra = 0.0

    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor
        self.gain = nn.Parameter(torch.ones(()))
        self.table = torch.ones(())
        self.register_buffer("offset", None)
        self.register_buffer("shift", torch.zeros(()))

    def forward(self, X: Tensor) -> Tensor:
        X = X * self.factor * self.gain.to(X.dtype) + self.shift.to(X.dtype) * self.table
        return X + float(self.training) + self.extra + (0.0 if self.offset is None else self.offset)

    def right_inverse(self, X: Tensor) -> Tensor:
        return X / self.factor


class Square(nn.Module):
    """A product of matrices, which autocast computes in a narrower type."""

    def forward(self, X: Tensor) -> Tensor:
        return X @ X


def scaled(impl: Impl) -> Any:
    """A square layer in eval mode with one step."""
    return impl.P.register_parametrization(nn.Linear(3, 3), "weight", Scale()).eval()


def fresh(layer: nn.Module) -> Tensor:
    """Evaluate the chain itself, which no cache knows of."""
    chain: Any = layer.parametrizations
    value: Tensor = chain.weight()
    return value


def look(value: Tensor) -> tuple[Any, ...]:
    return value.tolist(), value.dtype, value.requires_grad


def assert_fresh(layer: Any) -> None:
    expected = fresh(layer)
    assert torch.equal(layer.weight, expected)
    assert layer.weight.requires_grad == expected.requires_grad
    assert layer.weight.dtype == expected.dtype


# --- changes ------------------------------------------------------------------------------------------------------


class WritingToData(torch.optim.Optimizer):
    """An optimizer as many outside of torch are."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.sub_(1.0)


def stepping(make: Callable[[list[Tensor]], torch.optim.Optimizer]) -> Callable[[Impl, Any], None]:
    def step(impl: Impl, layer: Any) -> None:
        original(layer).grad = torch.ones(3, 3)
        make([original(layer)]).step()

    return step


def original(layer: Any, index: int | None = None) -> nn.Parameter:
    tensor = getattr(layer.parametrizations.weight, f"original{'' if index is None else index}")
    assert isinstance(tensor, nn.Parameter)
    return tensor


def step_of(layer: Any) -> Scale:
    step = layer.parametrizations.weight[0]
    assert isinstance(step, Scale)
    return step


def load(impl: Impl, layer: Any) -> None:
    layer.load_state_dict({key: tensor + 1 for key, tensor in layer.state_dict().items()})


def swap(impl: Impl, layer: Any) -> None:
    torch.utils.swap_tensors(original(layer), nn.Parameter(torch.ones(3, 3)))  # type: ignore[no-untyped-call]  # torch's


def refill(impl: Impl, layer: Any) -> None:
    # As FSDP frees and fills a parameter, though that moves no version counter.
    storage = original(layer).untyped_storage()
    size = storage.nbytes()
    storage.resize_(0)
    storage.resize_(size)
    with torch.no_grad():
        original(layer).fill_(4.0)


def set_data(make: Callable[[Tensor], Tensor]) -> Callable[[Impl, Any], None]:
    def change(impl: Impl, layer: Any) -> None:
        original(layer).data = make(original(layer).data)

    return change


def twice_to_data(impl: Impl, layer: Any) -> None:
    """The second tensor may get the address of the first, which is free again."""
    original(layer).data = torch.zeros(3, 3)
    original(layer).data = torch.ones(3, 3)


def write(impl: Impl, layer: Any) -> None:
    with torch.no_grad():
        original(layer).add_(1.0)


def write_in_inference_mode(impl: Impl, layer: Any) -> None:
    with torch.inference_mode():
        original(layer).add_(1.0)


def replace_parameter(impl: Impl, layer: Any) -> None:
    layer.parametrizations.weight.original = nn.Parameter(torch.ones(3, 3))


def append(impl: Impl, layer: Any) -> None:
    impl.P.register_parametrization(layer, "weight", Square())


def replace(impl: Impl, layer: Any) -> None:
    layer.parametrizations.weight[0] = Scale(5.0).eval()


def count_a_hidden_write(impl: Impl, layer: Any) -> None:
    original(layer).data.add_(1.0)
    torch.autograd.graph.increment_version(original(layer))


CHANGES: dict[str, Callable[[Impl, Any], None]] = {
    "SGD": stepping(lambda p: torch.optim.SGD(p, 0.1, foreach=False)),
    "SGD, foreach": stepping(lambda p: torch.optim.SGD(p, 0.1, foreach=True)),
    "SGD, fused": stepping(lambda p: torch.optim.SGD(p, 0.1, fused=True)),
    "Adam": stepping(lambda p: torch.optim.Adam(p, 0.1, foreach=False)),
    "Adam, foreach": stepping(lambda p: torch.optim.Adam(p, 0.1, foreach=True)),
    "Adam, fused": stepping(lambda p: torch.optim.Adam(p, 0.1, fused=True)),
    "an optimizer that writes to .data": stepping(WritingToData),
    "load_state_dict": load,
    "nn.init": lambda impl, layer: nn.init.ones_(original(layer)),
    "a write": write,
    "a write in inference mode": write_in_inference_mode,
    "a hidden write that was counted": count_a_hidden_write,
    ".data = other": set_data(lambda data: data + 1),
    ".data = other, twice": twice_to_data,
    ".data = its transpose": set_data(lambda data: data.T),
    ".data = a part of it": set_data(lambda data: data[:2]),
    ".to(dtype)": lambda impl, layer: layer.to(torch.float64),
    ".to(dtype) and back": lambda impl, layer: layer.half().float(),
    "swap_tensors": swap,
    "storage freed and filled": refill,
    "requires_grad_(False)": lambda impl, layer: layer.requires_grad_(False),
    "another parameter": replace_parameter,
    "train()": lambda impl, layer: layer.train(),
    "an assignment": lambda impl, layer: setattr(layer, "weight", torch.ones(3, 3)),
    "a step appended": append,
    "a step replaced": replace,
    "an attribute of a step": lambda impl, layer: setattr(step_of(layer), "factor", 7.0),
    "an attribute of its class": lambda impl, layer: setattr(step_of(layer), "extra", 1.0),
    "a parameter of a step": lambda impl, layer: nn.init.zeros_(step_of(layer).gain),
    "a buffer of a step": lambda impl, layer: step_of(layer).shift.fill_(1.0),
    "another buffer of a step": lambda impl, layer: setattr(step_of(layer), "shift", torch.ones(())),
    "a buffer that was None": lambda impl, layer: setattr(step_of(layer), "offset", torch.ones(())),
    "a tensor of a step": lambda impl, layer: setattr(step_of(layer), "table", torch.zeros(())),
}
# What moves the value only together with another buffer.
PREPARED = {"a tensor of a step"}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("computed", ["once", "twice"])
@row(4, ISSUE, torch="the value is kept until the scope closes")
def test_04_a_change_inside_is_seen(impl: Impl, computed: str, change: str) -> None:
    layer = scaled(impl)
    step_of(layer).shift.fill_(1.0 if change in PREPARED else 0.0)
    with impl.P.cached():
        if computed == "twice":
            assert layer.weight is layer.weight
            write(impl, layer)
        before = layer.weight.clone()
        CHANGES[change](impl, layer)
        after = fresh(layer)
        assert look(after) != look(before)
        assert_fresh(layer)


@row(4, ISSUE, torch="what was written to the value stays")
def test_04_a_write_to_the_value_does_not_stay(impl: Impl) -> None:
    layer = scaled(impl)
    with impl.P.cached(), torch.no_grad():
        layer.weight.zero_()
        assert layer.weight.any()
        assert_fresh(layer)


@row(4, HERE)
def test_04_a_removal_inside_is_seen(impl: Impl) -> None:
    layer = scaled(impl)
    with impl.P.cached():
        value = layer.weight
        impl.P.remove_parametrizations(layer, "weight")
        assert torch.equal(layer.weight, value)
        assert layer.weight.is_leaf


@row(4, HERE)
def test_04_without_a_change_it_evaluates_once(impl: Impl) -> None:
    layer = scaled(impl)
    with impl.P.cached():
        assert layer.weight is layer.weight


@pytest.fixture
def one_process() -> Iterator[DeviceMesh]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@row(4, HERE, torch="FSDP refills the parameter, and the value is kept")
def test_04_a_load_under_fully_shard_is_seen(impl: Impl, one_process: DeviceMesh) -> None:
    model: Any = fully_shard(nn.Sequential(impl.N.weight_norm(nn.Linear(3, 3, bias=False))), mesh=one_process)
    x = torch.ones(1, 3)
    with impl.P.cached(), torch.no_grad():
        before = model(x).clone()
        state = {
            name: tensor * (3.0 if name.endswith("0") else 1.0) for name, tensor in model.state_dict().items()
        }
        model.load_state_dict(state)
        torch.testing.assert_close(model(x), 3.0 * before)


# --- modes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@row(4, HERE, torch="the value has no graph, for the whole block")
def test_04_a_read_without_grad_does_not_cut_the_graph(impl: Impl, mode: Any) -> None:
    layer = scaled(impl)
    with impl.P.cached():
        with mode():
            assert not layer.weight.requires_grad
        assert layer.weight.requires_grad


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@row(4, HERE)
def test_04_reads_without_grad_evaluate_once(impl: Impl, mode: Any) -> None:
    layer = scaled(impl)
    with impl.P.cached(), mode():
        assert layer.weight is layer.weight


@row(4, HERE, torch="the value has a graph in no_grad")
def test_04_a_read_with_grad_makes_no_graph_in_no_grad(impl: Impl) -> None:
    layer = scaled(impl)
    with impl.P.cached():
        assert layer.weight.requires_grad
        with torch.no_grad():
            assert not layer.weight.requires_grad


@row(4, HERE, torch="bfloat16 is pinned for the block")
def test_04_autocast_inside(impl: Impl) -> None:
    layer = impl.P.register_parametrization(nn.Linear(3, 3), "weight", Square(), unsafe=True)
    with impl.P.cached():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer.weight.dtype == torch.bfloat16
        assert layer.weight.dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            assert layer.weight.dtype == torch.float16


# --- graphs -------------------------------------------------------------------------------------------------------


@row(4, HERE, torch="the graph of the kept value is freed", raises=RuntimeError)
def test_04_a_second_backward_pass(impl: Impl) -> None:
    layer, once = impl.N.weight_norm(nn.Linear(3, 3)), impl.N.weight_norm(nn.Linear(3, 3))
    once.load_state_dict(layer.state_dict())
    once.weight.sum().backward()
    with impl.P.cached():
        layer.weight.sum().backward()
        layer.weight.sum().backward()
    torch.testing.assert_close(original(layer, 1).grad, 2 * once.parametrizations.weight.original1.grad)


@row(4, HERE)
def test_04_a_gradient_of_the_value_does_not_use_it_up(impl: Impl) -> None:
    layer = scaled(impl)
    with impl.P.cached():
        value = layer.weight
        torch.autograd.grad(layer.weight.pow(2).sum(), value)
        assert layer.weight is value
        layer.weight.sum().backward()


@row(4, HERE, torch="the hook frees the graph that is still to be gone through", raises=RuntimeError)
def test_04_a_read_in_a_backward_pass_has_a_graph_of_its_own(impl: Impl) -> None:
    layer = impl.N.weight_norm(nn.Linear(3, 3))

    def penalize(gradient: Tensor) -> None:
        with torch.enable_grad():
            layer.weight.sum().backward()

    with impl.P.cached():
        output = layer(torch.ones(1, 3))
        output.register_hook(penalize)
        output.sum().backward()
    assert original(layer, 1).grad is not None


class Twice(nn.Module):
    """Uses a weight before a checkpointed segment, and twice within."""

    def __init__(self, impl: Impl, *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = impl.N.weight_norm(nn.Linear(3, 3))
        self.reentrant = reentrant
        self.checkpointed = True

    def segment(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))  # type: ignore[no-any-return]  # nn.Module.__call__

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for _ in range(2):
            x = (
                checkpoint(self.segment, x, use_reentrant=self.reentrant)
                if self.checkpointed
                else self.segment(x)
            )
        return x.pow(2).sum()


@pytest.mark.parametrize(
    ("reentrant", "backward_inside"),
    [
        pytest.param(True, True, marks=fails_on("torch", "the segments share a graph", RuntimeError)),
        pytest.param(False, False, marks=fails_on("torch", "the two runs of a segment differ", RuntimeError)),
        (True, False),
        (False, True),
    ],
)
@row(4, HERE)
def test_04_activation_checkpointing_inside(impl: Impl, reentrant: bool, backward_inside: bool) -> None:
    plain, model = Twice(impl, reentrant=reentrant), Twice(impl, reentrant=reentrant)
    plain.checkpointed = False
    x = torch.linspace(-1, 1, 6).reshape(2, 3)
    plain(x).backward()
    with impl.P.cached():
        loss = model(x)
        if backward_inside:
            loss.backward()
    if not backward_inside:
        loss.backward()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, expected.grad)


# --- lifetimes ----------------------------------------------------------------------------------------------------


@row(4, HERE, torch="keys are ids of modules, which live modules take over")
def test_04_dead_modules_leave_no_values(impl: Impl) -> None:
    wrong = 0
    with impl.P.cached():
        for index in range(200):
            layer = scaled(impl)
            nn.init.constant_(original(layer), float(index))
            wrong += not bool((layer.weight == 2.0 * index).all())
    assert wrong == 0


@pytest.mark.usefixtures("no_collector")
@row(4, HERE, torch="the cache and a class of its own hold it")
def test_04_a_dropped_module_is_freed_with_its_value(impl: Impl) -> None:
    with impl.P.cached():
        layer = scaled(impl)
        layer(torch.ones(1, 3)).sum().backward()
        alive = [weakref.ref(each) for each in (layer, layer.weight, original(layer))]
        del layer
        assert [reference() for reference in alive] == [None] * 3
        assert len(impl.P._cache) == 0


@row(4, HERE)
def test_04_a_tensor_has_one_entry(impl: Impl) -> None:
    layer = scaled(impl)
    with impl.P.cached():
        for _ in range(20):
            _ = layer.weight
            write(impl, layer)
        assert len(impl.P._cache) == 1


@row(4, HERE, torch="a copy gets the value of its source")
def test_04_clones_made_inside_have_their_own_values(impl: Impl) -> None:
    block = nn.TransformerEncoderLayer(4, 1, 3, batch_first=True)
    impl.P.register_parametrization(block.linear1, "weight", Scale())
    with impl.P.cached():
        _ = block.linear1.weight
        encoder = nn.TransformerEncoder(block, 3, enable_nested_tensor=False)
        linears: list[Any] = [layer.linear1 for layer in encoder.layers]  # type: ignore[union-attr]  # modules
        for linear in linears:
            nn.init.uniform_(original(linear))
        for linear in linears:
            assert_fresh(linear)


@row(4, HERE, torch="the average is read once")
def test_04_an_average_made_inside_follows(impl: Impl) -> None:
    layer = scaled(impl)
    with impl.P.cached():
        _ = layer.weight
        average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.5))  # type: ignore[no-untyped-call]  # torch's
        average.update_parameters(layer)
        _ = average.module.weight
        write(impl, layer)
        average.update_parameters(layer)
        assert_fresh(average.module)
        assert_fresh(layer)


@row(4, HERE)
def test_04_a_copy_outlives_the_scope(impl: Impl) -> None:
    layer = scaled(impl)
    with impl.P.cached():
        _ = layer.weight
        replica = copy.deepcopy(layer)
    write(impl, layer)
    assert_fresh(replica)
    assert not torch.equal(replica.weight, layer.weight)
