"""Whole models: take every norm, parametrization and pruning out in one call, or list them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from torchkiln._core.errors import NothingToFoldError, ParametrizationError
from torchkiln.models._find import Found, Patterns, computed_tensors, select
from torchkiln.models._report import Report, Row
from torchkiln.models._settle import Outcome, at_rest, checked_values, commit, outcomes

__all__ = ["Report", "Row", "bake", "restore", "summary"]


def bake(
    model: nn.Module, include: Patterns = None, *, exclude: Patterns = None, strict: bool = False
) -> Report:
    """Replace every computed tensor of ``model`` by a plain one with its value, whatever computed it.

    Found are parametrizations by torchkiln and by torch, the older hook-based ``torch.nn.utils.weight_norm`` and
    ``spectral_norm``, and ``torch.nn.utils.prune``, also nested in each other. The value is the one of eval mode, so
    that outputs in eval stay bit for bit what they were; no power iteration runs and no random number is drawn. The
    tensors have the names, order and kinds of the module that never had a norm, as far as torch leaves a trace of it.

    All or nothing: every value is computed and checked before anything changes, and an error half way puts all back.

    One original that becomes the tensor stays the same ``Parameter``, so an optimizer keeps it; several (weight norm)
    become a new one. Tied originals stay tied where the values are equal; where they are not, or the original is a
    plain parameter elsewhere too, the baked tensor gets a parameter of its own.

    Args:
        model: The model to change, in place.
        include: Pattern or patterns (``fnmatch``) on the path of the tensor, such as ``"encoder.*.weight"``; all
            computed tensors where it is None.
        exclude: Patterns of tensors to leave as they are.
        strict: Raise where there is nothing to bake.

    Returns:
        A report with a row for each tensor; false where there was nothing to bake.

    Raises:
        ParametrizationError: A value is not finite.
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
    values = checked_values(chosen)
    return _finish(
        _report("bake", found, chosen, [value.shape for value in values]),
        outcomes(model, chosen, values),
        strict=strict,
    )


def restore(
    model: nn.Module, include: Patterns = None, *, exclude: Patterns = None, strict: bool = False
) -> Report:
    """Replace every computed tensor of ``model`` by the original it is computed from.

    It is what ``remove_parametrizations(..., leave_parametrized=False)`` does to one tensor: the stored tensor comes
    back as it is, the step is gone. Masks of pruning are dropped. For spectral norm and for masks this is the weight
    before the norm; for a map whose original lives in another space (``orthogonal``) it is that point, not a weight.

    Args:
        model: The model to change, in place.
        include: As for :func:`bake`.
        exclude: As for :func:`bake`.
        strict: Raise where there is nothing to restore.

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
    results = [Outcome(one.fold, one.fold.leaves()[0], None) for one in chosen]
    return _finish(
        _report("restore", found, chosen, [result.tensor.shape for result in results]), results, strict=strict
    )


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
    return _report("summary", found, chosen, map(_shape, chosen))


def _finish(report: Report, results: list[Outcome], *, strict: bool) -> Report:
    if strict and not report:
        raise NothingToFoldError(str(report))
    commit(results)
    return report


def _report(verb: str, found: list[Found], chosen: list[Found], shapes: Iterable[torch.Size]) -> Report:
    rows = tuple(_row(one, shape) for one, shape in zip(chosen, shapes, strict=True))
    return Report(verb, rows, len(found) - len(chosen))


def _row(one: Found, shape: torch.Size) -> Row:
    parameters = {id(parameter): parameter.numel() for parameter in one.fold.parameters()}
    return Row(
        path=one.path,
        what=one.fold.what(),
        api=one.fold.api,
        shape=tuple(shape),
        keys=tuple(one.prefix + key for key in one.fold.stored_keys()),
        parameters=sum(parameters.values()),
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
