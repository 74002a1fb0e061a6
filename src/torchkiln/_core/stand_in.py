"""A tensor stands in for a computed one for the time of a functional call; the originals are not touched.

``torch.func.functional_call`` reads the tensors it is to exchange, assigns those it was given, and afterwards assigns
what it had read. For a computed tensor these would be two writes to the originals. So the one function that does it is
recognised, by its code, as the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import _named_member_accessor

__all__ = ["SWAP", "standing_in", "swap_in", "swapped_out"]

SWAP = _named_member_accessor.swap_tensor.__code__


@contextmanager
def standing_in(chain: nn.Module, tensor: Tensor) -> Iterator[None]:
    """Let ``tensor`` be the value of ``chain`` while the context is open."""
    before = chain.__dict__.get("_stand_in")
    _put(chain, tensor)
    try:
        yield
    finally:
        _put(chain, before)


def swapped_out(chain: nn.Module, value: Tensor) -> Tensor:
    """Return ``value``, which a functional call will assign when it ends, marked as what it read."""
    if value is not chain.__dict__.get("_stand_in"):
        value.__dict__["_value_of"] = chain
    return value


def swap_in(chain: Any, tensor: Tensor) -> None:
    """Let the tensor that a functional call assigns stand in, unless it is the value that it read."""
    _put(chain, None if tensor.__dict__.get("_value_of") is chain else tensor)


def _put(chain: nn.Module, tensor: Tensor | None) -> None:
    if tensor is None:
        chain.__dict__.pop("_stand_in", None)
    else:  # past nn.Module.__setattr__, which would register a parameter
        chain.__dict__["_stand_in"] = tensor
