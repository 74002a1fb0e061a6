"""Row 11: a state dict is written in the spelling asked for, and the module of that spelling loads it strictly."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchkiln

from .table import TORCH, Impl, fails_on, row
from .test_row_10_loading import MAKE, used_weight

# The norm of the model, the spelling asked for, and the module that has it.
CASES = [
    ("weight_norm", "plain", "plain"),
    ("weight_norm", "legacy", "legacy_weight_norm"),
    ("weight_norm", "torch", "weight_norm"),
    ("spectral_norm", "plain", "plain"),
    ("spectral_norm", "legacy", "legacy_spectral_norm"),
    ("spectral_norm", "torch", "spectral_norm"),
    ("legacy_weight_norm", "plain", "plain"),
    ("legacy_weight_norm", "torch", "weight_norm"),
    ("legacy_spectral_norm", "plain", "plain"),
    ("legacy_spectral_norm", "torch", "spectral_norm"),
    ("pruned", "plain", "plain"),
]
ONE_SPELLING = "state_dict() has the module's own spelling only"


def params() -> Iterator[Any]:
    for source, spelling, target in CASES:
        known = source == target or (source, target) == ("legacy_weight_norm", "weight_norm")
        marks = [] if known else [fails_on(TORCH.name, ONE_SPELLING, RuntimeError)]
        yield pytest.param(source, spelling, target, marks=marks, id=f"{source}-as-{spelling}")


def saved(impl: Impl, model: nn.Module, spelling: Any) -> dict[str, Tensor]:
    return model.state_dict() if impl is TORCH else torchkiln.state_dict(model, spelling=spelling)


@pytest.mark.parametrize(("source", "spelling", "target"), list(params()))
@row(11, "transformers 31633, speechbrain 3074, RAVE 304")
def test_11_the_matching_module_loads_it(impl: Impl, source: str, spelling: str, target: str) -> None:
    model, taker = (nn.Sequential(MAKE[name](impl)) for name in (source, target))
    before = copy.deepcopy(model.state_dict())
    # A load of torch's own, with no help from torchkiln, and without a warning.
    nn.Module.load_state_dict(taker, saved(impl, model, spelling), strict=True)
    torch.testing.assert_close(used_weight(taker), used_weight(model), rtol=0, atol=1e-12)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
