"""Rewriting the part of a state dict that is one module's, whatever spells it, into what the module asks for."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Hashable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from torchkiln._core.chain import chains_of, is_parametrized
from torchkiln._core.errors import CheckpointError, InverseError, ParametrizationError, TorchkilnWarning
from torchkiln._core.finite import is_finite
from torchkiln._core.sharded import whole
from torchkiln._core.spellings.entries import Entry, Group
from torchkiln._core.spellings.evaluate import Evaluation, Evaluator
from torchkiln._core.spellings.options import Options
from torchkiln._core.spellings.recognise import Recognised, recognise
from torchkiln._core.spellings.spelled import Spelled
from torchkiln._core.spellings.targets import ChainTarget, PlainTarget, Target, plain_targets

__all__ = ["chain_targets", "read_every_spelling", "respell"]

State = MutableMapping[str, Any]


def read_every_spelling(
    module: nn.Module,
    state_dict: State,
    prefix: str,
    local_metadata: dict[str, Any],
    _strict: object,
    _missing_keys: list[str],
    _unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Rewrite ``module``'s tensors in ``state_dict``, in place: a ``load_state_dict`` pre-hook.

    What cannot be rewritten stays, for torch to report as missing and unexpected keys.
    """
    start, chains = len(prefix), f"{prefix}parametrizations."
    keys = [
        key
        for key in state_dict
        if key.startswith(prefix) and ("." not in key[start:] or key.startswith(chains))
    ]
    targets = [*plain_targets(module, prefix), *chain_targets(module, prefix)]
    assign = bool(local_metadata.get("assign_to_params_buffers", False))
    try:
        refusals = respell(state_dict, keys, targets=targets, assign=assign, options=Options())
    except ParametrizationError as error:
        error_msgs.append(str(error))
        return
    for refusal in refusals:
        warnings.warn(f"{refusal}\nIt is not loaded.", TorchkilnWarning, stacklevel=2)


def chain_targets(module: nn.Module, prefix: str) -> list[Target]:
    """Return the parametrized tensors of ``module``."""
    if not is_parametrized(module):
        return []
    return [ChainTarget(module, name, prefix) for name in chains_of(module)]


def respell(
    state_dict: State, keys: Collection[str], *, targets: Sequence[Target], assign: bool, options: Options
) -> list[str]:
    """Rewrite some keys of a state dict into those that the targets store.

    Where both sides have the same norm the tensors are moved as they are. Otherwise the plain value is computed, as
    baking a file does, and the target finds the tensors for it.

    Args:
        state_dict: Changed in place.
        keys: The keys in it that belong to one module.
        targets: All tensors of that module.
        assign: Whether the module will take the tensors themselves, in the dtype that they have.
        options: What the caller knows that a state dict cannot say.

    Returns:
        Why tensors were left as they are, a text for each.

    Raises:
        ParametrizationError: A tensor cannot be stored by its target; the text names it.
    """
    stored = {key: tensor for target in targets for key, tensor in target.stored.items()}
    if _fit(stored, {key: state_dict[key] for key in keys}):
        return []
    respelling = _Respelling(state_dict, keys, targets=targets, assign=assign, options=options)
    for target in targets:
        respelling.rewrite(target)
    return respelling.refusals


def _fit(stored: Mapping[str, Tensor], given: Mapping[str, Any]) -> bool:
    """Return whether what is given can be loaded as it is; torch sees to what is not initialized yet."""
    return all(
        key in stored
        and (is_lazy(stored[key]) or is_lazy(tensor) or stored[key].shape == getattr(tensor, "shape", None))
        for key, tensor in given.items()
    )


class _Memory:
    """The values of a state dict, as an evaluator wants them."""

    def __init__(self, state_dict: State) -> None:
        self._state_dict = state_dict

    def read(self, _group: Group, key: str) -> Tensor:
        return whole(self._state_dict[key])

    def identity(self, _group: Group, key: str) -> Hashable:
        return id(self._state_dict[key])


class _Respelling:
    """The keys of one module, recognised, and their rewriting."""

    def __init__(
        self,
        state_dict: State,
        keys: Collection[str],
        *,
        targets: Sequence[Target],
        assign: bool,
        options: Options,
    ) -> None:
        self._state_dict, self._assign = state_dict, assign
        self.refusals: list[str] = []
        # A plain tensor of the module is data, whatever its name looks like.
        data = {target.name for target in targets if isinstance(target, PlainTarget)}
        given = {key: state_dict[key] for key in keys}
        self._values = {
            key: one for key, one in given.items() if isinstance(one, Tensor) and not is_lazy(one)
        }
        entries = {
            key: Entry(tuple(tensor.shape), tensor.dtype)
            for key, tensor in self._values.items()
            if key not in data
        }
        group = Group((), entries)
        options = options.expecting({target.name: target.default_dim for target in targets})
        self._found: Recognised = recognise(group, options)
        self._outermost = {item.name: item for item in self._found.outermost}
        self._evaluate = Evaluator(_Memory(state_dict), group, found=self._found, options=options)

    def rewrite(self, target: Target) -> None:
        """Rewrite one tensor, if the state dict has it in another spelling than the target's."""
        item = self._outermost.get(target.name)
        used = (target.name,) if item is None else tuple(self._found.leaves(item))
        if (isinstance(target, PlainTarget) and item is None) or not self._values.keys() >= set(used):
            return
        if target.stored.keys() >= set(used) and not self._means_another(target, item, used):
            return
        if item is not None and self._same_norm(target, item):
            self._replace(used, dict(zip(target.stored, map(self._state_dict.get, item.inputs), strict=True)))
            return
        try:
            made = self._plain(target, item)
        except (CheckpointError, InverseError) as error:
            self.refusals.append(str(error))
        else:
            self._replace(used, made)

    def _means_another(self, target: Target, item: Spelled | None, used: Iterable[str]) -> bool:
        """Return whether keys with the target's own names are a tensor of its shape in other terms, as another dim."""
        if _fit(target.stored, {key: self._values[key] for key in used}) or item is None:
            return False
        known = not any(part.blocked for part in self._found.parts(item))
        return known and target.shape in (None, item.entry.shape)

    def _same_norm(self, target: Target, item: Spelled) -> bool:
        if item.blocked or item.skipped or len(item.steps) != 1 or len(self._found.parts(item)) != 1:
            return False
        shapes = [tensor.shape for tensor in target.stored.values()]
        return item.steps[0].kind == target.kind and shapes == [
            self._values[key].shape for key in item.inputs
        ]

    def _plain(self, target: Target, item: Spelled | None) -> dict[str, Tensor]:
        """Return what the target stores for the plain value."""
        if item is None:
            value = whole(self._values[target.name].detach())
            dtype = value.dtype
        else:
            evaluation = self._evaluate(item)
            _warn_about(item, evaluation)
            value, dtype = evaluation.tensor, item.entry.dtype
        if target.shape is not None and value.shape != target.shape:
            raise ParametrizationError(
                f"{target.name}: the state dict has it with shape {tuple(value.shape)}, "
                f"the module with {tuple(target.shape)}."
            )
        encoded = target.encode(value, dtype=dtype if self._assign else None)
        if encoded.loaded is not None:
            _check_loaded(target.name, value, encoded.loaded)
        return dict(encoded.tensors)

    def _replace(self, used: Iterable[str], made: dict[str, Any]) -> None:
        for key in used:
            del self._state_dict[key]
        self._state_dict.update(made)


def _warn_about(item: Spelled, evaluation: Evaluation) -> None:
    texts = list(evaluation.warnings)
    if evaluation.guessed:
        texts.append(f"{item.name}: {evaluation.assumptions[-1]}.\nPass dims= to torchkiln.load_state_dict.")
    for text in texts:
        warnings.warn(text, TorchkilnWarning, stacklevel=2)


def _check_loaded(name: str, value: Tensor, loaded: Tensor) -> None:
    """Raise where the module will not compute numbers, warn where it will compute others than rounding explains."""
    if loaded.shape != value.shape:
        raise ParametrizationError(
            f"{name}: the state dict has it with shape {tuple(value.shape)}, the module with {tuple(loaded.shape)}."
        )
    if not value.numel() or not is_finite(value):
        return
    if not is_finite(loaded):
        raise ParametrizationError(
            f"{name}: its parametrization cannot be that value, and computes NaN for it."
        )
    wide = torch.promote_types(loaded.dtype, torch.float64)
    expected = value.to(device=loaded.device, dtype=wide)
    distance = float((loaded.detach().to(wide) - expected).abs().max())
    rounds = loaded.is_floating_point() or loaded.is_complex()
    rounding = torch.finfo(loaded.dtype).eps ** 0.75 if rounds else 0.0
    if distance > rounding * float(expected.abs().max()):
        warnings.warn(
            f"{name}: the value in the state dict is not one that its parametrization computes; "
            f"loaded is the projection, {distance:.3g} away (largest difference).",
            TorchkilnWarning,
            stacklevel=2,
        )
