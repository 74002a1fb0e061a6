"""Ties: find the other modules that hold a parameter, so that none is changed behind another's back.

A module does not know who else holds its parameters. The interpreter does: a parameter that only its module holds has
one reference, and reading that number costs nothing. Only where there are more (an optimizer, a variable, another
module) are the living modules searched, once for all their parameters: a search takes some ten milliseconds, and a
parameter found to be alone is not searched for again until its number of references changes.

Not found are holders that are no modules, modules in other processes, and what ``gc.freeze()`` has set aside.
"""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from torchkiln._core.chain import original_names
from torchkiln._core.inject import base_class, chain_of

__all__ = ["Place", "Slot", "chain_slots", "label", "other_holders", "places_within", "same_place"]

Slot = tuple[dict[str, Any], str]  # the dict of a module or chain, and the parameter's key there


class Place(NamedTuple):
    """A tensor of a module, plain or computed."""

    module: nn.Module
    name: str


def other_holders(slot: Slot, place: Place, *, known: Collection[int] = ()) -> list[Place]:
    """Return the places other than ``place`` that hold the parameter in ``slot``, or are computed from it.

    The caller should not have the parameter in a variable: that is one more reference, and a search.

    Args:
        slot: Where the parameter is.
        place: The tensor that it belongs to.
        known: The ids of modules whose places are left out.
    """
    tensors, key = slot
    if not isinstance(tensors.get(key), nn.Parameter):
        return []
    references = _references(slot)
    own = _references_of_one_holder() + _in_flat_weights(slot, place.module)
    if references <= own or references <= own + _in_our_variables(slot):
        return []
    if _alone.get(place.module, {}).get((place.name, key)) == (id(tensors[key]), references):
        return []
    if all(id(other.module) in known for other in _search(slot, place)):
        return []
    gc.collect()  # what is found may be a module that nobody can reach any more
    return [other for other in _search(slot, place) if id(other.module) not in known]


def places_within(root: nn.Module, slots: Sequence[Slot], place: Place) -> list[Place]:
    """Return the places in ``root``, other than ``place``, that hold a parameter in ``slots``."""
    wanted = {id(parameter) for tensors, key in slots if (parameter := tensors.get(key)) is not None}
    found = (other for (tensors, key), other in _slots(root.modules()) if id(tensors[key]) in wanted)
    return _distinct(other for other in found if not same_place(other, place))


def chain_slots(chain: nn.Module) -> list[Slot]:
    """Return where the parameters are that ``chain`` starts from."""
    slots: list[Slot] = []
    for name in original_names(chain):
        inner = chain_of(chain, name)
        slots += [(chain._parameters, name)] if inner is None else chain_slots(inner)
    return slots


def label(place: Place, root: nn.Module | None) -> str:
    """Return the path of ``place`` in ``root``; where it is not in there, its module's class and its name."""
    for path, module in () if root is None else root.named_modules():
        if module is place.module and path:
            return f"{path}.{place.name}"
    cls = type(place.module)
    return f"{(base_class(cls) or cls).__name__}.{place.name}"


# --- the number of references -------------------------------------------------------------------------------------


def _references(slot: Slot) -> int:
    tensors, key = slot
    in_graph = tensors[key]._use_count() > 1  # the C++ side, a live autograd graph above all, counts once
    return sys.getrefcount(tensors[key]) - (_references_of_a_graph() if in_graph else 0)


@cache
def _references_of_one_holder() -> int:
    return _references(({"": nn.Parameter(torch.empty(0))}, ""))


@cache
def _references_of_a_graph() -> int:
    tensors = {"": nn.Parameter(torch.empty(0))}
    alone = sys.getrefcount(tensors[""])
    with torch.inference_mode(False), torch.enable_grad():
        graph = tensors[""] * 2
    return sys.getrefcount(tensors[""]) - alone if graph.requires_grad else 0


def _in_flat_weights(slot: Slot, module: nn.Module) -> int:
    """Return how often a recurrent module's own list of weights has the parameter."""
    flat = vars(module).get("_flat_weights", ())
    return sum(weight is slot[0][slot[1]] for weight in flat)


def _in_our_variables(slot: Slot) -> int:
    """Return how often the functions of torchkiln that called this one have the parameter in a variable.

    Only theirs: to look at the variables of a function keeps them alive until it returns.
    """
    count = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torchkiln."):
        count += sum(value is slot[0][slot[1]] for value in frame.f_locals.values())
        frame = frame.f_back
    return count


# --- the search ---------------------------------------------------------------------------------------------------

# For each module, the parameters that were found to be held there alone, and how many references they had then.
# By identity, not weakly: a tensor with a weak reference cannot be swapped.
_alone: weakref.WeakKeyDictionary[nn.Module, dict[tuple[str, str], tuple[int, int]]]
_alone = weakref.WeakKeyDictionary()


def _search(slot: Slot, place: Place) -> list[Place]:
    holders: dict[int, list[tuple[Slot, Place]]] = {}
    for other_slot, other in _slots(_living_modules()):
        holders.setdefault(id(other_slot[0][other_slot[1]]), []).append((other_slot, other))
    for entries in holders.values():
        _note_alone(entries)
    entries = holders.get(id(slot[0][slot[1]]), [])
    return _distinct(other for _, other in entries if not same_place(other, place))


def _note_alone(entries: list[tuple[Slot, Place]]) -> None:
    slot, place = entries[0]
    if len(entries) == 1:
        note = (id(slot[0][slot[1]]), _references(slot))
        _alone.setdefault(place.module, {})[place.name, slot[1]] = note
    else:
        for slot, place in entries:
            _alone.get(place.module, {}).pop((place.name, slot[1]), None)


def _living_modules() -> list[nn.Module]:
    # By the type itself: isinstance would ask proxies and lazy objects for their __class__.
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, nn.Module)}
    return [thing for thing in objects if type(thing) in kinds]


def _slots(modules: Iterable[nn.Module]) -> Iterator[tuple[Slot, Place]]:
    """Yield every parameter's slot and its place; for an original, the place of the tensor computed from it."""
    # Scripted modules keep theirs elsewhere.
    modules = [module for module in modules if isinstance(vars(module).get("_modules"), dict)]
    owners = {id(chain): Place(module, name) for module in modules for name, chain in _chains(module).items()}
    for module in modules:
        owner = owners.get(id(module))
        while owner is not None and id(owner.module) in owners:  # an original that is computed itself
            owner = owners[id(owner.module)]
        for key, parameter in list(module._parameters.items()):  # another thread may be at work on it
            if parameter is not None:
                yield (module._parameters, key), owner or Place(module, key)


def _chains(module: nn.Module) -> dict[str, nn.Module | None]:
    chains: object = module._modules.get("parametrizations")
    if not isinstance(chains, nn.ModuleDict):
        return {}
    return {name: chain for name, chain in chains._modules.items() if hasattr(chain, "is_tensor")}


def same_place(a: Place, b: Place) -> bool:
    """Return whether both are the same tensor of the same module; a module's own ``==`` is not asked."""
    return a.module is b.module and a.name == b.name


def _distinct(places: Iterable[Place]) -> list[Place]:
    return list({(id(place.module), place.name): place for place in places}.values())
