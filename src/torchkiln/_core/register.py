"""Register: put a tensor of a module under a parametrization."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.atomic import all_or_nothing
from torchkiln._core.chain import (
    ParametrizationList,
    chains_of,
    copy_settings,
    insert_before,
    is_parametrized,
    original_names,
    steps_of,
)
from torchkiln._core.checks import check_step
from torchkiln._core.engine import balance, prepare, spread, take_in
from torchkiln._core.errors import ParametrizationError, describe
from torchkiln._core.inject import set_names
from torchkiln._core.optimizers import Optimizers, Replacement, follow, parameters_of
from torchkiln._core.request import check_request, no_tensor, tensor_or_none
from torchkiln._core.state import follow_forward
from torchkiln._core.ties import Place, Slot, chain_slots, label, other_holders, places_within, same_place

__all__ = ["register_parametrization", "tied_places", "transfer_parametrizations_and_params"]


def register_parametrization(
    module: nn.Module,
    tensor_name: str,
    parametrization: nn.Module,
    *,
    unsafe: bool = False,
    optimizer: Optimizers = None,
    tied_in: nn.Module | None = None,
) -> nn.Module:
    """Make a tensor of ``module`` the output of ``parametrization``.

    Reading ``module.weight`` then returns ``parametrization(original)``, and gradients flow to the original,
    ``module.parametrizations.weight.original``. Registering again on the same tensor appends a step to the chain.

    A parametrization is any module with ``forward(*originals) -> Tensor``. With a ``right_inverse(X)``, it is asked
    for the originals on registration, so that the tensor keeps its value as far as it can, and the tensor can be
    assigned to: ``module.weight = X``. A ``right_inverse`` that returns a sequence gives several originals,
    ``original0, original1, ...``; only the first step of a chain may do so. Without a ``right_inverse`` (or with
    one that raises ``NotImplementedError``) the original is the tensor itself.

    The parametrization takes over ``module``'s training mode. With one original the parameter object stays the same,
    so an optimizer that has it keeps working; several are new parameters. An optimizer passed as ``optimizer`` gets
    them in the place of the old one; one that is not, and goes on holding the old one, warns at its next step.

    A parameter that other modules hold too (an output layer tied to an embedding) is refused, with all its names, since
    parametrizing one would untie them. ``tied_in=model`` parametrizes it in all modules of ``model`` that hold it:
    they share the steps and the originals, and so the value. Holders that are no modules are not noticed.

    Args:
        module: The module that holds the tensor.
        tensor_name: The name of a parameter, a buffer, or a tensor that is parametrized already.
        parametrization: The step to register.
        unsafe: Allow the step to change the tensor's shape and dtype; nothing is checked then. Without it,
            ``forward`` and ``right_inverse`` are called once and their results compared with the tensor.
        optimizer: The optimizer, or optimizers, that train the tensor. New parameters, those of the step included,
            take the old one's place in its group. One with the old one's shape takes over its state (moments, step
            count); of several, those with its value. The others start without. The groups stay the same objects.
        tied_in: The model whose other modules with the same parameter are parametrized as well.

    Returns:
        ``module``.

    Raises:
        ParametrizationError: There is no such tensor, the step's results do not fit it, or another module holds the
            same parameter. ``module`` and the optimizers are unchanged.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchkiln.parametrize import register_parametrization
        >>> class Symmetric(nn.Module):
        ...     def forward(self, X):
        ...         return X.triu() + X.triu(1).mT
        ...     def right_inverse(self, A):
        ...         return A.triu()
        >>> layer = register_parametrization(nn.Linear(5, 5), "weight", Symmetric())
        >>> torch.equal(layer.weight, layer.weight.mT)
        True
        >>> layer.weight = torch.eye(5)
        >>> torch.equal(layer.weight, torch.eye(5))
        True
    """
    check_request(module, tensor_name, parametrization)
    prepare([module], f"register {type(parametrization).__name__} on {type(module).__name__}.{tensor_name}")
    leave_out = take_in(module, parametrization)
    was_training = parametrization.training
    parametrization.train(module.training)
    try:
        begin_or_append = _append if is_parametrized(module, tensor_name) else _begin
        changed = begin_or_append(
            Place(module, tensor_name), parametrization, unsafe=unsafe, optimizer=optimizer, tied_in=tied_in
        )
    except BaseException:
        leave_out()
        parametrization.train(was_training)
        raise
    for place in changed:
        follow_forward(place.module, parametrization)
    spread(place.module for place in changed)
    return module


def _begin(
    place: Place, step: nn.Module, *, unsafe: bool, optimizer: Optimizers, tied_in: nn.Module | None
) -> list[Place]:
    module, name = place
    # First of all: while the parameter is in a variable here, it looks as if somebody else held it.
    places = [place, *tied_places(place, [(module._parameters, name)], tied_in)]
    original = _plain_tensor(module, name)
    with ExitStack() as stack:
        for one in places:
            stack.enter_context(all_or_nothing(one.module, *([original] if one is place else [])))
        before = {name: original} if isinstance(original, nn.Parameter) else {}
        replacement = Replacement(module, name, label(place, tied_in), before)
        chain = ParametrizationList([step], original, unsafe)
        for one in places:
            _put_in_place(chain if one is place else _twin(chain), one)
        balance(one.module for one in places)
        replacement.after, replacement.after_extra = parameters_of(chain, name)
        follow(optimizer, [replacement], root=tied_in or module)
    return places


def _put_in_place(chain: ParametrizationList, place: Place) -> None:
    module, name = place
    _move_into(chain, module, name)
    if not is_parametrized(module):
        module.parametrizations = nn.ModuleDict()
    chains = chains_of(module)
    chains[name] = chain
    set_names(module, tuple(chains))


def _twin(chain: ParametrizationList) -> ParametrizationList:
    """Return a chain of another module's with the same steps and originals."""
    twin = copy(chain)
    containers = {key: copy(value) for key, value in vars(chain).items() if isinstance(value, (dict, set))}
    vars(twin).update(containers)
    return twin


def tied_places(place: Place, slots: Sequence[Slot], tied_in: nn.Module | None) -> list[Place]:
    """Return the other places in ``tied_in`` that hold what is in ``slots``; raise where others hold it as well."""
    appending = is_parametrized(place.module, place.name)
    tied = [] if tied_in is None else places_within(tied_in, slots, place)
    # A plain tensor that shares its parameter with an original is not what is computed from it: no tie of values.
    tied = [one for one in tied if is_parametrized(one.module, one.name) == appending]
    others = [
        other
        for slot in slots
        for other in other_holders(slot, place)
        if not any(same_place(other, one) for one in tied)
        and (is_parametrized(other.module, other.name) or not appending)
    ]
    if others:
        root = tied_in or place.module
        name, names = label(place, root), ", ".join(dict.fromkeys(label(other, root) for other in others))
        raise ParametrizationError(
            f"{name} is the same parameter as {names}: parametrizing one of them would untie them.\n"
            "Pass tied_in=model to parametrize them alike, or give the module a parameter of its own before:\n"
            f"module.{place.name} = nn.Parameter(module.{place.name}.detach().clone())"
        )
    return tied


def _plain_tensor(module: nn.Module, name: str) -> Tensor:
    tensor = tensor_or_none(module, name)
    if tensor is None:
        raise no_tensor(
            module,
            name,
            f"Module '{describe(module)}' does not have a parameter, a buffer, or a parametrized element "
            f"with name '{name}'",
        )
    return tensor


def _move_into(chain: ParametrizationList, module: nn.Module, name: str) -> None:
    """Take the plain tensor from ``module``, and note in ``chain`` how to put it back where it was."""
    tensors: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    order = list(tensors)
    if is_parametrized(module):
        for other, other_chain in chains_of(module).items():
            insert_before(order, other, getattr(other_chain, "followers", ()))
    chain.followers = tuple(order[order.index(name) + 1 :])
    if name in module._non_persistent_buffers_set:
        chain._non_persistent_buffers_set.update(chain._buffers)
        module._non_persistent_buffers_set.discard(name)
    del tensors[name]


def _append(
    place: Place, step: nn.Module, *, unsafe: bool, optimizer: Optimizers, tied_in: nn.Module | None
) -> list[Place]:
    module, name = place
    chain = chains_of(module)[name]
    places = [place, *tied_places(place, chain_slots(chain), tied_in)]
    if not unsafe:
        check_step(getattr(module, name), step, name)
    before, extra = parameters_of(chain, name)
    replacement = Replacement(module, name, label(place, tied_in), before, extra)
    chains = [chains_of(one.module)[one.name] for one in places]
    with ExitStack() as stack:
        for one in chains:
            stack.enter_context(all_or_nothing(one))
            # Not append(): where the original is parametrized the chain has a submodule that is no step.
            one.add_module(str(len(steps_of(one))), step)
        balance(one.module for one in places)
        replacement.after, replacement.after_extra = parameters_of(chain, name)
        follow(optimizer, [replacement], root=tied_in or module)
    for one in chains:
        one.unsafe |= unsafe
    return places


def transfer_parametrizations_and_params(
    from_module: nn.Module, to_module: nn.Module, tensor_name: str | None = None
) -> nn.Module:
    """Give ``to_module`` the parametrizations of ``from_module`` and the tensors they start from.

    The steps and the originals are shared by both modules afterwards. A tensor that ``to_module`` lacks is made.
    Does nothing where ``from_module`` is not parametrized.

    Args:
        from_module: The module to take from.
        to_module: The module to give to.
        tensor_name: The tensor to transfer; all that are parametrized where it is None.

    Returns:
        ``to_module``.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchkiln import parametrizations, parametrize
        >>> source = parametrizations.weight_norm(nn.Linear(3, 3))
        >>> target = parametrize.transfer_parametrizations_and_params(source, nn.Linear(3, 3))
        >>> torch.equal(source.weight, target.weight)
        True
    """
    if not is_parametrized(from_module):
        return to_module
    chains = chains_of(from_module)
    names = list(chains) if tensor_name is None else [tensor_name]
    with all_or_nothing(to_module, *to_module.parameters(recurse=False), *to_module.buffers(recurse=False)):
        for name in names:
            _transfer(from_module, to_module, name)
    return to_module


def _transfer(from_module: nn.Module, to_module: nn.Module, name: str) -> None:
    if not hasattr(to_module, name):
        with torch.no_grad():
            value = nn.Parameter(getattr(from_module, name))
        setattr(to_module, name, value)
    source = chains_of(from_module)[name]
    for step in steps_of(source):
        register_parametrization(to_module, name, step)
    target = chains_of(to_module)[name]
    for original in original_names(source):
        setattr(target, original, getattr(source, original))
    copy_settings(source, target)
