"""Whole models: take every norm, parametrization and pruning out in one call, or list them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from torchkiln._core.errors import NothingToFoldError, ParametrizationError
from torchkiln._core.optimizers import Optimizers
from torchkiln._core.warn import warn
from torchkiln.models._baked import baked
from torchkiln.models._check import does_nothing, round_to
from torchkiln.models._find import Found, Patterns, computed_tensors, select
from torchkiln.models._functional import functional_call
from torchkiln.models._report import Report, Row
from torchkiln.models._settle import Outcome, announce, at_rest, checked_values, commit, outcomes
from torchkiln.models._state_dict import load_state_dict, state_dict
from torchkiln.models._ties import replacements, tied_paths

__all__ = [
    "Report",
    "Row",
    "bake",
    "baked",
    "functional_call",
    "load_state_dict",
    "restore",
    "state_dict",
    "summary",
]


def bake(
    model: nn.Module,
    include: Patterns = None,
    *,
    exclude: Patterns = None,
    strict: bool = False,
    dtype: torch.dtype | None = None,
    optimizer: Optimizers = None,
) -> Report:
    """Replace every computed tensor of ``model`` by a plain one with its value, whatever computed it.

    Found are parametrizations by torchkiln and by torch, the older hook-based ``torch.nn.utils.weight_norm`` and
    ``spectral_norm``, and ``torch.nn.utils.prune``, also nested in each other. The value is the one of eval mode, so
    that outputs in eval stay bit for bit what they were; no power iteration runs and no random number is drawn. The
    tensors have the names, order and kinds of the module that never had a norm, as far as torch leaves a trace of it.

    All or nothing: every value is computed and found finite before anything changes; each tensor is read back and
    compared with it, bit for bit, afterwards; an error half way puts all back. A bake that does nothing warns: there
    was nothing to bake, or every value is that of its original, as with an adapter that was never loaded.

    One original that becomes the tensor stays the same ``Parameter``, so an optimizer keeps it; several (weight norm)
    become a new one, which an optimizer passed as ``optimizer`` gets in their place. Tied originals stay tied where the
    values are equal; where they are not, or the original is a plain parameter elsewhere too, the baked tensor gets a
    parameter of its own. Rows name what is tied.

    Args:
        model: The model to change, in place.
        include: Pattern or patterns (``fnmatch``) on the path of the tensor, such as ``"encoder.*.weight"``; all
            computed tensors where it is None.
        exclude: Patterns of tensors to leave as they are.
        strict: Raise where there is nothing to bake, instead of a warning.
        dtype: Store the baked floating-point tensors in this dtype; the rows say what the rounding costs. By default
            each has the dtype it was computed in, and is not rounded.
        optimizer: The optimizer, or optimizers, that train the model. A new parameter takes the place and the state
            (moments, step count) of the old one with its shape, the last of several; what has no use any more
            leaves. The groups stay the same objects. One that is not passed warns at its next step.

    Returns:
        A report with a row for each tensor; false where there was nothing to bake.

    Raises:
        ParametrizationError: A value is not finite or does not fit ``dtype``, or the model does not keep it.
        NothingToFoldError: Nothing was to be baked and ``strict`` is set.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchkiln import parametrizations
        >>> model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 8)), nn.ReLU(), nn.Linear(8, 2))
        >>> before = model(torch.ones(1, 4))
        >>> print(bake(model))
        bake: 1 tensor baked
        tensor    computed by  api        shape  parameters
        --------  -----------  ---------  -----  ----------
        0.weight  weight_norm  torchkiln  8 x 4  40
        >>> list(model.state_dict())
        ['0.weight', '0.bias', '2.weight', '2.bias']
        >>> torch.equal(model(torch.ones(1, 4)), before)
        True
    """
    found = computed_tensors(model)
    chosen = select(found, include, exclude)
    computed = checked_values(chosen)
    values, rounding = round_to(chosen, computed, dtype)
    report = _report("bake", model, found, chosen, [value.shape for value in values], rounding)
    results = outcomes(model, chosen, values)
    if chosen and does_nothing(chosen, values):
        warn(
            f"bake: every baked value is that of its original, bit for bit ({_listed([one.path for one in chosen])}).\n"
            "Was the model trained, or its adapter or checkpoint loaded?"
        )
    return _finish(model, report, chosen, results, strict=strict, optimizer=optimizer)


def restore(
    model: nn.Module,
    include: Patterns = None,
    *,
    exclude: Patterns = None,
    strict: bool = False,
    optimizer: Optimizers = None,
) -> Report:
    """Replace every computed tensor of ``model`` by the original it is computed from.

    It is what ``remove_parametrizations(..., leave_parametrized=False)`` does to one tensor: the stored tensor comes
    back as it is, the step is gone. Masks of pruning are dropped. For spectral norm and for masks this is the weight
    before the norm; for a map whose original lives in another space (``orthogonal``) it is that point, not a weight.

    Args:
        model: The model to change, in place.
        include: As for :func:`bake`.
        exclude: As for :func:`bake`.
        strict: Raise where there is nothing to restore, instead of a warning.
        optimizer: The optimizer, or optimizers, that train the model; the parameters of the steps leave them.

    Returns:
        A report with a row for each tensor.

    Raises:
        ParametrizationError: A tensor has several originals, as under weight norm; nothing was changed.
        NothingToFoldError: Nothing was to be restored and ``strict`` is set.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torch.nn.utils import prune
        >>> layer = nn.Linear(4, 4)
        >>> before = layer.weight
        >>> _ = prune.l1_unstructured(layer, "weight", amount=0.5)
        >>> len(restore(layer))
        1
        >>> layer.weight is before
        True
    """
    found = computed_tensors(model)
    chosen = select(found, include, exclude)
    several = [one.path for one in chosen if one.fold.survivor() is None]
    if several:
        raise ParametrizationError(
            f"{_listed(several)}: computed from several tensors, none of which is the original; "
            "nothing was changed.\nUse bake for them, and exclude them here."
        )
    announce("restore", chosen)
    results = [Outcome(one.fold, one.fold.leaves()[0], None) for one in chosen]
    report = _report("restore", model, found, chosen, [result.tensor.shape for result in results])
    return _finish(model, report, chosen, results, strict=strict, optimizer=optimizer)


def summary(model: nn.Module, include: Patterns = None, *, exclude: Patterns = None) -> Report:
    """List the computed tensors of ``model``, what computes and what stores them; changes nothing.

    A shape that the stored tensors do not tell (a user's step on several originals, or one registered as unsafe) is
    found by computing the tensor once, in eval mode.

    Args:
        model: The model to look at.
        include: As for :func:`bake`.
        exclude: As for :func:`bake`.

    Returns:
        A report with a row for each tensor.

    Example:
        >>> from torch import nn
        >>> from torchkiln import parametrizations
        >>> for row in summary(parametrizations.spectral_norm(nn.Linear(4, 8))):
        ...     print(row.path, row.what, row.shape, row.parameters)
        weight spectral_norm (8, 4) 32
    """
    found = computed_tensors(model)
    chosen = select(found, include, exclude)
    return _report("summary", model, found, chosen, map(_shape, chosen))


def _finish(
    model: nn.Module,
    report: Report,
    chosen: list[Found],
    results: list[Outcome],
    *,
    strict: bool,
    optimizer: Optimizers,
) -> Report:
    if not report:
        if strict:
            raise NothingToFoldError(str(report))
        warn(str(report))
    commit(results, model=model, replaced=replacements(model, chosen), optimizer=optimizer)
    return report


def _report(
    verb: str,
    model: nn.Module,
    found: list[Found],
    chosen: list[Found],
    shapes: Iterable[torch.Size],
    rounding: Iterable[float] = (),
) -> Report:
    tied = tied_paths(model, found, chosen)
    rows = tuple(map(_row, chosen, shapes, tied, [*rounding] or [0.0] * len(chosen)))
    return Report(verb, rows, len(found) - len(chosen))


def _row(one: Found, shape: torch.Size, tied: tuple[str, ...], rounding: float) -> Row:
    parameters = {id(parameter): parameter.numel() for parameter in one.fold.parameters()}
    return Row(
        path=one.path,
        what=one.fold.what(),
        api=one.fold.api,
        shape=tuple(shape),
        keys=tuple(one.prefix + key for key in one.fold.stored_keys),
        parameters=sum(parameters.values()),
        tied=tied,
        rounding=rounding,
    )


def _shape(one: Found) -> torch.Size:
    shape = one.fold.known_shape()
    if shape is None:
        with at_rest([one]):
            shape = one.fold.value().shape
    return shape


def _listed(paths: list[str]) -> str:
    shown = ", ".join(paths[:5])
    return f"{shown} and {len(paths) - 5} more" if len(paths) > 5 else shown
