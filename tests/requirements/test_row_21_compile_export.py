"""Row 21: torch.compile, torch.export and both ONNX exporters take a parametrized model; onnxruntime judges."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import torchkiln

from .table import Impl, fails_on, row

X = torch.linspace(-1, 1, 8).reshape(2, 4)
NORMS = ["weight_norm", "spectral_norm", "orthogonal"]
norms = pytest.mark.parametrize("norm", NORMS)
# Said by torch of its own compiler and exporters.
quiet = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Net(nn.Module):
    """A linear layer and a convolution, or two linear layers where the map needs a matrix."""

    def __init__(self, impl: Impl, norm: str) -> None:
        super().__init__()
        make = getattr(impl.N, norm)
        self.needs_matrix = norm == "orthogonal"
        self.first = make(nn.Linear(4, 4))
        self.second = make(nn.Linear(4, 3) if self.needs_matrix else nn.Conv1d(4, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.second(x) if self.needs_matrix else self.second(x[..., None])[..., 0]


def net(impl: Impl, norm: str) -> nn.Module:
    return Net(impl, norm).eval()


# --- torch.compile ------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: nn.Module) -> tuple[Any, CompileCounterWithBackend]:
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(model, backend=counter, fullgraph=True), counter


@norms
@row(21, "pytorch 167645")
def test_21_one_graph_trains_as_eager_does(impl: Impl, norm: str) -> None:
    eager = Net(impl, norm)
    other = Net(impl, norm)
    other.load_state_dict(eager.state_dict())
    fast, counter = compiled(other)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (eager, other)]
    for _ in range(3):
        for model, optimizer in zip((eager, fast), optimizers, strict=True):
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
    assert counter.frame_count == 1
    torch.testing.assert_close(other.state_dict(), eager.state_dict())


@norms
@row(21, "pytorch 167645")
def test_21_modes_have_at_most_a_graph_each(impl: Impl, norm: str) -> None:
    model = Net(impl, norm)
    fast, counter = compiled(model)
    for training in (True, False) * 4:
        model.train(training)
        fast(X)
        with torch.no_grad():
            fast(X)
    assert counter.frame_count <= 4  # {train, eval} x {grad, no grad}
    model.eval()
    torch.testing.assert_close(fast(X), model(X))


@norms
@row(21, "pytorch 167645")
def test_21_a_compiled_model_sees_writes_and_removal(impl: Impl, norm: str) -> None:
    model = net(impl, norm)
    fast, counter = compiled(model)
    fast(X)
    model.load_state_dict(net(impl, norm).state_dict())
    torch.testing.assert_close(fast(X), model(X))
    assert counter.frame_count == 1
    expected = model(X)
    for layer in (model.first, model.second):
        impl.P.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(fast(X), expected)
    assert counter.frame_count == 2


@pytest.mark.slow
@quiet
@norms
@row(21, "pytorch 167645")
def test_21_inductor(impl: Impl, norm: str) -> None:
    model = net(impl, norm)
    fast = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(fast(X), model(X))
    fast(X).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


# --- torch.export -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:No complete tensor found:UserWarning")  # torch's base is a view
@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@norms
@row(21, "pytorch 113415")
def test_21_export(impl: Impl, norm: str, strict: bool, tmp_path: Path) -> None:
    model = net(impl, norm)
    program = torch.export.export(model, (X,), strict=strict)
    assert set(program.state_dict) == set(model.state_dict())
    torch.export.save(program, tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(X), model(X))


def folded(impl: Impl, model: nn.Module) -> AbstractContextManager[nn.Module]:
    """The model on plain weights for a while, which torch has no way to ask for."""
    return torchkiln.baked(model) if impl.name == "torchkiln" else impl.P.baked(model)


CANNOT_FOLD = "torch cannot fold for the time of an export"


@norms
@row(21, "pytorch 113415", torch=CANNOT_FOLD, raises=AttributeError)
def test_21_export_folded_on_request(impl: Impl, norm: str) -> None:
    model = net(impl, norm)
    expected = model(X)
    with folded(impl, model):
        program = torch.export.export(model, (X,))
    assert not [key for key in program.state_dict if "parametrizations" in key]
    assert not [node for node in program.graph.nodes if "norm" in str(node.target)]
    torch.testing.assert_close(program.module()(X), expected)
    assert impl.P.is_parametrized(model.first, "weight")


# --- ONNX ---------------------------------------------------------------------------------------------------------

WANTED = ("onnx", "onnxscript", "onnxruntime")
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in WANTED), reason=f"needs {', '.join(WANTED)}"
)
exporters = pytest.mark.parametrize("dynamo", [False, True], ids=["torchscript", "dynamo"])


def judged(model: nn.Module, path: Path, *, dynamo: bool) -> Tensor:
    """Export, and compute the output with onnxruntime."""
    import onnxruntime

    torch.onnx.export(model, (X,), path, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    return torch.from_numpy(output)


NO_VDOT = fails_on("torch", "the exporter does not know vdot", torch.onnx.errors.UnsupportedOperatorError)


@needs_onnx
@quiet
@pytest.mark.parametrize(
    ("norm", "dynamo"),
    [
        ("weight_norm", False),
        ("weight_norm", True),
        pytest.param("spectral_norm", False, marks=NO_VDOT),
        ("spectral_norm", True),
        # ONNX has no operator for the factorizations behind orthogonal: it is exported folded, below.
    ],
)
@row(21, "pytorch 113415")
def test_21_onnx(impl: Impl, norm: str, dynamo: bool, tmp_path: Path) -> None:
    model = net(impl, norm)
    expected = model(X)
    torch.testing.assert_close(judged(model, tmp_path / "model.onnx", dynamo=dynamo), expected)


@needs_onnx
@quiet
@exporters
@norms
@row(21, "pytorch 113415", torch=CANNOT_FOLD, raises=AttributeError)
def test_21_onnx_folded_on_request(impl: Impl, norm: str, dynamo: bool, tmp_path: Path) -> None:
    model = net(impl, norm)
    expected = model(X)
    with folded(impl, model):
        found = judged(model, tmp_path / "model.onnx", dynamo=dynamo)
    torch.testing.assert_close(found, expected)
    assert impl.P.is_parametrized(model.first, "weight")
