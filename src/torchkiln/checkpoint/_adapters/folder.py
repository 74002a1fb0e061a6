"""An adapter as a user names it, and its folder opened: the settings, and one file of tensors."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.finite import is_finite
from torchkiln._core.spellings.entries import Group
from torchkiln.checkpoint._adapters.settings import Settings, read_settings
from torchkiln.checkpoint._io import CheckpointFile
from torchkiln.checkpoint._open import open_checkpoint

__all__ = ["Adapter", "OpenAdapter", "open_adapters"]

_FILES = ("adapter_model.safetensors", "adapter_model.bin")


@dataclass(frozen=True)
class Adapter:
    """The folder of a PEFT adapter, and how much of it to merge.

    Attributes:
        path: The folder, with ``adapter_config.json`` and ``adapter_model.safetensors`` or ``adapter_model.bin``.
        weight: A factor of what the adapter adds. Types that add nothing, but rotate or scale, take 1 alone.
    """

    path: str | os.PathLike[str]
    weight: float = 1.0


@dataclass(frozen=True)
class OpenAdapter:
    """An adapter whose files are open."""

    path: Path
    weight: float
    settings: Settings
    file: CheckpointFile
    group: Group

    def read(self, key: str, dtype: torch.dtype) -> Tensor:
        """Return one tensor in a dtype, whole numbers as they are.

        Raises:
            CheckpointError: The file cannot be read, was changed since it was opened, or holds NaN or infinity there.
        """
        tensor = self.file.read(self.group, key).detach()
        self.file.check_unchanged()
        if tensor.dtype.is_floating_point and not is_finite(tensor):
            raise CheckpointError(
                f"{self.file.path}: {key} has values that are not finite. Is the file damaged?\nNothing was written."
            )
        return tensor.to(dtype) if tensor.dtype.is_floating_point else tensor


@contextmanager
def open_adapters(
    adapters: Sequence[Adapter | str | os.PathLike[str]],
) -> Iterator[tuple[OpenAdapter, ...]]:
    """Open the folders of adapters.

    Returns:
        A context manager giving them.

    Raises:
        CheckpointError: A folder lacks a file, or one of them cannot be read without running code.
    """
    with ExitStack() as stack:
        yield tuple(
            _open(one if isinstance(one, Adapter) else Adapter(one), index, stack)
            for index, one in enumerate(adapters)
        )


def _open(adapter: Adapter, index: int, stack: ExitStack) -> OpenAdapter:
    folder = Path(adapter.path)
    if not math.isfinite(adapter.weight):
        raise CheckpointError(f"adapters[{index}]: expected a finite weight, got {adapter.weight}.")
    settings = read_settings(folder)
    found = [folder / name for name in _FILES if (folder / name).exists()]
    if not found:
        raise CheckpointError(
            f"{folder}: the adapter has no weights: expected {' or '.join(_FILES)} beside {settings.path.name}.\n"
            "Save it with save_pretrained, or fetch the whole folder."
        )
    file = stack.enter_context(open_checkpoint(found[0]))
    if len(file.groups) != 1 or file.loose:
        raise CheckpointError(f"{found[0]}: expected one level of named tensors, as PEFT writes them.")
    return OpenAdapter(folder, float(adapter.weight), settings, file, file.groups[0])
