"""Register: put a tensor of a module under a parametrization."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.atomic import all_or_nothing
from torchkiln._core.chain import (
    ParametrizationList,
    chains_of,
    insert_before,
    is_parametrized,
    original_names,
    steps_of,
)
from torchkiln._core.checks import check_step
from torchkiln._core.errors import ParametrizationError, describe
from torchkiln._core.inject import set_names
from torchkiln._core.state import follow_forward

__all__ = ["register_parametrization", "transfer_parametrizations_and_params"]


def register_parametrization(
    module: nn.Module, tensor_name: str, parametrization: nn.Module, *, unsafe: bool = False
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
    so an optimizer that has it keeps working; several are new parameters, to be given to the optimizer.

    Args:
        module: The module that holds the tensor.
        tensor_name: The name of a parameter, a buffer, or a tensor that is parametrized already.
        parametrization: The step to register.
        unsafe: Allow the step to change the tensor's shape and dtype; nothing is checked then. Without it,
            ``forward`` and ``right_inverse`` are called once and their results compared with the tensor.

    Returns:
        ``module``.

    Raises:
        ParametrizationError: There is no such tensor, or the step's results do not fit it. ``module`` is unchanged.

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
    was_training = parametrization.training
    parametrization.train(module.training)
    try:
        if is_parametrized(module, tensor_name):
            _append(module, tensor_name, parametrization, unsafe=unsafe)
        else:
            _begin(module, tensor_name, parametrization, unsafe=unsafe)
    except BaseException:
        parametrization.train(was_training)
        raise
    follow_forward(module, parametrization)
    return module


def _begin(module: nn.Module, name: str, parametrization: nn.Module, *, unsafe: bool) -> None:
    original = _plain_tensor(module, name)
    with all_or_nothing(module, original):
        chain = ParametrizationList([parametrization], original, unsafe)
        _move_into(chain, module, name)
        if not is_parametrized(module):
            module.parametrizations = nn.ModuleDict()
        chains = chains_of(module)
        chains[name] = chain
        set_names(module, tuple(chains))


def _plain_tensor(module: nn.Module, name: str) -> Tensor:
    for tensors in (module._parameters, module._buffers):
        if name in tensors:
            tensor = tensors[name]
            if tensor is None:
                raise ParametrizationError(
                    f"{type(module).__name__}.{name} is None: there is no tensor to parametrize.\n"
                    "Create the module with this tensor, or set it before registering."
                )
            return tensor
    raise ParametrizationError(
        f"Module '{describe(module)}' does not have a parameter, a buffer, or a parametrized element "
        f"with name '{name}'"
    )


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


def _append(module: nn.Module, name: str, parametrization: nn.Module, *, unsafe: bool) -> None:
    chain = chains_of(module)[name]
    if not unsafe:
        check_step(getattr(module, name), parametrization, name)
    # Not append(): where the original is parametrized the chain has a submodule that is no step.
    chain.add_module(str(len(steps_of(chain))), parametrization)
    chain.unsafe |= unsafe


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
