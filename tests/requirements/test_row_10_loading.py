"""Row 10: a state dict loads strictly, however it and the module spell the same tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import prune

import torchkiln

from .table import TORCH, Impl, fails_on, row

Make = Callable[[Impl], nn.Module]


def layer() -> nn.Linear:
    """A weight that each of the norms leaves as it is: half an identity, of spectral norm 1."""
    made = nn.Linear(4, 4, dtype=torch.float64)
    made.weight.data = torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64)).roll(1, 0)
    return made


def legacy_spectral_norm(impl: Impl) -> nn.Module:
    made = utils.spectral_norm(layer(), n_power_iterations=3)
    made(torch.ones(1, 4, dtype=torch.float64))
    return made


MAKE: dict[str, Make] = {
    "plain": lambda impl: layer(),
    "legacy_weight_norm": lambda impl: utils.weight_norm(layer(), dim=None),
    "legacy_spectral_norm": legacy_spectral_norm,
    "pruned": lambda impl: prune.l1_unstructured(layer(), "weight", amount=2),
    "weight_norm": lambda impl: impl.N.weight_norm(layer(), dim=None),
    "spectral_norm": lambda impl: impl.N.spectral_norm(layer()),
}
KEYS = "torch reads the older keys under its weight norm alone, and no other spelling"


def pairs() -> Iterator[Any]:
    for source in MAKE:
        for target in MAKE:
            known = source == target or (source, target) == ("legacy_weight_norm", "weight_norm")
            marks = [] if known else [fails_on(TORCH.name, KEYS, RuntimeError)]
            yield pytest.param(source, target, marks=marks, id=f"{source}-{target}")


def load(impl: Impl, model: nn.Module, state: dict[str, Tensor]) -> None:
    if impl is TORCH:
        model.load_state_dict(state)
    else:
        torchkiln.load_state_dict(model, state)


def used_weight(model: nn.Module) -> Tensor:
    """Return the weight that the forward pass multiplies by."""
    model.eval()
    return (
        model(torch.eye(4, dtype=torch.float64)) - model(torch.zeros(1, 4, dtype=torch.float64))
    ).T.detach()


@pytest.mark.parametrize(("source", "target"), list(pairs()))
@row(10, "102999; transformers 26796, 27605, 30628; TTS 3177")
def test_10_every_spelling_loads_into_every_other(impl: Impl, source: str, target: str) -> None:
    giver, taker = MAKE[source](impl), MAKE[target](impl)
    for tensor in taker.parameters():
        tensor.data.mul_(2)
    load(impl, taker, giver.state_dict())
    torch.testing.assert_close(used_weight(taker), used_weight(giver), rtol=0, atol=1e-12)


@pytest.mark.parametrize("target", ["weight_norm", "spectral_norm"])
@row(10, "transformers 31633, 32433, 33995", torch=KEYS, raises=RuntimeError)
def test_10_a_plain_file_loads_into_a_whole_parametrized_model(impl: Impl, target: str) -> None:
    plain, normed = (
        nn.Sequential(nn.ReLU(), nn.Sequential(make(impl))) for make in (MAKE["plain"], MAKE[target])
    )
    normed.load_state_dict(plain.state_dict())  # by itself: the model's code need not know
    torch.testing.assert_close(used_weight(normed), used_weight(plain), rtol=0, atol=1e-12)
