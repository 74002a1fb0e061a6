"""What a module asks a state dict for: the keys of one tensor, and how to make them from a plain value."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn

from torchkiln._core.chain import chains_of, enabled_steps, is_parametrized, original_names, steps_of
from torchkiln._core.checks import says_no_inverse
from torchkiln._core.errors import InverseError, ParametrizationError
from torchkiln._core.sharded import gather_module
from torchkiln._core.spellings import fold
from torchkiln._core.spellings.spelled import Kind, Norm
from torchkiln._core.state import frozen

__all__ = ["ChainTarget", "Encoded", "PlainTarget", "Target", "default_dim", "norm_of_chain", "plain_targets"]

_NORMS: dict[str, Norm] = {"_WeightNorm": "weight_norm", "_SpectralNorm": "spectral_norm"}


class Encoded:
    """A plain value as the tensors that a module stores for it.

    Attributes:
        tensors: The tensors to load, by key.
        loaded: The value that the module will compute from them; None where it is the value itself.
    """

    def __init__(self, tensors: Mapping[str, Tensor], loaded: Tensor | None = None) -> None:
        self.tensors, self.loaded = tensors, loaded


class Target(ABC):
    """One tensor of a module, plain or computed.

    Attributes:
        name: The key that its plain value would have.
        stored: The tensors that the module stores for it, by key.
        kind: The one step that computes it, where it is one that every spelling knows; its inputs are then ``stored``,
            in the order in which :class:`~torchkiln._core.spellings.spelled.Spelled` has them.
        shape: Its shape, None where that is not known without computing.
        default_dim: Which dimension spectral norm takes for the outputs of its module.
    """

    name: str
    stored: Mapping[str, Tensor]
    kind: Kind | None = None
    shape: torch.Size | None = None
    default_dim: int = 0

    @abstractmethod
    def encode(self, value: Tensor, *, dtype: torch.dtype | None) -> Encoded:
        """Return what to load for the tensor to be ``value``, or the nearest that it can be.

        Args:
            value: The plain value, not to be written to.
            dtype: The dtype that the stored tensors are to have; their own where it is None.

        Raises:
            InverseError: A step has no right inverse.
            ParametrizationError: The right inverse fails.
        """


class PlainTarget(Target):
    """A parameter or buffer."""

    def __init__(self, module: nn.Module, tensor: str, prefix: str) -> None:
        self.name = prefix + tensor
        self.stored = {self.name: cast(Tensor, getattr(module, tensor))}
        self.default_dim = default_dim(module)

    def encode(self, value: Tensor, *, dtype: torch.dtype | None) -> Encoded:
        # Without a dtype the loading module casts, once.
        return Encoded({self.name: value if dtype is None else value.to(dtype)})


def plain_targets(module: nn.Module, prefix: str) -> list[Target]:
    """Return the parameters and buffers of ``module`` that its state dict has."""
    transient = module._non_persistent_buffers_set
    tensors = {**module._parameters, **module._buffers}
    return [
        PlainTarget(module, name, prefix)
        for name, tensor in tensors.items()
        if tensor is not None and name not in transient
    ]


def default_dim(module: nn.Module) -> int:
    """Return the dimension that torch's spectral norm takes for the outputs of ``module``."""
    return int(isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)))


class ChainTarget(Target):
    """A tensor under ``parametrizations``, ours or torch's."""

    def __init__(self, module: nn.Module, tensor: str, prefix: str) -> None:
        self.name = prefix + tensor
        self.chain: Any = chains_of(module)[tensor]
        self._start = f"{prefix}parametrizations.{tensor}."
        self.stored = {
            self._start + key: value for key, value in self.chain.state_dict(keep_vars=True).items()
        }
        self.kind, self.default_dim = norm_of_chain(self.chain), default_dim(module)
        self.shape = self._known_shape()

    def _known_shape(self) -> torch.Size | None:
        original = getattr(self.chain, original_names(self.chain)[-1], None)
        if self.kind is None and (self.chain.unsafe or not self.chain.is_tensor):
            return None
        return original.shape if isinstance(original, Tensor) else None

    def encode(self, value: Tensor, *, dtype: torch.dtype | None) -> Encoded:
        self._check_invertible()
        # A copy does the work: nothing of the module changes if it fails.
        with torch.inference_mode(False), torch.no_grad():
            chain = deepcopy(self.chain)
            gather_module(chain)
            if value.is_meta:
                return Encoded(self._state(chain.to("meta")))
            before = self._state(chain) if self._materialize(chain, value, dtype) else {}
            versions = {key: tensor._version for key, tensor in before.items()}
            self._invert(chain, value)
            with frozen(chain):
                try:
                    settle_norms(chain)
                except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, and not in its __all__
                    raise ParametrizationError(
                        f"{self.name}: its spectral norm cannot be computed. Look for values that are not finite."
                    ) from error
                loaded = chain()
        state = self._state(chain)
        # What nothing has set has no value where the module has no data: torch reports it as missing.
        unset = {key for key in before if state[key] is before[key] and state[key]._version == versions[key]}
        return Encoded({key: tensor.detach() for key, tensor in state.items() if key not in unset}, loaded)

    def _check_invertible(self) -> None:
        for step in enabled_steps(self.chain):
            if not hasattr(step, "right_inverse"):
                raise InverseError(f"{self.name}: {type(step).__name__} has no right_inverse.")
        for name in original_names(self.chain):
            held = name in self.chain._parameters or name in self.chain._buffers
            if not held and not is_parametrized(self.chain, name):
                raise InverseError(
                    f"{self.name}: its {name} is computed by a hook, and cannot be assigned to."
                )

    @staticmethod
    def _materialize(chain: nn.Module, value: Tensor, dtype: torch.dtype | None) -> bool:
        """Give a copy without data some, and the dtype asked for; return whether it had none."""
        tensors = [*chain.parameters(), *chain.buffers()]
        without_data = any(tensor.is_meta for tensor in tensors)
        if without_data:
            chain.to_empty(device=value.device)
        if dtype is not None and dtype.is_floating_point and any(tensor.dtype != dtype for tensor in tensors):
            chain.to(dtype)
        return without_data

    def _invert(self, chain: Any, value: Tensor) -> None:
        original = getattr(chain, original_names(chain)[-1])
        value = value.to(original, copy=True) if isinstance(original, Tensor) else value.clone()
        try:
            chain.right_inverse(value)
        except NotImplementedError as error:
            if says_no_inverse(error):
                raise InverseError(f"{self.name}: a step has no right_inverse: {error}") from error
            raise
        except Exception as error:
            raise ParametrizationError(
                f"{self.name}: its parametrization refuses the value: {type(error).__name__}: {error}"
            ) from error

    def _state(self, chain: nn.Module) -> dict[str, Tensor]:
        return {self._start + key: tensor for key, tensor in chain.state_dict(keep_vars=True).items()}


def norm_of_chain(chain: Any) -> Norm | None:
    """Return the norm that a chain is, where it is one whose tensors both styles spell."""
    steps = steps_of(chain)
    norm = _norm_of_step(steps[0]) if len(steps) == 1 == len(enabled_steps(chain)) else None
    if norm == "weight_norm":
        return None if chain.is_tensor else norm
    # The spectral norm of a vector keeps no state, which the legacy one does.
    return norm if norm is not None and "_u" in steps[0]._buffers else None


def _norm_of_step(step: nn.Module) -> Norm | None:
    classes = (
        cls for cls in type(step).__mro__ if cls.__module__.partition(".")[0] in ("torch", "torchkiln")
    )
    return next((_NORMS[cls.__name__] for cls in classes if cls.__name__ in _NORMS), None)


def settle_norms(chain: Any) -> None:
    """Make the norms of a chain whose originals were just set compute what those stand for.

    Spectral norm gets the singular vectors of the matrix it now sees. A slice of zeros gets a direction in weight
    norm, which has none to divide by otherwise.
    """
    originals = [getattr(chain, name) for name in original_names(chain)]
    for step in enabled_steps(chain):
        norm = _norm_of_step(step)
        if norm == "weight_norm" and len(originals) == 2:
            _give_direction(originals[1], int(step.dim))  # type: ignore[arg-type]  # mypy: Tensor | Module
        elif norm == "spectral_norm" and "_u" in step._buffers:
            W = originals[0]
            u, v, _ = fold.singular_pair(W.to(fold.compute_dtype(W.dtype)), int(step.dim))  # type: ignore[arg-type]  # mypy: Tensor | Module
            step._u.copy_(u)  # type: ignore[operator]  # mypy: Tensor | Module
            step._v.copy_(v)  # type: ignore[operator]  # mypy: Tensor | Module
        originals = [step(*originals)]


def _give_direction(v: Tensor, dim: int) -> None:
    over = [d for d in range(v.ndim) if dim == -1 or d != dim % v.ndim]
    v.masked_fill_(v.abs().amax(over, keepdim=True) == 0, 1)
