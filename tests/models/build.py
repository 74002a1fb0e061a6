"""Layers normed in every way there is, and what a test compares of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations as torch_parametrizations
from torch.nn.utils import parametrize as torch_parametrize
from torch.nn.utils import prune

from torchkiln import parametrizations, parametrize


class Symmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.triu() + X.triu(1).mT


class Scale(nn.Module):
    def __init__(self, factor: float = 2.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, X: Tensor) -> Tensor:
        return X * self.factor


class RankOne(nn.Module):
    """Several originals, no bound on the shape."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x.unsqueeze(-1) * y

    def right_inverse(self, Z: Tensor) -> tuple[Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(Z, full_matrices=False)
        return U[:, 0] * S[0].sqrt(), Vh[0] * S[0].sqrt()


class Noisy(nn.Module):
    """Random in training mode, as weight dropout is."""

    def forward(self, X: Tensor) -> Tensor:
        return X * torch.rand_like(X) if self.training else X * 3


def pruned(
    *methods: Callable[..., nn.Module], name: str = "weight", **kwargs: Any
) -> Callable[[nn.Module], nn.Module]:
    def apply(module: nn.Module) -> nn.Module:
        for method in methods:
            method(module, name, **kwargs)
        return module

    return apply


def registered(
    *steps: nn.Module, api: Any = parametrize, name: str = "weight"
) -> Callable[[nn.Module], nn.Module]:
    def apply(module: nn.Module) -> nn.Module:
        for step in steps:
            api.register_parametrization(module, name, step, unsafe=True)
        return module

    return apply


def square() -> nn.Module:
    return nn.Linear(4, 4)


# What normed it -> (a layer for 4 features, the words and the api of its row).
LAYERS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "weight_norm": (lambda: parametrizations.weight_norm(square()), "weight_norm", "torchkiln"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(square()), "spectral_norm", "torchkiln"),
    "orthogonal": (lambda: parametrizations.orthogonal(nn.Linear(4, 6)), "orthogonal", "torchkiln"),
    "orthogonal_wide": (lambda: parametrizations.orthogonal(nn.Linear(4, 3)), "orthogonal", "torchkiln"),
    "chain": (lambda: registered(Symmetric(), Scale())(square()), "Symmetric, Scale", "torchkiln"),
    "rank_one": (lambda: registered(RankOne())(square()), "RankOne", "torchkiln"),
    "noisy": (lambda: registered(Noisy())(square()), "Noisy", "torchkiln"),
    "torch_weight_norm": (lambda: torch_parametrizations.weight_norm(square()), "weight_norm", "torch"),
    "torch_spectral_norm": (lambda: torch_parametrizations.spectral_norm(square()), "spectral_norm", "torch"),
    "torch_orthogonal": (lambda: torch_parametrizations.orthogonal(nn.Linear(4, 3)), "orthogonal", "torch"),
    "torch_chain": (lambda: registered(Symmetric(), api=torch_parametrize)(square()), "Symmetric", "torch"),
    "weight_norm_hook": (lambda: utils.weight_norm(square()), "weight_norm (hook)", "hook"),
    "weight_norm_hook_whole": (lambda: utils.weight_norm(square(), dim=None), "weight_norm (hook)", "hook"),
    "spectral_norm_hook": (lambda: utils.spectral_norm(square()), "spectral_norm (hook)", "hook"),
    "l1": (lambda: pruned(prune.l1_unstructured, amount=0.5)(square()), "prune (L1Unstructured)", "prune"),
    "structured": (
        lambda: pruned(prune.ln_structured, amount=2, n=2, dim=0)(square()),
        "prune (LnStructured)",
        "prune",
    ),
    "custom_mask": (
        lambda: pruned(prune.custom_from_mask, mask=torch.eye(4))(square()),
        "prune (CustomFromMask)",
        "prune",
    ),
    "container": (
        lambda: pruned(prune.l1_unstructured, prune.random_unstructured, amount=0.3)(square()),
        "prune (L1Unstructured, RandomUnstructured)",
        "prune",
    ),
    # nested
    "parametrized_original": (
        lambda: nest(square(), Symmetric()),
        "Symmetric, orthogonal",
        "torchkiln",
    ),
    "pruned_original": (
        lambda: prune_original(registered(Scale())(square())),
        "prune (L1Unstructured), Scale",
        "torchkiln",
    ),
    "pruned_direction": (
        lambda: pruned(prune.l1_unstructured, name="weight_v", amount=0.3)(utils.weight_norm(square())),
        "prune (L1Unstructured), weight_norm (hook)",
        "hook",
    ),
    "parametrized_direction": (
        lambda: registered(Scale(), name="weight_v")(utils.weight_norm(square())),
        "Scale, weight_norm (hook)",
        "hook",
    ),
    "parametrized_step": (lambda: step_inside(square()), "Product", "torchkiln"),
}


def nest(module: nn.Module, step: nn.Module) -> nn.Module:
    parametrizations.orthogonal(module, orthogonal_map="cayley")
    parametrize.register_parametrization(module.parametrizations.weight, "original", step)
    return module


def prune_original(module: nn.Module) -> nn.Module:
    prune.l1_unstructured(module.parametrizations.weight, "original", amount=0.3)
    return module


class Product(nn.Module):
    """A step with a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.rand(4, 4) + 1)

    def forward(self, X: Tensor) -> Tensor:
        return X * self.factor


def step_inside(module: nn.Module) -> nn.Module:
    step = Product()
    parametrizations.weight_norm(step, "factor")
    return parametrize.register_parametrization(module, "weight", step)


def everything() -> nn.Sequential:
    """One model with a layer of each kind."""
    layers = []
    for make, _, _ in LAYERS.values():
        layer = make()
        layers += [layer, nn.Linear(layer.out_features, 4)]
    return nn.Sequential(*layers)


def evaluated(model: nn.Module, x: Tensor) -> Tensor:
    """Output in eval mode; the model's modes stay."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        output = model.eval()(x)
    for module, mode in modes.items():
        module.training = mode
    return output


def anatomy(model: nn.Module) -> list[Any]:
    """What must come back after a failure: classes, tensors with their places and bits, modes, hooks, attributes."""
    parts: list[Any] = []
    for name, module in model.named_modules():
        parts.append((name, type(module), module.training, sorted(vars(module))))
        for tensors in (module._parameters, module._buffers):
            parts += [
                (key, id(t), t.requires_grad, t.tolist()) for key, t in tensors.items() if t is not None
            ]
        parts += [list(module._modules), list(map(id, module._forward_pre_hooks.values()))]
        parts += [list(module._state_dict_hooks), list(module._load_state_dict_pre_hooks)]
    return parts
