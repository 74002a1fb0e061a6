"""State dicts of live models in the spelling asked for, and loading them in whichever they have."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from torch import Tensor, nn

from torchkiln._core.errors import ParametrizationError, TorchkilnWarning
from torchkiln._core.sharded import is_sharded, laid_out_as
from torchkiln._core.spellings.entries import Label
from torchkiln._core.spellings.options import Options
from torchkiln._core.spellings.respell import respell
from torchkiln._core.spellings.spelled import Norm, Style, norm_keys
from torchkiln._core.spellings.targets import norm_of_chain
from torchkiln._core.spellings.versions import relabel
from torchkiln.models._check import check_finite
from torchkiln.models._find import Found, computed_tensors
from torchkiln.models._fold import ChainFold, Fold
from torchkiln.models._hooks import HookFold
from torchkiln.models._settle import at_rest, followers, same
from torchkiln.models._targets import hook_kind, targets_by_prefix

__all__ = ["load_state_dict", "state_dict"]

Spelling = Literal["legacy", "plain", "torch"]


def load_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    *,
    strict: bool = True,
    assign: bool = False,
    assume: Mapping[str, str] | None = None,
    dims: Mapping[str, int | None] | None = None,
) -> Any:
    """Load a state dict into a model, whichever way each of the two spells its tensors.

    The spellings are the plain one, torch's parametrizations, the older hook-based weight norm and spectral norm, and
    pruning; the model may be parametrized by torchkiln or by torch, have hooks, or be plain. Where both sides have the
    same norm its tensors are loaded as they are. Otherwise the value is computed, as :func:`torchkiln.bake` does, and
    goes through the right inverse of what the model has; state that has no part in it, such as the mask of a pruned
    layer, stays. A module that torchkiln parametrized does the same in its own ``load_state_dict``; this function is
    for models that have other modules too.

    Args:
        model: The model to load into.
        state_dict: Is not changed.
        strict: As in ``model.load_state_dict``; a tensor whose value cannot be told, or not be stored, raises.
        assign: As in ``model.load_state_dict``.
        assume: What names and shapes do not tell, by the tensor's name or a pattern: an orthogonal map
            (``"matrix_exp"``, ``"cayley"``, ``"householder"``), ``"identity"``, or ``"data"`` for keys that only look
            like a norm's.
        dims: The normalized dim by the tensor's name or a pattern, where several fit; None for all at once.

    Returns:
        What ``model.load_state_dict`` returns: the missing and the unexpected keys.

    Raises:
        ParametrizationError: A tensor cannot be converted; the model is unchanged.
        CheckpointError: A pattern is of no use.
        RuntimeError: As from ``model.load_state_dict``.

    Warns:
        TorchkilnWarning: The model cannot have a value exactly, and gets the projection of it; or a tensor is not
            loaded, where ``strict`` is false.

    Example:
        >>> import torch, torchkiln
        >>> from torch import nn
        >>> normed = torchkiln.parametrizations.weight_norm(nn.Linear(4, 2))
        >>> plain = nn.Linear(4, 2)
        >>> torchkiln.load_state_dict(plain, normed.state_dict())
        <All keys matched successfully>
        >>> torch.equal(plain.weight, normed.weight)
        True
    """
    converted = OrderedDict(state_dict)
    # load_state_dict reads the versions of its modules there.
    converted._metadata = getattr(state_dict, "_metadata", None)  # type: ignore[attr-defined]  # torch's
    options = Options(assume, dims)
    keys = _keys_by_prefix(converted)
    refusals: list[str] = []
    for prefix, targets in targets_by_prefix(model):
        if prefix in keys:
            refusals += respell(converted, keys[prefix], targets=targets, assign=assign, options=options)
    options.check_used("the state dict")
    if refusals and strict:
        more = f"\n{len(refusals) - 1} more like it." if len(refusals) > 1 else ""
        raise ParametrizationError(f"{refusals[0]}{more}")
    for refusal in refusals:
        warnings.warn(f"{refusal}\nIt is not loaded.", TorchkilnWarning, stacklevel=2)
    for key, own in model.state_dict(keep_vars=True).items():
        if is_sharded(own) and isinstance(converted.get(key), Tensor):
            converted[key] = laid_out_as(converted[key], own)
    return model.load_state_dict(converted, strict=strict, assign=assign)


def _keys_by_prefix(keys: Iterable[str]) -> dict[str, list[str]]:
    """Return the keys by the prefix of the module whose tensors they store."""
    found: dict[str, list[str]] = {}
    for key in keys:
        above, inside, _ = f".{key}".partition(".parametrizations.")
        prefix = f"{above}."[1:] if inside else key[: key.rfind(".") + 1]
        found.setdefault(prefix, []).append(key)
    return found


# --- writing ------------------------------------------------------------------------------------------------------


def state_dict(model: nn.Module, *, spelling: Spelling) -> dict[str, Any]:
    """Return the state dict of ``model`` with its computed tensors in the spelling asked for; the model is unchanged.

    The module that has this spelling loads it strictly: one without norms for ``"plain"``, with torch's (or
    torchkiln's) parametrizations for ``"torch"``, and with the older ``torch.nn.utils.weight_norm`` and
    ``spectral_norm`` for ``"legacy"``. Between the last two keys are renamed and every number stays. Plain values are
    those of :func:`torchkiln.bake`. Pruning is spelled ``weight_orig, weight_mask`` in both.

    Args:
        model: A model with tensors computed by torchkiln, by torch's parametrizations, by hooks, or by pruning.
        spelling: ``"plain"``, ``"torch"`` or ``"legacy"``.

    Returns:
        A new dict. Tensors that are not computed, or only renamed, share the model's memory, as those of
        ``model.state_dict()`` do.

    Raises:
        ParametrizationError: A tensor has no such spelling, as an orthogonal one has no legacy one; a plain value is
            not finite; or a hook of the model has renamed keys.

    Example:
        >>> import torchkiln
        >>> from torch import nn
        >>> layer = torchkiln.parametrizations.weight_norm(nn.Linear(4, 2))
        >>> list(torchkiln.state_dict(layer, spelling="plain"))
        ['weight', 'bias']
        >>> list(torchkiln.state_dict(layer, spelling="legacy"))
        ['bias', 'weight_g', 'weight_v']
    """
    if spelling not in ("legacy", "plain", "torch"):
        raise ParametrizationError(f'spelling: expected "plain", "torch" or "legacy", got {spelling!r}.')
    found = computed_tensors(model)
    state: dict[str, Any] = model.state_dict()
    changes = _folded(found) if spelling == "plain" else _renamed(found, spelling)
    _check_keys(state, changes)
    result = _written(state, changes)
    records = getattr(state, "_metadata", None)
    if records is not None:
        for change in changes:
            relabel(records, before=change.before, after=change.after)
        result._metadata = records  # type: ignore[attr-defined]  # torch's
    return result


@dataclass(frozen=True)
class _Change:
    """The keys that one computed tensor has under one prefix, and what takes their place.

    Attributes:
        keys: The keys that give way.
        written: The new keys, each with its tensor or with the old key whose tensor it takes.
        followers: The keys that are to come after the new ones.
        before: How the tensor and those inside it were spelled.
        after: How it is spelled now.
    """

    keys: tuple[str, ...]
    written: Mapping[str, Tensor | str]
    followers: tuple[str, ...] = ()
    before: tuple[Label, ...] = ()
    after: tuple[Label, ...] = ()


def _written(state: Mapping[str, Any], changes: list[_Change]) -> OrderedDict[str, Any]:
    """Return ``state`` with the changes made, the new keys before their followers."""
    place = {key: index for index, key in enumerate(state)}
    old = {new: change.keys for change in changes for new in change.written}
    at: dict[int, list[_Change]] = {}
    for change in changes:
        near = (*change.keys, *(key for name in change.followers for key in old.get(name, (name,))))
        at.setdefault(min(place[key] for key in near if key in place), []).append(change)
    dropped = {key for change in changes for key in change.keys}
    result: OrderedDict[str, Any] = OrderedDict()
    for index, key in enumerate(state):
        for change in sorted(at.get(index, ()), key=lambda one: -len(one.followers)):
            for new, source in change.written.items():
                result[new] = state[source] if isinstance(source, str) else source
        if key not in dropped:
            result[key] = state[key]
    return result


def _check_keys(state: Mapping[str, Any], changes: list[_Change]) -> None:
    for change in changes:
        missing = [key for key in change.keys if key not in state]
        if missing:
            raise ParametrizationError(
                f"{missing[0]}: model.state_dict() has no such key; a hook of the model renames or drops it.\n"
                "Call state_dict on the module below that hook."
            )


def _prefixes(one: Found) -> list[str]:
    return [path[: len(path) - len(one.fold.name)] for path in one.paths]


# --- plain values -------------------------------------------------------------------------------------------------


def _folded(found: list[Found]) -> list[_Change]:
    stored = [one for one in found if one.fold.stored_keys]
    with at_rest(stored):
        values = [one.fold.value() for one in stored]
    shared: dict[tuple[int, ...], list[Tensor]] = {}
    changes: list[_Change] = []
    for one, value in zip(stored, values, strict=True):
        check_finite(
            one,
            value,
            advice=".\n"
            'model.state_dict(), and spelling="torch" or "legacy", have the stored tensors as they are.',
        )
        # What is tied in the model is tied in the dict: one tensor for the same originals and the same value.
        known = shared.setdefault(tuple(map(id, one.fold.leaves())), [])
        tied = next((other for other in known if same(other, value)), None)
        if tied is None:
            known.append(value)
        changes += [_fold(one.fold, prefix, value if tied is None else tied) for prefix in _prefixes(one)]
    return changes


def _fold(fold: Fold, prefix: str, value: Tensor) -> _Change:
    return _Change(
        keys=tuple(prefix + key for key in fold.stored_keys),
        written={} if _is_transient(fold) else {prefix + fold.name: value},
        followers=tuple(prefix + name for name in followers(fold)),
        before=tuple(_label(inner, prefix) for inner in fold.nested()),
    )


def _is_transient(fold: Fold) -> bool:
    """Return whether the tensor is a buffer that no state dict has."""
    return all(name in fold.holder._non_persistent_buffers_set for name in fold.originals)


# --- renamed norms ------------------------------------------------------------------------------------------------


def _renamed(found: list[Found], spelling: Style) -> list[_Change]:
    others = [one for one in found if not all(_is_spelled(fold, spelling) for fold in one.fold.nested())]
    norms = [_norm(one.fold) for one in others]
    refused = [one for one, norm in zip(others, norms, strict=True) if norm is None]
    if refused:
        more = f"\n{len(refused) - 1} more like it." if len(refused) > 1 else ""
        raise ParametrizationError(
            f"{refused[0].path}: {refused[0].fold.what()} has no {spelling} spelling.\n"
            f'Write spelling="plain", or bake it first: torchkiln.bake(model, {refused[0].path!r}).{more}'
        )
    return [
        _rename(one.fold, prefix, spelling, cast(Norm, norm))
        for one, norm in zip(others, norms, strict=True)
        for prefix in _prefixes(one)
    ]


def _rename(fold: Fold, prefix: str, spelling: Style, norm: Norm) -> _Change:
    keys = tuple(prefix + key for key in fold.stored_keys)
    return _Change(
        keys=keys,
        written=dict(zip(norm_keys(prefix + fold.name, spelling, norm), keys, strict=True)),
        before=(_label(fold, prefix),),
        after=(Label(prefix, fold.name, spelling, norm),),
    )


def _is_spelled(fold: Fold, spelling: Style) -> bool:
    return fold.api == "prune" or _style(fold) == spelling


def _style(fold: Fold) -> Style:
    return "torch" if isinstance(fold, ChainFold) else "legacy"


def _norm(fold: Fold) -> Norm | None:
    """Return the norm that computes a tensor, where it is one alone that both styles spell."""
    if fold.inner:
        return None
    if isinstance(fold, HookFold):
        kind = hook_kind(fold)
        return kind if kind in ("spectral_norm", "weight_norm") else None
    return norm_of_chain(cast(ChainFold, fold).chain)


def _label(fold: Fold, prefix: str) -> Label:
    norm = hook_kind(fold) if isinstance(fold, HookFold) else ""
    return Label(prefix, fold.name, _style(fold), norm)
