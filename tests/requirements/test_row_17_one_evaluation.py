"""Row 17: within one forward of its owner a tensor is evaluated once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from .table import Impl, row

ISSUE = "speechbrain 3074, torchlip 20"


class Counted(nn.Module):
    """The identity, and how often it ran."""

    calls = 0

    def forward(self, X: Tensor) -> Tensor:
        self.calls += 1
        return X * 1.0


class Recurrence(nn.Module):
    """A user's recurrent layer: reads its kernel at each time, and its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(self.kernel.shape[0], dtype=self.kernel.dtype, device=self.kernel.device)
        for part in x:
            state = part + self.kernel @ state
        return state


def counted(impl: Impl, module: nn.Module, name: str) -> Counted:
    step = Counted()
    impl.P.register_parametrization(module, name, step)
    step.calls = 0
    return step


MODULES: dict[str, tuple[Any, str, Any]] = {
    "LSTM": (lambda: nn.LSTM(4, 4), "weight_hh_l0", lambda m: m(torch.ones(3, 1, 4))[0]),
    "GRU": (lambda: nn.GRU(4, 4), "weight_ih_l0", lambda m: m(torch.ones(3, 1, 4))[0]),
    "user's": (Recurrence, "kernel", lambda m: m(torch.ones(3, 4))),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", MODULES.values(), ids=MODULES)
@row(17, ISSUE, torch="it evaluates at each read")
def test_17_once_in_a_forward(impl: Impl, case: tuple[Any, str, Any], training: bool) -> None:
    build, name, run = case
    module = build().train(training)
    step = counted(impl, module, name)
    run(module)
    assert step.calls == 1
    run(module)
    assert step.calls == 2


@row(17, ISSUE, torch="it evaluates at each read")
def test_17_attention_in_eval_mode(impl: Impl) -> None:
    attention = nn.MultiheadAttention(8, 2, batch_first=True).eval()
    step = counted(impl, attention, "in_proj_weight")
    x = torch.ones(1, 3, 8)
    with torch.no_grad():
        attention(x, x, x)
    assert step.calls == 1


@row(17, ISSUE)
def test_17_a_linear_layer_evaluates_once(impl: Impl) -> None:
    layer = nn.Linear(4, 4)
    step = counted(impl, layer, "weight")
    layer(torch.ones(1, 4))
    assert step.calls == 1


@row(17, ISSUE)
@pytest.mark.parametrize("case", MODULES.values(), ids=MODULES)
def test_17_gradients_are_those_of_the_plain_module(impl: Impl, case: tuple[Any, str, Any]) -> None:
    build, name, run = case
    torch.manual_seed(0)
    plain = build()
    torch.manual_seed(0)
    module = build()
    counted(impl, module, name)
    for _ in range(2):
        run(plain).sum().backward()
        run(module).sum().backward()
    expected = getattr(plain, name).grad
    torch.testing.assert_close(module.parametrizations[name].original.grad, expected)


@row(17, ISSUE)
def test_17_a_write_within_the_forward_is_seen(impl: Impl) -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            first = self.weight.sum()
            with torch.no_grad():
                self.parametrizations.weight.original.mul_(2)  # type: ignore[union-attr]  # Tensor | Module
            return torch.stack([first, self.weight.sum()])

    layer = Doubling(3, 3)
    counted(impl, layer, "weight")
    first, second = layer(torch.ones(1, 3))
    torch.testing.assert_close(second, 2 * first)


@row(17, ISSUE)
def test_17_a_write_to_the_value_does_not_stay(impl: Impl) -> None:
    class Writing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            before = self.weight.clone()
            with torch.no_grad():
                self.weight.zero_()
            return (self.weight - before).abs().max()

    layer = Writing(3, 3)
    counted(impl, layer, "weight")
    assert layer(torch.ones(1, 3)) == 0
