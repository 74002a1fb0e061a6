"""Specs: what a parametrization is, as JSON, and the parametrization built again from it.

A spec is ``{"name": ..., "version": 1, "arguments": {...}}``, with ``"state"`` for what a right inverse noted beside
its buffers. Names are looked up in the mapping that the caller passes and nowhere else: no file
decides what is imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from torchkiln._core.errors import ParametrizationError

__all__ = ["VERSION", "build", "encode"]

VERSION = 1
_KEYS = {"name", "version", "arguments"}


def encode(value: Any, where: str) -> Any:
    """Return an argument as JSON has it: parametrizations as their specs, tensors as None (buffers hold them).

    Raises:
        ParametrizationError: JSON has nothing like it.
    """
    if isinstance(value, (str, bool, int, float)) or value is None:
        return value
    if isinstance(value, Tensor):
        return None
    if isinstance(value, (list, tuple, nn.ModuleList)):
        return [encode(item, where) for item in value]
    if isinstance(value, nn.Module) and hasattr(value, "spec"):
        return value.spec()  # type: ignore[operator]  # mypy: Tensor | Module
    raise ParametrizationError(
        f"{where} has no JSON spec: got a {type(value).__name__}.\n"
        "Use a family of the catalogue, or bake the tensor before the file is written."
    )


def build(
    spec: Mapping[str, Any],
    known: Mapping[str, Callable[..., nn.Module]],
    *,
    buffers: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Build a parametrization from its spec, and give it the buffers that a state dict holds for it.

    Args:
        spec: What ``Parametrization.spec()`` returned, also after a way through JSON.
        known: Which class a name stands for.
        buffers: Buffers by their names within the parametrization, such as ``base`` or ``left.base``.

    Raises:
        ParametrizationError: The version, a name, an argument or a buffer is not known.
    """
    step = _build(spec, known)
    for path, tensor in (buffers or {}).items():
        owner_path, _, name = path.rpartition(".")
        owner = dict(step.named_modules()).get(owner_path)
        if owner is None or name not in owner._buffers:
            raise ParametrizationError(f"{spec['name']} has no buffer {path!r}.")
        owner._buffers[name] = tensor
    return step


def _build(spec: Mapping[str, Any], known: Mapping[str, Callable[..., nn.Module]]) -> nn.Module:
    if not _is_spec(spec):
        raise ParametrizationError(f"A spec has the keys {', '.join(sorted(_KEYS))}. Got {spec!r:.200}.")
    name, version = spec["name"], spec["version"]
    if version != VERSION:
        raise ParametrizationError(
            f"{name}: this spec has version {version!r}, and {VERSION} is the one known here.\n"
            "Read it with the torchkiln that wrote it, or a newer one."
        )
    if name not in known:
        raise ParametrizationError(
            f"{name!r} is no family of the catalogue.\nPass also={{{name!r}: the class}} if it is your own."
        )
    try:
        step = known[name](**{key: _decode(value, known) for key, value in spec["arguments"].items()})
    except TypeError as error:
        raise ParametrizationError(f"{name} does not take these arguments: {error}.") from error
    for key, value in spec.get("state", {}).items():
        if key not in getattr(step, "remembers", ()):
            raise ParametrizationError(f"{name} notes no {key!r}.")
        setattr(step, key, tuple(value) if isinstance(value, list) else value)
    return step


def _decode(value: Any, known: Mapping[str, Callable[..., nn.Module]]) -> Any:
    if isinstance(value, list):
        return tuple(_decode(item, known) for item in value)
    return _build(value, known) if _is_spec(value) else value


def _is_spec(value: Any) -> bool:
    return isinstance(value, Mapping) and value.keys() >= _KEYS
