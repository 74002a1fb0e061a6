"""Row 4: a scope of ``cached()`` belongs to the thread or task that opened it, and nothing leaks out of a transform."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.func import functional_call, grad, jvp, vmap
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .table import Impl, fails_on, row

# Forward-mode AD loads torch's decompositions, some of which torch scripts.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

HERE = "reproduced on torch 2.13"
PROCESS = "the cache is one switch for the whole process"
T = TypeVar("T")


class Scale(nn.Module):
    """Multiplication by a constant."""

    def forward(self, X: Tensor) -> Tensor:
        return X * 2.0

    def right_inverse(self, X: Tensor) -> Tensor:
        return X / 2.0


class Drawing(nn.Module):
    """Adds noise, so that each evaluation has another value."""

    def forward(self, X: Tensor) -> Tensor:
        return X + torch.rand_like(X)


def scaled(impl: Impl) -> Any:
    return impl.P.register_parametrization(nn.Linear(3, 3), "weight", Scale())


def noisy(impl: Impl) -> Any:
    return impl.P.register_parametrization(nn.Linear(3, 3), "weight", Drawing())


def is_kept(layer: Any) -> bool:
    return layer.weight is layer.weight


def in_a_thread(call: Callable[[], T]) -> T:
    results: list[T] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()
    thread.join()
    return results[0]


# --- threads ------------------------------------------------------------------------------------------------------


@row(4, HERE, torch=PROCESS)
def test_04_another_thread_has_no_part_in_a_scope(impl: Impl) -> None:
    layer = noisy(impl)
    with impl.P.cached():
        assert not in_a_thread(lambda: is_kept(layer))


@row(4, HERE, torch=PROCESS)
def test_04_each_thread_has_a_scope_of_its_own(impl: Impl) -> None:
    layer = noisy(impl)

    def scoped() -> Tensor:
        with impl.P.cached():
            value: Tensor = layer.weight
            assert layer.weight is value
            return value

    with impl.P.cached():
        here = layer.weight
        assert in_a_thread(scoped) is not here
        assert layer.weight is here


@row(4, HERE, torch=PROCESS)
def test_04_a_thread_that_ends_its_scope_leaves_others_open(impl: Impl) -> None:
    layer, opened, go = noisy(impl), threading.Event(), threading.Event()

    def held() -> None:
        with impl.P.cached():
            opened.set()
            assert go.wait(10)

    thread = threading.Thread(target=held)
    thread.start()
    assert opened.wait(10)
    kept_here = is_kept(layer)
    with impl.P.cached():
        go.set()
        thread.join()
        assert is_kept(layer)
    assert not kept_here


# --- tasks --------------------------------------------------------------------------------------------------------


@row(4, HERE, torch=PROCESS)
def test_04_a_sibling_task_has_no_part_in_a_scope(impl: Impl) -> None:
    layer = noisy(impl)

    async def scoped(opened: asyncio.Event, seen: asyncio.Event) -> bool:
        with impl.P.cached():
            opened.set()
            await seen.wait()
            return is_kept(layer)

    async def main() -> tuple[bool, bool]:
        opened, seen = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(scoped(opened, seen))
        await opened.wait()
        here = is_kept(layer)
        seen.set()
        return here, await task

    assert asyncio.run(main()) == (False, True)


@row(4, HERE)
def test_04_a_task_created_inside_inherits_the_scope_while_it_is_open(impl: Impl) -> None:
    layer = noisy(impl)

    async def reading(closed: asyncio.Event) -> tuple[Tensor, bool]:
        value = layer.weight
        await closed.wait()
        return value, is_kept(layer)

    async def main() -> tuple[bool, bool]:
        closed = asyncio.Event()
        with impl.P.cached():
            here = layer.weight
            task = asyncio.create_task(reading(closed))
            await asyncio.sleep(0)
        closed.set()
        value, kept = await task
        return value is here, kept

    assert asyncio.run(main()) == (True, False)


@row(4, HERE)
def test_04_a_child_task_sees_what_its_parent_writes(impl: Impl) -> None:
    layer = impl.N.spectral_norm(nn.Linear(3, 3)).eval()

    async def child() -> Tensor:
        value: Tensor = layer.weight
        return value.clone()

    async def main() -> Tensor:
        with impl.P.cached():
            task = asyncio.create_task(child())
            nn.init.eye_(layer.parametrizations.weight.original)
            return await task

    torch.testing.assert_close(asyncio.run(main()), layer.weight)


@row(4, HERE, torch=PROCESS)
def test_04_a_thread_with_a_copied_context_has_no_part_in_the_scope(impl: Impl) -> None:
    layer = noisy(impl)

    async def main() -> bool:
        with impl.P.cached():
            return await asyncio.to_thread(is_kept, layer)

    assert not asyncio.run(main())


# --- opening and closing ------------------------------------------------------------------------------------------


@row(4, HERE)
def test_04_an_exception_closes_the_scope(impl: Impl) -> None:
    layer = noisy(impl)

    def fail() -> None:
        with impl.P.cached(), impl.P.cached():
            assert is_kept(layer)
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert not is_kept(layer)


@row(4, HERE)
def test_04_nested_scopes_share_until_the_outermost_closes(impl: Impl) -> None:
    layer = noisy(impl)
    with impl.P.cached():
        with impl.P.cached():
            inner = layer.weight
        assert layer.weight is inner
    assert layer.weight is not inner


def scope_in_a_generator(impl: Impl) -> Iterator[None]:
    with impl.P.cached():
        yield


@pytest.mark.parametrize("first", [0, 1])
@row(4, HERE)
def test_04_generators_close_in_any_order(impl: Impl, first: int) -> None:
    layer = noisy(impl)
    generators = [scope_in_a_generator(impl), scope_in_a_generator(impl)]
    for generator in generators:
        next(generator)
    next(generators[first], None)
    assert is_kept(layer)
    next(generators[1 - first], None)
    assert not is_kept(layer)
    with impl.P.cached():
        assert is_kept(layer)
    assert not is_kept(layer)


@row(4, HERE)
def test_04_an_asynchronous_generator_may_close_in_another_task(impl: Impl) -> None:
    layer = noisy(impl)

    async def scoped() -> Any:
        with impl.P.cached():
            yield

    async def main() -> None:
        generator = scoped()
        await generator.__anext__()
        await asyncio.create_task(generator.aclose())

    asyncio.run(main())
    assert not is_kept(layer)


# --- transforms and graphs ----------------------------------------------------------------------------------------


def loss(layer: Any, x: Tensor) -> Tensor:
    return layer(x).pow(2).sum()  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any


def by_grad(layer: Any) -> None:
    grad(lambda x: loss(layer, x))(torch.ones(3))


def by_vmap(layer: Any) -> None:
    vmap(lambda x: loss(layer, x * layer.weight.sum()))(torch.ones(2, 3))


def by_jvp(layer: Any) -> None:
    jvp(lambda x: loss(layer, x), (torch.ones(3),), (torch.ones(3),))


def by_functional_call(layer: Any) -> None:
    parameters = {name: tensor.detach() * 3 for name, tensor in layer.named_parameters()}
    grad(lambda p: functional_call(layer, p, (torch.ones(3),)).sum())(parameters)


class ZeroingDispatch(TorchDispatchMode):
    """Returns zeros for each product."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return torch.zeros(3, 3) if func is torch.ops.aten.mul.Tensor else result


class ZeroingFunction(TorchFunctionMode):
    """Returns zeros for each product."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return torch.zeros(3, 3) if func is Tensor.mul else func(*args, **(kwargs or {}))


def by_mode(mode: type[Any]) -> Callable[[Any], None]:
    def call(layer: Any) -> None:
        with mode():
            assert not layer.weight.any()

    return call


def by_fake_tensors(layer: Any) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        _ = layer.weight


TRANSFORMS = {
    "grad": (by_grad, "a wrapper of the transform stays"),
    "vmap": (by_vmap, None),
    "jvp": (by_jvp, "a wrapper of the transform stays"),
    "functional_call": (by_functional_call, "the value for other parameters stays"),
    "dispatch mode": (by_mode(ZeroingDispatch), "the value of the mode stays"),
    "function mode": (by_mode(ZeroingFunction), "the value of the mode stays"),
    "FakeTensorMode": (by_fake_tensors, "a fake tensor stays"),
}


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(call, id=name, marks=[fails_on("torch", reason)] if reason else [])
        for name, (call, reason) in TRANSFORMS.items()
    ],
)
@row(4, HERE)
def test_04_nothing_leaks_out_of_a_transform(impl: Impl, transform: Callable[[Any], None]) -> None:
    layer = scaled(impl)
    with impl.P.cached():
        transform(layer)
        value = layer.weight
        assert type(value) is Tensor
        assert not torch._C._functorch.is_functorch_wrapped_tensor(value)
        assert torch.equal(value, layer.parametrizations.weight())


@pytest.mark.parametrize(
    "transform",
    [
        pytest.param(
            call,
            id=name,
            marks=[fails_on("torch", "the mode is not asked")] if name.endswith(" mode") else [],
        )
        for name, (call, _) in TRANSFORMS.items()
    ],
)
@row(4, HERE)
def test_04_a_value_from_outside_survives_a_transform(impl: Impl, transform: Callable[[Any], None]) -> None:
    layer = scaled(impl)
    with impl.P.cached():
        value = layer.weight
        transform(layer)
        assert layer.weight is value


@row(4, HERE, torch="the value is that of the first parameters")
def test_04_functional_call_inside_uses_the_given_parameters(impl: Impl) -> None:
    layer = scaled(impl)
    parameters = {name: tensor.detach() * 3 for name, tensor in layer.named_parameters()}
    x = torch.ones(1, 3)
    expected = functional_call(layer, parameters, (x,))
    with impl.P.cached():
        layer(x)
        assert torch.equal(functional_call(layer, parameters, (x,)), expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@row(4, HERE, torch="the graph has the value from before")
def test_04_a_compiled_model_inside(impl: Impl) -> None:
    layer = impl.P.register_parametrization(nn.Linear(3, 3), "weight", Scale())
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.ones(1, 3)
    with impl.P.cached():
        _ = layer.weight
        nn.init.eye_(layer.parametrizations.weight.original)
        output = compiled(x)
    assert torch.equal(output, layer(x))


@row(4, HERE, torch="a fake tensor stays")
def test_04_an_export_inside(impl: Impl) -> None:
    layer = scaled(impl)
    x = torch.ones(1, 3)
    with impl.P.cached():
        exported = torch.export.export(layer, (x,)).module()
        value = layer.weight
    assert type(value) is Tensor
    torch.testing.assert_close(exported(x), layer(x))
