"""The laws that every parametrization obeys, as functions that raise where it does not."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

import torchkiln
from torchkiln._core.base import Parametrization
from torchkiln._core.errors import ParametrizationError
from torchkiln.families import from_spec
from torchkiln.parametrize import register_parametrization

__all__ = ["LAWS", "LawBrokenError", "NotApplicableError", "Subject"]

Originals = tuple[Tensor, ...]


class LawBrokenError(AssertionError):
    """The parametrization breaks the law; the message says how."""


class NotApplicableError(Exception):
    """The law says nothing about this parametrization; the message says why."""


class Holder(nn.Module):
    """A module with one tensor, which its forward returns."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(memory_format=torch.preserve_format))

    def forward(self) -> Tensor:
        """Return the tensor."""
        return self.weight


@dataclass(frozen=True)
class Subject:
    """What a law looks at: a parametrization, never changed, and a tensor to register it on."""

    step: nn.Module
    example: Tensor

    def fresh(self) -> nn.Module:
        """Return a copy to work with."""
        return deepcopy(self.step)

    def start(self, X: Tensor | None = None) -> tuple[nn.Module, Originals]:
        """Return a copy that was given ``X``, the example by default, and the originals it made of it."""
        step = self.fresh()
        X = self.example if X is None else X
        try:
            originals = step.right_inverse(X)  # type: ignore[operator]  # mypy: Tensor | Module
        except (AttributeError, NotImplementedError):
            originals = X
        return step, (originals,) if isinstance(originals, Tensor) else tuple(originals)

    def moved(self, originals: Originals) -> Originals:
        """Return originals a little way from the given ones, the same each time."""
        generator = torch.Generator().manual_seed(1)
        return tuple(_nudged(original, generator) for original in originals)

    def point(self) -> Tensor:
        """Return a value that the parametrization takes, not far from the example."""
        step, originals = self.start()
        value: Tensor = step(*self.moved(originals))
        return value.detach()

    def registered(self) -> Holder:
        """Return a module with the example under a copy of the parametrization, moved from where it started."""
        holder = Holder(self.example)
        register_parametrization(holder, "weight", self.fresh())
        with torch.no_grad():
            for original, other in zip(
                holder.parameters(), self.moved(tuple(holder.parameters())), strict=True
            ):
                original.copy_(other)
        return holder

    def residual(self, X: Tensor) -> float:
        """Return how far ``X`` is from the constraint."""
        if not isinstance(self.step, Parametrization):
            raise NotApplicableError("it has no residual()")
        try:
            return float(self.step.residual(X))
        except NotImplementedError as error:
            raise NotApplicableError("it constrains nothing") from error


def _nudged(original: Tensor, generator: torch.Generator) -> Tensor:
    noise = torch.randn(original.shape, generator=generator, dtype=_wide(original.dtype))
    return (original.detach() + 0.1 * noise.to(original.device)).to(original.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def tolerance(dtype: torch.dtype) -> float:
    """Return how far two ways of computing a value of order 1 may be apart."""
    return float(torch.finfo(dtype).eps ** 0.6)


def _require(condition: object, text: str) -> None:
    if not condition:
        raise LawBrokenError(text)


def _require_on(subject: Subject, X: Tensor, what: str) -> None:
    _require(bool(torch.isfinite(X).all()), f"{what} is not finite")
    scale = 1 + (float(X.abs().max()) if X.numel() else 0)
    distance = subject.residual(X)
    _require(distance <= tolerance(X.dtype) * scale, f"{what} is {distance:.2g} from the constraint")


def _require_close(got: Tensor, expected: Tensor, what: str) -> None:
    _require(got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(expected.shape)}")
    if expected.numel():
        got, expected = got.detach(), expected.detach()
        distance = float((got - expected).abs().max())
        scale = 1 + float(expected.abs().max())
        _require(distance <= tolerance(expected.dtype) * scale, f"{what} is off by {distance:.2g}")


def keeps_shape_and_dtype(subject: Subject) -> None:
    """The value has the shape, dtype and device of the tensor."""
    got, wanted = subject.point(), subject.example
    for attribute in ("shape", "dtype", "device"):
        have, want = getattr(got, attribute), getattr(wanted, attribute)
        _require(have == want, f"{attribute} {have}, not {want}")


def is_member(subject: Subject) -> None:
    """Whatever the originals are, the value satisfies the constraint."""
    _require_on(subject, subject.point(), "the value")


def has_right_inverse(subject: Subject) -> None:
    """A value on the constraint is kept; another is projected, and its projection is kept."""
    if not hasattr(subject.step, "right_inverse"):
        raise NotApplicableError("it has no right_inverse()")
    value = subject.point()
    try:
        subject.fresh().right_inverse(value)  # type: ignore[operator]  # mypy: Tensor | Module
    except NotImplementedError as error:
        raise NotApplicableError("it has no inverse") from error
    step, originals = subject.start(value)
    _require_close(step(*originals), value, "a value it had computed")
    step, originals = subject.start()
    projected = step(*originals)
    step, originals = subject.start(projected)
    _require_close(step(*originals), projected, "the projection of a projection")


def differentiates(subject: Subject) -> None:
    """The gradient is the derivative, in float64."""
    if not subject.example.numel():
        raise NotApplicableError("the example is empty")
    if not getattr(subject.step, "differentiable", True):
        raise NotApplicableError("its gradient is not the derivative, on purpose")
    wide = Subject(
        subject.fresh().double(),
        subject.example.to(torch.promote_types(subject.example.dtype, torch.float64)),
    )
    step, originals = wide.start()
    moved = tuple(original.requires_grad_() for original in wide.moved(originals))
    try:
        torch.autograd.gradcheck(step, moved, fast_mode=True)
    except GradcheckError as error:
        raise LawBrokenError(f"the gradient is wrong: {str(error).splitlines()[0]}") from error


def acts_on_batches(subject: Subject) -> None:
    """A batch of tensors gives the batch of their values."""
    if getattr(subject.step, "event_dim", None) is None:
        raise NotApplicableError("it acts on the tensor as a whole")
    examples = [subject.example, subject.moved((subject.example,))[0]]
    step, originals = subject.start(torch.stack(examples))
    moved = subject.moved(originals)
    batch = step(*moved)
    for index, example in enumerate(examples):
        step, _ = subject.start(example)
        _require_close(batch[index], step(*(original[index] for original in moved)), f"element {index}")


def survives_training(subject: Subject) -> None:
    """After three steps of an optimizer the value still satisfies the constraint."""
    holder = subject.registered()
    optimizer = torch.optim.Adam(holder.parameters(), lr=0.05)
    target = torch.linspace(-1, 1, subject.example.numel()).view(subject.example.shape)
    for _ in range(3):
        optimizer.zero_grad()
        (holder() * target.to(subject.example.dtype)).abs().square().sum().backward()
        optimizer.step()
    value = holder().detach()
    _require(bool(torch.isfinite(value).all()), "the value is not finite after three steps")
    try:
        _require_on(subject, value, "the value after three steps")
    except NotApplicableError:
        return


def compiles(subject: Subject) -> None:
    """Dynamo traces it in one graph, to the same values."""
    step, originals = subject.start()
    moved = subject.moved(originals)
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        # Dynamo makes instances of autograd.Function, and torch deprecates that.
        warnings.simplefilter("ignore", DeprecationWarning)
        value = compiled(*moved)
    _require_close(value, step(*moved), "the compiled value")


def is_functional(subject: Subject) -> None:
    """``vmap`` over originals and ``functional_call`` give the values that a loop gives."""
    step, originals = subject.start()
    both = [originals, subject.moved(originals)]
    stacked = [torch.stack(pair) for pair in zip(*both, strict=True)]
    mapped = torch.func.vmap(step)(*stacked)
    for index, tensors in enumerate(both):
        _require_close(mapped[index], step(*tensors), f"element {index} of vmap")
    holder = Holder(subject.example)
    register_parametrization(holder, "weight", step)
    names = [name for name, _ in holder.named_parameters()]
    called = torch.func.functional_call(holder, dict(zip(names, both[1], strict=True)), ())
    _require_close(called, step(*both[1]), "functional_call")


def copies(subject: Subject) -> None:
    """A deep copy, a pickle and a loaded state dict compute the same, and share nothing with their source."""
    holder = subject.registered()
    value = holder().detach().clone()
    _require_close(pickle.loads(pickle.dumps(holder))(), value, "the pickled copy")  # our own bytes
    loaded = Holder(subject.example)
    register_parametrization(loaded, "weight", subject.fresh())
    loaded.load_state_dict(holder.state_dict())
    _require_close(loaded(), value, "the loaded state dict")
    copy = deepcopy(holder)
    _require_close(copy(), value, "the deep copy")
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(1)
    _require(torch.equal(holder(), value), "a change of the deep copy changes its source")


def bakes(subject: Subject) -> None:
    """Baking leaves a plain parameter with the value, to the bit."""
    holder = subject.registered()
    value = holder().detach().clone()
    with warnings.catch_warnings():
        # It warns where every value is its original's: seldom intended in a model, and no fault here.
        warnings.simplefilter("ignore", torchkiln.TorchkilnWarning)
        torchkiln.bake(holder)
    _require(
        type(holder) is Holder and isinstance(holder.weight, nn.Parameter), "baking left it parametrized"
    )
    _require(torch.equal(holder.weight, value), "the baked value is another one")


def is_refused_cleanly(subject: Subject) -> None:
    """A registration that is refused leaves the module as it was."""
    holder = Holder(subject.example)
    before, value = holder.weight, holder.weight.detach().clone()
    spoiled = subject.fresh()
    forward = spoiled.forward
    spoiled.forward = lambda *originals: forward(*originals)[None]
    try:
        register_parametrization(holder, "weight", spoiled)
    except ParametrizationError:
        untouched = type(holder) is Holder and holder.weight is before and torch.equal(before, value)
        _require(untouched and not list(holder.children()), "the refused registration left a trace")
        return
    raise LawBrokenError("a value of another shape was accepted")


def describes_itself(subject: Subject) -> None:
    """Its spec, a file's tensors and nothing else compute the value."""
    if not isinstance(subject.step, Parametrization):
        raise NotApplicableError("it has no spec()")
    step, originals = subject.start()
    moved = subject.moved(originals)
    try:
        text = json.dumps(step.spec())  # type: ignore[operator]  # mypy: Tensor | Module
    except ParametrizationError as error:
        raise NotApplicableError(str(error).splitlines()[0]) from error
    known: dict[str, Any] = {type(part).__name__: type(part) for part in step.modules()}
    again = from_spec(json.loads(text), also=known, buffers=dict(step.named_buffers()))
    _require(torch.equal(again(*moved), step(*moved)), "what its spec builds computes another value")


def samples(subject: Subject) -> None:
    """Samples satisfy the constraint, and follow their generator."""
    if not isinstance(subject.step, Parametrization):
        raise NotApplicableError("it has no sample()")
    example = subject.example
    try:
        first, again = (
            subject.step.sample(tuple(example.shape), generator=generator, dtype=example.dtype)
            for generator in (torch.Generator().manual_seed(2), torch.Generator().manual_seed(2))
        )
    except NotImplementedError as error:
        raise NotApplicableError("it has no natural distribution") from error
    _require(first.shape == example.shape and first.dtype == example.dtype, "another shape or dtype")
    _require(torch.equal(first, again), "the generator does not determine the sample")
    _require_on(subject, first, "the sample")


Law = Callable[[Subject], None]

LAWS: dict[str, Law] = {
    "shape": keeps_shape_and_dtype,
    "membership": is_member,
    "inverse": has_right_inverse,
    "gradient": differentiates,
    "batch": acts_on_batches,
    "training": survives_training,
    "compile": compiles,
    "functional": is_functional,
    "copy": copies,
    "bake": bakes,
    "refusal": is_refused_cleanly,
    "spec": describes_itself,
    "sample": samples,
}
