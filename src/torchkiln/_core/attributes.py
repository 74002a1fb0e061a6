"""What a parameter is besides its numbers: its class, and the attributes that others have set on it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

__all__ = ["parameter_like"]


def parameter_like(data: Tensor, sources: Sequence[Tensor], *, requires_grad: bool) -> nn.Parameter:
    """Return ``data`` as a parameter of the class and with the attributes of ``sources``; the last one prevails.

    Attributes are what optimizers and engines note on a parameter (``_no_weight_decay``, a sharding dimension).
    Tensors that wrap others hold those in their attributes, so theirs stay where they are.
    """
    data = Tensor.detach(data)  # not a subclass's own, which may be of another class
    parameter = nn.Parameter(data, requires_grad)
    kinds = [type(source) for source in sources if issubclass(type(source), nn.Parameter)]
    if kinds and kinds[-1] is not nn.Parameter and type(parameter) is nn.Parameter:
        # As in a deep copy, the class's own constructor is not asked: it may want more than data.
        parameter = cast(nn.Parameter, Tensor._make_subclass(kinds[-1], data, requires_grad))
    for source in sources:
        vars(parameter).update(_attributes(source))
    return parameter


def _attributes(tensor: Tensor) -> dict[str, Any]:
    is_wrapper: bool = is_traceable_wrapper_subclass(tensor)
    return {} if is_wrapper else vars(tensor).copy()
