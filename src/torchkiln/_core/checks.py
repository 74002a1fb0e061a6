"""What a step may return, checked once for registration and for each further step; the messages begin as torch's."""

from __future__ import annotations

import dis
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from torchkiln._core.errors import ParametrizationError
from torchkiln._core.sharded import evaluate, invert, is_sharded

if TYPE_CHECKING:
    from types import TracebackType

__all__ = [
    "check_alike",
    "check_output",
    "check_step",
    "initial_inverse",
    "is_opaque",
    "says_no_inverse",
]


def check_alike(
    expected: Tensor, got: object, heading: str, labels: tuple[str, str], *attributes: str
) -> None:
    """Raise unless ``got`` has the same ``attributes`` as ``expected``; ``{}`` in the texts is the attribute."""
    for attribute in attributes:
        want, have = getattr(expected, attribute), getattr(got, attribute)
        if want != have:
            text = f"{heading}\n{labels[0]}: {want}\n{labels[1]}: {have}"
            raise ParametrizationError(text.replace("{}", attribute))


def check_output(value: Tensor, output: object, flag: str, labels: tuple[str, str]) -> None:
    """Raise unless a step's ``output`` is a tensor with the dtype and shape of ``value``."""
    if not isinstance(output, Tensor):
        raise ParametrizationError(f"A parametrization must return a tensor. Got {type(output).__name__}.")
    heading = (
        f"Registering a parametrization may not change the {{}} of the tensor, unless {flag} is enabled."
    )
    check_alike(value, output, heading, labels, "dtype", "shape")


def check_step(value: Tensor, step: nn.Module, name: str) -> None:
    """Raise unless a further ``step`` maps tensors like ``value`` to tensors like ``value``, both ways."""
    output: object = evaluate(step, (value,), None) if is_sharded(value) else step(value)
    check_output(
        value, output, "the `unsafe` flag", (f"module.{name}.{{}}", f"parametrization(module.{name}).{{}}")
    )
    inverse = _inverse(step, output)
    if inverse is output:
        return
    if not isinstance(inverse, Tensor):
        raise ParametrizationError(
            f"parametrization.right_inverse must return a tensor. Got: {type(inverse).__name__}"
        )
    heading = (
        "The tensor returned by parametrization.right_inverse must have the same {} "
        f"as module.{name}, unless the `unsafe` flag is enabled."
    )
    check_alike(value, inverse, heading, (f"module.{name}.{{}}", "returned {}"), "dtype", "shape")


def initial_inverse(steps: Iterable[nn.Module], original: Tensor) -> Tensor | Sequence[Any]:
    """Run the right inverses, last step first; a step without one counts as the identity here."""
    inverse: Any = original
    for step in reversed(list(steps)):
        inverse = _inverse(step, inverse)
    if not isinstance(inverse, (Tensor, Sequence)):
        raise ParametrizationError(
            "'right_inverse' must return a Tensor or a Sequence of tensors (list, tuple...). "
            f"Got {type(inverse).__name__}"
        )
    return inverse


def _inverse(step: nn.Module, value: Any) -> Any:
    if not hasattr(step, "right_inverse"):
        return value
    try:
        return invert(step, value)
    except NotImplementedError as error:
        if not says_no_inverse(error):
            raise
        return value


def says_no_inverse(error: NotImplementedError) -> bool:
    """Return whether a ``raise`` statement of a parametrization made ``error``, rather than a kernel of torch.

    ``right_inverse`` says "I have no inverse" by raising it; a kernel that lacks a dtype raises the same type, and
    taking that for "no inverse" would hide the failure.
    """
    trace: TracebackType | None = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return True
    code = trace.tb_frame.f_code
    raised_by_statement = code.co_code[trace.tb_lasti] == dis.opmap["RAISE_VARARGS"]
    in_torch = str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] == "torch"
    return raised_by_statement and (not in_torch or code.co_name == "right_inverse")


def is_opaque(element: object, index: int) -> bool:
    """Return whether ``element`` is an opaque object of torch, which an original may be as well."""
    from torch._library.opaque_object import is_opaque_reference_type
    from torch._opaque_base import OpaqueBase

    if not isinstance(element, OpaqueBase):
        return False
    if not is_opaque_reference_type(type(element)):
        raise ParametrizationError(
            "'right_inverse' must return a Tensor or a reference-type opaque. "
            f"Got element {index} of the sequence with type {type(element).__name__}."
        )
    return True
