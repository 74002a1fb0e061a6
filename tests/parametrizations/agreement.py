"""What it takes for two implementations of a built-in to agree: names to the letter, numbers to rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from parametrize.oracle import OURS, TORCH, Impl, assert_same, freeze

Make = Callable[[Impl], nn.Module]


def both(make: Make, *, seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """Make the module on torch and on torchkiln, each from the same seed."""
    modules = []
    for impl in (TORCH, OURS):
        torch.manual_seed(seed)
        modules.append(make(impl))
    return modules[0], modules[1]


def assert_close(ours: Any, expected: Any) -> None:
    """Compare tensors to a few units of rounding of their dtype."""
    torch.testing.assert_close(ours, expected, rtol=_tolerance(expected), atol=_tolerance(expected))


def _tolerance(expected: Any) -> float:
    tensor = expected if isinstance(expected, Tensor) else next(iter(expected.values()))
    return 500 * torch.finfo(tensor.dtype).eps


def assert_same_names(ours: nn.Module, theirs: nn.Module) -> None:
    """Compare the printed form, the names and order of the state, gradients flags and modes."""
    assert repr(ours) == repr(theirs)
    assert type(ours).__name__ == type(theirs).__name__
    for names in (
        lambda module: [(key, value.shape, value.dtype) for key, value in module.state_dict().items()],
        lambda module: [(key, value.requires_grad) for key, value in module.named_parameters()],
        lambda module: [key for key, _ in module.named_buffers()],
        lambda module: [(key, child.training) for key, child in module.named_modules()],
    ):
        assert names(ours) == names(theirs)


def assert_agree(ours: nn.Module, theirs: nn.Module, name: str = "weight") -> None:
    """Compare names, state, value and the gradients of a function of the value."""
    assert_same_names(ours, theirs)
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    values = [getattr(module, name) for module in (ours, theirs)]
    assert_close(values[0].detach(), values[1].detach())
    cotangent = torch.randn_like(values[1].detach())
    gradients = []
    for module, value in zip((ours, theirs), values, strict=True):
        leaves = list(module.parametrizations[name].parameters())
        gradients.append(torch.autograd.grad(value, leaves, cotangent, allow_unused=True))
    for mine, expected in zip(*gradients, strict=True):
        assert_close(mine, expected)


def assert_same_error(make: Make) -> None:
    """The call raises the same error on both."""
    caught: list[Any] = []
    for impl in (TORCH, OURS):
        torch.manual_seed(0)
        try:
            make(impl)
        except Exception as error:  # noqa: BLE001  compared below, whatever it is
            caught.append(error)
        else:
            caught.append(None)
    assert caught[0] is not None, "torch did not raise"
    assert_same(caught[1], caught[0])


__all__ = [
    "OURS",
    "TORCH",
    "Impl",
    "assert_agree",
    "assert_close",
    "assert_same_error",
    "assert_same_names",
    "both",
    "freeze",
]
