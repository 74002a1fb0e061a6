"""State that follows the originals: advanced at most once for each change of them, by no read, and in no recomputation.

Some steps keep buffers that follow the tensor they see: the singular vectors of spectral norm. Torch moves them on
every read in training mode, so that looking at a shape, or recomputing a checkpointed segment, changes the model.
Here a read *computes* the advanced state, once for each change of the originals, and uses it; the buffers take it over
when the owner's forward ends, or when the mode changes. See ``README.md`` beside this file, "State".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from torchkiln._core.chain import chains_of, is_parametrized, within
from torchkiln._core.sharded import beside
from torchkiln._core.tracing import is_recorded

__all__ = ["AdvancingStep", "advances_state", "follow_forward", "frozen", "unfollow_forward", "value_at_rest"]

State = tuple[Tensor, ...]


class _Progress(NamedTuple):
    """How far the state has come."""

    change: tuple[Any, ...] | None  # the originals that the state was last advanced for; None: to be advanced
    state: State  # the state in use, in tensors that nothing writes to
    ahead: bool  # whether the buffers do not have it yet
    buffers: list[tuple[str, int, int]]  # those it belongs to, by id and version: after a load it is void


class AdvancingStep(nn.Module):
    """A step whose buffers advance in training, at most once for each change of the originals.

    A subclass names its buffers in ``state_names``, defines :meth:`advance`, and asks :meth:`current_state` for the
    state in ``forward``.
    """

    advances_state: ClassVar[bool] = True
    state_names: ClassVar[tuple[str, ...]] = ()
    _progress: _Progress | None = None

    def advance(self, x: Tensor, *state: Tensor) -> State:
        """Return the state after ``state`` for the input ``x``, as new tensors; called without grad."""
        raise NotImplementedError(f"{type(self).__name__} must define advance()")

    def adopt(self, *state: Tensor) -> State:
        """Return ``state``, which others may have written into the buffers, as a state to evaluate with."""
        return state

    def current_state(self, x: Tensor) -> State:
        """Return the state to evaluate ``x`` with, in tensors that nothing writes to.

        In eval mode it is the state as it is; in training mode it is advanced, unless it has been for these originals.
        """
        change = self.__dict__.pop("_change", None)
        if is_recorded():
            buffers = self._state_buffers()
            return self._advanced_in_place(x, buffers) if self.training else self.adopt(*buffers)
        progress = self._current_progress()
        if not self._is_behind(progress, change):
            return progress.state
        with torch.no_grad():
            state = self.advance(x.detach(), *progress.state)
        return self._advanced(change, state)

    @staticmethod
    def current_states(
        steps: Sequence[AdvancingStep], advance: Callable[[list[int], list[State]], Sequence[State]]
    ) -> list[State]:
        """Return :meth:`current_state` of each step, those that are to advance advanced by one call of ``advance``.

        It is given which of the steps they are, and their states.
        """
        changes = [step.__dict__.pop("_change", None) for step in steps]
        found = [step._current_progress() for step in steps]
        states = [progress.state for progress in found]
        behind = [i for i, step in enumerate(steps) if step._is_behind(found[i], changes[i])]
        if behind:
            with torch.no_grad():
                new = advance(behind, [states[i] for i in behind])
            for i, state in zip(behind, new, strict=True):
                states[i] = steps[i]._advanced(changes[i], state)
        return states

    def _current_progress(self) -> _Progress:
        progress = self._valid_progress()
        if progress is None:
            with torch.no_grad():
                found = self.adopt(*[buffer.clone() for buffer in self._state_buffers()])
            progress = self._keep(None, found, ahead=False)
        return progress

    def _is_behind(self, progress: _Progress, change: tuple[Any, ...] | None) -> bool:
        return self.training and (change is None or progress.change != change)

    def _advanced(self, change: tuple[Any, ...] | None, state: State) -> State:
        if change is None:  # not in a chain of ours: as torch, by every call
            self._write(state)
            return state
        return self._keep(change, state, ahead=True).state

    def _keep(self, change: tuple[Any, ...] | None, state: State, *, ahead: bool) -> _Progress:
        progress = _Progress(change, state, ahead, self._marks())
        # Tensors made under these modes must not outlive them.
        if not (torch.is_inference_mode_enabled() or torch._C._are_functorch_transforms_active()):
            self.__dict__["_progress"] = progress
        return progress

    def commit(self, *, advance_next: bool = False) -> None:
        """Let the buffers take over the state in use; ``advance_next`` makes the next read in training advance it."""
        progress = self._valid_progress()
        if progress is not None and (progress.ahead or advance_next):
            self._write(progress.state)
            self._keep(None if advance_next else progress.change, progress.state, ahead=False)

    def train(self, mode: bool = True) -> AdvancingStep:
        """Set the mode, and let the buffers take over the state in use."""
        self.commit()
        return super().train(mode)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        progress = self._valid_progress()
        if progress is not None and progress.ahead:
            destination.update(zip((prefix + name for name in self.state_names), progress.state, strict=True))

    def _state_buffers(self) -> State:
        buffers = self._buffers
        return tuple([buffers[name] for name in self.state_names if name in buffers])  # type: ignore[misc]  # none is None

    def _marks(self) -> list[tuple[str, int, int]]:
        get = self._buffers.get
        return [
            (name, id(held), _version(held)) for name in self.state_names if (held := get(name)) is not None
        ]

    def _valid_progress(self) -> _Progress | None:
        progress, buffers = self._progress, self._buffers
        if progress is not None:
            for name, mark, version in progress.buffers:
                buffer = buffers.get(name)
                if buffer is None or id(buffer) != mark or _version(buffer) != version:
                    return None
        return progress

    def _write(self, state: State) -> None:
        # In place: DistributedDataParallel and DataParallel hold on to the buffers themselves.
        for buffer, tensor in zip(self._state_buffers(), state, strict=True):
            buffer.copy_(beside(tensor, buffer))

    def _advanced_in_place(self, x: Tensor, buffers: State) -> State:
        with torch.no_grad():
            self._write(self.advance(x.detach(), *buffers))
            return tuple(buffer.clone() for buffer in buffers)


def _version(buffer: Tensor) -> int:
    try:
        return buffer._version
    except RuntimeError:  # made in inference mode, where writes are not counted
        return 0


def advances_state(step: nn.Module) -> bool:
    """Return whether reading ``step`` in training mode advances its buffers: ours, or torch's own spectral norm."""
    return getattr(type(step), "advances_state", False) or type(step).__qualname__ == "_SpectralNorm"


def follow_forward(module: nn.Module, step: nn.Module) -> None:
    """Let the state of ``step``, newly registered on ``module``, be committed whenever ``module``'s forward ends."""
    if isinstance(step, AdvancingStep):
        step.commit(advance_next=True)  # the checks of the registration were no use of the tensor
        if _commit_after_forward not in module._forward_hooks.values():
            module.register_forward_hook(_commit_after_forward)


def unfollow_forward(module: nn.Module) -> None:
    """Undo :func:`follow_forward` once no step of ``module`` advances."""
    if module._forward_hooks and not any(True for _ in _advancing_steps(module)):
        for key, hook in list(module._forward_hooks.items()):
            if hook is _commit_after_forward:
                del module._forward_hooks[key]


def _commit_after_forward(module: nn.Module, _arguments: Any, _output: Any) -> None:
    if module.training and not is_recorded():
        for step in _advancing_steps(module):
            step.commit()


def _advancing_steps(module: nn.Module) -> Iterator[AdvancingStep]:
    if is_parametrized(module):
        for chain in chains_of(module).values():
            for step in within(chain):
                if isinstance(step, AdvancingStep):
                    yield step


@contextmanager
def frozen(chain: nn.Module) -> Iterator[None]:
    """Keep the state of ``chain``'s steps while the context is open.

    Steps that advance are put into eval mode for the time of the context; all others run in the mode they are in.
    """
    advancing = [step for step in within(chain) if step.training and advances_state(step)]
    for step in advancing:
        step.training = False
    try:
        yield
    finally:
        for step in advancing:
            step.training = True


def value_at_rest(chain: nn.Module) -> Tensor:
    """Return what the last read of ``chain`` returned, changing nothing."""
    with frozen(chain):
        return chain()  # type: ignore[no-any-return]  # nn.Module.__call__ returns Any
