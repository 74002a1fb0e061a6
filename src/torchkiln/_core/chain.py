"""The chain of one tensor: its originals, and the steps that compute the tensor from them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from torchkiln._core.attributes import parameter_like
from torchkiln._core.checks import check_alike, check_output, initial_inverse, is_opaque
from torchkiln._core.engine import balance, prepare, versions
from torchkiln._core.errors import InverseError, ParametrizationError
from torchkiln._core.sharded import Placements, evaluate, invert, is_sharded, laid_out_as, placements_of

__all__ = [
    "TORCHS_MODULE",
    "ParametrizationList",
    "chains_of",
    "copy_settings",
    "enabled_steps",
    "is_parametrized",
    "is_unhooked",
    "original_names",
    "parametrizations_of",
    "register_tensor",
    "set_data",
    "steps_of",
    "tensors_within",
    "within",
]

# Some code compares the whole name of an injected class with torch's (brevitas does), and fx decides by it what a leaf
# is.
TORCHS_MODULE = "torch.nn.utils.parametrize"


_MODULE_CALL = nn.Module.__call__
_MODULE_GETATTR = nn.Module.__getattr__
_global = torch.nn.modules.module
_forward_hooks, _forward_pre_hooks = _global._global_forward_hooks, _global._global_forward_pre_hooks
_backward_hooks, _backward_pre_hooks = _global._global_backward_hooks, _global._global_backward_pre_hooks


class ParametrizationList(nn.ModuleList):
    """Hold the original tensors of a parametrized tensor and the steps that compute it from them.

    It is what ``module.parametrizations[tensor_name]`` is. The steps are its items; the tensor they start from is
    ``original``, or ``original0, original1, ...`` where the first step's ``right_inverse`` returns a sequence. Made by
    :func:`~torchkiln.parametrize.register_parametrization`, not by hand.

    Args:
        modules: The steps, first to last; at least one.
        original: The parameter or buffer to parametrize. Where there is one original it stays this very object and
            takes the data of the right inverse.
        unsafe: Whether the steps may change the dtype and shape of the tensor; nothing is checked then.

    Attributes:
        is_tensor: Whether there is one original, named ``original``.
        ntensors: How many originals there are.
        unsafe: As above; appending an unsafe step turns it on.

    Raises:
        ParametrizationError: A step returns no tensor, or one of another dtype, shape or device than it must.
    """

    original: Tensor
    unsafe: bool
    is_tensor: bool
    ntensors: int
    _advances: bool = False  # whether a step has state that advances
    followers: tuple[str, ...] = ()  # the names that came after this tensor in its module, computed ones too
    # Settings of stack.py, by the steps themselves: the indices change when somebody edits the list.
    _disabled_steps: tuple[nn.Module, ...] = ()
    _step_names: tuple[tuple[str, nn.Module], ...] = ()
    _stand_in: Tensor | None = (
        None  # what a functional call has put in the place of the value, see stand_in.py
    )
    _placements: Placements | None = None  # of a tensor that was sharded when it was parametrized

    def __init__(self, modules: Sequence[nn.Module], original: Tensor, unsafe: bool = False) -> None:
        if len(modules) == 0:
            raise ParametrizationError("ParametrizationList requires one or more modules.")
        super().__init__(modules)
        # Past nn.Module.__setattr__, which looks for tensors and modules. _disabled_steps is set, though the class has
        # it: torch.compile tells an attribute of the instance from one of the class.
        attributes: dict[str, Any] = {"__module__": TORCHS_MODULE, "_disabled_steps": (), "unsafe": unsafe}
        self.__dict__.update(attributes)
        if is_sharded(original):
            self._placements = placements_of(original)
        with torch.no_grad():
            inverse = initial_inverse(modules, original)
        is_tensor = isinstance(inverse, Tensor)
        self.__dict__.update(is_tensor=is_tensor, ntensors=1 if is_tensor else len(inverse))
        if isinstance(inverse, Tensor):
            heading = "When `right_inverse` outputs one tensor, it may not change the {}."
            check_alike(
                original, inverse, heading, ("original.{}", "right_inverse(original).{}"), "dtype", "device"
            )
            # The checks run on a stand-in, so that a refused registration leaves the original as it was.
            register_tensor(self, "original", _like_original(inverse, original))
        else:
            self._hold_sequence(inverse, original)
        if not unsafe:
            check_output(original, self(), "`unsafe` flag", ("unparametrized {}", "parametrized {}"))
        if isinstance(inverse, Tensor):
            del self.original
            set_data(original, inverse)
            register_tensor(self, "original", original)

    def _hold_sequence(self, inverse: Sequence[Any], original: Tensor) -> None:
        for index, element in enumerate(inverse):
            if not isinstance(element, Tensor) and not is_opaque(element, index):
                raise ParametrizationError(
                    "'right_inverse' must return a Tensor or a Sequence of tensors (list, tuple...). "
                    f"Got element {index} of the sequence with type {type(element).__name__}."
                )
        for index, element in enumerate(inverse):
            if isinstance(element, Tensor):
                register_tensor(self, f"original{index}", _like_original(element, original))
            else:
                setattr(self, f"original{index}", element)

    def originals(self) -> tuple[Any, ...]:
        """Return the originals in the order in which the first step takes them."""
        parameters = self._parameters
        try:  # not getattr() first: nn.Module.__getattr__ would cost as much as all the rest
            if self.ntensors == 2:  # most often
                return (parameters["original0"], parameters["original1"])
            return tuple(map(parameters.__getitem__, original_names(self)))
        except KeyError:
            return tuple([getattr(self, name) for name in original_names(self)])

    def __call__(self) -> Tensor:
        """Compute the tensor; hooks on the chain run as on any module."""
        # torch.fx patches nn.Module.__call__ while it traces.
        plain = nn.Module.__call__ is _MODULE_CALL and is_unhooked(self.__dict__)
        return self.forward() if plain else super().__call__()

    def forward(self) -> Tensor:
        """Compute the tensor from its originals."""
        steps = self._modules
        if self._advances and self.training:
            self.announce_change()
        if self._disabled_steps:
            return self._forward_of_enabled()
        if self._stand_in is not None:
            return self._stand_in
        original = self._parameters.get("original")
        inputs = self.originals() if original is None else (original,)
        for one in inputs:
            if type(one) is not nn.Parameter and is_sharded(one):
                return self._forward_of_sharded(inputs)
        x: Tensor = _to_call(steps["0"])(*inputs)
        if len(steps) > 1:
            index = 1
            while (step := steps.get(str(index))) is not None:
                x = _to_call(step)(x)
                index += 1
        return x

    def _forward_of_enabled(self) -> Tensor:
        steps, originals = enabled_steps(self), self.originals()
        if any(map(is_sharded, originals)):
            return self._forward_of_sharded(originals)
        # A first step with several originals cannot be disabled.
        x: Tensor = originals[0] if self.is_tensor else steps.pop(0)(*originals)
        for step in steps:
            x = step(x)
        return x

    def _forward_of_sharded(self, originals: tuple[Any, ...]) -> Tensor:
        x = originals
        for step in enabled_steps(self):
            x = (evaluate(step, x, self._placements),)
        return x[0]  # type: ignore[no-any-return]  # originals may be opaque objects

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a step, or a submodule that is none."""
        super().add_module(name, module)
        if getattr(type(module), "advances_state", False):
            self._advances = True

    def announce_change(self) -> None:
        """Tell the steps whose state advances which versions of the tensors they are evaluated for."""
        for step in self._modules.values():
            if step.training and getattr(type(step), "advances_state", False):
                if torch.compiler.is_compiling():
                    return
                step.__dict__["_change"] = versions(self) or self._versions()

    def _versions(self) -> tuple[Any, ...]:
        parameters = [one for module in within(self) for one in module._parameters.values()]
        held = (*parameters, *self._buffers.values())
        return tuple([(id(one), one._version) for one in held if one is not None and not one.is_inference()])

    def right_inverse(self, value: Tensor) -> None:
        """Set the originals so that the chain computes ``value``, or its projection on what it can compute.

        Args:
            value: The tensor to compute from now on.

        Raises:
            InverseError: A step has no ``right_inverse``.
            ParametrizationError: A ``right_inverse`` returns something else than it did on registration; the
                originals are unchanged then.
        """
        prepare([self])
        with torch.no_grad():
            # A step may return its input: what the caller holds must not become the original.
            inverse: Any = value.detach().clone() if isinstance(value, Tensor) else value  # type: ignore[redundant-expr]  # users may pass anything
            for original in filter(is_sharded, self.originals()):
                if isinstance(inverse, Tensor) and original.shape == inverse.shape:
                    inverse = laid_out_as(inverse, original)
            for step in reversed(enabled_steps(self)):
                if not hasattr(step, "right_inverse"):
                    raise InverseError(
                        f"parametrization {type(step).__name__} does not implement right_inverse."
                    )
                inverse = invert(step, inverse)
            if self.is_tensor:
                self._assign_single(inverse)
            else:
                self._assign_sequence(inverse)
        balance([self])

    def _assign_single(self, inverse: Any) -> None:
        if not isinstance(inverse, Tensor):
            raise ParametrizationError(
                f"`right_inverse` should return a tensor. Got {type(inverse).__name__}"
            )
        if inverse.dtype != self.original.dtype:
            raise ParametrizationError(
                f"The tensor returned by `right_inverse` has dtype {inverse.dtype} "
                f"while `original` has dtype {self.original.dtype}"
            )
        if "original" in self._parameters or "original" in self._buffers:
            set_data(self.original, inverse)
        else:  # the original is itself parametrized: its own chain takes the value
            self.original = inverse

    def _assign_sequence(self, inverse: Any) -> None:
        if not isinstance(inverse, Sequence):
            raise ParametrizationError(
                f"'right_inverse' must return a sequence of tensors. Got {type(inverse).__name__}."
            )
        if len(inverse) != self.ntensors:
            raise ParametrizationError(
                f"'right_inverse' must return a sequence of tensors of length {self.ntensors}. "
                f"Got a sequence of length {len(inverse)}."
            )
        for index, element in enumerate(inverse):
            self._check_element(index, element)
        for index, element in enumerate(inverse):
            name = f"original{index}"
            if isinstance(element, Tensor) and (name in self._parameters or name in self._buffers):
                set_data(getattr(self, name), element)
            else:
                setattr(self, name, element)

    def _check_element(self, index: int, element: Any) -> None:
        if isinstance(element, Tensor):
            expected = getattr(self, f"original{index}").dtype
            if expected != element.dtype:
                raise ParametrizationError(
                    f"Tensor {index} returned by `right_inverse` has dtype {element.dtype} "
                    f"while `original{index}` has dtype {expected}"
                )
        elif not is_opaque(element, index):
            raise ParametrizationError(
                "'right_inverse' must return a sequence of tensors or reference-type opaques. "
                f"Got element {index} of type {type(element).__name__}."
            )


def is_parametrized(module: nn.Module, tensor_name: str | None = None) -> bool:
    """Return whether a tensor of ``module`` is parametrized, by torchkiln or by torch.

    Args:
        module: The module to ask.
        tensor_name: The tensor to ask for; any of the module's own where it is None.

    Example:
        >>> from torch import nn
        >>> from torchkiln import parametrize, parametrizations
        >>> layer = parametrizations.weight_norm(nn.Linear(3, 3))
        >>> parametrize.is_parametrized(layer, "weight"), parametrize.is_parametrized(layer, "bias")
        (True, False)
    """
    chains = parametrizations_of(module)
    if not isinstance(chains, nn.ModuleDict):
        return False
    return bool(chains._modules) if tensor_name is None else tensor_name in chains._modules


def parametrizations_of(module: nn.Module) -> object:
    """Return ``getattr(module, "parametrizations", None)``.

    To ask ``nn.Module`` for what is not there takes a microsecond, so that is done for wrappers alone, and for scripted
    modules, which keep theirs elsewhere.
    """
    attributes, cls = module.__dict__, type(module)
    modules: object = attributes.get("_modules")
    if type(modules) is dict:
        if (found := modules.get("parametrizations")) is not None:
            return found
        places = (attributes, attributes["_parameters"], attributes["_buffers"])
        in_class = cls.__getattr__ is not _MODULE_GETATTR or hasattr(cls, "parametrizations")
        if not in_class and not any("parametrizations" in place for place in places):
            return None
    return getattr(module, "parametrizations", None)


def chains_of(module: nn.Module) -> dict[str, Any]:
    """Return the chains of a parametrized module, ours or torch's, by tensor name.

    The plain dict inside the ``ModuleDict``, which refuses names such as "keys".
    """
    chains = module._modules["parametrizations"]
    return chains._modules  # type: ignore[union-attr]  # a parametrized module has it


def original_names(chain: Any) -> Sequence[str]:
    """Return the names of a chain's originals, ours or torch's."""
    if chain.is_tensor:
        return ("original",)
    count: int = chain.ntensors
    return _NUMBERED[:count] if count <= len(_NUMBERED) else [f"original{index}" for index in range(count)]


_NUMBERED = tuple(f"original{index}" for index in range(8))  # made once: every read asks for them


def _to_call(step: Any) -> Callable[..., Any]:
    """Return what to call for ``step``: its forward where that is all there is, for nn.Module.__call__ costs more."""
    plain = type(step).__call__ is _MODULE_CALL and is_unhooked(step.__dict__)
    return step.forward if plain else step  # type: ignore[no-any-return]  # a step may be any module


def is_unhooked(attributes: dict[str, Any]) -> bool:
    """Return whether calling the module with these attributes does nothing but to call its forward."""
    return not (
        attributes["_forward_hooks"]
        or attributes["_forward_pre_hooks"]
        or attributes["_backward_hooks"]
        or attributes["_backward_pre_hooks"]
        or "_compiled_call_impl" in attributes
        or _forward_hooks
        or _forward_pre_hooks
        or _backward_hooks
        or _backward_pre_hooks
    )


def steps_of(chain: nn.Module) -> list[nn.Module]:
    """Return the steps of a chain, ours or torch's, first to last.

    They are the items ``0, 1, ...``; a chain whose original is parametrized has another submodule beside them.
    """
    return list(_iterate_steps(chain))


def enabled_steps(chain: nn.Module) -> list[nn.Module]:
    """Return the steps of a chain that are not disabled, first to last."""
    disabled = chain.__dict__.get("_disabled_steps", ())
    return [step for step in _iterate_steps(chain) if not any(step is other for other in disabled)]


def copy_settings(source: nn.Module, target: nn.Module) -> None:
    """Let the steps that ``target`` has from ``source`` have the names there, and be disabled, as in ``source``."""
    for setting in ("_disabled_steps", "_step_names"):
        if value := source.__dict__.get(setting):
            setattr(target, setting, (*target.__dict__.get(setting, ()), *value))


def _iterate_steps(chain: nn.Module) -> Iterator[nn.Module]:
    for index in count():
        step = chain._modules.get(str(index))
        if step is None:
            return
        yield step


def insert_before(names: list[str], name: str, followers: tuple[str, ...]) -> None:
    """Insert ``name`` into ``names`` before the first of ``followers`` that is there, else at the end."""
    names.insert(
        next((names.index(follower) for follower in followers if follower in names), len(names)), name
    )


def within(root: nn.Module) -> list[nn.Module]:
    """Return ``root`` and the modules in it, each once: ``root.modules()`` at a fraction of its cost."""
    found = [root]
    for module in found:
        for child in module._modules.values():
            if child is not None and not any(child is one for one in found):
                found.append(child)
    return found


def tensors_within(root: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers in ``root``."""
    held = [(*module._parameters.values(), *module._buffers.values()) for module in within(root)]
    return [tensor for tensors in held for tensor in tensors if tensor is not None]


def register_tensor(module: nn.Module, name: str, tensor: Tensor, *, persistent: bool = True) -> None:
    """Register ``tensor`` on ``module`` as what it is: a parameter or a buffer."""
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(name, tensor)
    else:
        module.register_buffer(name, tensor, persistent=persistent)


def set_data(target: Tensor, source: Tensor) -> None:
    """Let ``target`` have the data, shape and strides of ``source`` and stay the same object."""
    if source is target:
        return
    wrapped: bool = is_traceable_wrapper_subclass(target)
    with torch.no_grad():
        if wrapped or torch.__future__.get_swap_module_params_on_conversion():
            if isinstance(target, nn.Parameter):  # the swap takes class and attributes along
                source = parameter_like(source, [target], requires_grad=target.requires_grad)
            version = None if target.is_inference() else target._version
            torch.utils.swap_tensors(target, source)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            if (
                version is not None and not target.is_inference()
            ):  # it took the other's, which may be the same
                torch._C._autograd._unsafe_set_version_counter((target,), (version + 1,))
        else:
            target.set_(source)  # type: ignore[call-overload]  # typeshed of torch lacks this overload


def _like_original(tensor: Tensor, original: Tensor) -> Tensor:
    """Return ``tensor`` as a parameter or a buffer, requiring grad, as ``original`` is and does."""
    if isinstance(original, nn.Parameter):
        return parameter_like(tensor, [original], requires_grad=original.requires_grad)
    return tensor.detach().requires_grad_(original.requires_grad)
