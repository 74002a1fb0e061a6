"""Modules that torch itself put under norms: the oracle for every spelling, and how to save them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

__all__ = ["CASES", "CONTAINERS", "Case", "ids", "read_file", "same_bits", "save"]

Put = Callable[[nn.Module], nn.Module]


@dataclass(frozen=True)
class Case:
    """A plain module, what torch puts it under, an input for it, and what a report should say."""

    name: str
    plain: Callable[[], nn.Module]
    put: Put
    x: tuple[int, ...]
    spelling: str
    dim: int | None
    tensor: str = "weight"

    def build(self) -> nn.Module:
        """The module under its norm, in eval mode, away from the values that registration gave it."""
        module = self.put(self.plain())
        for _ in range(3):  # u and v move
            module(torch.randn(self.x))
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        return module.eval()

    def computed(self, module: nn.Module) -> Tensor:
        """The tensor as the module computes with it."""
        # Twice: the hook of weight norm runs before that of pruning, and sees its effect one forward later.
        module(torch.zeros(self.x))
        module(torch.zeros(self.x))
        tensor: Tensor = getattr(module, self.tensor).detach()
        return tensor


def wn(**options: Any) -> Put:
    return lambda module: parametrizations.weight_norm(module, **options)


def sn(**options: Any) -> Put:
    return lambda module: parametrizations.spectral_norm(module, **options)


def legacy_wn(**options: Any) -> Put:
    return lambda module: nn.utils.weight_norm(module, **options)


def legacy_sn() -> Put:
    return nn.utils.spectral_norm


def pruned(name: str) -> Put:
    return lambda module: prune.random_unstructured(module, name, amount=0.4)


def both(*puts: Put) -> Put:
    return lambda module: reduce(lambda done, put: put(done), puts, module)


def _nested(module: nn.Module) -> nn.Module:
    parametrizations.weight_norm(module)
    parametrizations.spectral_norm(module.parametrizations.weight, "original1")
    return module


def linear() -> nn.Module:
    return nn.Linear(6, 4)


def conv() -> nn.Module:
    return nn.Conv1d(3, 5, 7)


def transposed() -> nn.Module:
    return nn.ConvTranspose1d(3, 5, 7)


CASES = [
    Case("wn-linear", linear, wn(), (2, 6), "torch weight_norm", 0),
    Case("wn-conv", conv, wn(), (3, 8), "torch weight_norm", 0),
    Case("wn-last", conv, wn(dim=2), (3, 8), "torch weight_norm", 2),
    Case("wn-middle", conv, wn(dim=1), (3, 8), "torch weight_norm", 1),
    Case("wn-all", linear, wn(dim=None), (2, 6), "torch weight_norm", None),
    Case("wn-one-row", lambda: nn.Conv1d(3, 1, 7), wn(), (3, 8), "torch weight_norm", 0),
    Case("wn-transposed", transposed, wn(), (3, 8), "torch weight_norm", 0),
    Case(
        "wn-name",
        lambda: nn.LSTM(3, 4),
        wn(name="weight_hh_l0"),
        (2, 3),
        "torch weight_norm",
        0,
        "weight_hh_l0",
    ),
    Case("legacy-wn-linear", linear, legacy_wn(), (2, 6), "legacy weight_norm", 0),
    Case("legacy-wn-last", conv, legacy_wn(dim=2), (3, 8), "legacy weight_norm", 2),
    Case("legacy-wn-all", conv, legacy_wn(dim=None), (3, 8), "legacy weight_norm", None),
    Case("sn-linear", linear, sn(), (2, 6), "torch spectral_norm", 0),
    Case("sn-square", lambda: nn.Linear(5, 5), sn(dim=1), (2, 5), "torch spectral_norm", 1),
    Case("sn-conv", lambda: nn.Conv2d(3, 5, 3), sn(), (3, 4, 4), "torch spectral_norm", 0),
    Case("sn-transposed", transposed, sn(), (3, 8), "torch spectral_norm", 1),
    Case("legacy-sn-linear", linear, legacy_sn(), (2, 6), "legacy spectral_norm", 0),
    Case("legacy-sn-transposed", transposed, legacy_sn(), (3, 8), "legacy spectral_norm", 1),
    Case("pruned", linear, pruned("weight"), (2, 6), "pruning", None),
    Case("pruned-v", linear, both(legacy_wn(), pruned("weight_v")), (2, 6), "legacy weight_norm", 0),
    Case("nested", linear, _nested, (2, 6), "torch weight_norm", 0),
    Case("chain", linear, both(wn(), sn()), (2, 6), "torch weight_norm + spectral_norm", 0),
]

CONTAINERS = [".safetensors", ".pt"]


def ids(case: Case) -> str:
    return case.name


def save(state: dict[str, Any], path: Path) -> Path:
    """Write tensors as the suffix says."""
    if path.suffix == ".safetensors":
        tensors = {key: value.detach().clone().contiguous() for key, value in state.items()}
        safetensors.torch.save_file(tensors, path, metadata={"made by": "a test"})
    else:
        torch.save(state, path)
    return path


def read_file(path: Path) -> Any:
    """Read what the suffix says."""
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True)


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Tell equal tensors apart even by the sign of zero; NaN equals itself."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = (t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)
