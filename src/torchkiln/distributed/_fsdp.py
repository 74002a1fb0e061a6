"""FSDP2's books: which parameter of which module it shards; they follow when a parametrization comes or goes.

``fully_shard`` notes for each parameter the module and the name under which it swaps the sharded and the gathered
tensor (``FSDPParam``), in groups that are communicated together. Registering moves a parameter into a chain, or makes
two of it; removing does the reverse. ``balance`` compares the books with what the modules have: an entry whose
parameter has moved is pointed to its new place, one whose parameter is gone is struck out, and a new sharded
parameter gets an entry in the same group. Nothing is gathered for it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam, ParamModuleInfo
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from torchkiln._core.attributes import parameter_like
from torchkiln._core.chain import chains_of, is_parametrized, set_data
from torchkiln._core.errors import ParametrizationError

__all__ = ["balance", "reshard", "shard_step", "versions"]


class Slot(NamedTuple):
    """A place that holds a parameter: a module, or what is in one of its chains."""

    holder: nn.Module
    name: str
    module: nn.Module


# The groups of a module before it changes: afterwards its only parameter may be a new one, which none knows.
_groups: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[FSDPParamGroup]]]
_groups = weakref.WeakKeyDictionary()


def _groups_by_module(modules: Iterable[nn.Module]) -> dict[nn.Module, list[FSDPParamGroup]]:
    """Return for each module the groups that have a parameter of it or of its chains, or had one before."""
    by_holder: dict[int, list[FSDPParamGroup]] = {}
    for group in _all_groups():
        for holder in {id(slot.holder) for entry in group.fsdp_params for slot in _slots_of(entry)}:
            by_holder.setdefault(holder, []).append(group)
    found = {}
    for module in modules:
        before = [one for ref in _groups.get(module, ()) if (one := ref()) is not None]
        now = [group for holder in _holders(module) for group in by_holder.get(id(holder), ())]
        if groups := list({id(group): group for group in (*now, *before)}.values()):
            found[module] = groups
    return found


def _all_groups() -> Iterator[FSDPParamGroup]:
    states = {
        id(state): state for ref in _module_state_mapping.values() if isinstance(state := ref(), FSDPState)
    }
    for state in states.values():
        yield from state._fsdp_param_groups


def _holders(module: nn.Module) -> list[nn.Module]:
    """Return ``module`` and all that is in its chains."""
    if not is_parametrized(module):
        return [module]
    return [module, *(inner for chain in chains_of(module).values() for inner in chain.modules())]


def _slots_of(entry: FSDPParam) -> list[Slot]:
    info = entry._module_info
    holders, names = [info.module, *info.shared_modules], [info.param_name, *info.shared_param_names]
    return list(map(Slot, holders, names, holders))


def reshard(modules: Sequence[nn.Module]) -> None:
    """Let ``modules`` hold their sharded parameters, which are the ones that can be exchanged.

    Raises:
        ParametrizationError: A forward or backward pass is under way.
    """
    groups = _groups_by_module(modules)
    for module, own in groups.items():
        _groups[module] = list(map(weakref.ref, own))
    for group in _distinct(groups):
        if group._training_state is not TrainingState.IDLE:
            raise ParametrizationError(
                f"FSDP is in the {group._training_state.name.lower()} pass of {group._module_fqn or 'a module'}: its "
                "parameters cannot be exchanged now.\nRegister, remove and assign between two steps."
            )
        group.wait_for_unshard()
        group._to_sharded()  # type: ignore[no-untyped-call]  # torch leaves it unannotated


def shard_step(module: nn.Module, step: nn.Module) -> None:
    """Shard the parameters of ``step`` as FSDP shards those of ``module``, where it does.

    Raises:
        ParametrizationError: One of them has no dimension to shard.
    """
    groups = _groups_by_module([module]).get(module, [])
    if not groups:
        return
    spec = groups[0].fsdp_params[0]._sharding_spec
    is_data = groups[0].mesh_info.mesh.ndim - 1  # the axis of the mesh that FSDP shards over
    placements = [Shard(0) if axis == is_data else Replicate() for axis in range(spec.mesh.ndim)]
    for holder in step.modules():
        held: dict[str, Any] = holder._parameters
        for name, parameter in held.items():
            if parameter is None or isinstance(parameter, DTensor):
                continue
            _check_dimensions(parameter, f"{type(step).__name__}.{name}")
            part = distribute_tensor(parameter.detach(), spec.mesh, placements)
            held[name] = parameter_like(part, [parameter], requires_grad=parameter.requires_grad)


def _check_dimensions(parameter: Tensor, what: str) -> None:
    if parameter.ndim == 0:
        raise ParametrizationError(
            f"{what}: FSDP shards parameters along a dimension, and a number has none.\n"
            "Give it one, of shape (1,); for weight_norm pass a dim."
        )


def balance(modules: Sequence[nn.Module]) -> None:
    """Bring the books up to what ``modules`` have now; what is right already stays."""
    groups = _groups_by_module(modules)
    found = _found(groups)
    templates = {id(group): list(group.fsdp_params) for group in _distinct(groups)}
    for group in _distinct(groups):
        _follow(group, found)
    booked = {id(entry.sharded_param) for group in _distinct(groups) for entry in group.fsdp_params}
    for key, slots in found.items():
        parameter: Any = slots[0].holder._parameters[slots[0].name]
        if key not in booked and isinstance(parameter, DTensor):
            _enter(*_fitting(groups[slots[0].module], templates, parameter), parameter, slots)
    for group in _distinct(groups):
        _renew(group)
    for holder in (holder for module in groups for holder in _holders(module)):
        _entries.pop(holder, None)
        holder._is_fsdp_managed_module = True  # type: ignore[assignment]  # as fully_shard marks them
        holder._fsdp_use_orig_params = True  # type: ignore[assignment]


def _distinct(groups: Mapping[nn.Module, list[FSDPParamGroup]]) -> list[FSDPParamGroup]:
    return list({id(group): group for own in groups.values() for group in own}.values())


def _found(modules: Iterable[nn.Module]) -> dict[int, list[Slot]]:
    """Return the places of each parameter in ``modules``."""
    found: dict[int, list[Slot]] = {}
    for module in modules:
        for holder in _holders(module):
            for name, parameter in holder._parameters.items():
                if parameter is not None:
                    found.setdefault(id(parameter), []).append(Slot(holder, name, module))
    return found


def _follow(group: FSDPParamGroup, found: dict[int, list[Slot]]) -> None:
    """Point the entries of ``group`` to where their parameters are, and strike out those whose are nowhere."""
    alive = {id(inner) for module in group.modules for inner in module.modules()}
    kept = []
    for entry in group.fsdp_params:
        slots = [
            slot
            for slot in _slots_of(entry)
            if id(slot.holder) in alive and slot.holder._parameters.get(slot.name) is entry.sharded_param
        ]
        held = {(id(slot.holder), slot.name) for slot in slots}
        slots += [
            slot
            for slot in found.get(id(entry.sharded_param), ())
            if (id(slot.holder), slot.name) not in held
        ]
        if slots:
            kept.append(entry)
            _point(entry, slots)
        else:
            entry._post_load_hook_handle.remove()
    group.fsdp_params = kept


def _point(entry: FSDPParam, slots: list[Slot]) -> None:
    info = _module_info(slots)
    if info == entry._module_info:
        return
    entry._post_load_hook_handle.remove()
    entry._module_info = info
    listen: Any = slots[0].holder.register_load_state_dict_post_hook
    entry._post_load_hook_handle = listen(lambda *_: _reset(entry))


def _module_info(slots: list[Slot]) -> ParamModuleInfo:
    first, *shared = slots
    return ParamModuleInfo(
        first.holder, first.name, [slot.holder for slot in shared], [slot.name for slot in shared]
    )


def _fitting(
    groups: list[FSDPParamGroup], templates: Mapping[int, list[FSDPParam]], parameter: DTensor
) -> tuple[FSDPParamGroup, FSDPParam]:
    """Return a group, and an entry that it has or had, which is sharded over the mesh of ``parameter``."""
    for group in groups:
        for template in templates[id(group)]:
            if template._sharding_spec.mesh == parameter.device_mesh:
                return group, template
    raise ParametrizationError(
        f"a new parameter of shape {tuple(parameter.shape)} is sharded over {parameter.device_mesh}, and no group of "
        "FSDP shards over that.\nShard the parameters of a parametrization over the mesh of its module."
    )


def _enter(group: FSDPParamGroup, template: FSDPParam, parameter: DTensor, slots: list[Slot]) -> None:
    """Make an entry for ``parameter`` in ``group``, like that of ``template``."""
    _check_dimensions(parameter, slots[0].name)
    placement = _placement(template, parameter)
    entry = FSDPParam(
        _unsharded_like(template, parameter),
        _module_info(slots),
        template.mesh_info,
        group.post_forward_mesh_info,
        group.device,
        lambda _: placement,
        group.mp_policy,
        group.offload_policy,
    )
    wanted = entry._sharding_spec.placements
    if parameter.placements != wanted:  # computed for all of the axis, where FSDP shards whatever there is
        data: Any = parameter.detach()
        set_data(parameter, data.redistribute(placements=wanted))
    # It has made a parameter without data for the places; the real one takes its part.
    entry.sharded_param = parameter  # type: ignore[assignment]  # an nn.Parameter that is a DTensor
    for slot in slots:
        slot.holder._parameters[slot.name] = parameter  # type: ignore[assignment]  # as above
    group.fsdp_params.append(entry)


def _placement(template: FSDPParam, parameter: DTensor) -> Shard:
    ndim = template.mesh_info.mesh.ndim
    dims: list[int] = [one.dim for one in parameter.placements[:ndim] if hasattr(one, "dim")]
    return Shard(dims[0] if dims else 0)


def _unsharded_like(template: FSDPParam, parameter: DTensor) -> nn.Parameter:
    """Return the parameter as it was before FSDP sharded it, without data."""
    whole: Tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    if (inner := template._unsharded_dtensor_spec) is not None:  # tensor parallelism, within what FSDP shards
        placements = parameter.placements[-inner.mesh.ndim :]
        whole = distribute_tensor(whole, inner.mesh, placements)
    return nn.Parameter(whole, requires_grad=parameter.requires_grad)


def _renew(group: FSDPParamGroup) -> None:
    """Let the entries know the data of their parameters, and the group its entries."""
    for entry in group.fsdp_params:
        _reset(entry)
    if group._reset_sharded_params:  # it has run already
        group._init_mp_dtypes()
    if handles := group._module_to_pre_save_state_dict_hook_handle:
        for handle in (*handles.values(), *group._module_to_pre_load_state_dict_hook_handle.values()):
            handle.remove()
        handles.clear()
        group._module_to_pre_load_state_dict_hook_handle.clear()
        group._register_state_dict_hooks()


def _reset(entry: FSDPParam) -> None:
    entry.reset_sharded_param()  # type: ignore[no-untyped-call]  # torch leaves it unannotated


# --- versions -----------------------------------------------------------------------------------------------------

# The entries of a chain, looked up once; weakly on both sides, since an entry refers to the chain.
_entries: weakref.WeakKeyDictionary[nn.Module, list[weakref.ref[FSDPParam]]]
_entries = weakref.WeakKeyDictionary()


def versions(chain: nn.Module) -> tuple[Any, ...] | None:
    """Return the identities and versions of the sharded parameters of ``chain``, and of its other tensors.

    What a forward sees is the gathered parameter, which FSDP refills each time and leaves at the version it has.
    """
    if chain not in _entries:
        holders = set(map(id, chain.modules()))
        _entries[chain] = [
            weakref.ref(entry)
            for group in _all_groups()
            for entry in group.fsdp_params
            if any(id(slot.holder) in holders for slot in _slots_of(entry))
        ]
    entries = [entry for ref in _entries[chain] if (entry := ref()) is not None]
    if not entries:
        return None
    booked: list[Tensor] = [entry.sharded_param for entry in entries]
    known = {id(getattr(entry, "_unsharded_param", None)) for entry in entries} | set(map(id, booked))
    others = [one for one in (*chain.parameters(), *chain._buffers.values()) if one is not None]
    return tuple(
        (id(one), one._version) for one in (*booked, *(one for one in others if id(one) not in known))
    )
