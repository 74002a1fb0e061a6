"""Give the chain of a tensor other steps and, for a new first step, other originals, all or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.atomic import all_or_nothing
from torchkiln._core.attributes import parameter_like
from torchkiln._core.chain import (
    ParametrizationList,
    chains_of,
    enabled_steps,
    is_parametrized,
    original_names,
    register_tensor,
    set_data,
    steps_of,
)
from torchkiln._core.engine import balance
from torchkiln._core.errors import ParametrizationError
from torchkiln._core.optimizers import Optimizers, Replacement, follow, parameters_of
from torchkiln._core.remove import leaf_originals
from torchkiln._core.state import frozen
from torchkiln._core.ties import Place, label

__all__ = ["commit_steps", "is_in", "originals_for", "received", "stand_in", "without"]


def commit_steps(
    places: list[Place],
    steps: list[nn.Module],
    *,
    originals: Tensor | Sequence[Any] | None,
    optimizer: Optimizers,
    root: nn.Module | None,
) -> None:
    """Let the chains of ``places``, all tied, have ``steps``, and start from ``originals`` where they are given.

    Args:
        places: The tensors whose chains change; all of them start from the same tensors.
        steps: Their steps from now on.
        originals: What they start from, from now on; None leaves that as it is.
        optimizer: The optimizers that follow.
        root: The model that the tensors are in, where it is known.
    """
    (module, name), chains = places[0], [chains_of(place.module)[place.name] for place in places]
    before, extra = parameters_of(chains[0], name)
    replacement = Replacement(module, name, label(places[0], root), before, extra)
    with ExitStack() as stack:
        for chain in chains:
            stack.enter_context(_unchanged_on_error(chain))
        for chain in chains:
            if originals is not None:
                _start_from(chain, originals)
            _hold_steps(chain, steps)
        balance(place.module for place in places)
        replacement.after, replacement.after_extra = parameters_of(chains[0], name)
        follow(optimizer, [replacement], root=root or module)


@contextmanager
def _unchanged_on_error(chain: nn.Module) -> Iterator[None]:
    attributes = vars(chain).copy()
    try:
        with all_or_nothing(chain, *leaf_originals(chain)):
            yield
    except BaseException:
        vars(chain).update(attributes)
        raise


def is_in(steps: Iterable[nn.Module], step: nn.Module) -> bool:
    """Return whether ``step`` itself is among ``steps``; a user's class may define what is equal."""
    return any(step is one for one in steps)


def without(steps: Iterable[nn.Module], gone: Sequence[nn.Module]) -> tuple[nn.Module, ...]:
    """Return ``steps`` without those that are in ``gone``."""
    return tuple(step for step in steps if not is_in(gone, step))


def received(chain: Any, index: int) -> Tensor:
    """Return what the steps before ``index`` make of the originals, at rest; disabled ones are left out."""
    before, enabled = steps_of(chain)[:index], enabled_steps(chain)
    with frozen(chain), torch.no_grad():
        originals = [getattr(chain, name) for name in original_names(chain)]
        x: Tensor = originals[0] if chain.is_tensor else before.pop(0)(*originals)
        for step in before:
            if is_in(enabled, step):
                x = step(x)
    return x


def stand_in(chain: Any, value: Tensor) -> Tensor:
    """Return a copy of ``value`` that is a parameter or buffer, and trains, as the originals of ``chain`` do."""
    leaves = leaf_originals(chain)
    trains = any(leaf.requires_grad for leaf in leaves)
    value = value.detach().clone()
    if any(isinstance(leaf, nn.Parameter) for leaf in leaves):
        return parameter_like(value, leaves, requires_grad=trains)
    return value.requires_grad_(trains)


def originals_for(step: nn.Module, tensor: Tensor, *, unsafe: bool) -> Tensor | Sequence[Any]:
    """Return the originals that ``step``, registered on ``tensor``, starts from."""
    chain = ParametrizationList([step], tensor, unsafe)
    return chain.original if chain.is_tensor else chain.originals()


def _start_from(chain: Any, originals: Tensor | Sequence[Any]) -> None:
    """Exchange the originals of ``chain``; one that stays one stays the same object."""
    if chain.is_tensor and isinstance(originals, Tensor):
        if is_parametrized(chain):
            chain.original = originals.detach()
        else:
            set_data(chain.original, originals)
        return
    if is_parametrized(chain):
        raise ParametrizationError(
            "The original is itself parametrized, and would become several tensors, or one of several.\n"
            "Remove that parametrization first."
        )
    persistent = not chain._non_persistent_buffers_set
    for name in original_names(chain):
        delattr(chain, name)
    chain.is_tensor = isinstance(originals, Tensor)
    chain.ntensors = 1 if isinstance(originals, Tensor) else len(originals)
    for name, original in zip(
        original_names(chain), (originals,) if chain.is_tensor else originals, strict=True
    ):
        if isinstance(original, Tensor):
            register_tensor(chain, name, original, persistent=persistent)
        else:
            setattr(chain, name, original)


def _hold_steps(chain: Any, steps: list[nn.Module]) -> None:
    """Number ``steps`` anew in ``chain``, and forget the settings of those that are gone."""
    old = {str(index) for index in range(len(steps_of(chain)))}
    others = {key: module for key, module in chain._modules.items() if key not in old}
    chain._modules.clear()
    chain._modules.update({str(index): step for index, step in enumerate(steps)} | others)
    if disabled := chain.__dict__.get("_disabled_steps"):
        chain._disabled_steps = tuple(step for step in disabled if is_in(steps, step))
    if names := chain.__dict__.get("_step_names"):
        chain._step_names = tuple((name, step) for name, step in names if is_in(steps, step))
