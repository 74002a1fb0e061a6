"""The one file that touches ``module.__class__``: the class that makes a tensor's name a computed property.

A parametrized module gets the class ``Parametrized<Base>``, of which there is one for each (base class, set of
tensor names); equal layers therefore have equal types. Its property evaluates the chain that the *instance* holds
under that name, and falls back to the plain tensor where the instance holds none, so instances never affect each
other. See ``README.md`` beside this file.
"""

from __future__ import annotations

import copyreg
import functools
import sys
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchkiln._core.cache import any_scope_open, cached_value, evaluate_once
from torchkiln._core.chain import TORCHS_MODULE, ParametrizationList
from torchkiln._core.distribute import APPLIED, applied
from torchkiln._core.errors import ComputedTensorError
from torchkiln._core.spellings.respell import read_every_spelling
from torchkiln._core.stand_in import SWAP, swap_in, swapped_out
from torchkiln._core.writes import watched

__all__ = ["base_class", "chain_of", "parametrized_class", "set_names"]

_in_dynamo = torch.compiler.is_dynamo_compiling  # it cannot trace what looks at frames

# Weak on both sides: neither a user's class nor an injected class lives longer than its users.
_classes: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[tuple[str, ...], type]]
_classes = weakref.WeakKeyDictionary()
# For each class that others have put on top of ours, or of what ours extends: the same on top of another.
_exchanged: weakref.WeakKeyDictionary[type, weakref.WeakValueDictionary[type, type]]
_exchanged = weakref.WeakKeyDictionary()


# These read a tensor once in a forward, so that nothing is gained by keeping it.
_READ_ONCE = {
    cls.forward
    for cls in (
        *(nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.PReLU),
        *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.LayerNorm, nn.RMSNorm, nn.GroupNorm),
        ParametrizationList,
    )
}


class ParametrizedMeta(type):
    """The class of injected classes: it pickles them, and shields the shared ones from torch's own functions.

    ``torch.nn.utils.parametrize`` deletes and sets properties on ``module.__class__``, which it takes for this
    module's alone. A deleted name stays, since the property falls back to the plain tensor; a property that
    torch sets becomes ours, which evaluates torch's chains as well.
    """

    _parametrized_names: tuple[str, ...]

    def __delattr__(cls, attribute: str) -> None:
        if not isinstance(vars(cls).get(attribute), _TensorProperty):
            super().__delattr__(attribute)

    def __setattr__(cls, attribute: str, value: object) -> None:
        if type(value) is property:
            value = _tensor_property(cls, attribute)
        super().__setattr__(attribute, value)

    def mro(cls) -> list[type]:
        first, *rest = super().mro()
        return [first, *([_Unannounced] if "_being_made" in vars(cls) else []), *rest]


class _Unannounced:
    """Stands before a class's bases while it is made: a user's ``__init_subclass__`` is for the user's subclasses."""

    def __init_subclass__(cls, **_arguments: Any) -> None:
        """Do nothing, and hand on nothing."""


def _make_class(metaclass: type, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> type:
    cls = cast(type, metaclass(name, bases, {**namespace, "_being_made": True}))
    type.__delattr__(cls, "_being_made")
    type.__setattr__(cls, "__bases__", bases)  # Python asks for the order anew
    return cls


class _TensorProperty(property):
    """A property made by this file."""


def parametrized_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the one class that extends ``base`` by computed properties for ``names``."""
    names = tuple(sorted(names))
    known = _classes.get(base)
    if known is None:
        known = _classes[base] = weakref.WeakValueDictionary()
    cls = known.get(names)
    if cls is None:
        cls = known[names] = _new_class(base, names)
    return cls


def _new_class(base: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    name = f"Parametrized{base.__name__}"
    namespace = {
        "__module__": TORCHS_MODULE,
        "__qualname__": name,
        "__getattr__": _missing_attribute(base),
        "__reduce_ex__": _reduce_ex,
        APPLIED: applied,
        "__prepare_scriptable__": _refuse_scripting,
        "register_parameter": _keeping_computed(base),
    }
    if base.forward not in _READ_ONCE:
        namespace["forward"] = evaluate_once(base)
    cls = _make_class(_metaclass(base), name, (base,), {**namespace, "_parametrized_names": names})
    for tensor_name in names:
        type.__setattr__(cls, tensor_name, _tensor_property(cls, tensor_name))
    type.__setattr__(cls, "_load_from_state_dict", _loading(cast(type[nn.Module], cls)))
    return cast(type[nn.Module], cls)


def _metaclass(base: type) -> type[ParametrizedMeta]:
    if issubclass(ParametrizedMeta, type(base)):
        return ParametrizedMeta
    meta = cast(
        type[ParametrizedMeta], type(f"Parametrized{type(base).__name__}", (ParametrizedMeta, type(base)), {})
    )
    copyreg.pickle(meta, _reduce_class)
    return meta


def chain_of(module: nn.Module, name: str) -> Any:
    """Return the chain that computes ``module``'s tensor ``name``, or None where it is a plain tensor."""
    parametrizations = module._modules.get("parametrizations")
    return None if parametrizations is None else parametrizations._modules.get(name)


def _tensor_property(cls: type, name: str) -> _TensorProperty:
    # cls is held by the property it holds: a cycle that dies with the class.
    def read(self: nn.Module) -> Any:
        try:  # chain_of() in place: this is every read
            chain: Any = self._modules["parametrizations"]._modules[name]  # type: ignore[union-attr]  # no None
        except KeyError:
            return _plain_attribute(cls, self, name)
        # The flag is a thread's or another's; most reads find it down.
        if any_scope_open.flag and not _in_dynamo():  # one graph evaluates once anyway
            kept = cached_value(self, name, chain)
            if kept is not None:
                return kept if sys._getframe(1).f_code is not SWAP else swapped_out(chain, kept)
        value = chain()
        # A forward does not write into its weights; anyone else may want to (nn.init, reset_parameters).
        if _in_dynamo() or (caller := sys._getframe(1).f_code).co_name == "forward":
            return value
        if caller is SWAP:
            return swapped_out(chain, value)
        return watched(value, chain, name)

    def write(self: nn.Module, value: Tensor) -> None:
        chain = chain_of(self, name)
        if chain is None:
            self.__dict__[name] = value
        # Past nn.Module.__setattr__ is who assigned. A chain of torch's knows no stand-in.
        elif isinstance(chain, ParametrizationList) and not _in_dynamo() and sys._getframe(2).f_code is SWAP:
            swap_in(chain, value)
        else:
            chain.right_inverse(value)

    return _TensorProperty(read, write)


def _missing_attribute(base: type[nn.Module]) -> Callable[[nn.Module, str], Any]:
    """Return the ``__getattr__`` of an injected class.

    Python calls it for tensors and submodules, as on any module, and when a computed tensor's chain has raised an
    ``AttributeError``: evaluating again raises that, where ``nn.Module`` would report the tensor itself as missing.
    """
    base_getattr = base.__getattr__
    is_plain = base_getattr is nn.Module.__getattr__

    def find(self: nn.Module, name: str) -> Any:
        if is_plain and (tensor := self.__dict__["_parameters"].get(name)) is not None:
            return tensor
        chain = chain_of(self, name)
        return base_getattr(self, name) if chain is None else chain()

    return find


def _keeping_computed(base: type[nn.Module]) -> Callable[..., None]:
    """Return the ``register_parameter`` of an injected class, which ``module.weight = nn.Parameter(...)`` calls."""

    @functools.wraps(base.register_parameter)
    def register_parameter(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if chain_of(self, name) is not None:
            raise ComputedTensorError(
                f"attribute '{name}' already exists: {base.__name__}.{name} is computed by a parametrization.\n"
                f"Assign a tensor to set its value; to replace or to quantize it, torchkiln.bake(model) before."
            )
        base.register_parameter(self, name, param)

    return register_parameter


def _loading(cls: type[nn.Module]) -> Callable[..., None]:
    """Return the method by which an injected class loads its tensors in every spelling."""

    def load(self: nn.Module, *arguments: Any) -> None:
        # A hook for the time of the call, and the last one, because those of the user may rename keys. It is not
        # kept on the module: nothing to copy, to pickle or to remove.
        register: Any = self._register_load_state_dict_pre_hook
        handle = register(read_every_spelling, with_module=True)
        try:
            super(cls, self)._load_from_state_dict(*arguments)  # type: ignore[misc]  # nn.Module has it
        finally:
            handle.remove()

    return load


def _refuse_scripting(_module: nn.Module) -> nn.Module:
    """Stop ``torch.jit.script``, which asks every module by this method what to compile."""
    raise RuntimeError(
        "Parametrization is not working with scripting.\n"
        "Script the folded model: torchkiln.bake(model), or trace or export it as it is."
    )


def _plain_attribute(cls: type, module: nn.Module, name: str) -> Any:
    """Look ``name`` up as if ``cls`` had no such property."""
    for places in (module._parameters, module._buffers, module.__dict__):
        if name in places:
            return places[name]
    return getattr(super(cls, module), name)


def base_class(cls: type) -> type[nn.Module] | None:
    """Return the class that ``cls``'s injected class extends, or None where there is none in it.

    Others inject classes on top of ours (FSDP's ``FSDPModule``), so the whole resolution order is searched.
    """
    return next((parent.__bases__[0] for parent in cls.__mro__ if _is_injected(parent)), None)


def _is_injected(cls: type) -> bool:
    ours = "_parametrized_names" in vars(cls)
    return ours or (
        cls.__module__ == TORCHS_MODULE
        and cls.__name__.startswith("Parametrized")
        and len(cls.__bases__) == 1
    )


def set_names(module: nn.Module, names: tuple[str, ...]) -> None:
    """Give ``module`` the class in which just ``names`` are computed; its own class again where there are none."""
    cls = type(module)
    held = next((parent for parent in cls.__mro__ if _is_injected(parent)), cls)
    base = base_class(held) or held
    wanted = parametrized_class(base, names) if names else base
    new = _exchange(cls, wanted, held)
    # Around any __setattr__ of the user's class.
    object.__setattr__(module, "__class__", new)


def _exchange(cls: type, wanted: type, held: type) -> type:
    """Return ``cls`` with ``held``, which it is or extends, exchanged for ``wanted``; the same class each time."""
    if cls is held:
        return wanted
    known = _exchanged.setdefault(cls, weakref.WeakValueDictionary()).get(wanted)
    if known is not None:
        return known
    bases = tuple(
        _exchange(parent, wanted, held) if issubclass(parent, held) else parent for parent in cls.__bases__
    )
    namespace = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
    metaclass = type(wanted) if issubclass(type(wanted), type(cls)) else type(cls)
    name = cls.__name__.replace(held.__name__, wanted.__name__)
    others: list[type] = bases[-1].__subclasses__()  # FSDP may have made the same one
    made = (one for one in others if one.__bases__ == bases and one.__name__ == name)
    new = next(made, None) or _make_class(metaclass, name, bases, namespace)
    _exchanged[cls][wanted] = new
    _exchanged.setdefault(new, weakref.WeakValueDictionary())[held] = cls
    return new


# --- copies and pickles -------------------------------------------------------------------------------------------


def _reduce_ex(self: nn.Module, protocol: Any) -> Any:
    """Pickle and copy by (base class, names): the injected class has no importable name."""
    cls = cast(
        ParametrizedMeta,
        next(parent for parent in type(self).__mro__ if "_parametrized_names" in vars(parent)),
    )
    make, (made, *arguments), state, *items = super(cls, self).__reduce_ex__(max(2, int(protocol)))  # type: ignore[arg-type]  # self is an instance
    if make is not copyreg.__newobj__ or made is not type(self) or made is not cls:  # type: ignore[attr-defined]  # not in typeshed
        return (make, (made, *arguments), state, *items)  # the user's class says itself how to make it
    # nn.Module's own state leaves out what is in slots.
    slots = {slot: getattr(self, slot) for slot in copyreg._slotnames(cls) if hasattr(self, slot)}  # type: ignore[attr-defined]  # not in typeshed
    if "_flat_weights" in state:  # an RNN keeps computed weights; it reads them anew before it uses them
        flat = [
            weight if weight is None or weight.is_leaf else weight.detach()
            for weight in state["_flat_weights"]
        ]
        state = {**state, "_flat_weights": flat}
    return (
        _new_instance,
        (base_class(cls), vars(cls)["_parametrized_names"], arguments, slots),
        state,
        *items,
    )


def _new_instance(
    base: type, names: tuple[str, ...], arguments: list[Any], slots: dict[str, Any]
) -> nn.Module:
    cls = parametrized_class(base, names)
    module = cls.__new__(cls, *arguments)
    for name, value in slots.items():
        object.__setattr__(module, name, value)
    return module


def _reduce_class(cls: ParametrizedMeta) -> Any:
    if "_parametrized_names" not in vars(cls):
        return cls.__qualname__  # a class made on top of ours: by its own name
    return (parametrized_class, (base_class(cls), cls._parametrized_names))


copyreg.pickle(ParametrizedMeta, _reduce_class)
