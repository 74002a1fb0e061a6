"""Evaluate without side effects: steps whose state advances when they are read stand still."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

__all__ = ["frozen", "value_at_rest"]


@contextmanager
def frozen(chain: nn.Module) -> Iterator[None]:
    """Keep the state of ``chain``'s steps while the context is open.

    A step whose class has ``advances_state = True`` changes its buffers when it is read in training mode (the power
    iteration of spectral norm). Such steps, and torch's own, are put into eval mode for the time of the context; all
    others run in the mode they are in.
    """
    advancing = [step for step in chain.modules() if step.training and _advances_state(step)]
    for step in advancing:
        step.training = False
    try:
        yield
    finally:
        for step in advancing:
            step.training = True


def _advances_state(step: nn.Module) -> bool:
    return getattr(type(step), "advances_state", False) or type(step).__qualname__ == "_SpectralNorm"


def value_at_rest(chain: nn.Module) -> Tensor:
    """Return what the last read of ``chain`` returned, changing nothing."""
    with frozen(chain):
        return chain()  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any
