"""What may be registered, and what to do where it may not: said before anything is looked at or changed."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchkiln._core.chain import parametrizations_of
from torchkiln._core.errors import ParametrizationError
from torchkiln._core.inject import base_class

__all__ = ["check_lazy", "check_request", "no_tensor", "tensor_or_none"]


def check_request(module: nn.Module, name: str, step: object) -> None:
    """Raise where ``step`` cannot be registered on ``module``'s tensor ``name``, before anything is looked at."""
    if not isinstance(step, nn.Module):
        raise ParametrizationError(
            f"{type(module).__name__}.{name}: a parametrization must be an nn.Module, got {type(step).__name__}.\n"
            "Put the function into the forward() of one."
        )
    taken = parametrizations_of(module) is not None and base_class(type(module)) is None
    if taken:
        raise ParametrizationError(
            f"{type(module).__name__} has an attribute 'parametrizations' of its own, the name under which the chains "
            "are kept.\nRename it before registering."
        )
    check_lazy(module, name)


def check_lazy(module: nn.Module, name: str) -> None:
    """Raise where the tensor has no shape yet."""
    tensor = tensor_or_none(module, name)
    if tensor is not None and is_lazy(tensor):
        raise ParametrizationError(
            f"{type(module).__name__}.{name} is lazy: it has no shape yet.\nRun one forward before registering."
        )


def tensor_or_none(module: nn.Module, name: str) -> Tensor | None:
    """Return the plain tensor ``name`` of ``module``, or None where there is none or it is None."""
    parameter = module._parameters.get(name)
    return module._buffers.get(name) if parameter is None else parameter


def no_tensor(module: nn.Module, name: str, text: str) -> ParametrizationError:
    """Return the error for a name that has no tensor: torch's ``text``, and what to do where that is known."""
    if name in module._parameters or name in module._buffers:
        text += f"\n{type(module).__name__}.{name} is None: make the module with it, or set it before registering."
    elif "." in name:
        path, _, tensor = name.rpartition(".")
        text += f"\nPass the module that holds it: model.get_submodule({path!r}) and {tensor!r}."
    return ParametrizationError(text)
