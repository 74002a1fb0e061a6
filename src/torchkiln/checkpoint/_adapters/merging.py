"""Which tensors of a base adapters change, planned from headers alone, and the changed tensors when they are due."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings import fold
from torchkiln._core.spellings.entries import Entry, Group
from torchkiln.checkpoint._adapters import shared
from torchkiln.checkpoint._adapters.blocks import merged_rows
from torchkiln.checkpoint._adapters.edits import (
    Add,
    AddProduct,
    Edit,
    Product,
    Replace,
    apply,
    expected,
    product,
)
from torchkiln.checkpoint._adapters.folder import OpenAdapter
from torchkiln.checkpoint._adapters.keys import Parsed, Renamed, locate, parse
from torchkiln.checkpoint._adapters.lora import experts
from torchkiln.checkpoint._adapters.methods import Method, method_of
from torchkiln.checkpoint._adapters.target import Target
from torchkiln.checkpoint._check import check_merged
from torchkiln.checkpoint._io import CheckpointFile, Extent
from torchkiln.checkpoint._report import Note

__all__ = ["Merging", "Step", "by_rows", "plan_merging"]

Base = Mapping[Group, Mapping[str, Entry]]


@dataclass(frozen=True, eq=False)
class Step:
    """One change of one tensor, with the tensors of the adapter that it is a function of. Equal only to itself."""

    adapter: OpenAdapter
    edit: Edit
    keys: tuple[str, ...]
    made: Mapping[str, Callable[[], Tensor]] = field(default_factory=dict)
    """Tensors that the folder does not hold, and that follow from its settings."""

    @property
    def kind(self) -> str:
        """What to call it in a report."""
        return self.adapter.settings.kind + (" (replaced)" if isinstance(self.edit, Replace) else "")

    def read(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the adapter's tensors in a dtype."""
        return [
            self.made[key]().to(dtype) if key in self.made else self.adapter.read(key, dtype)
            for key in self.keys
        ]


@dataclass
class Merging:
    """What adapters change in an open base.

    Attributes:
        steps: The changes of each tensor, in order.
        notes: What a reader of the report should know.
    """

    steps: dict[tuple[Group, str], list[Step]] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def of(self, group: Group, name: str) -> list[Step]:
        """Return the changes of a tensor; none where no adapter changes it."""
        return self.steps.get((group, name), [])

    def taken_from(self, plain: dict[Group, list[str]]) -> list[tuple[Group, str]]:
        """Take the tensors that adapters change out of those that stay as they are, and return them."""
        taken = [(group, key) for group, keys in plain.items() for key in keys if (group, key) in self.steps]
        for group, key in taken:
            plain[group].remove(key)
        return taken

    def merged(
        self, name: str, W: Tensor, steps: Sequence[Step], *, dtype: torch.dtype, verify: bool
    ) -> Tensor:
        """Return a tensor with its changes made: in float32 or wider, and rounded once.

        Args:
            name: What to call it.
            W: Its value in the base, which is not written to.
            steps: The changes.
            dtype: The dtype to return.
            verify: Compute it again in float64, and compare.

        Raises:
            CheckpointError: An adapter cannot be read, the result is not finite, or the two computations differ.
        """
        wide = _working_dtype(W.dtype, steps)
        value = W.to(wide, copy=True).contiguous()
        for step in steps:
            value = apply(step.edit, value, step.read(wide), weight=step.adapter.weight)
        value = value.to(dtype).contiguous()
        if verify:
            edits = [(step.edit, step.adapter.weight) for step in steps]
            exact = expected(edits, W, [step.read(torch.float64) for step in steps])
            check_merged(name, value, exact, source=W)
        return value

    def rows(
        self,
        name: str,
        source: tuple[Extent, Entry],
        steps: Sequence[Step],
        *,
        dtype: torch.dtype,
        verify: bool,
    ) -> Iterator[tuple[Tensor, bool]]:
        """Yield the rows of :meth:`merged`, block by block, where every change is the sum of a product.

        With each block comes whether all of it is finite.

        Args:
            name: What to call it.
            source: Where its bytes are.
            steps: The changes.
            dtype: The dtype to return.
            verify: Check each block.

        Raises:
            CheckpointError: As for :meth:`merged`.
        """
        wide = _working_dtype(source[1].dtype, steps)
        return merged_rows(name, source, partial(_factors, steps), wide=wide, dtype=dtype, verify=verify)

    def keys(self, group: Group, name: str) -> tuple[str, ...]:
        """Return the adapters' keys that change a tensor."""
        return tuple(key for step in self.of(group, name) for key in step.keys if key not in step.made)


def by_rows(steps: Sequence[Step]) -> bool:
    """Tell whether every change of a tensor is the sum of a product, of which each row is computed alone."""
    return all(isinstance(step.edit, AddProduct) for step in steps)


def _factors(steps: Sequence[Step], dtype: torch.dtype) -> list[Product]:
    return [product(step.edit, step.read(dtype), weight=step.adapter.weight) for step in steps]


def _working_dtype(stored: torch.dtype, steps: Sequence[Step]) -> torch.dtype:
    """Return float32, or what is wider among the dtypes of a tensor and of what changes it."""
    wide = fold.compute_dtype(stored)
    for step in steps:
        entries = step.adapter.group.entries
        for key in (key for key in step.keys if key in entries and entries[key].dtype.is_floating_point):
            wide = torch.promote_types(wide, entries[key].dtype)
    return wide


def plan_merging(adapters: Sequence[OpenAdapter], file: CheckpointFile, base: Base) -> Merging:
    """Plan the merging of adapters into a base; nothing but headers is read.

    Args:
        adapters: In the order in which they are merged.
        file: The base.
        base: Names, shapes and dtypes of its tensors, plain or folded.

    Raises:
        CheckpointError: A tensor of an adapter finds no tensor of the base or does not fit it, a type is not known,
            or two changes of one tensor do not go together.
    """
    merging = Merging()
    for adapter in adapters:
        _plan_one(merging, adapter, file, base)
    for (group, name), steps in merging.steps.items():
        kind = file.unusual(group, name) if name in group.entries else ""
        _check_together(group.full_name(name), base[group][name], steps, kind=kind)
    _tie(merging, file)
    return merging


def _plan_one(merging: Merging, adapter: OpenAdapter, file: CheckpointFile, base: Base) -> None:
    method = method_of(adapter.settings)
    parsed = parse(adapter.group.entries, method.parts)
    _check_dora(adapter, parsed)
    named = _named_parameters(adapter, parsed)
    wanted = {
        f"{module}.{named[module]}": next(iter(keys.values())) for module, keys in parsed.modules.items()
    }
    wanted.update(parsed.whole)
    if not wanted:
        raise CheckpointError(
            f"{adapter.path}: its file holds no tensor of a {adapter.settings.kind} adapter."
        )
    group, rename = _place(wanted, file, base)
    if rename != Renamed():
        merging.notes.append(Note("info", "", f"{adapter.path}: {rename}"))
    planned = _replacements(adapter, parsed, base[group], rename)
    planned += _module_changes(adapter, method, parsed, named, base[group], rename)
    for name, step in planned:
        merging.steps.setdefault((group, name), []).append(step)
    count = len({name for name, _ in planned})
    text = (
        f"{adapter.path}: {adapter.settings.kind}, {len(adapter.group.entries)} tensors, merged into {count}"
    )
    weight = "" if adapter.weight == 1 else f" with weight {adapter.weight:g}"
    merging.notes.append(Note("info", "", text + weight))


def _place(wanted: Mapping[str, str], file: CheckpointFile, base: Base) -> tuple[Group, Renamed]:
    """Return which state dict of the base the names are in, and under which beginning."""
    found: list[tuple[Group, Renamed]] = []
    errors: list[tuple[int, CheckpointError]] = []
    for group in file.groups:
        where = ".".join((str(file.path), *group.path))
        try:
            found.append((group, locate(list(wanted), base[group], where=where, what=wanted)))
        except CheckpointError as error:
            errors.append((len(group.entries), error))
    if len(found) > 1:
        one, two = (".".join(group.path) for group, _ in found[:2])
        raise CheckpointError(
            f"{file.path}: the adapter fits {one} and {two}. Give it a file with one of them."
        )
    if not found:
        if not errors:
            raise CheckpointError(f"{file.path}: holds no named tensors that an adapter could change.")
        raise max(errors, key=lambda pair: pair[0])[1]
    return found[0]


def _check_dora(adapter: OpenAdapter, parsed: Parsed) -> None:
    """Raise unless DoRA's magnitudes are there exactly where the settings say so."""
    said = adapter.settings.flag("use_dora")
    for module, keys in parsed.modules.items():
        low_rank = any(part.startswith(("lora_A", "lora_embedding_A")) for part in keys)
        if low_rank and ("lora_magnitude_vector" in keys) != said:
            have = "has no lora_magnitude_vector" if said else "has a lora_magnitude_vector"
            raise CheckpointError(
                f"{adapter.path}: {module} {have}, and use_dora is {str(said).lower()} in the settings. The folder's "
                "files do not belong together."
            )


def _named_parameters(adapter: OpenAdapter, parsed: Parsed) -> dict[str, str]:
    """Return which tensor of each module is changed first of all: its weight, or the parameter targeted by name."""
    targeted = adapter.settings.names("target_parameters")
    named: dict[str, str] = {}
    for module in parsed.modules:
        fitting = [one for one in targeted if adapter.settings.matches(one.rpartition(".")[0], module)]
        if len(fitting) > 1 or (fitting and "base_layer" in module.split(".")):
            raise CheckpointError(
                f"{adapter.path}: {module}: target_parameters names {' and '.join(fitting)} of this module, and the "
                "tensors do not say which they are for.\nMerge it with PEFT."
            )
        named[module] = fitting[0].rpartition(".")[2] if fitting else "weight"
    return named


def _replacements(
    adapter: OpenAdapter, parsed: Parsed, base: Mapping[str, Entry], rename: Renamed
) -> list[tuple[str, Step]]:
    planned = []
    for name, key in parsed.whole.items():
        place = rename(name)
        assert place is not None
        mine, theirs = adapter.group.entries[key].shape, base[place].shape
        if mine != theirs:
            raise CheckpointError(
                f"{adapter.path}: {key} has shape {mine}, and {place} of the base {theirs}. Is this the base that the "
                "adapter was trained on, or was its vocabulary resized?"
            )
        planned.append((place, Step(adapter, Replace(name, (key,)), (key,))))
    return planned


def _module_changes(
    adapter: OpenAdapter,
    method: Method,
    parsed: Parsed,
    named: Mapping[str, str],
    base: Mapping[str, Entry],
    rename: Renamed,
) -> list[tuple[str, Step]]:
    entries = adapter.group.entries
    together = {part: entries[key] for part, key in parsed.shared.items()}
    sizes = {module: _tensors_of(module, named[module], base, rename) for module in parsed.modules}
    generated = shared.projections(
        adapter.settings, together, [own["weight"].shape for own in sizes.values()]
    )
    together.update({part: entry for part, (entry, _) in generated.items()})
    made = {part: make for part, (_, make) in generated.items()}
    _check_orientation(adapter, parsed, sizes)
    planned = []
    for module, keys in parsed.modules.items():
        parts = {**together, **{part: entries[key] for part, key in keys.items()}}
        target = Target(module, adapter.settings, parts, sizes[module])
        edits = experts(target, named[module]) if named[module] != "weight" else method.rule(target)
        for edit in edits:
            own = {**{part: part for part in made}, **parsed.shared, **keys}
            step = Step(adapter, edit, tuple(own[part] for part in edit.parts), made)
            tensor = edit.tensor if edit.tensor != "weight" else named[module]
            planned.append((str(rename(f"{module}.{tensor}")), step))
    return planned


def _check_orientation(
    adapter: OpenAdapter, parsed: Parsed, sizes: Mapping[str, Mapping[str, Entry]]
) -> None:
    """Raise unless the setting for square weights is what the others show: PEFT keeps one for all modules."""
    inputs_first: set[bool] = set()
    square = ""
    for module, keys in parsed.modules.items():
        shape = sizes[module]["weight"].shape
        if "lora_A.weight" in keys and len(shape) == 2:
            square = module if shape[0] == shape[1] else square
            if shape[0] != shape[1]:
                inputs_first.add(adapter.group.entries[keys["lora_A.weight"]].shape[-1] == shape[0])
    flag = adapter.settings.flag("fan_in_fan_out")
    if square and (not flag) in inputs_first:
        raise CheckpointError(
            f"{adapter.path}: {square}: whether its square weight has its inputs first is not in the files: "
            f"fan_in_fan_out is {str(flag).lower()}, and other layers are the other way round.\nMerge it with PEFT."
        )


def _tensors_of(module: str, tensor: str, base: Mapping[str, Entry], rename: Renamed) -> dict[str, Entry]:
    """Return the base's tensors of a module; the one that is targeted counts as its weight."""
    found = {
        name: base.get(str(rename(f"{module}.{place}")))
        for name, place in (("weight", tensor), ("bias", "bias"))
    }
    return {name: entry for name, entry in found.items() if entry is not None}


def _check_together(name: str, entry: Entry, steps: Sequence[Step], *, kind: str) -> None:
    """Raise unless a tensor can be changed so: numbers it can hold, and changes that have an order."""
    if kind:
        raise CheckpointError(f"{name}: is a {kind} tensor. Merge into the base that it was made from.")
    if not entry.dtype.is_floating_point or entry.dtype.itemsize < 2:
        raise CheckpointError(
            f"{name}: is {entry.dtype}, quantized. Merge into the base that it was made from."
        )
    for step in steps:
        if step.adapter.weight != 1 and not isinstance(step.edit, (Add, AddProduct)):
            raise CheckpointError(
                f"{step.adapter.path}: {step.kind} does not add to {name}, so a weight of {step.adapter.weight:g} "
                "means nothing. Use 1."
            )
    if len({step.adapter.path for step in steps if isinstance(step.edit, Replace)}) > 1:
        raise CheckpointError(f"{name}: two adapters were trained on the whole tensor. Merge one of them.")
    norms = [step for step in steps if "lora_magnitude_vector" in step.edit.parts]
    if norms and len({step.adapter.path for step in steps}) > 1:
        raise CheckpointError(
            f"{name}: the DoRA of {norms[0].adapter.path} divides by the norm of the base's tensor, which another "
            "adapter changes too. Merge one of them."
        )


def _tie(merging: Merging, file: CheckpointFile) -> None:
    """Let tensors that share memory change together, as the modules that share them do in PEFT."""
    for group in file.groups:
        names: dict[Hashable, list[str]] = {}
        for key in group.entries:
            names.setdefault(file.identity(group, key), []).append(key)
        for tied in (keys for keys in names.values() if len(keys) > 1):
            _tie_one(merging, group, tied)


def _tie_one(merging: Merging, group: Group, tied: Sequence[str]) -> None:
    changed = [key for key in tied if (group, key) in merging.steps]
    if not changed:
        return
    first, *others = changed
    steps = merging.steps[group, first]
    if others or any(isinstance(step.edit, Replace) for step in steps):
        both = ", ".join(tied)
        raise CheckpointError(
            f"{group.full_name(first)}: {both} are one tensor in the base, and the adapter "
            f"{'changes several of them' if others else 'has one of them of its own'}.\n"
            "Save the base with tensors of their own first."
        )
    for key in tied:
        merging.steps[group, key] = steps
    rest = ", ".join(key for key in tied if key != first)
    merging.notes.append(Note("info", first, f"{first} is tied to {rest}: both are changed"))
