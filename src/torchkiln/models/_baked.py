"""Run a model on plain weights for a while: computed tensors step aside, and come back as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchkiln._core.engine import balance, prepare
from torchkiln._core.errors import ParametrizationError
from torchkiln.models._find import Found, Patterns, computed_tensors, select
from torchkiln.models._settle import Outcome, checked_values, commit, new_tensor, same

__all__ = ["baked"]


@contextmanager
def baked(model: nn.Module, include: Patterns = None, *, exclude: Patterns = None) -> Iterator[nn.Module]:
    """Let ``model`` have plain tensors while the context is open, for inference at the cost of a plain model.

    Inside, the model is what :func:`~torchkiln.bake` makes of it: the values of eval mode in plain parameters, modules
    of their own classes, no hooks of norms, plain keys in ``state_dict()``. It can be copied, saved, exported and
    compiled. Afterwards, also after an exception, everything is back: classes, the original parameters and buffers (the
    same objects, so optimizers keep them), steps, hooks, and the training mode of every module. Nothing stored changes
    in between, no power iteration runs and no random number is drawn. Contexts nest.

    The values are those of the moment of entering. What is done to a plain tensor inside does not reach the originals:
    a training step, ``load_state_dict``, ``.to(dtype)``. It is an error, raised on leaving, when the model is whole
    again. Writes to other tensors (a bias, running statistics) stay.

    It is a change of the model, seen by all threads: do not train it in another thread meanwhile, and do not let two
    threads or tasks open contexts on one model that overlap without being nested.

    Args:
        model: The model.
        include: As for :func:`~torchkiln.bake`.
        exclude: As for :func:`~torchkiln.bake`.

    Yields:
        ``model``.

    Raises:
        ParametrizationError: A value is not finite, and nothing was changed; or, on leaving, a plain tensor was
            written to, converted, replaced, or got a gradient.

    Example:
        >>> import torch, torchkiln
        >>> from torch import nn
        >>> model = nn.Sequential(torchkiln.parametrizations.weight_norm(nn.Linear(4, 2)))
        >>> x = torch.ones(1, 4)
        >>> before = model(x)
        >>> with torch.no_grad(), torchkiln.baked(model):
        ...     print(type(model[0]).__name__, list(model.state_dict()), torch.equal(model(x), before))
        Linear ['0.weight', '0.bias'] True
        >>> list(model.state_dict())
        ['0.bias', '0.parametrizations.weight.original0', '0.parametrizations.weight.original1']
    """
    chosen = select(computed_tensors(model), include, exclude)
    results = _plain_tensors(chosen)
    training = {module: module.training for module in model.modules()}
    saved = [_Saved(module, prefix) for module, prefix in _owners(chosen).items()]
    commit(results)
    for one in saved:
        one.note_plain()
    marks = [_mark(result.tensor) for result in results]
    try:
        yield model
    except BaseException:
        _restore(saved, training)
        raise
    prepare(one.module for one in saved)
    written = {
        one.path
        for one, result, mark in zip(chosen, results, marks, strict=True)
        if result.tensor.grad is not None or _mark(result.tensor) != mark
    }
    lost = written | _restore(saved, training)
    paths = [one.path for one in chosen]
    _check_untouched(sorted(lost, key=lambda path: paths.index(path) if path in paths else len(paths)))


def _plain_tensors(chosen: list[Found]) -> list[Outcome]:
    """Compute the values, in tensors of their own; what is tied and has equal values shares one, as after bake."""
    made: dict[tuple[int, ...], list[Tensor]] = {}
    results = []
    with torch.inference_mode(False):
        for one, value in zip(chosen, checked_values(chosen), strict=True):
            tied = made.setdefault(tuple(map(id, one.fold.leaves())), [])
            tensor = next((known for known in tied if same(known, value)), None)
            if tensor is None:
                tensor = new_tensor(one.fold, value)
                tied.append(tensor)
            results.append(Outcome(one.fold, tensor, None))
    return results


def _owners(chosen: list[Found]) -> dict[nn.Module, str]:
    """Return the modules that change, and the prefix of their tensors' paths."""
    owners: dict[nn.Module, str] = {}
    for one in chosen:
        for fold in one.fold.nested():
            for module in (fold.module, fold.module._modules.get("parametrizations")):
                if module is not None:
                    owners.setdefault(module, one.prefix)
    return owners


def _restore(saved: list[_Saved], training: dict[nn.Module, bool]) -> set[str]:
    """Put everything back, and return the paths of what was exchanged for something else meanwhile."""
    prepare(one.module for one in saved)
    exchanged = {path for one in saved for path in one.restore()}
    balance(one.module for one in saved)
    for module, mode in training.items():
        module.training = mode
    return exchanged


def _check_untouched(paths: list[str]) -> None:
    if paths:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        raise ParametrizationError(
            f"{', '.join(paths[:3])}{more}: changed, or given a gradient, inside baked(); the model has its stored "
            "tensors back, and that is lost.\nTrain, load and convert outside of the context, or bake(model) for good; "
            "torch.autograd.grad gives the gradients of inputs alone."
        )


def _mark(tensor: Tensor) -> tuple[Any, ...]:
    """Return what changes when ``tensor`` is written to."""
    place = (tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, tensor._version)
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.dtype not in _HASHED:
        return place
    # The version misses what is written through .data.
    return (*place, torch.hash_tensor(tensor.detach()).view(torch.int64).item())


_HASHED = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.uint8}

# The dicts and sets of every module: tensors, submodules, hooks. "" stands for its attributes.
_CONTAINERS = [name for name, value in vars(nn.Module()).items() if isinstance(value, (dict, set))]
Content = dict[Any, Any]


class _Saved:
    """A module as it was before it was made plain, and the way back."""

    def __init__(self, module: nn.Module, prefix: str) -> None:
        self.module, self.prefix = module, prefix
        self.before_type, self.before = type(module), _contents(module)

    def note_plain(self) -> None:
        self.plain_type, self.plain = type(self.module), _contents(self.module)

    def restore(self) -> list[str]:
        """Undo what made the module plain; return the paths of what was exchanged for something else meanwhile."""
        now = _contents(self.module)
        exchanged = [
            f"{self.prefix}{key}"
            for name in ("_parameters", "_buffers")
            for key in _differing(self.before[name], self.plain[name])
            if key in _differing(self.plain[name], now[name])
        ]
        if type(self.module) is not self.plain_type:
            exchanged = exchanged or [f"{self.prefix}parametrizations"]
        if exchanged:  # by another norm, perhaps: what that has put there and moved goes back as well
            now = self.plain
        object.__setattr__(self.module, "__class__", self.before_type)
        for name, before in self.before.items():
            undone = _differing(before, self.plain[name])
            if undone or exchanged:
                _refill(_container(self.module, name), _merged(before, now[name], undone))
        return exchanged


def _contents(module: nn.Module) -> dict[str, Content]:
    return {name: _as_dict(_container(module, name)) for name in ("", *_CONTAINERS)}


def _container(module: nn.Module, name: str) -> Any:
    return vars(module)[name] if name else vars(module)


def _as_dict(container: Any) -> Content:
    return container.copy() if isinstance(container, dict) else dict.fromkeys(container)


def _differing(one: Content, other: Content) -> set[Any]:
    """Return the keys that only one of two contents has, or that stand for another object in it."""
    return {
        key
        for key in one.keys() | other.keys()
        if key not in one or key not in other or one[key] is not other[key]
    }


def _merged(before: Content, now: Content, undone: set[Any]) -> Content:
    """Return ``now`` with the keys ``undone`` as they were ``before``, in the order of before."""
    kept = {key: value for key, value in now.items() if key not in undone}
    back = {key: value for key, value in before.items() if key in undone or key in kept}
    return back | kept


def _refill(container: Any, content: Content) -> None:
    container.clear()
    container.update(content)
