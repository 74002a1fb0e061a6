"""Optimizers follow: put the parameters that a tensor has now in the place of those that it had.

Registering or removing may end the life of a parameter: weight norm makes two of one, and baking one of two. An
optimizer that was made before goes on with the old ones, and nothing trains. ``follow`` exchanges them in the
optimizers that it is given, in the same group and position, and hands the state on. For those that it is not given,
``replaced.py`` has a warning at their next step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adagrad, Optimizer

from torchkiln._core.errors import ParametrizationError
from torchkiln._core.layout import laid_out_as
from torchkiln._core.replaced import note
from torchkiln._core.warn import warn

__all__ = ["Optimizers", "Replacement", "follow", "parameters_of"]

Optimizers = Optimizer | Iterable[Optimizer] | None
Named = Mapping[str, nn.Parameter]


@dataclass
class Replacement:
    """The parameters that store one tensor, by their names, before a change and after it.

    Attributes:
        module: The module that has the tensor.
        name: The tensor's name there.
        path: What to call it in a warning.
        before: The parameters it started from.
        before_extra: Those of its steps.
        after: The parameters it starts from now, or itself where it is plain.
        after_extra: Those of its steps.
    """

    module: nn.Module
    name: str
    path: str
    before: Named
    before_extra: Named = field(default_factory=dict)
    after: Named = field(default_factory=dict)
    after_extra: Named = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layout = {id(p): (p.shape, p.stride()) for p in self.before.values()}

    def gone(self, alive: set[int]) -> list[nn.Parameter]:
        """Return the parameters that the tensor had, and that nothing in the model has any more."""
        return [p for p in (*self.before.values(), *self.before_extra.values()) if id(p) not in alive]

    def replaced(self) -> list[nn.Parameter]:
        """Return the parameters that trained and that the tensor does not start from any more."""
        now = {id(p) for p in self.after.values()}
        gone = [p for p in self.before.values() if id(p) not in now and p.requires_grad]
        return gone if now else []

    def fresh(self) -> list[nn.Parameter]:
        """Return the parameters that the tensor did not have before; of a step's own, those that train."""
        known = {id(p) for p in (*self.before.values(), *self.before_extra.values())}
        extra = [p for p in self.after_extra.values() if p.requires_grad]
        return [p for p in (*self.after.values(), *extra) if id(p) not in known]

    def changed_layout(self) -> list[nn.Parameter]:
        """Return the parameters that stayed, but have another shape or other strides."""
        return [
            p
            for p in self.after.values()
            if self.layout.get(id(p), (p.shape, p.stride())) != (p.shape, p.stride())
        ]

    def heritage(self) -> dict[int, nn.Parameter]:
        """Return, for each new parameter that continues an old one, the old one.

        It is one of the same shape. Where an old one has several such heirs, those with its values (the direction of
        weight norm, not its length); where a new one could continue several, the last of them.
        """
        fresh = [p for p in self.after.values() if all(p is not old for old in self.before.values())]
        found = {}
        for old in self.before.values():
            if any(old is p for p in self.after.values()):
                continue
            heirs = [p for p in fresh if p.shape == old.shape]
            if len(heirs) > 1:
                heirs = [p for p in heirs if _has_values_of(old, p)] or heirs
            found.update({id(p): old for p in heirs})
        return found


def follow(optimizer: Optimizers, replacements: list[Replacement], *, root: nn.Module) -> None:
    """Let optimizers go on with the new parameters; the last act of a change, which either happens or raises.

    Args:
        optimizer: One optimizer, several, or None.
        replacements: What was replaced.
        root: The module after the change. What it no longer has leaves the optimizers.
    """
    optimizers = _as_list(optimizer)
    alive = {id(p) for p in root.parameters()} if optimizers else set()
    plans = [_Plan(one, replacements, alive) for one in optimizers]
    changed = [(one, one.changed_layout()) for one in replacements]
    gradients = [(p, _gradient_for(p)) for _, kept in changed for p in kept if p.grad is not None]
    for p, gradient in gradients:
        p.grad = gradient
    for plan in plans:
        plan.carry_out()
    for one, kept in changed:
        note(one.module, one.name, path=one.path, gone=one.replaced(), relaid=bool(kept))
    if optimizers:
        _warn_of_none(plans, replacements)


def _gradient_for(p: nn.Parameter) -> Tensor | None:
    """Return the gradient of ``p`` for the layout that it has now; none where it has another shape."""
    fits = p.grad is not None and p.grad.shape == p.shape
    return laid_out_as(p.grad, p) if fits and p.grad is not None else None


def _as_list(optimizer: Optimizers) -> list[Optimizer]:
    found = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or ())
    for one in found:
        if not isinstance(one, Optimizer):
            raise ParametrizationError(
                f"optimizer: expected a torch.optim.Optimizer or several, got {type(one).__name__}."
            )
    return found


def _warn_of_none(plans: list[_Plan], replacements: list[Replacement]) -> None:
    due = [one.path for one in replacements if one.replaced()]
    if due and not any(plan.known for plan in plans):
        warn(
            f"optimizer: holds none of the parameters of {', '.join(due[:5])}, so nothing was exchanged in it.\n"
            "Pass the optimizer that trains them."
        )


class _Plan:
    """What becomes of one optimizer; computed as a whole before anything of it changes."""

    def __init__(self, optimizer: Optimizer, replacements: list[Replacement], alive: set[int]) -> None:
        self.optimizer = optimizer
        self.held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.known: set[str] = set()
        self.joining: dict[int, list[nn.Parameter]] = {}  # by the parameter whose place they take
        self.leaving: dict[int, nn.Parameter] = {}
        self.names: dict[int, str] = {}  # by parameter, in the module, before and after
        self.new_names: dict[int, str] = {}
        self.old_state = optimizer.state
        self.state: dict[nn.Parameter, dict[str, Any]] = {}
        for one in replacements:
            self._add(one, alive)
        self.groups = [self._regrouped(group) for group in optimizer.param_groups]

    def _add(self, one: Replacement, alive: set[int]) -> None:
        anchors = [p for p in (*one.before.values(), *one.before_extra.values()) if id(p) in self.held]
        if not anchors:
            return
        self.known.add(one.path)
        heritage = one.heritage()
        self.leaving |= {id(p): p for p in one.gone(alive) if id(p) in self.held}
        for new in one.fresh():
            old = heritage.get(id(new))
            if id(new) not in self.held:
                place = old if old is not None and id(old) in self.held else anchors[0]
                self.joining.setdefault(id(place), []).append(new)
                self.held.add(id(new))
                heirs = sum(heir is old for heir in heritage.values())
                self._inherit(new, old, layout=one.layout, alone=heirs == 1 and id(old) not in alive)
                if not self.state.get(new):
                    self.state[new] = _initial_state(self.optimizer, new, self.old_state.get(place, {}))
        for p in one.changed_layout():
            self._inherit(p, p, layout=one.layout, alone=True)
        self.names |= {id(p): name for name, p in (*one.before.items(), *one.before_extra.items())}
        self.new_names |= {id(p): name for name, p in (*one.after.items(), *one.after_extra.items())}

    def _inherit(
        self, new: nn.Parameter, old: nn.Parameter | None, *, layout: dict[int, Any], alone: bool
    ) -> None:
        state = None if old is None else self.old_state.get(old)
        if old is None or not state or isinstance(self.optimizer, LBFGS):
            return
        fits = layout[id(old)][0] == new.shape
        self.state[new] = (
            {key: _carried(key, value, old, new, alone=alone) for key, value in state.items()} if fits else {}
        )

    def _regrouped(self, group: dict[str, Any]) -> tuple[list[Tensor], list[str] | None]:
        """Return the group's parameters and, where it keeps them, their names."""
        params: list[Tensor] = []
        names: list[str] = []
        old_names = group.get("param_names") or [""] * len(group["params"])
        for p, name in zip(group["params"], old_names, strict=True):
            stays = [] if id(p) in self.leaving else [p]
            entries = [*stays, *self.joining.get(id(p), ())]
            params += entries
            names += [self._named(entry, p, name) for entry in entries]
        return params, names if group.get("param_names") else None

    def _named(self, new: Tensor, old: Tensor, name: str) -> str:
        """Return the name of ``new``, in the place of ``old``, which had ``name``: that within the whole model."""
        if id(new) not in self.new_names:
            return name
        local = self.names.get(id(old), "")
        return (name.removesuffix(local) if name.endswith(local) else "") + self.new_names[id(new)]

    def carry_out(self) -> None:
        """Change the optimizer, in place: schedulers and scalers hold its groups."""
        for group, (params, names) in zip(self.optimizer.param_groups, self.groups, strict=True):
            group["params"][:] = params
            if names is not None:
                group["param_names"][:] = names
        for p in self.leaving.values():
            self.old_state.pop(p, None)
        for new, state in self.state.items():
            self.old_state.pop(new, None)
            if state:
                self.old_state[new] = state
        if isinstance(self.optimizer, LBFGS) and (self.joining or self.leaving):
            # Its state is of all parameters in one vector.
            self.old_state.clear()
            self.optimizer._numel_cache = None


def _carried(key: str, value: Any, old: nn.Parameter | None, new: nn.Parameter, *, alone: bool) -> Any:
    """Return one entry of the state of ``old`` for ``new``."""
    if not isinstance(value, Tensor) or old is None:
        return value
    # "step" is a count, whatever the dtype of the parameter is.
    if key != "step" and value.shape == new.shape:
        dtype = new.dtype if value.dtype == old.dtype else value.dtype
        value_there = laid_out_as(value.to(new.device, dtype), new)
        if alone or value_there is not value:
            return value_there
    return value if alone else value.clone()


def _initial_state(optimizer: Optimizer, p: nn.Parameter, neighbour: dict[str, Any]) -> dict[str, Any]:
    """Return the state that a new parameter must have already; most optimizers make it in its first step."""
    if isinstance(optimizer, SGD) and neighbour.get("momentum_buffer") is not None:
        # Its fused kernel takes a step with either all of the buffers or none.
        is_fused = any(group["fused"] for group in optimizer.param_groups)
        return {"momentum_buffer": torch.zeros_like(p, requires_grad=False)} if is_fused else {}
    if isinstance(optimizer, Adagrad):
        scratch = Adagrad([torch.empty_like(p).requires_grad_()], **optimizer.defaults)
        (state,) = scratch.state.values()
        return dict(state)
    return {}


def _has_values_of(old: Tensor, new: Tensor) -> bool:
    return new.dtype == old.dtype and not new.is_meta and torch.equal(new, old)


def parameters_of(chain: nn.Module, name: str) -> tuple[Named, Named]:
    """Return the parameters that the chain of tensor ``name`` starts from, and those of its steps, by their names."""
    originals: dict[str, nn.Parameter] = {}
    extra: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for key, p in _named(chain):
        if id(p) not in seen:
            is_step = key.partition(".")[0].isdecimal()
            (extra if is_step else originals)[f"parametrizations.{name}.{key}"] = p
            seen.add(id(p))
    return originals, extra


def _named(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Parameter]]:
    """Yield what ``module.named_parameters(remove_duplicate=False)`` does, at a fraction of its cost."""
    for key, p in module._parameters.items():
        if p is not None:
            yield prefix + key, p
    for key, child in module._modules.items():
        if child is not None:
            yield from _named(child, f"{prefix}{key}.")
