"""The steps of a chain as JSON, and the steps built again: the catalogue's families, and our three built-ins.

A spec never says what is imported or run. Its name is looked up in the catalogue, among the built-ins, and in the
mapping that the caller passes; its arguments are numbers, texts, and further specs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln import families
from torchkiln._core.errors import ParametrizationError
from torchkiln._core.spec import VERSION
from torchkiln._core.spellings.entries import Entry
from torchkiln.parametrizations import _OrthMaps, _Orthogonal, _SpectralNorm, _WeightNorm

__all__ = ["BUILT_IN", "Also", "build_step", "spec_of"]

Also = Mapping[str, Callable[..., nn.Module]]
"""A caller's own classes, by the names in specs."""

# The built-ins have no spec() of their own: they are torch's classes in all but name, and torch's have none.
BUILT_IN = {"_Orthogonal": "orthogonal", "_SpectralNorm": "spectral_norm", "_WeightNorm": "weight_norm"}


def spec_of(step: nn.Module, *, where: str) -> dict[str, Any]:
    """Return the spec of a step.

    Args:
        step: Of the catalogue, a class with ``spec()``, or one of the built-ins, torch's as well as ours.
        where: The tensor, for messages.

    Raises:
        ParametrizationError: It has none.
    """
    cls = type(step)
    if cls.__name__ in BUILT_IN and cls.__module__.partition(".")[0] in ("torch", "torchkiln"):
        return _built_in_spec(step, BUILT_IN[cls.__name__])
    known = getattr(families, cls.__name__, None)
    if known is not None and known is not cls:
        raise ParametrizationError(
            f"{where}: {cls.__module__}.{cls.__name__} has the name of a family of the catalogue. Rename the class."
        )
    if not hasattr(step, "spec"):
        raise ParametrizationError(
            f"{where}: {cls.__name__} does not say what it is, so no file can.\n"
            "Derive it from torchkiln.Parametrization, or bake the tensor before the file is written."
        )
    spec: dict[str, Any] = step.spec()  # type: ignore[operator]  # mypy: Tensor | Module
    return spec


def _built_in_spec(step: Any, name: str) -> dict[str, Any]:
    arguments: dict[str, Any]
    if name == "weight_norm":
        arguments = {"dim": step.dim}
    elif name == "spectral_norm":
        # A vector has no power iteration.
        arguments = {
            "dim": step.dim,
            "eps": step.eps,
            "n_power_iterations": getattr(step, "n_power_iterations", 1),
        }
    else:
        arguments = {"map": step.orthogonal_map.name, "use_trivialization": "base" in step._buffers}
    return {"name": name, "version": VERSION, "arguments": arguments}


def build_step(
    spec: Mapping[str, Any], entry: Entry, *, also: Also | None, buffers: Mapping[str, Tensor]
) -> nn.Module:
    """Build a step from its spec, in eval mode.

    Args:
        spec: As :func:`spec_of` returned it, also after a way through JSON.
        entry: Shape and dtype of the tensor that it computes.
        also: A caller's own classes.
        buffers: Its buffers, by their names within it.

    Raises:
        ParametrizationError: A name, a version, an argument or a buffer is not known.
    """
    name = spec.get("name")
    if name not in BUILT_IN.values() or name in (also or {}):
        return families.from_spec(spec, also=also, buffers=buffers).eval()
    if spec.get("version") != VERSION:
        raise ParametrizationError(
            f"{name}: this spec has version {spec.get('version')!r}, and {VERSION} is the one known here.\n"
            "Read it with the torchkiln that wrote it, or a newer one."
        )
    step = _built_in(str(name), spec["arguments"], entry)
    for path, tensor in buffers.items():
        if path not in step._buffers:
            raise ParametrizationError(f"{name} has no buffer {path!r}.")
        step._buffers[path] = tensor
    return step.eval()


def _built_in(name: str, arguments: Mapping[str, Any], entry: Entry) -> nn.Module:
    try:
        if name == "weight_norm":
            return _WeightNorm(**arguments)
        # The shape is all that they read; on the meta device no power iteration costs anything.
        weight = torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        if name == "spectral_norm":
            return _SpectralNorm(weight, **arguments)
        chosen, trivialized = _OrthMaps[arguments["map"]], arguments["use_trivialization"]
        return _Orthogonal(weight, chosen, use_trivialization=bool(trivialized))
    except (KeyError, TypeError) as error:
        raise ParametrizationError(f"{name} does not take the arguments {arguments!r:.200}.") from error
