"""``spectral_norm`` gives torch's numbers, names and errors, power iteration by power iteration."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from parametrize.oracle import OURS, TORCH, Impl, beyond_torch

from .agreement import assert_agree, assert_close, assert_same_error, assert_same_names, both

MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3, dtype=torch.float64),
    "convolution 1d": lambda: nn.Conv1d(4, 3, 2, dtype=torch.float64),
    "convolution 2d": lambda: nn.Conv2d(2, 3, (2, 3), dtype=torch.float64),
    "convolution 3d": lambda: nn.Conv3d(2, 2, 2, dtype=torch.float64),
    "transposed convolution 1d": lambda: nn.ConvTranspose1d(4, 3, 2, dtype=torch.float64),
    "transposed convolution 2d": lambda: nn.ConvTranspose2d(2, 3, 2, dtype=torch.float64),
    "transposed convolution 3d": lambda: nn.ConvTranspose3d(2, 3, 2, dtype=torch.float64),
    "embedding": lambda: nn.Embedding(5, 3, dtype=torch.float64),
    "bilinear": lambda: nn.Bilinear(2, 3, 4, dtype=torch.float64),
    "one row": lambda: nn.Linear(4, 1, dtype=torch.float64),
    "one column": lambda: nn.Linear(1, 4, dtype=torch.float64),
}
EVERY_MODULE = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


def vectors(module: nn.Module, name: str = "weight") -> list[torch.Tensor]:
    """The buffers of the power iteration."""
    step = module.parametrizations[name][0]
    return [step._u, step._v]


@EVERY_MODULE
@pytest.mark.parametrize("training", [True, False])
def test_registration(module: Callable[[], nn.Module], training: bool) -> None:
    theirs, ours = both(lambda impl: impl.N.spectral_norm(module().train(training)))
    assert_agree(ours, theirs)


@EVERY_MODULE
def test_reads_in_training_mode(module: Callable[[], nn.Module]) -> None:
    """From the same state the same number of training steps gives the same vectors and values."""
    theirs, ours = both(lambda impl: impl.N.spectral_norm(module()))
    ours.load_state_dict(theirs.state_dict())
    for layer in (theirs, ours):
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        for _ in range(4):
            optimizer.zero_grad()
            (layer.weight - 0.5).square().sum().backward()
            optimizer.step()
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert_agree(ours, theirs)


@pytest.mark.parametrize("n_power_iterations", [1, 2, 5])
@pytest.mark.parametrize("eps", [1e-12, 1e-3, 0.5])
@pytest.mark.parametrize("dim", [None, 0, 1, -1, 2])
def test_options(n_power_iterations: int, eps: float, dim: int | None) -> None:
    theirs, ours = both(
        lambda impl: impl.N.spectral_norm(
            nn.Conv1d(4, 3, 2, dtype=torch.float64), "weight", n_power_iterations, eps, dim
        )
    )
    assert_agree(ours, theirs)


@pytest.mark.parametrize("eps", [1e-12, 0.1, 10.0])
@pytest.mark.parametrize("training", [True, False])
def test_vector(eps: float, training: bool) -> None:
    theirs, ours = both(
        lambda impl: impl.N.spectral_norm(
            nn.Linear(4, 3, dtype=torch.float64).train(training), "bias", eps=eps
        )
    )
    assert_agree(ours, theirs, "bias")
    assert [key for key, _ in ours.named_buffers()] == []


@EVERY_MODULE
def test_evaluation_changes_nothing(impl: Impl, module: Callable[[], nn.Module]) -> None:
    layer = impl.N.spectral_norm(module()).eval()
    before = [vector.clone() for vector in vectors(layer)]
    assert torch.equal(layer.weight, layer.weight)
    assert all(torch.equal(*pair) for pair in zip(vectors(layer), before, strict=True))


def test_a_first_forward_after_a_change_advances(impl: Impl) -> None:
    layer = impl.N.spectral_norm(nn.Linear(4, 3, dtype=torch.float64))
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(torch.randn(3, 4, dtype=torch.float64))
    before = [vector.clone() for vector in vectors(layer)]
    layer(torch.ones(1, 4, dtype=torch.float64))
    assert not torch.equal(vectors(layer)[0], before[0])


@pytest.mark.parametrize("module", [MODULES["linear"], MODULES["transposed convolution 2d"]])
def test_the_estimate_converges(impl: Impl, module: Callable[[], nn.Module]) -> None:
    layer = impl.N.spectral_norm(module(), n_power_iterations=200)
    with torch.no_grad():
        layer.parametrizations.weight.original.add_(0.1)
    weight = layer.weight
    rows = weight if weight.ndim == 2 else weight.transpose(0, 1).flatten(1)
    norm = torch.linalg.matrix_norm(rows, 2).item()
    assert norm == pytest.approx(1.0, abs=1e-9)


def test_two_forwards_and_one_backward(impl: Impl) -> None:
    layer = impl.N.spectral_norm(nn.Linear(4, 3, dtype=torch.float64))
    real, fake = torch.randn(2, 2, 4, dtype=torch.float64)
    (layer(real).sum() - layer(fake).square().sum()).backward()
    assert layer.parametrizations.weight.original.grad.isfinite().all()


def test_two_forwards_and_one_backward_agree() -> None:
    theirs, ours = both(
        lambda impl: impl.N.spectral_norm(nn.Linear(4, 3, dtype=torch.float64), n_power_iterations=300)
    )
    x = torch.randn(2, 4, dtype=torch.float64)
    for layer in (theirs, ours):
        (layer(x).sum() - layer(2 * x).square().sum()).backward()
    torch.testing.assert_close(
        ours.parametrizations.weight.original.grad, theirs.parametrizations.weight.original.grad
    )


def test_assignment() -> None:
    def make(impl: Impl) -> nn.Module:
        layer = impl.N.spectral_norm(nn.Linear(4, 3, dtype=torch.float64)).eval()
        layer.weight = torch.randn(3, 4, dtype=torch.float64)
        return layer

    theirs, ours = both(make)
    assert_agree(ours, theirs)


@pytest.mark.parametrize(("source", "target"), [(TORCH, OURS), (OURS, TORCH)], ids=["to ours", "to torch"])
@EVERY_MODULE
def test_state_dicts_move(source: Impl, target: Impl, module: Callable[[], nn.Module]) -> None:
    giver, taker = (impl.N.spectral_norm(module()).eval() for impl in (source, target))
    assert repr(taker.load_state_dict(giver.state_dict())) == "<All keys matched successfully>"
    assert_close(taker.weight.detach(), giver.weight.detach())


@pytest.mark.parametrize("leave_parametrized", [True, False])
def test_removal(leave_parametrized: bool) -> None:
    def make(impl: Impl) -> nn.Module:
        layer = impl.N.spectral_norm(nn.Linear(4, 3, dtype=torch.float64)).eval()
        return impl.P.remove_parametrizations(layer, "weight", leave_parametrized=leave_parametrized)

    theirs, ours = both(make)
    assert type(ours) is nn.Linear
    assert_close(ours.weight.detach(), theirs.weight.detach())


@beyond_torch("torch advances the power iteration once more")
@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("one ")])
def test_removal_keeps_the_last_read_in_training(impl: Impl, name: str) -> None:
    layer = impl.N.spectral_norm(MODULES[name]())
    read = layer.weight
    step = layer.parametrizations.weight[0]
    before = step._u.clone()
    impl.P.remove_parametrizations(layer, "weight")
    assert torch.equal(layer.weight, read)
    assert torch.equal(step._u, before)
    assert step.training


def test_buffers_follow_the_weight() -> None:
    theirs, ours = both(
        lambda impl: impl.N.spectral_norm(nn.Linear(4, 3, dtype=torch.float64)).float().eval()
    )
    assert_same_names(ours, theirs)
    assert_close(ours.weight.detach(), theirs.weight.detach())


def test_complex() -> None:
    theirs, ours = both(lambda impl: impl.N.spectral_norm(nn.Linear(4, 3, dtype=torch.complex128)).eval())
    assert_agree(ours, theirs)


def test_buffer() -> None:
    def make(impl: Impl) -> nn.Module:
        module = nn.Module().eval()
        module.register_buffer("kernel", torch.randn(4, 3, dtype=torch.float64))
        return impl.N.spectral_norm(module, "kernel")

    theirs, ours = both(make)
    assert_same_names(ours, theirs)
    assert_close(ours.kernel, theirs.kernel)


def test_on_a_parametrized_tensor() -> None:
    def make(impl: Impl) -> nn.Module:
        layer = impl.N.weight_norm(nn.Linear(4, 3, dtype=torch.float64).eval())
        return impl.N.spectral_norm(layer, n_power_iterations=3)

    theirs, ours = both(make)
    assert_agree(ours, theirs)


@pytest.mark.parametrize(
    "call",
    [
        lambda impl: impl.N.spectral_norm(nn.Linear(4, 3), "missing"),
        lambda impl: impl.N.spectral_norm(nn.Linear(4, 3, bias=False), "bias"),
        lambda impl: impl.N.spectral_norm(nn.Linear(4, 3), n_power_iterations=0),
        lambda impl: impl.N.spectral_norm(nn.Linear(4, 3), n_power_iterations=-2),
        lambda impl: impl.N.spectral_norm(nn.Linear(4, 3), dim=2),
        lambda impl: impl.N.spectral_norm(nn.Linear(4, 3), dim=-3),
        lambda impl: impl.N.spectral_norm(nn.Linear(4, 3), "bias", dim=1),
        lambda impl: impl.N.spectral_norm(nn.Linear(4, 3), "bias", n_power_iterations=0),
    ],
    ids=["missing", "none", "no iterations", "negative", "dimension", "below", "vector", "vector iterations"],
)
def test_errors(call: Callable[[Impl], nn.Module]) -> None:
    assert_same_error(call)


@pytest.mark.parametrize("name", ["linear", "convolution 2d", "transposed convolution 1d"])
def test_gradcheck(name: str) -> None:
    layer = OURS.N.spectral_norm(MODULES[name]()).eval()
    chain = layer.parametrizations.weight
    assert torch.autograd.gradcheck(chain[0], chain.original.detach().clone().requires_grad_())
