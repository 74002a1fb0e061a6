"""DistributedDataParallel: its reducer averages the parameters that the model has, not those that it had when wrapped.

The reducer is made once, for a list of parameters. A parametrization that comes or goes afterwards may exchange some
of them: their gradients would stay local, and the ranks drift apart. ``balance`` gives the wrapper a reducer for the
parameters there are now, as its constructor does.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.nn.parallel import DistributedDataParallel

from torchkiln._core.chain import chains_of, is_parametrized
from torchkiln._core.errors import ParametrizationError

__all__ = ["balance", "find_wrappers", "spread"]


class _Wrappers:
    """The wrappers in this process. A module does not know who wraps it.

    They are searched for once, among all living objects; a global hook of torch, called when a module gets a submodule,
    tells of those that come later.
    """

    def __init__(self) -> None:
        self.known: weakref.WeakSet[DistributedDataParallel] = weakref.WeakSet()
        self.watches = False

    def watch(self) -> None:
        if self.watches:
            return
        self.watches = True
        register_module_module_registration_hook(self)
        objects = gc.get_objects()
        kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, DistributedDataParallel)}
        self.known.update(thing for thing in objects if type(thing) in kinds)

    def __call__(self, parent: nn.Module, _name: str, _child: object) -> None:
        if isinstance(parent, DistributedDataParallel):
            self.known.add(parent)


_wrappers = _Wrappers()


def find_wrappers(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    """Return the wrappers that train a parameter of ``modules``."""
    _wrappers.watch()
    return _wrappers_of(modules)


def _wrappers_of(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    wanted = set(map(id, modules))
    return [one for one in _wrappers.known if any(id(module) in wanted for module in one.module.modules())]


def balance(modules: Sequence[nn.Module]) -> None:
    """Give the wrappers of ``modules`` reducers for the parameters that their models have now."""
    for wrapper in _wrappers_of(modules):
        now = [
            one for name, one in wrapper.module.named_parameters() if name not in wrapper.parameters_to_ignore
        ]
        if list(map(id, now)) != list(map(id, wrapper._module_parameters)):
            wrapper._module_parameters = now
            _renew_reducer(wrapper)


def _renew_reducer(wrapper: Any) -> None:
    if wrapper.mixed_precision is not None:
        raise ParametrizationError(
            "DistributedDataParallel keeps copies of the parameters in another precision, and cannot follow a change.\n"
            "Register and remove before wrapping, or wrap without mixed_precision."
        )
    wrapper.reducer._remove_autograd_hooks()
    parameters, sparse = wrapper._build_params_for_reducer()
    was_static, wrapper.static_graph = wrapper.static_graph, False
    names = wrapper._build_debug_param_to_name_mapping(parameters)
    wrapper._ddp_init_helper(parameters, sparse, names, was_static)
    if was_static:
        wrapper._set_static_graph()
    wrapper._has_rebuilt_buckets = False
    for hook, state in wrapper._comm_hooks:
        dist._register_comm_hook(  # type: ignore[attr-defined]  # torch does not list it
            wrapper.reducer, state, hook
        )


def spread(modules: Sequence[nn.Module]) -> None:
    """Give all ranks the first one's originals and state of the chains of ``modules``, as wrapping does."""
    for wrapper in _wrappers_of(modules):
        chains = [chain for one in modules if is_parametrized(one) for chain in chains_of(one).values()]
        tensors: list[Tensor] = [
            one.detach() for chain in chains for one in (*chain.parameters(), *chain.buffers())
        ]
        if tensors:
            dist._broadcast_coalesced(  # type: ignore[attr-defined]  # torch does not list it
                wrapper.process_group, tensors, wrapper.broadcast_bucket_size, 0
            )
