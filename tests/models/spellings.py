"""One matrix that every norm, mask and constraint here can have, in a layer of each spelling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import prune

from torchkiln import parametrizations

ALL_MATCHED = "<All keys matched successfully>"
EXACT = {"rtol": 0, "atol": 1e-12}

Make = Callable[[], nn.Module]
Place = Callable[[nn.Module], nn.Module]


def matrix() -> Tensor:
    """Two random rotations on the diagonal: orthogonal, of spectral norm 1, and half of it masked."""
    W = torch.zeros(4, 4, dtype=torch.float64)
    for block in (slice(0, 2), slice(2, 4)):
        angle = torch.rand((), dtype=torch.float64) + 0.5
        W[block, block] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).reshape(2, 2)
    return W


def linear() -> nn.Linear:
    layer = nn.Linear(4, 4, dtype=torch.float64)
    layer.weight.data.copy_(matrix())
    return layer


def pruned() -> nn.Module:
    layer = linear()
    mask = layer.weight != 0
    layer.weight.data += ~mask
    return prune.custom_from_mask(layer, "weight", mask)


def run_once(layer: nn.Module) -> nn.Module:
    """Give the older spectral norm the singular vectors of its matrix, which starts from random ones."""
    layer(torch.ones(1, 4, dtype=torch.float64))
    return layer


MAKE: dict[str, Make] = {
    "plain": linear,
    "legacy_weight_norm": lambda: utils.weight_norm(linear()),
    "legacy_weight_norm_whole": lambda: utils.weight_norm(linear(), dim=None),
    "legacy_spectral_norm": lambda: run_once(utils.spectral_norm(linear())),
    "pruned": pruned,
    "torch_weight_norm": lambda: torch_parametrizations.weight_norm(linear()),
    "torch_spectral_norm": lambda: torch_parametrizations.spectral_norm(linear()),
    "weight_norm": lambda: parametrizations.weight_norm(linear()),
    "weight_norm_columns": lambda: parametrizations.weight_norm(linear(), dim=1),
    "spectral_norm": lambda: parametrizations.spectral_norm(linear()),
    "orthogonal": lambda: parametrizations.orthogonal(linear()),
}
# What it takes to read them is all in their state dicts.
SELF_EXPLAINING = [name for name in MAKE if name != "orthogonal"]
OURS = [name for name in MAKE if "norm" in name and "legacy" not in name and "torch" not in name] + [
    "orthogonal"
]


PLACES: dict[str, Place] = {
    "top": lambda layer: layer,
    "nested": lambda layer: nn.Sequential(nn.ReLU(), nn.Sequential(nn.Linear(2, 2), layer)),
    "data_parallel": lambda layer: nn.DataParallel(nn.Sequential(layer)),
}


def layer_of(model: nn.Module) -> nn.Module:
    """Return the layer with the matrix."""
    return next(module for module in model.modules() if getattr(module, "in_features", 0) == 4)


def value(model: nn.Module) -> Tensor:
    """Return the matrix that the layer multiplies by, as its forward pass shows it."""
    layer = layer_of(model).eval()
    with torch.no_grad():
        return (layer(torch.eye(4, dtype=torch.float64)) - layer.bias).T


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Return whether two state dicts have the same keys, in the same order, and the same bits."""
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)
