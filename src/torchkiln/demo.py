"""The demo: train a parametrized network on real digits, bake its checkpoint file, and compare the predictions."""

from __future__ import annotations

import re
import tempfile
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from torchkiln import bake, checkpoint, parametrizations
from torchkiln._cli._console import progress
from torchkiln._cli._reports import inspection_table
from torchkiln._core.errors import OutputExistsError

__all__ = ["DemoReport", "run_demo"]

_SOURCE, _TARGET = "digits.pt", "digits.plain.pt"
_TEST_IMAGES = 450
_BATCHES = 21
# The map is a choice made in code; a state dict does not record it, so whoever bakes the file has to know it.
_ORTHOGONAL_MAP = "matrix_exp"
_ASSUME = {"hidden.weight": _ORTHOGONAL_MAP}


@dataclass(frozen=True)
class _Comparison:
    """How the predictions of a plain network differ from those of the trained, parametrized one."""

    accuracy: float
    differing_predictions: int
    max_abs_logit_difference: float


@dataclass(frozen=True)
class DemoReport:
    """What the demo measured.

    Attributes:
        train_images: How many images the network was trained on.
        test_images: How many others every number below was measured on.
        epochs: Passes over the training images.
        train_seconds: Wall-clock time of the training.
        accuracy: Share of the test images that the trained, parametrized network gets right.
        folded: Names of the tensors that baking the file folded.
        missing_keys: Keys a plain network misses in the file before baking.
        unexpected_keys: Keys of that file a plain network has no place for.
        from_file: The plain network that loaded the baked file.
        from_model: The trained network after its parametrizations were removed in memory.
        renamed: A plain network whose weights are the originals under new names: the commonest mistake, as a control.
    """

    train_images: int
    test_images: int
    epochs: int
    train_seconds: float
    accuracy: float
    folded: tuple[str, ...]
    missing_keys: int
    unexpected_keys: int
    from_file: _Comparison
    from_model: _Comparison
    renamed: _Comparison

    @property
    def identical(self) -> bool:
        """Whether both plain networks predict the same digit as the trained one for every test image."""
        return self.from_file.differing_predictions == 0 and self.from_model.differing_predictions == 0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON-able data."""
        return {**asdict(self), "identical": self.identical}


@dataclass(frozen=True)
class _Digits:
    """scikit-learn's 8 x 8 digits, split into images to train on and images to test on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def run_demo(
    *, epochs: int = 20, seed: int = 0, keep: Path | None = None, console: Console | None = None
) -> DemoReport:
    """Train, save, inspect, bake, reload and compare, telling the story on ``console``.

    Args:
        epochs: Passes over the training images.
        seed: Seeds the split, the initial weights and the order of the batches; the global generator is untouched.
        keep: Directory for the two files (``digits.pt``, ``digits.plain.pt``); by default a temporary one.
        console: Where to print; silent by default.

    Returns:
        Every number that was printed.

    Raises:
        ModuleNotFoundError: scikit-learn is not installed.
        OutputExistsError: ``keep`` already holds one of the two files.

    Example:
        >>> report = run_demo(epochs=1)
        >>> report.identical
        True
    """
    story = _Story(console or Console(quiet=True))
    with ExitStack() as stack:
        folder = keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torchkiln-demo-")))
        source, target = _output_files(folder)
        stack.enter_context(_reproducible(seed))
        digits = _load_digits()
        trained = _parametrized_network()
        story.begins(digits, seed)
        with story.training(epochs) as after_epoch:
            seconds = _train(trained, digits, epochs=epochs, after_epoch=after_epoch)
        story.trained(epochs, seconds, _accuracy(_logits(trained, digits), digits))
        torch.save(trained.state_dict(), source)
        report = _bake_and_compare(
            trained, digits, source, target, story=story, epochs=epochs, seconds=seconds
        )
        story.ends(report, keep=keep)
    return report


def _bake_and_compare(
    trained: nn.Sequential,
    digits: _Digits,
    source: Path,
    target: Path,
    *,
    story: _Story,
    epochs: int,
    seconds: float,
) -> DemoReport:
    """Bake the file and the live network, and compare both, and a control, with the network as it was trained."""
    saved = torch.load(source, weights_only=True)
    missing, unexpected = _plain_network().load_state_dict(saved, strict=False)
    story.saved(source, missing=len(missing), unexpected=len(unexpected))
    folded = checkpoint.bake(source, target, assume=_ASSUME)
    story.baked(folded)

    from_file, renamed = _plain_network(), _plain_network()
    from_file.load_state_dict(torch.load(target, weights_only=True), strict=True)
    renamed.load_state_dict(_only_renamed(saved), strict=True)
    before = _logits(trained, digits)
    bake(trained)
    return DemoReport(
        train_images=len(digits.train_images),
        test_images=len(digits.test_images),
        epochs=epochs,
        train_seconds=seconds,
        accuracy=_accuracy(before, digits),
        folded=tuple(row.name for row in folded.rows),
        missing_keys=len(missing),
        unexpected_keys=len(unexpected),
        from_file=_compare(before, _logits(from_file, digits), digits),
        from_model=_compare(before, _logits(trained, digits), digits),
        renamed=_compare(before, _logits(renamed, digits), digits),
    )


def _only_renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the control: what a script gets that makes the keys fit and forgets to compute.

    A weight norm's direction is its last original, the other two have one, so the last original that has the
    weight's name wins.
    """
    renamed = {}
    for key, tensor in state.items():
        plain = re.sub(r"parametrizations\.(\w+)\.original1?$", r"\1", key)
        if ".parametrizations." not in plain:
            renamed[plain] = tensor
    return renamed


@contextmanager
def _reproducible(seed: int) -> Iterator[None]:
    """Seed a private copy of the generator, and use one thread: on tensors this small more threads only wait."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def _output_files(folder: Path) -> tuple[Path, Path]:
    """Return the two paths the demo writes in ``folder``, which it makes; refuse to overwrite either."""
    folder.mkdir(parents=True, exist_ok=True)
    source, target = folder / _SOURCE, folder / _TARGET
    for path in (source, target):
        if path.exists():
            raise OutputExistsError(
                f"{path}: the demo writes this file and it exists already.\nName another folder."
            )
    return source, target


def _load_digits() -> _Digits:
    """Read the digits that ship inside scikit-learn and split them at random."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "sklearn":
            raise
        message = "the demo needs scikit-learn: pip install 'torchkiln[demo]'"
        raise ModuleNotFoundError(message, name=error.name) from None
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).to(torch.float32).unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target)
    order = torch.randperm(len(labels))
    test, train = order[:_TEST_IMAGES], order[_TEST_IMAGES:]
    return _Digits(images[train], labels[train], images[test], labels[test])


def _plain_network() -> nn.Sequential:
    """Return the network as anybody would deploy it: two convolutions and two linear layers of plain weights."""
    layers = OrderedDict[str, nn.Module](
        conv1=nn.Conv2d(1, 16, 3, padding=1),
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),
        conv2=nn.Conv2d(16, 32, 3, padding=1),
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),
        flatten=nn.Flatten(),
        hidden=nn.Linear(128, 64),
        relu3=nn.ReLU(),
        head=nn.Linear(64, 10),
    )
    return nn.Sequential(layers).eval()


def _parametrized_network() -> nn.Sequential:
    """Return the same network as it is trained: weight-normed, spectral-normed and orthogonal weights."""
    network = _plain_network()
    parametrizations.weight_norm(network.get_submodule("conv1"))
    parametrizations.spectral_norm(network.get_submodule("conv2"))
    parametrizations.orthogonal(network.get_submodule("hidden"), orthogonal_map=_ORTHOGONAL_MAP)
    parametrizations.weight_norm(network.get_submodule("head"))
    return network


def _train(
    network: nn.Module, digits: _Digits, *, epochs: int, after_epoch: Callable[[int, float], None]
) -> float:
    """Train with Adam under a one-cycle learning rate; return the seconds it took."""
    began = time.perf_counter()
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=epochs * _BATCHES)
    network.train()
    for epoch in range(1, epochs + 1):
        for batch in torch.randperm(len(digits.train_labels)).tensor_split(_BATCHES):
            loss = nn.functional.cross_entropy(
                network(digits.train_images[batch]), digits.train_labels[batch]
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without annotations
            optimizer.step()
            schedule.step()
        after_epoch(epoch, loss.item())
    network.eval()
    return time.perf_counter() - began


@torch.no_grad()
def _logits(network: nn.Module, digits: _Digits) -> Tensor:
    output: Tensor = network(digits.test_images)
    return output


def _accuracy(logits: Tensor, digits: _Digits) -> float:
    return (logits.argmax(dim=1) == digits.test_labels).double().mean().item()


def _compare(expected: Tensor, logits: Tensor, digits: _Digits) -> _Comparison:
    """Compare the logits of a plain network with those of the trained one."""
    return _Comparison(
        accuracy=_accuracy(logits, digits),
        differing_predictions=int((expected.argmax(dim=1) != logits.argmax(dim=1)).sum()),
        max_abs_logit_difference=(expected - logits).abs().max().item(),
    )


class _Story:
    """What the demo prints, step by step."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def begins(self, digits: _Digits, seed: int) -> None:
        counts = f"{len(digits.train_images)} to train on, {len(digits.test_images)} to test on, seed {seed}"
        self._console.print(f"[bold]torchkiln demo[/]: scikit-learn's handwritten digits, {counts}")
        self._step(1, "train a network with three kinds of parametrization")
        self._say("conv1, head: weight_norm    conv2: spectral_norm    hidden: orthogonal")

    @contextmanager
    def training(self, epochs: int) -> Iterator[Callable[[int, float], None]]:
        """Yield what to call after each epoch: a bar on a terminal, a line now and then elsewhere."""
        with progress("training") as advance:

            def after_epoch(epoch: int, loss: float) -> None:
                if advance is not None:
                    advance(epoch, epochs, f"loss {loss:.3f}")
                elif epoch % max(1, epochs // 4) == 0:
                    self._say(f"epoch {epoch:3}/{epochs}  loss {loss:.3f}")

            yield after_epoch

    def trained(self, epochs: int, seconds: float, accuracy: float) -> None:
        self._say(f"{epochs} epochs in {seconds:.1f} s, test accuracy {accuracy:.2%}")

    def saved(self, source: Path, *, missing: int, unexpected: int) -> None:
        self._step(2, f"save its state dict and look inside: torchkiln inspect {source.name}")
        self._console.print(Padding(inspection_table(checkpoint.inspect(source)), (0, 0, 0, 3), expand=False))
        self._say(f"a plain network cannot load it: {missing} keys missing, {unexpected} unexpected")

    def baked(self, folded: checkpoint.FileReport) -> None:
        assume = " ".join(f"--assume {name}={orthogonal_map}" for name, orthogonal_map in _ASSUME.items())
        self._step(3, f"bake the file: torchkiln bake {_SOURCE} -o {_TARGET}")
        self._console.print(Text(f"     {assume}", style="bold"), soft_wrap=True)
        self._say(
            f"{len(folded.rows)} tensors folded, {folded.passed_through} copied, without the network's code"
        )
        self._say("a plain network now loads it, strictly")

    def ends(self, report: DemoReport, *, keep: Path | None) -> None:
        self._step(4, f"compare on the {report.test_images} test images")
        self._console.print(_comparison_table(report))
        self._say("files are folded by torch's maps, which torchkiln's equal to rounding")
        if keep is not None:
            self._say(f"kept: {keep / _SOURCE}, {keep / _TARGET}")
        if report.identical:
            verdict = f"\nPASS: baking changed none of the {report.test_images} predictions."
            self._console.print(Text(verdict, style="bold green"))
        else:
            self._console.print(Text("\nFAIL: baking changed predictions.", style="bold red"))

    def _step(self, number: int, what: str) -> None:
        self._console.print(Text(f"\n{number}. {what}", style="bold"), soft_wrap=True)

    def _say(self, what: str) -> None:
        self._console.print(Text(f"   {what}"), soft_wrap=True)


def _comparison_table(report: DemoReport) -> Padding:
    """Return the trained network's accuracy beside that of the two plain ones."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    table.add_column("network")
    for column in ("accuracy", "same predictions", "max logit error"):
        table.add_column(column, justify="right")
    table.add_row("trained, parametrized", f"{report.accuracy:.2%}", "", "")
    rows = (
        ("plain, baked file", report.from_file),
        ("torchkiln.bake(model)", report.from_model),
        ("control: renamed keys", report.renamed),
    )
    for name, plain in rows:
        same = f"{report.test_images - plain.differing_predictions} of {report.test_images}"
        table.add_row(name, f"{plain.accuracy:.2%}", same, f"{plain.max_abs_logit_difference:.2g}")
    return Padding(table, (0, 0, 0, 3), expand=False)
