"""Compute every value, decide which tensor holds it, then change the model, all or nothing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.atomic import all_or_nothing
from torchkiln._core.attributes import parameter_like
from torchkiln._core.chain import set_data, within
from torchkiln._core.engine import balance, prepare
from torchkiln._core.optimizers import Optimizers, Replacement, follow
from torchkiln.models._check import check_finite, check_stored, same
from torchkiln.models._find import Found
from torchkiln.models._fold import ChainFold, Fold, slots_of
from torchkiln.models._ties import held_outside

__all__ = [
    "Outcome",
    "announce",
    "at_rest",
    "checked_values",
    "commit",
    "followers",
    "new_tensor",
    "outcomes",
    "same",
]


# --- values -------------------------------------------------------------------------------------------------------


@contextmanager
def at_rest(found: list[Found]) -> Iterator[None]:
    """Evaluate in eval mode, without grad; random numbers, modes and the hooks' attributes stay as they are."""
    nested = [fold for one in found for fold in one.fold.nested()]
    chains = [fold.chain for fold in nested if isinstance(fold, ChainFold)]
    training = [module for chain in chains for module in within(chain) if module.training]
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        _keep_generators(stack, [tensor for fold in nested for tensor in fold.leaves()])
        # A hook inside a chain writes its result to the chain when the chain is called.
        stack.callback(_restore_attributes, [(chain, vars(chain).copy()) for chain in chains])
        stack.callback(_set_training, training, mode=True)
        _set_training(training, mode=False)
        yield


def _keep_generators(stack: ExitStack, tensors: list[Tensor]) -> None:
    stack.enter_context(torch.random.fork_rng(devices=[]))
    devices = {tensor.device for tensor in tensors if tensor.device.type not in ("cpu", "meta")}
    for kind in {device.type for device in devices}:
        indices = [device.index for device in devices if device.type == kind]
        stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))


def _set_training(modules: list[nn.Module], *, mode: bool) -> None:
    # Not train(): some modules override it to do work.
    for module in modules:
        module.training = mode


def _restore_attributes(saved: list[tuple[nn.Module, dict[str, Any]]]) -> None:
    for module, attributes in saved:
        vars(module).clear()
        vars(module).update(attributes)


def announce(verb: str, found: list[Found]) -> None:
    """Say what is about to be done with ``found``, which must be the same wherever the model is trained."""
    modules = (fold.module for one in found for fold in one.fold.nested())
    prepare(modules, lambda: f"{verb} " + ", ".join(f"{one.path} ({one.fold.what()})" for one in found))


def checked_values(found: list[Found]) -> list[Tensor]:
    """Compute the values; raise where one is not finite, before anything was changed."""
    announce("compute", found)
    with at_rest(found):
        values = [one.fold.value() for one in found]
    for one, value in zip(found, values, strict=True):
        check_finite(one, value, advice=_advice(one))
    return values


def _advice(one: Found) -> str:
    zeros = "In torch's own norms a slice of zeros, or a weight of zeros, is 0 / 0.\n"
    repair = f"Repair the stored tensors, or leave the tensor out: exclude={one.path!r}."
    return f"; nothing was changed.\n{'' if one.fold.api == 'torchkiln' else zeros}{repair}"


# --- which tensor holds which value -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What becomes of one computed tensor.

    Attributes:
        fold: The computed tensor.
        tensor: The parameter or buffer that takes its place.
        value: The data to give that one first; None where it has them.
    """

    fold: Fold
    tensor: Tensor
    value: Tensor | None


def outcomes(model: nn.Module, found: list[Found], values: list[Tensor]) -> list[Outcome]:
    """Decide which tensor holds each value, so that no tensor used elsewhere changes.

    The one original of a tensor goes on as the tensor, so that optimizers keep it. Where it is used elsewhere too, as
    a plain parameter or as the original of a tensor with another value, a new parameter is made. Tensors with the same
    originals and the same value share one parameter, as they did before.
    """
    # First of all: a parameter that a variable here has looks as if somebody else held it.
    held = held_outside(model, found)
    held |= {id(tensor) for tensor in _remaining_tensors(model, [one.fold for one in found])}
    made: dict[tuple[int, ...], list[tuple[Tensor, Tensor]]] = {}
    results = []
    for one, value in zip(found, values, strict=True):
        group = made.setdefault(tuple(map(id, one.fold.leaves())), [])
        shared = next((tensor for tensor, known in group if same(known, value)), None)
        outcome = (
            Outcome(one.fold, shared, None)
            if shared is not None
            else _outcome(one.fold, value, taken=[tensor for tensor, _ in group], held=held)
        )
        group.append((outcome.tensor, value))
        results.append(outcome)
    return results


def _outcome(fold: Fold, value: Tensor, *, taken: list[Tensor], held: set[int]) -> Outcome:
    survivor = fold.survivor()
    if survivor is not None and id(survivor) in held and not same(survivor, value):
        survivor = None
    if survivor is not None and any(survivor is tensor for tensor in taken):
        survivor = None
    if survivor is None or (survivor.dtype, survivor.device) != (value.dtype, value.device):
        return Outcome(fold, new_tensor(fold, value), None)
    return Outcome(fold, survivor, None if id(survivor) in held else value)


def new_tensor(fold: Fold, value: Tensor) -> Tensor:
    """Return ``value`` as a parameter where ``fold`` starts from one, which trains if anything there does."""
    parameters = [tensor for tensor in fold.leaves() if isinstance(tensor, nn.Parameter)]
    if not parameters:
        return value
    trains = any(parameter.requires_grad for parameter in fold.parameters())
    trains = trains and (value.is_floating_point() or value.is_complex())
    return parameter_like(value, parameters, requires_grad=trains)


def _remaining_tensors(model: nn.Module, folds: list[Fold]) -> Iterator[Tensor]:
    """Yield the registered tensors of ``model`` but those that only ``folds`` use."""
    nested = [fold for outer in folds for fold in outer.nested()]
    chains = {id(fold.chain) for fold in nested if isinstance(fold, ChainFold)}
    parts = {(id(fold.holder), part) for fold in nested for part in fold.parts}
    seen = set(chains)
    pending = [model]
    while pending:
        module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and (id(module), name) not in parts:
                yield tensor
        pending += [child for child in module._modules.values() if child is not None]


# --- the change ---------------------------------------------------------------------------------------------------


def commit(
    results: list[Outcome],
    *,
    model: nn.Module | None = None,
    replaced: Sequence[Replacement] = (),
    optimizer: Optimizers = None,
) -> None:
    """Give every computed tensor's place to its plain tensor; after an error all is as it was.

    Args:
        results: The tensors.
        model: The model that they are in, where the change is for good.
        replaced: For each of them what optimizers may hold; none where it is no change for good.
        optimizer: The optimizers that follow.
    """
    owners = {id(fold.module): fold.module for result in results for fold in result.fold.nested()}
    with ExitStack() as stack:
        for module in owners.values():
            stack.enter_context(_unchanged_on_error(module))
        for result in results:
            if result.value is not None:
                stack.enter_context(all_or_nothing(result.fold.module, result.tensor))
                set_data(result.tensor, result.value)
            result.fold.take_out(result.tensor)
        for result in results:
            _settle_order(result.fold)
        for module in owners.values():
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()
        balance(owners.values())
        for result in results:
            stored = getattr(result.fold.module, result.fold.name)
            check_stored(result.fold.name, stored, result.tensor if result.value is None else result.value)
        if model is not None:
            for result, one in zip(results, replaced, strict=True):
                one.after = {one.path: result.tensor} if isinstance(result.tensor, nn.Parameter) else {}
            follow(optimizer, list(replaced), root=model)


@contextmanager
def _unchanged_on_error(module: nn.Module) -> Iterator[None]:
    """Put back what all_or_nothing leaves: hooks and plain attributes."""
    attributes = vars(module).copy()
    contents = {name: value.copy() for name, value in attributes.items() if name.endswith("_hooks")}
    try:
        with all_or_nothing(module):
            yield
    except BaseException:
        vars(module).clear()
        vars(module).update(attributes)
        for name, content in contents.items():
            attributes[name].clear()
            attributes[name].update(content)
        raise


def _settle_order(fold: Fold) -> None:
    """Move a tensor to where the module without norms has it; torchkiln's own chains have done so."""
    if fold.api != "torchkiln":
        slots = slots_of(fold.module, fold.name)
        _move_before(slots, fold.name, [name for name in followers(fold) if name in slots])


def followers(fold: Fold) -> tuple[str, ...]:
    """Return the names that come after a tensor in the module without norms, as far as there is a trace of it.

    Torch's functions do not record the place. Its recurrent modules list their tensors; its other modules make a
    weight before the bias of the same name.
    """
    if isinstance(fold, ChainFold) and fold.api == "torchkiln":
        return tuple(fold.chain.followers)
    classes = [cls for cls in type(fold.module).__mro__ if cls is not nn.Module]
    if not any(cls.__module__.startswith("torch.nn.modules.") for cls in classes):
        return ()
    order = tuple(getattr(fold.module, "_flat_weights_names", ()))
    if fold.name in order:
        return order[order.index(fold.name) + 1 :]
    return (fold.name.replace("weight", "bias"),) if "weight" in fold.name else ()


def _move_before(slots: dict[str, Any], name: str, followers: list[str]) -> None:
    keys = list(slots)
    first = min((keys.index(follower) for follower in followers), default=len(keys))
    if first < keys.index(name):
        for key in (name, *(key for key in keys[first:] if key != name)):
            slots[key] = slots.pop(key)
