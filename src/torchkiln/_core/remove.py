"""Remove: take a tensor's parametrization out again, and leave a plain tensor in its old place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.atomic import all_or_nothing
from torchkiln._core.attributes import parameter_like
from torchkiln._core.chain import (
    chains_of,
    insert_before,
    is_parametrized,
    original_names,
    register_tensor,
    set_data,
    tensors_within,
    within,
)
from torchkiln._core.engine import balance, prepare
from torchkiln._core.errors import ParametrizationError, describe
from torchkiln._core.finite import has_plain_memory, is_finite
from torchkiln._core.inject import base_class, chain_of, set_names
from torchkiln._core.optimizers import Optimizers, Replacement, follow, parameters_of
from torchkiln._core.state import unfollow_forward, value_at_rest
from torchkiln._core.ties import Place, chain_slots, label, other_holders
from torchkiln._core.warn import warn

__all__ = [
    "computed_value",
    "leaf_originals",
    "new_tensor",
    "put_back",
    "remove_parametrizations",
    "surviving_original",
    "type_before_parametrizations",
]


def remove_parametrizations(
    module: nn.Module, tensor_name: str, leave_parametrized: bool = True, *, optimizer: Optimizers = None
) -> nn.Module:
    """Make a parametrized tensor of ``module`` a plain one again.

    The tensor returns to its old place among the parameters or buffers, and the module to its own class once nothing
    of it is parametrized. With one original the parameter object stays the same, so an optimizer that has it keeps
    working; a tensor computed from several originals becomes a new parameter (or buffer, as it was). An optimizer
    passed as ``optimizer`` gets that in the place of the old ones; one that is not, and goes on holding them, warns at
    its next step.

    A value that is not finite is left as it is, with a warning; looking for one waits for the device. An original that
    another module has too keeps its data: this module gets a parameter of its own, with a warning.

    The state of a step does not advance: the value is the one that the last read returned.

    Args:
        module: The module that holds the tensor.
        tensor_name: The parametrized tensor.
        leave_parametrized: True leaves the computed value, in its dtype; False puts the original back, which
            is possible only where there is one.
        optimizer: The optimizer, or optimizers, that train the tensor. A new parameter takes the place and the state
            (moments, step count) of the old one with its shape, the last of several. Parameters that ``module`` has no
            longer leave, also those of a step that another module shares: bake the model of both then.

    Returns:
        ``module``.

    Raises:
        ParametrizationError: The tensor is not parametrized, or ``leave_parametrized`` is False and the tensor is
            computed from several originals. ``module`` and the optimizers are unchanged.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchkiln import parametrizations, parametrize
        >>> layer = parametrizations.weight_norm(nn.Linear(3, 3))
        >>> before = layer.weight
        >>> torch.equal(parametrize.remove_parametrizations(layer, "weight").weight, before)
        True
        >>> type(layer).__name__, list(layer.state_dict())
        ('Linear', ['weight', 'bias'])
    """
    if not is_parametrized(module, tensor_name):
        raise ParametrizationError(
            f"Module {describe(module)} does not have a parametrization on {tensor_name}"
        )
    prepare([module], f"remove {type(module).__name__}.{tensor_name}")
    chain, place = chains_of(module)[tensor_name], Place(module, tensor_name)
    tied: list[Place] = []
    if leave_parametrized:
        # Before the value, which may be the original itself: a variable that has it looks like another holder.
        tied = [other for slot in chain_slots(chain) for other in other_holders(slot, place)]
        value = computed_value(chain)
    elif chain.is_tensor:
        value = chain.original
    else:
        raise ParametrizationError(
            "Cannot leave unparametrized (`leave_parametrized=False`) a tensor "
            "that is parametrized in terms of a sequence of tensors."
        )
    # Before the change: where warnings are errors, nothing has changed then.
    if tied:
        warn(
            f"{label(place, module)} gets a parameter of its own, and is no longer tied to "
            f"{', '.join(dict.fromkeys(label(other, module) for other in tied))}.\n"
            "torchkiln.bake(model) on the model that has both keeps them tied."
        )
    if leave_parametrized and not is_finite(value):
        warn(f"{label(place, module)}: not all values are finite; they are left as they are.")
    _exchange(place, value, keep_object=not tied, optimizer=optimizer)
    return module


def _exchange(place: Place, value: Tensor, *, keep_object: bool, optimizer: Optimizers) -> None:
    """Take the chain out and let the optimizers follow, both or none."""
    module, name = place
    chain = chains_of(module)[name]
    before, extra = parameters_of(chain, name)
    replacement = Replacement(module, name, label(place, None), before, extra)
    kept = surviving_original(chain)
    with all_or_nothing(module, *([] if kept is None else [kept])):
        _settle(module, name, value, kept if keep_object or value is kept else None)
        balance([module])
        plain = module._parameters.get(name)
        replacement.after = {} if plain is None else {name: plain}
        follow(optimizer, [replacement], root=module)


def type_before_parametrizations(module: nn.Module) -> type:
    """Return the class that ``module`` had before it was parametrized; its class where it is not.

    Example:
        >>> from torch import nn
        >>> from torchkiln import parametrize, parametrizations
        >>> layer = parametrizations.weight_norm(nn.Linear(3, 3))
        >>> type(layer).__name__, parametrize.type_before_parametrizations(layer).__name__
        ('ParametrizedLinear', 'Linear')
    """
    cls = type(module)
    return (base_class(cls) or cls) if is_parametrized(module) else cls


def computed_value(chain: nn.Module) -> Tensor:
    """Return the chain's value with data of its own, laid out as it was computed.

    Another layout would change the last bits of the products that the tensor is used in.
    """
    with torch.no_grad():
        value = value_at_rest(chain)
    if value is surviving_original(chain):
        return value
    value = value.detach()
    return value.clone() if _is_shared(value, chain) else value


def _is_shared(value: Tensor, chain: nn.Module) -> bool:
    """Return whether another tensor of the chain, or another element of ``value``, has the same memory."""
    if not has_plain_memory(value):
        return False
    storage = value.untyped_storage()
    others = filter(has_plain_memory, tensors_within(chain))
    pointers = {tensor.untyped_storage().data_ptr() for tensor in others}
    return storage.data_ptr() in pointers or storage.nbytes() != value.numel() * value.element_size()


def leaf_originals(chain: nn.Module) -> list[Tensor]:
    """Return the tensors the chain starts from; where an original is parametrized, those that it starts from."""
    leaves: list[Tensor] = []
    for name in original_names(chain):
        original: object = chain._parameters.get(name)
        if original is None and (inner := chain_of(chain, name)) is not None:
            leaves += leaf_originals(inner)
            continue
        if original is None:  # a buffer, or an opaque object
            original = getattr(chain, name)
        if isinstance(original, Tensor):
            leaves.append(original)
    return leaves


def surviving_original(chain: nn.Module) -> Tensor | None:
    """Return the one tensor that the chain starts from, or None where it starts from several."""
    leaves = leaf_originals(chain)
    return leaves[0] if len(leaves) == 1 else None


def _settle(module: nn.Module, name: str, value: Tensor, survivor: Tensor | None) -> None:
    if survivor is None or (survivor.dtype, survivor.device) != (value.dtype, value.device):
        tensor = new_tensor(value, chains_of(module)[name])
    else:
        _take_over(survivor, value)
        tensor = survivor
    put_back(module, name, tensor)


def _take_over(survivor: Tensor, value: Tensor) -> None:
    try:
        set_data(survivor, value)
    except RuntimeError as error:
        if type(survivor) in (Tensor, nn.Parameter):
            raise
        raise RuntimeError(
            "Calling remove_parametrizations() with leave_parametrized=True for a parameter that is an instance of "
            f"a tensor subclass ({type(survivor).__name__}) requires set_() to be implemented correctly for it.\n"
            "Pass leave_parametrized=False, implement set_(), or call "
            "torch.__future__.set_swap_module_params_on_conversion(True)."
        ) from error


def new_tensor(value: Tensor, chain: nn.Module) -> Tensor:
    """Return ``value`` as a parameter where a parameter was parametrized, frozen or not, else as a buffer."""
    originals = [original for original in leaf_originals(chain) if isinstance(original, nn.Parameter)]
    if not originals:
        return value.detach()
    parameters = (p for one in within(chain) for p in one._parameters.values() if p is not None)
    trains = any(p.requires_grad for p in parameters)
    trains = trains and (value.is_floating_point() or value.is_complex())
    return parameter_like(value, originals, requires_grad=trains)


def put_back(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Give the place of ``module``'s computed tensor ``name`` to ``tensor``; the chain is gone."""
    chains = chains_of(module)
    chain = chains.pop(name)
    if not chains:
        del module._modules["parametrizations"]
    set_names(module, tuple(chains))
    unfollow_forward(module)
    register_tensor(module, name, tensor, persistent=not chain._non_persistent_buffers_set)
    flat_names = vars(module).get("_flat_weights_names", ())
    if name in flat_names:  # a recurrent layer's own list, as its __setattr__ keeps it
        module._flat_weights[flat_names.index(name)] = tensor  # type: ignore[operator]  # a list
    tensors: dict[str, Any] = module._parameters if name in module._parameters else module._buffers
    order = list(tensors)[:-1]
    insert_before(order, name, getattr(chain, "followers", ()))
    for key in order[order.index(name) + 1 :]:
        tensors[key] = tensors.pop(key)
