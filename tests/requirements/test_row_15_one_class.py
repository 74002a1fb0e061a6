"""Row 15: equal layers are of one class, so what compiles, stacks or lists layers by class treats them as equal."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import functional_call, stack_module_state

from parametrize.steps import Scale

from .table import Impl, row

CLASS_EACH = "torch makes a class for each module"
NORMS = ["weight_norm", "spectral_norm", "orthogonal"]


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A residual block of two layers, each under ``norm``."""

    def __init__(self, impl: Impl, norm: str | None) -> None:
        super().__init__()
        make = getattr(impl.N, norm) if norm else nn.Identity()
        self.up, self.down = make(nn.Linear(4, 6)), make(nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(x).relu())


def graphs(impl: Impl, norm: str | None, *, blocks: int = 12) -> int:
    """Compile ``blocks`` equal blocks one by one, as torchtitan does, and count the graphs."""
    counter = CompileCounter()
    for _ in range(blocks):
        block = Block(impl, norm)
        block.compile(backend=counter, fullgraph=True)
        block(torch.ones(2, 4)).sum().backward()
    return counter.frame_count


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("norm", NORMS)
@row(15, "torchtitan 2754", torch=CLASS_EACH, raises=torch._dynamo.exc.FailOnRecompileLimitHit)
def test_15_equal_blocks_share_one_graph(impl: Impl, norm: str) -> None:
    plain = graphs(impl, None)
    torch._dynamo.reset()
    assert graphs(impl, norm) == plain == 1


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("norm", NORMS)
@row(15, "torchtitan 2754", torch=CLASS_EACH)
def test_15_a_second_model_compiles_nothing(impl: Impl, norm: str) -> None:
    counter = CompileCounter()
    for _ in range(2):
        block = Block(impl, norm)
        block.compile(backend=counter, fullgraph=True)
        block(torch.ones(2, 4))
    assert counter.frame_count == 1


@pytest.mark.parametrize("norm", NORMS)
@row(15, "torchtitan 2754", torch=CLASS_EACH)
def test_15_equal_layers_have_equal_types(impl: Impl, norm: str) -> None:
    layers = [getattr(impl.N, norm)(nn.Linear(4, 3)) for _ in range(3)]
    assert len({type(layer) for layer in layers}) == 1


@row(15, "torchtitan 2754", torch=CLASS_EACH)
def test_15_the_order_of_the_names_does_not_matter(impl: Impl) -> None:
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    for layer, names in [(one, ("weight", "bias")), (other, ("bias", "weight"))]:
        for name in names:
            impl.P.register_parametrization(layer, name, Scale())
    assert type(one) is type(other)


@pytest.mark.parametrize("norm", NORMS)
@row(15, "torchtitan 2754", torch=CLASS_EACH, raises=RuntimeError)
def test_15_the_states_of_an_ensemble_are_stacked(impl: Impl, norm: str) -> None:
    members = [getattr(impl.N, norm)(nn.Linear(4, 3)).eval() for _ in range(3)]
    parameters, buffers = stack_module_state(members)
    x = torch.ones(2, 4)
    skeleton = copy.deepcopy(members[0]).to("meta")
    outputs = torch.vmap(functools.partial(functional_call, skeleton), in_dims=(0, None))(
        {**parameters, **buffers}, (x,)
    )
    torch.testing.assert_close(outputs, torch.stack([member(x) for member in members]))


def hooked(calls: list[str]) -> type[nn.Linear]:
    class Registered(nn.Linear):
        """Lists its subclasses, and demands an argument of them."""

        def __init_subclass__(cls, *, label: str) -> None:
            super().__init_subclass__()
            calls.append(label)

    return Registered


@row(15, "reproduced on torch 2.13", torch="torch makes a subclass and announces it", raises=TypeError)
def test_15_the_users_init_subclass_is_not_called(impl: Impl) -> None:
    calls: list[str] = []
    base = hooked(calls)
    layer = impl.P.register_parametrization(base(4, 3), "weight", Scale())
    impl.P.register_parametrization(layer, "bias", Scale())
    impl.P.remove_parametrizations(layer, "bias")
    assert calls == []
    assert type(layer).__bases__ == (base,)
    assert type(layer).__mro__[1:] == base.__mro__


@row(15, "reproduced on torch 2.13")
def test_15_the_users_own_subclasses_are_announced(impl: Impl) -> None:
    calls: list[str] = []
    base = hooked(calls)
    parametrized = type(impl.P.register_parametrization(nn.Linear(4, 3), "weight", Scale()))

    class Mine(base, label="mine"):  # type: ignore[misc, valid-type]
        """A subclass by the user, made after an injected class."""

    assert calls == ["mine"]
    assert issubclass(Mine, nn.Linear)
    assert not issubclass(Mine, parametrized)
