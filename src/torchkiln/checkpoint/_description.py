"""What a safetensors file says of itself: for each computed tensor its steps, in the metadata of the header.

The metadata has under ``"torchkiln"`` the text ``{"version": 1, "tensors": {name: {"shape": ..., "dtype": ...,
"unsafe": ..., "steps": [spec, ...]}}}``. Tensors are where torch has them; nothing else is added to the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.described import Described
from torchkiln._core.spellings.entries import Entry
from torchkiln.checkpoint._io import Change, Made
from torchkiln.checkpoint._specs import Also, build_step

__all__ = ["KEY", "Description", "carried", "described", "read_descriptions", "text_of"]

KEY = "torchkiln"
VERSION = 1
_NORMS = ("spectral_norm", "weight_norm")


@dataclass(frozen=True)
class Description:
    """The steps of one tensor.

    Attributes:
        entry: Its shape and dtype.
        steps: Their specs, first to last.
        unsafe: Whether they may change shape and dtype.
    """

    entry: Entry
    steps: tuple[Mapping[str, Any], ...]
    unsafe: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return it as the file has it."""
        return {
            "shape": list(self.entry.shape),
            "dtype": str(self.entry.dtype).removeprefix("torch."),
            "unsafe": self.unsafe,
            "steps": list(self.steps),
        }


def text_of(descriptions: Mapping[str, Description]) -> str:
    """Return the text of descriptions by the names of their tensors."""
    tensors = {name: description.to_json() for name, description in descriptions.items()}
    return json.dumps({"version": VERSION, "tensors": tensors}, separators=(",", ":"))


def read_descriptions(metadata: Mapping[str, str], *, where: str) -> dict[str, Description]:
    """Return what a file says of its tensors, by name; nothing where it says nothing.

    Raises:
        CheckpointError: It has another version, or is not what torchkiln writes.
    """
    if KEY not in metadata:
        return {}
    try:
        said = json.loads(metadata[KEY])
        version = said["version"]
        if version == VERSION:
            return {str(name): _read_one(one) for name, one in said["tensors"].items()}
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{where}: its description of itself cannot be read ({type(error).__name__}: {error}).\n"
            f'It is the text under "{KEY}" in its metadata.'
        ) from error
    raise CheckpointError(
        f"{where}: describes itself in version {version!r:.40}, and {VERSION} is the one known here.\n"
        "Read it with the torchkiln that wrote it, or a newer one."
    )


def _read_one(said: Mapping[str, Any]) -> Description:
    shape = tuple(said["shape"])
    dtype = getattr(torch, said["dtype"])
    if not isinstance(dtype, torch.dtype) or not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"no tensor has shape {shape} and dtype {said['dtype']}")
    if not said["steps"] or not all(isinstance(step, dict) for step in said["steps"]):
        raise ValueError("a tensor without steps")
    return Description(Entry(shape, dtype), tuple(said["steps"]), bool(said["unsafe"]))


def described(descriptions: Mapping[str, Description], *, also: Also | None) -> dict[str, Described]:
    """Return how each tensor is computed.

    Args:
        descriptions: What the file says.
        also: The caller's own classes, by the names in specs.
    """
    return {name: _described(name, one, also) for name, one in descriptions.items()}


def _described(name: str, one: Description, also: Also | None) -> Described:
    names = tuple(str(step.get("name")) for step in one.steps)
    norm = len(names) == 1 and names[0] in _NORMS and len(one.entry.shape) > 1
    dim = one.steps[0]["arguments"]["dim"] if norm else None
    dim = None if names[0] == "weight_norm" and dim == -1 else dim
    return Described(
        names,
        one.entry,
        partial(_compute, name, one, also),
        text=json.dumps(list(one.steps), sort_keys=True),
        norm=norm,
        dim=dim,
        blocked=_obstacle(one, also),
    )


def _obstacle(one: Description, also: Also | None) -> str:
    """Return why the steps cannot be taken, found by building them."""
    try:
        for spec in one.steps:
            build_step(spec, one.entry, also=also, buffers={})
    except Exception as error:  # noqa: BLE001  # whatever a constructor makes of a file's arguments is the file's fault
        return str(error) or type(error).__name__
    return ""


@torch.no_grad()
def _compute(
    name: str, one: Description, also: Also | None, originals: Sequence[Tensor], state: Mapping[str, Tensor]
) -> Tensor:
    """Take the steps."""
    try:
        values: Sequence[Tensor] = originals
        for index, spec in enumerate(one.steps):
            start = f"{index}."
            own = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            values = (build_step(spec, one.entry, also=also, buffers=own)(*values),)
        (value,) = values
    except Exception as error:
        raise CheckpointError(
            f"{name}: the steps that the file describes cannot be taken: {type(error).__name__}: {error}"
        ) from error
    if (tuple(value.shape), value.dtype) != (one.entry.shape, one.entry.dtype):
        raise CheckpointError(
            f"{name}: the file describes a tensor of {one.entry.shape} and {one.entry.dtype}, and its steps make one "
            f"of {tuple(value.shape)} and {value.dtype}."
        )
    return value.detach()


def carried(metadata: Mapping[str, str], changes: Sequence[Change], *, where: str) -> dict[str, str]:
    """Return the metadata of a file after changes: of tensors that are no longer computed nothing is said.

    Args:
        metadata: Of the source.
        changes: What gives way to what.
        where: The source, for messages.
    """
    left = dict(metadata)
    if KEY in metadata:
        changed = {key: change for change in changes for key in change.keys}
        pairs = [_after(name, one, changed) for name, one in read_descriptions(metadata, where=where).items()]
        kept = dict(pair for pair in pairs if pair is not None)
        left[KEY] = text_of(kept)
        if not kept:
            del left[KEY]
    return left


def _after(name: str, one: Description, changed: Mapping[str, Change]) -> tuple[str, Description] | None:
    """Return name and description of a tensor after the changes, None where it is computed no longer."""
    prefix, dot, tensor = name.rpartition(".")
    ends = [f"parametrizations.{tensor}.original{number}" for number in ("", "0")]
    found = next((end for end in ends if f"{prefix}{dot}{end}" in changed), None)
    if found is None:
        return name, one
    change = changed[f"{prefix}{dot}{found}"]
    ((new, output),) = list(change.outputs.items())[:1]
    if len(change.keys) > 1 or not (new == found or new.endswith(f".{found}")):
        return None
    entry = Entry(one.entry.shape, output.entry.dtype) if isinstance(output, Made) else one.entry
    return f"{new.removesuffix(found)}{tensor}", replace(one, entry=entry)
