"""Edit one step of a chain, by index or name: insert, remove, replace, disable, enable; the others stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from torchkiln._core.chain import ParametrizationList, chains_of, enabled_steps, is_parametrized, steps_of
from torchkiln._core.checks import check_step
from torchkiln._core.engine import prepare
from torchkiln._core.errors import ParametrizationError, describe
from torchkiln._core.inject import base_class
from torchkiln._core.optimizers import Optimizers
from torchkiln._core.register import register_parametrization, tied_places
from torchkiln._core.remove import remove_parametrizations
from torchkiln._core.request import check_request
from torchkiln._core.restack import commit_steps, is_in, originals_for, received, stand_in, without
from torchkiln._core.state import follow_forward, unfollow_forward
from torchkiln._core.ties import Place, chain_slots, places_within

__all__ = ["Stack", "stack", "word_for"]

# What a step of the drop-in is called: the function that registers it.
_WORDS = {"_Orthogonal": "orthogonal", "_SpectralNorm": "spectral_norm", "_WeightNorm": "weight_norm"}


def word_for(step: nn.Module) -> str:
    """Return what to call ``step`` where it has no name: its class, or the function that makes it."""
    name = (base_class(type(step)) or type(step)).__name__
    return _WORDS.get(name, name)


def stack(module: nn.Module, tensor_name: str) -> Stack:
    """Return the stack of steps that computes a tensor of ``module``, to look at and to edit.

    Args:
        module: The module that holds the tensor.
        tensor_name: A parameter, a buffer or a parametrized tensor of ``module``; the stack of a plain one is empty.

    Returns:
        A view: it reads and edits ``module`` itself, and stays good whatever is registered and removed.

    Raises:
        ParametrizationError: ``module`` has no such tensor.

    Example:
        >>> import torch, torchkiln
        >>> from torch import nn
        >>> class Scale(nn.Module):
        ...     def __init__(self, factor):
        ...         super().__init__()
        ...         self.factor = factor
        ...     def forward(self, X):
        ...         return X * self.factor
        >>> layer = nn.Linear(2, 2)
        >>> steps = torchkiln.stack(layer, "weight")
        >>> steps.append(Scale(2.0))
        >>> steps.append(Scale(3.0), name="triple")
        >>> steps
        weight: Scale, triple
        >>> before = layer.weight
        >>> with steps.disabled("triple"):
        ...     torch.allclose(layer.weight * 3, before)
        True
        >>> steps.remove("Scale").factor
        2.0
        >>> torch.allclose(layer.weight * 2, before)
        True
    """
    if not (is_parametrized(module, tensor_name) or tensor_name in {**module._parameters, **module._buffers}):
        raise ParametrizationError(
            f"Module '{describe(module)}' does not have a parameter, a buffer, or a parametrized element "
            f"with name '{tensor_name}'\nTake the stack from the module that holds the tensor itself: "
            'stack(model.encoder, "weight").'
        )
    return Stack(module, tensor_name)


class Stack:
    """The steps of one tensor, first to last; made by :func:`stack`.

    A key is an index or a name. A step's name is the one given to :meth:`append`, :meth:`insert` or :meth:`replace`,
    else the name of its class (``"Scale"``), or of the function that registers it (``"spectral_norm"``). Names belong
    to the module: copies and pickles have them, state dicts do not.

    Every edit is all or nothing, and leaves the modules, tensors and settings of the other steps alone. State-dict keys
    have the index of a step, as in any ``nn.ModuleList``, so the steps after an inserted or removed one move by one.

    Example:
        >>> import torchkiln
        >>> from torch import nn
        >>> layer = torchkiln.parametrizations.spectral_norm(nn.Linear(2, 2))
        >>> steps = torchkiln.stack(layer, "weight")
        >>> steps.names, len(steps), "spectral_norm" in steps, steps["spectral_norm"] is steps[0]
        (('spectral_norm',), 1, True, True)
    """

    def __init__(self, module: nn.Module, tensor_name: str) -> None:
        self._module = module
        self._tensor_name = tensor_name

    # --- looking --------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each step, first to last."""
        chain = self._chain()
        given = () if chain is None else chain.__dict__.get("_step_names", ())
        return tuple(next((name for name, one in given if one is step), word_for(step)) for step in self)

    def is_enabled(self, key: int | str) -> bool:
        """Return whether the step ``key`` takes part in computing the tensor."""
        step = self[key]
        return is_in(enabled_steps(self._chain()), step)

    def __len__(self) -> int:
        return len(self._steps())

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._steps())

    def __getitem__(self, key: int | str) -> nn.Module:
        return self._steps()[self._index(key)]

    def __contains__(self, key: object) -> bool:
        return key in self.names or (isinstance(key, nn.Module) and is_in(self, key))

    def __repr__(self) -> str:
        chain = self._chain()
        enabled = [] if chain is None else enabled_steps(chain)
        words = [
            name if is_in(enabled, step) else f"{name} (disabled)"
            for name, step in zip(self.names, self, strict=True)
        ]
        return f"{self._tensor_name}: {', '.join(words) or 'no steps'}"

    # --- editing --------------------------------------------------------------------------------------------------

    def append(
        self,
        step: nn.Module,
        *,
        name: str | None = None,
        unsafe: bool = False,
        optimizer: Optimizers = None,
        tied_in: nn.Module | None = None,
    ) -> None:
        """Add ``step`` after the others: ``register_parametrization`` with a name.

        Args:
            step: The parametrization to add.
            name: What to call it; by its class where it is None.
            unsafe: As for :func:`~torchkiln.parametrize.register_parametrization`.
            optimizer: As for :func:`~torchkiln.parametrize.register_parametrization`.
            tied_in: As for :func:`~torchkiln.parametrize.register_parametrization`.

        Raises:
            ParametrizationError: The step does not fit the tensor, or is in the stack already; the name is taken; or
                the edit would untie the tensor from another module's.
        """
        self._check_new(step, name)
        register_parametrization(
            self._module, self._tensor_name, step, unsafe=unsafe, optimizer=optimizer, tied_in=tied_in
        )
        place = Place(self._module, self._tensor_name)
        tied = [] if tied_in is None else places_within(tied_in, chain_slots(self._chain()), place)
        for one in (place, *tied):
            _call(step, name, one)

    def insert(
        self,
        key: int | str,
        step: nn.Module,
        *,
        name: str | None = None,
        unsafe: bool = False,
        optimizer: Optimizers = None,
        tied_in: nn.Module | None = None,
    ) -> None:
        """Add ``step`` before the step ``key``.

        A new first step is registered on the original: its right inverse, if it has one, takes the original over.
        Anywhere else the steps before it and the original stay as they are, and the tensor changes by what it does.

        Args:
            key: The step that will follow; ``len(stack)`` appends.
            step: As for :meth:`append`.
            name: As for :meth:`append`.
            unsafe: As for :meth:`append`.
            optimizer: As for :meth:`append`.
            tied_in: As for :meth:`append`.

        Raises:
            ParametrizationError: As for :meth:`append`; or the step would come before one with several originals.
        """
        if key == len(self):
            self.append(step, name=name, unsafe=unsafe, optimizer=optimizer, tied_in=tied_in)
            return
        index = self._index(key)
        if index == 0 and not self._chain().is_tensor:
            raise ParametrizationError(
                f"{self}: no step can come before {self.names[0]!r}, which starts from "
                f"{self._chain().ntensors} tensors.\nInsert it after that one."
            )
        self._check_new(step, name)
        steps = self._steps()
        steps.insert(index, step)
        self._put(index, steps, name=name, unsafe=unsafe, optimizer=optimizer, tied_in=tied_in)

    def replace(
        self,
        key: int | str,
        step: nn.Module,
        *,
        name: str | None = None,
        unsafe: bool = False,
        optimizer: Optimizers = None,
        tied_in: nn.Module | None = None,
    ) -> nn.Module:
        """Put ``step`` in the place of the step ``key``: :meth:`remove` and :meth:`insert` in one.

        The steps before it stay as they are. A new first step is registered on the original or, where the old one had
        several, on what that computed. To keep the tensor's value, assign it afterwards: ``module.weight = value``.

        Args:
            key: The step to take out.
            step: As for :meth:`append`.
            name: As for :meth:`append`; the name that was given to the old step where it is None.
            unsafe: As for :meth:`append`.
            optimizer: As for :meth:`append`.
            tied_in: As for :meth:`append`.

        Returns:
            The step that was taken out.

        Raises:
            ParametrizationError: As for :meth:`append`.
        """
        index, steps = self._index(key), self._steps()
        old, known = steps[index], self.names[index]
        self._check_new(step, None if name == known else name)
        if name is None and known != word_for(old):
            name = known
        steps[index] = step
        self._put(index, steps, name=name, unsafe=unsafe, optimizer=optimizer, tied_in=tied_in)
        return old

    def remove(
        self, key: int | str, *, optimizer: Optimizers = None, tied_in: nn.Module | None = None
    ) -> nn.Module:
        """Take the step ``key`` out, as if it had never been registered.

        The original stays, and the next step takes what this one took; of steps A, B, C without B the tensor is
        C(A(original)), and without A it is C(B(original)). A first step with several originals leaves what it computed
        as the one original, a new parameter. Without its last step the tensor is plain, the original itself; use
        ``remove_parametrizations`` or ``bake`` to keep the computed value.

        Args:
            key: The step to take out.
            optimizer: As for :meth:`append`.
            tied_in: As for :meth:`append`.

        Returns:
            The step that was taken out.

        Raises:
            ParametrizationError: There is no such step, or the edit would untie the tensor from another module's.
        """
        index, steps = self._index(key), self._steps()
        places = self._places(tied_in)
        removed, chain = steps.pop(index), self._chain()
        if not steps:
            for place in places:
                leave = not chain.is_tensor
                remove_parametrizations(
                    place.module, place.name, leave_parametrized=leave, optimizer=optimizer
                )
            return removed
        starts_anew = index == 0 and not chain.is_tensor
        originals = stand_in(chain, received(chain, 1)) if starts_anew else None
        commit_steps(places, steps, originals=originals, optimizer=optimizer, root=tied_in)
        for place in places:
            unfollow_forward(place.module)
        return removed

    # --- switching ------------------------------------------------------------------------------------------------

    def disable(self, *keys: int | str) -> None:
        """Leave steps out of the computation until they are enabled again; they keep their place, tensors and keys.

        A setting of the module, as training mode is, for all threads. Copies and pickles have it, state dicts do not:
        a file baked without the model has every step. Assigning to the tensor, removing and baking go by what is
        enabled. Under ``torch.compile`` each setting has one graph.

        Args:
            keys: The steps.

        Raises:
            ParametrizationError: A step starts from several tensors, so that there is nothing to pass on; or the
                tensor was registered by torch's own parametrize, whose chain has no such setting.
        """
        steps = [self._switchable(key) for key in keys]
        if steps:
            chain = self._chain()
            chain._disabled_steps = (*without(chain._disabled_steps, steps), *steps)

    def enable(self, *keys: int | str) -> None:
        """Let steps that were disabled take part again.

        Args:
            keys: The steps.
        """
        steps = [self._switchable(key) for key in keys]
        if steps:
            chain = self._chain()
            chain._disabled_steps = without(chain._disabled_steps, steps)

    @contextmanager
    def disabled(self, *keys: int | str) -> Iterator[None]:
        """Disable steps while the context is open; those that were disabled before stay so.

        Args:
            keys: The steps.

        Raises:
            ParametrizationError: As for :meth:`disable`.
        """
        chain = self._chain()
        steps = [self._switchable(key) for key in keys if self.is_enabled(key)]
        self.disable(*keys)
        try:
            yield
        finally:
            if steps:
                chain._disabled_steps = without(chain._disabled_steps, steps)

    # --- the parts ------------------------------------------------------------------------------------------------

    def _chain(self) -> Any:
        return (
            chains_of(self._module)[self._tensor_name]
            if is_parametrized(self._module, self._tensor_name)
            else None
        )

    def _steps(self) -> list[nn.Module]:
        chain = self._chain()
        return [] if chain is None else steps_of(chain)

    def _index(self, key: int | str) -> int:
        if isinstance(key, int):
            places = [range(len(self))[key]] if -len(self) <= key < len(self) else []
        else:
            places = [index for index, name in enumerate(self.names) if name == key]
        if len(places) == 1:
            return places[0]
        if places:
            raise ParametrizationError(
                f"{self}: {len(places)} steps are called {key!r}.\nUse an index, one of {places}."
            )
        raise ParametrizationError(f"{self}: there is no step {key!r}.")

    def _check_new(self, step: nn.Module, name: str | None) -> None:
        if is_in(self, step):
            raise ParametrizationError(
                f"{self}: this {word_for(step)} is in the stack already.\nAdd a copy of it."
            )
        if name is not None and name in self.names:
            raise ParametrizationError(f"{self}: there is a step {name!r} already.\nChoose another name.")

    def _switchable(self, key: int | str) -> nn.Module:
        index = self._index(key)
        step = self[index]
        if not isinstance(self._chain(), ParametrizationList):
            raise ParametrizationError(
                f"{self}: registered by torch.nn.utils.parametrize, which cannot leave a step out.\n"
                "Register it with torchkiln.parametrize, or with torch's functions under torchkiln.install()."
            )
        if index == 0 and not self._chain().is_tensor:
            raise ParametrizationError(
                f"{self}: {key!r} makes one tensor of {self._chain().ntensors}, so the tensor cannot do without it.\n"
                "Remove it, or replace it."
            )
        if sum(step is one for one in self) > 1:
            raise ParametrizationError(
                f"{self}: {key!r} is in the stack more than once.\nReplace it by a copy of its own first."
            )
        return step

    def _places(self, tied_in: nn.Module | None) -> list[Place]:
        """Return this tensor and those that are tied to it in ``tied_in``; raise where others are."""
        place = Place(self._module, self._tensor_name)
        prepare([self._module], f"edit the stack of {type(self._module).__name__}.{self._tensor_name}")
        return [place, *tied_places(place, chain_slots(self._chain()), tied_in)]

    def _put(
        self,
        index: int,
        steps: list[nn.Module],
        *,
        name: str | None,
        unsafe: bool,
        optimizer: Optimizers,
        tied_in: nn.Module | None,
    ) -> None:
        """Let the stack be ``steps``, of which the one at ``index`` is new, and called ``name``."""
        places = self._places(tied_in)
        chain, step = self._chain(), steps[index]
        check_request(self._module, self._tensor_name, step)
        was_training = step.training
        step.train(self._module.training)
        try:
            value = received(chain, index if chain.is_tensor else max(index, 1))
            originals = None
            if index == 0:
                originals = originals_for(step, stand_in(chain, value), unsafe=unsafe)
            elif not unsafe:
                check_step(value, step, self._tensor_name)
            commit_steps(places, steps, originals=originals, optimizer=optimizer, root=tied_in)
        except BaseException:
            step.train(was_training)
            raise
        for place in places:
            chains_of(place.module)[place.name].unsafe |= unsafe
            unfollow_forward(place.module)
            follow_forward(place.module, step)
            _call(step, name, place)


def _call(step: nn.Module, name: str | None, place: Place) -> None:
    """Let ``step`` be called ``name`` in the chain of ``place``."""
    if name is not None:
        chain = chains_of(place.module)[place.name]
        chain._step_names = (*chain.__dict__.get("_step_names", ()), (name, step))
