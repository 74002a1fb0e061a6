"""From the names in an adapter to those in a base: which module a tensor is for, and where the base has it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torchkiln._core.errors import CheckpointError

__all__ = ["Parsed", "Renamed", "locate", "parse"]

_WRAPPER = "base_model.model."
_OWNER = "base_model."
# Modules that PEFT puts around a tensor of the base that it keeps a trained copy of.
_AROUND = frozenset({"base_layer", "modules_to_save"})
_UNUSED = "original_module"
# What libraries put before the names of a model, and take away again, without meaning another part of it.
_WRAPPERS = frozenset({"_orig_mod", "base_model", "model", "module", "transformer"})
_SIDES = frozenset({"decoder", "encoder"})


@dataclass
class Parsed:
    """The tensors of an adapter.

    Attributes:
        modules: For each module the keys of the tensors made for it, by their names within it.
        shared: Keys of tensors for all modules.
        whole: Names of base tensors to the keys of what replaces them.
        unused: Keys of copies of the base that PEFT does not use.
    """

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    whole: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def parse(keys: Iterable[str], parts: Collection[str]) -> Parsed:
    """Sort the keys of an adapter by what they are for.

    Args:
        keys: As the file has them.
        parts: The names that the adapter's type gives to its tensors.

    Example:
        >>> parse(["base_model.model.layers.0.q.lora_A.weight"], ["lora_A"]).modules
        {'layers.0.q': {'lora_A.weight': 'base_model.model.layers.0.q.lora_A.weight'}}
    """
    found = Parsed()
    for key in keys:
        name = key.removeprefix(_WRAPPER)
        words = name.split(".")
        at = next((index for index, word in enumerate(words) if word in parts), None)
        if at is not None:
            module, part = ".".join(words[:at]), ".".join(words[at:])
            if key.startswith(_OWNER) and module == "base_model":
                found.shared[part] = key
            else:
                # Older versions wrote the magnitude of DoRA as the weight of a module.
                part = part.removesuffix(".weight") if "magnitude" in part else part
                found.modules.setdefault(module, {})[part] = key
        elif _UNUSED in words:
            found.unused.append(key)
        else:
            plain = ".".join(word for word in words if word not in _AROUND)
            if plain == name or plain not in found.whole:
                found.whole[plain] = key
    return found


@dataclass(frozen=True)
class Renamed:
    """How names in an adapter become names in a base: another beginning, or the same."""

    old: str = ""
    new: str = ""

    def __call__(self, name: str) -> str | None:
        """Return the name in the base, None where the rule does not fit."""
        return self.new + name.removeprefix(self.old) if name.startswith(self.old) else None

    def __str__(self) -> str:
        if not self.old:
            return f'the base has "{self.new}" before the adapter\'s names'
        return f'the adapter\'s names begin with "{self.old}" where those of the base begin with "{self.new}"'


def locate(wanted: Sequence[str], base: Collection[str], *, where: str, what: Mapping[str, str]) -> Renamed:
    """Return the one way in which every wanted name is in the base: as it is, or with another beginning.

    Args:
        wanted: Names in the adapter.
        base: Names in the base.
        where: The base, for messages.
        what: The adapter's key behind each wanted name.

    Raises:
        CheckpointError: Some name is not in the base in any way, or there are several ways.

    Example:
        >>> locate(["model.q.weight"], ["q.weight", "k.weight"], where="base", what={})
        Renamed(old='model.', new='')
    """
    if all(name in base for name in wanted):
        return Renamed()
    most, best = -1, Renamed()
    for ways in _ways(wanted[0], base):
        complete = []
        for way in ways:
            count = sum(way(name) in base for name in wanted)
            if count > most:
                most, best = count, way
            if count == len(wanted):
                complete.append(way)
        if len(complete) > 1:
            raise CheckpointError(
                f"{where}: the adapter's {wanted[0]} could be {complete[0](wanted[0])} or {complete[1](wanted[0])}, "
                "and so could all the others.\nGive it the base whose names are the adapter's own, see --rename."
            )
        if complete:
            return complete[0]
    missing = [name for name in wanted if best(name) not in base]
    raise CheckpointError(_not_found(missing, len(wanted), where=where, what=what))


def _ways(name: str, base: Collection[str]) -> Iterator[list[Renamed]]:
    """Yield the ways in which a name may be in the base, those first that keep most of it."""
    yield [Renamed()]
    words = name.split(".")
    for kept in range(len(words) - 1):
        end = ".".join(words[kept:])
        old = name[: len(name) - len(end)]
        ways = (Renamed(old, key[: len(key) - len(end)]) for key in base if f".{key}".endswith(f".{end}"))
        yield [way for way in ways if _harmless(way)]


def _harmless(way: Renamed) -> bool:
    """Tell whether another beginning means the same part of a model.

    Wrappers may be exchanged. One other word (``bert.``) may be there or not, but for the sides of a model of two.
    """
    old, new = (
        [word for word in part.split(".") if word and word not in _WRAPPERS] for part in (way.old, way.new)
    )
    if not old and not new:
        return True
    return len(old) + len(new) == 1 and _SIDES.isdisjoint([*old, *new]) and "" in (way.old, way.new)


def _not_found(missing: Sequence[str], count: int, *, where: str, what: Mapping[str, str]) -> str:
    first = missing[0]
    tied = ", or is it tied to another tensor of the base and not stored" if "head" in first else ""
    more = f" ({len(missing)} of its {count} tensors are not)" if count > 1 else ""
    return (
        f"{where}: the adapter changes {first} ({what.get(first, first)}), which is not in the base{more}.\n"
        f"Is this the base that the adapter was trained on{tied}? Nothing was written."
    )
