"""Row 7: tied weights stay tied, or registration refuses with both names."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from .table import OURS, Impl, row


class Symmetric(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X.triu() + X.triu(1).mT

    def right_inverse(self, A: Tensor) -> Tensor:
        return A.triu()


class Language(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.head = nn.Linear(4, 4)
        self.head.weight = self.embedding.weight

    def is_tied(self) -> bool:
        return torch.equal(self.head.weight, self.embedding.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.head(self.embedding(tokens))
        return out


TOKENS = torch.arange(4)
NORMS: dict[str, Callable[[Impl, nn.Module], nn.Module]] = {
    "symmetric": lambda impl, module: impl.P.register_parametrization(module, "weight", Symmetric()),
    "weight_norm": lambda impl, module: impl.N.weight_norm(module),
    "spectral_norm": lambda impl, module: impl.N.spectral_norm(module),
    "orthogonal": lambda impl, module: impl.N.orthogonal(module),
}
SILENT = "the tie is broken without a word"


def step(model: Language) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(TOKENS).square().sum().backward()
    optimizer.step()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("owner", ["head", "embedding"])
@row(7, "reproduced on torch 2.13", torch=SILENT)
def test_07_registering_on_one_refuses_or_keeps_the_tie(impl: Impl, norm: str, owner: str) -> None:
    model = Language()
    before = model.embedding.weight.detach().clone()
    refusal = ""
    try:
        NORMS[norm](impl, getattr(model, owner))
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert "Linear.weight" in refusal
        assert "Embedding.weight" in refusal
        assert torch.equal(model.embedding.weight, before)
        assert model.head.weight is model.embedding.weight
    else:
        step(model)
        assert model.is_tied()


class Twice(nn.Module):
    def forward(self, X: Tensor) -> Tensor:
        return X * 2

    def right_inverse(self, X: Tensor) -> Tensor:
        return X / 2


@row(7, "reproduced on torch 2.13", torch="the second registration inverts the shared original once more")
def test_07_both_can_be_parametrized_and_stay_tied(impl: Impl) -> None:
    model, shared = Language(), Twice()
    before = model.head.weight.detach().clone()
    if impl == OURS:
        impl.P.register_parametrization(model.head, "weight", shared, tied_in=model)
    else:
        impl.P.register_parametrization(model.head, "weight", shared)
        impl.P.register_parametrization(model.embedding, "weight", shared)
    assert torch.equal(model.head.weight, before)
    step(model)
    assert model.is_tied()
    assert len(list(model.parameters())) == 2


@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal"])
@row(7, "reproduced on torch 2.13", torch="knows no other holder", raises=TypeError)
def test_07_a_built_in_on_both(impl: Impl, norm: str) -> None:
    model = Language()
    getattr(impl.N, norm)(model.head, tied_in=model)
    step(model)
    assert model.is_tied()
    assert impl.P.is_parametrized(model.embedding, "weight")


@row(7, "reproduced on torch 2.13", torch="the original that the other holds is overwritten")
@pytest.mark.filterwarnings("ignore:.* gets a parameter of its own")
def test_07_removal_on_one_does_not_change_the_other(impl: Impl) -> None:
    head = impl.P.register_parametrization(nn.Linear(4, 4), "weight", nn.Softplus())
    embedding = nn.Embedding(4, 4)
    embedding.weight = head.parametrizations.weight.original
    before = embedding.weight.detach().clone()
    impl.P.remove_parametrizations(head, "weight")
    assert torch.equal(embedding.weight, before)
