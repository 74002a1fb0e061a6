"""Drop-in for ``torch.nn.utils.parametrizations``: orthogonal, spectral norm and weight norm.

The functions, their defaults, the random numbers they draw, their state-dict keys and the classes that the repr shows
are torch's; the maths is in ``families/_maps``.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from enum import Enum, auto
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchkiln._core.chain import chains_of
from torchkiln._core.engine import prepare
from torchkiln._core.errors import ParametrizationError, describe
from torchkiln._core.optimizers import Optimizers
from torchkiln._core.request import check_lazy, no_tensor
from torchkiln._core.sharded import shard_of, share
from torchkiln._core.state import AdvancingStep
from torchkiln._core.tracing import is_recorded
from torchkiln.families import SpectralNorm
from torchkiln.families._maps import norms, spectral_batch
from torchkiln.families._maps import orthogonal as orthogonal_maps
from torchkiln.families._maps import spectral_norm as spectral_maps
from torchkiln.families._maps.precision import full_precision, widen
from torchkiln.parametrize import register_parametrization

__all__ = ["orthogonal", "spectral_norm", "weight_norm"]

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def _tensor(module: nn.Module, name: str) -> Tensor:
    prepare([module], f"parametrize {type(module).__name__}.{name}")
    tensor = getattr(module, name, None)
    if not isinstance(tensor, Tensor):
        raise no_tensor(
            module, name, f"Module '{describe(module)}' has no parameter or buffer with name '{name}'"
        )
    check_lazy(module, name)
    return tensor


# --- orthogonal ---------------------------------------------------------------------------------------------------


class _OrthMaps(Enum):
    """The maps from a free matrix to an orthogonal one."""

    matrix_exp = auto()
    cayley = auto()
    householder = auto()


_MAPS = {
    _OrthMaps.matrix_exp: orthogonal_maps.exponential,
    _OrthMaps.cayley: orthogonal_maps.cayley,
    _OrthMaps.householder: orthogonal_maps.householder,
}


class _Orthogonal(nn.Module):
    """The step behind :func:`orthogonal`: ``base @ map(X)``, of the transposed matrix where it is wide."""

    base: Tensor | None

    def __init__(self, weight: Tensor, orthogonal_map: _OrthMaps, *, use_trivialization: bool = True) -> None:
        super().__init__()
        if weight.is_complex() and orthogonal_map is _OrthMaps.householder:
            # The reflectors of a complex matrix do not determine its factors tau.
            raise ParametrizationError("The householder parametrization does not support complex tensors.")
        self.shape = weight.shape
        self.orthogonal_map = orthogonal_map
        if use_trivialization:
            self.register_buffer("base", None)

    def forward(self, X: Tensor) -> Tensor:
        return self._at(X, self._buffers.get("base"))

    def _at(self, X: Tensor, base: Tensor | None) -> Tensor:
        wide = X.shape[-2] < X.shape[-1]
        with full_precision(X):
            tall = widen(X.mT if wide else X)
            Q = _MAPS[self.orthogonal_map](tall, orthogonal_maps.in_dtype_of(tall, base))
        # LAPACK's columns lie one after the other. Laid out as a weight is, products with this tensor and with its
        # baked copy are the same to the last bit.
        return (Q.mT if wide else Q).to(X.dtype).contiguous()

    def likeness(self, original: Tensor) -> Hashable:
        """Return what has to be equal to be evaluated together, beside the originals; None where it does not pay."""
        if original.is_cpu and original.numel() > 128 * 128:
            return None
        base = self._buffers.get("base")
        return self.orthogonal_map, None if base is None else base.dtype

    @staticmethod
    def forward_together(steps: Sequence[_Orthogonal], originals: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what ``forward`` of each step returns for its original, by one batch of matrices."""
        bases = [base for step in steps if (base := step._buffers.get("base")) is not None]
        return steps[0]._at(torch.stack([*originals]), torch.stack(bases) if bases else None).unbind()

    @torch.no_grad()
    def right_inverse(self, Q: Tensor) -> Tensor:
        if Q.shape != self.shape:
            raise ParametrizationError(
                f"Expected a matrix or batch of matrices of shape {self.shape}. Got a tensor of shape {Q.shape}."
            )
        wide = Q.shape[-2] < Q.shape[-1]
        tall = Q.mT if wide else Q
        with full_precision(Q):
            if "base" in self._buffers:
                self.base = orthogonal_maps.complete_basis(tall)
                return _minus_identity(Q)
            X = self._inverse_without_base(widen(tall)).to(Q.dtype)
        return X.mT.contiguous() if wide else X

    def _inverse_without_base(self, Q: Tensor) -> Tensor:
        if self.orthogonal_map is not _OrthMaps.householder:
            # Their inverse would need the columns of the n x n matrix that the map cuts off.
            raise NotImplementedError(
                "It is not possible to assign to the matrix exponential "
                "or the Cayley parametrizations when use_trivialization=False."
            )
        return orthogonal_maps.householder_inverse(Q)


def _minus_identity(Q: Tensor) -> Tensor:
    """Return the point that every map sends to the first unit vectors: the base itself is then the value."""
    X = torch.zeros_like(Q)
    X.diagonal(dim1=-2, dim2=-1).fill_(-1)
    return X


def orthogonal(
    module: ModuleT,
    name: str = "weight",
    orthogonal_map: str | None = None,
    *,
    use_trivialization: bool = True,
    optimizer: Optimizers = None,
    tied_in: nn.Module | None = None,
) -> ModuleT:
    r"""Keep a matrix, or a batch of matrices, orthogonal (unitary where it is complex).

    With at least as many rows as columns the columns are orthonormal, :math:`Q^H Q = I`; otherwise the rows are,
    :math:`Q Q^H = I`. A free matrix :math:`X` of the same shape is trained, and

    .. math::
        Q = B\, \varphi(X)_{[:, :k]}, \qquad
        \varphi = \exp(A), \quad (I - A/2)^{-1}(I + A/2) \quad \text{or} \quad H_1 \cdots H_k

    with :math:`A` the skew-Hermitian matrix of the lower triangle of :math:`X` and :math:`H_i` Householder reflectors.
    The base :math:`B` is the "dynamic trivialization" of arXiv:1909.09501: the value at registration becomes the
    origin around which the map is well conditioned. It is a buffer, n x n.

    At registration a value that is orthogonal is kept, and any other is replaced by the Q factor of its QR
    decomposition. Without the base, ``matrix_exp`` and ``cayley`` cannot be assigned to, and their initial value is
    the map of the old tensor. float16 and bfloat16 are computed in float32 and rounded once.

    Args:
        module: the module that owns the tensor.
        name: the tensor's name.
        orthogonal_map: ``"matrix_exp"``, ``"cayley"`` or ``"householder"``; by default ``"matrix_exp"`` for square and
            complex matrices, else ``"householder"``, which costs less the thinner the matrix is.
        use_trivialization: whether to keep the base :math:`B`.
        optimizer: the optimizer, or optimizers, that train the tensor; see
            :func:`~torchkiln.parametrize.register_parametrization`, as for ``tied_in``. torch has neither.
        tied_in: the model whose other modules with the same parameter are parametrized as well.

    Shape:
        ``(*, m, n)``, with any batch dimensions in front.

    Returns:
        ``module``.

    Raises:
        ParametrizationError: no such tensor, fewer than two dimensions, an unknown map, or a complex tensor under
            ``"householder"``.

    Example:
        >>> layer = orthogonal(nn.Linear(20, 40))
        >>> layer
        ParametrizedLinear(
          in_features=20, out_features=40, bias=True
          (parametrizations): ModuleDict(
            (weight): ParametrizationList(
              (0): _Orthogonal()
            )
          )
        )
        >>> Q = layer.weight
        >>> torch.allclose(Q.T @ Q, torch.eye(20), atol=1e-5)
        True

    References:
        Lezcano-Casado and Martinez-Rubio, "Cheap Orthogonal Constraints", arXiv:1901.08428;
        Lezcano-Casado, "Trivializations for Gradient-Based Optimization on Manifolds", arXiv:1909.09501.
    """
    weight = _tensor(module, name)
    if weight.ndim < 2:
        raise ParametrizationError(
            f"Expected a matrix or batch of matrices. Got a tensor of {weight.ndim} dimensions."
        )
    if orthogonal_map is None:
        square = weight.shape[-2] == weight.shape[-1]
        orthogonal_map = "matrix_exp" if square or weight.is_complex() else "householder"
    chosen = _OrthMaps.__members__.get(orthogonal_map)
    if chosen is None:
        raise ParametrizationError(
            f'orthogonal_map has to be one of "matrix_exp", "cayley", "householder". Got: {orthogonal_map}'
        )
    step = _Orthogonal(weight, chosen, use_trivialization=use_trivialization)
    register_parametrization(module, name, step, unsafe=True, optimizer=optimizer, tied_in=tied_in)
    return module


# --- weight norm --------------------------------------------------------------------------------------------------


class _WeightNorm(nn.Module):
    """The step behind :func:`weight_norm`."""

    sharding = "reduced"

    def __init__(self, dim: int | None = 0) -> None:
        super().__init__()
        self.dim = -1 if dim is None else dim

    def event_dims(self, ndim: int) -> list[int]:
        """Return the dimensions along which the norm is taken."""
        return [dim for dim in range(ndim) if self.dim == -1 or dim != self.dim % ndim]

    def forward(self, weight_g: Tensor, weight_v: Tensor) -> Tensor:
        return norms.weight_normalize(weight_v, weight_g, self.dim)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        norm = norms.norm_except(weight, self.dim)
        return norm, norms.directed(weight, norm)


def weight_norm(
    module: ModuleT,
    name: str = "weight",
    dim: int | None = 0,
    *,
    gain: float | None = None,
    optimizer: Optimizers = None,
    tied_in: nn.Module | None = None,
) -> ModuleT:
    r"""Train a tensor's length and direction apart.

    .. math::
        W = g\, \frac{V}{\|V\|}

    The length :math:`g` is ``parametrizations.<name>.original0`` and the direction :math:`V` ``original1``; the norm is
    taken over every dimension but ``dim``, for one length per output channel. State dicts with the keys ``<name>_g``
    and ``<name>_v`` of the older ``torch.nn.utils.weight_norm`` load as well.

    A direction of zeros gives zeros and finite gradients, where torch gives NaN. A slice that is zero at registration
    gets length 0 and a direction of ones, from which it can be trained.

    Args:
        module: the module that owns the tensor.
        name: the tensor's name.
        dim: the dimension that keeps a length for each index. ``None`` gives one length for the whole tensor, and so
            does -1, as in torch.
        gain: fill the length with this number and freeze it, as the last layer of DINO does; torch has no such option.
        optimizer: the optimizer, or optimizers, that train the tensor; see
            :func:`~torchkiln.parametrize.register_parametrization`, as for ``tied_in``. torch has neither.
        tied_in: the model whose other modules with the same parameter are parametrized as well.

    Shape:
        ``original0`` has the tensor's number of dimensions, all 1 but ``dim`` (no dimensions for ``dim=None``);
        ``original1`` has the tensor's shape.

    Returns:
        ``module``.

    Raises:
        ParametrizationError: no such tensor.
        IndexError: ``dim`` is not a dimension of the tensor.

    Example:
        >>> layer = weight_norm(nn.Linear(20, 40))
        >>> layer.parametrizations.weight.original0.shape
        torch.Size([40, 1])
        >>> layer.parametrizations.weight.original1.shape
        torch.Size([40, 20])

    References:
        Salimans and Kingma, "Weight Normalization", arXiv:1602.07868.
    """
    register_parametrization(
        module, name, _WeightNorm(dim), unsafe=True, optimizer=optimizer, tied_in=tied_in
    )
    if gain is not None:
        length = chains_of(module)[name].original0
        with torch.no_grad():
            length.fill_(gain)
        length.requires_grad_(False)
    return module


# --- spectral norm ------------------------------------------------------------------------------------------------


class _SpectralNorm(AdvancingStep):
    """The step behind :func:`spectral_norm`."""

    sharding = "reduced"
    state_names = ("_u", "_v")
    fewest_on_cpu = 10

    def __init__(self, weight: Tensor, n_power_iterations: int = 1, dim: int = 0, eps: float = 1e-12) -> None:
        super().__init__()
        ndim = weight.ndim
        if not -ndim <= dim < ndim:
            raise IndexError(
                f"Dimension out of range (expected to be in range of [-{ndim}, {ndim - 1}] but got {dim})"
            )
        if n_power_iterations <= 0:
            raise ParametrizationError(
                f"Expected n_power_iterations to be positive, but got n_power_iterations={n_power_iterations}"
            )
        self.dim = dim % ndim
        self.eps = eps
        if ndim > 1:
            self.n_power_iterations = n_power_iterations
            u, v = self._start(spectral_maps.as_matrix(weight, self.dim))
            self.register_buffer("_u", u)
            self.register_buffer("_v", v)

    def _start(self, M: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            u, v = (share(shard_of(M).new_empty(length).normal_(), M) for length in M.shape)
            u, v = F.normalize(u, dim=0, eps=self.eps), F.normalize(v, dim=0, eps=self.eps)
            u, v, _ = spectral_maps.power_iteration(M, u, v, steps=15, eps=self.eps)
        return u, v

    def advance(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        M = spectral_maps.as_matrix(x, self.dim)
        u, v, image = spectral_maps.power_iteration(M, *state, steps=self.n_power_iterations, eps=self.eps)
        if not is_recorded():
            self.__dict__["_image"] = image  # for the evaluation that asked for it, and no other
        return u, v

    def adopt(self, *state: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors at length 1: averaged ones (EMA) are shorter."""
        return tuple(spectral_maps.restored(vector) for vector in state)

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return F.normalize(weight, dim=0, eps=self.eps)
        u, v = self.current_state(weight)
        at = spectral_maps.Iterate(u, v, self.__dict__.pop("_image", None))
        return spectral_maps.spectral_normalize(weight, at, self.dim, trains=self.training)

    def likeness(self, weight: Tensor) -> Hashable:
        """Return what has to be equal to be evaluated together, beside the weights; None where it does not pay."""
        pays = not weight.is_cpu or weight.numel() <= 128 * 128
        plain = pays and weight.ndim > 1 and widen(weight) is weight
        return (self.dim, self.eps, self.n_power_iterations) if plain else None

    @staticmethod
    def forward_together(steps: Sequence[_SpectralNorm], weights: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return what ``forward`` of each step returns for its weight, by one batch of matrices."""
        first = steps[0]
        rows = torch.stack([*weights]).movedim(first.dim + 1, 1)
        M = rows.flatten(2)

        def advance(behind: list[int], states: list[tuple[Tensor, ...]]) -> Sequence[tuple[Tensor, ...]]:
            matrices = M.detach() if len(behind) == len(M) else M.detach()[behind]
            u, v = (torch.stack(vectors) for vectors in zip(*states, strict=True))
            u, v = spectral_batch.iterate(matrices, u, v, steps=first.n_power_iterations, eps=first.eps)
            return list(zip(u.unbind(), v.unbind(), strict=True))

        with full_precision(M):
            states = AdvancingStep.current_states(steps, advance)
            u, v = (torch.stack(vectors) for vectors in zip(*states, strict=True))
            return spectral_batch.normalize(M, u, v).view_as(rows).movedim(1, first.dim + 1).unbind()

    def right_inverse(self, value: Tensor) -> Tensor:
        return value

    def reset(self, weight: Tensor) -> None:
        """Look for the singular vectors of the original ``weight`` anew, from random ones, as at registration."""
        if weight.ndim > 1:
            self._write(self._start(spectral_maps.as_matrix(weight, self.dim)))


def spectral_norm(
    module: ModuleT,
    name: str = "weight",
    n_power_iterations: int = 1,
    eps: float = 1e-12,
    dim: int | None = None,
    *,
    coefficient: float = 1.0,
    cap: bool = False,
    tolerance: float | None = None,
    optimizer: Optimizers = None,
    tied_in: nn.Module | None = None,
) -> ModuleT:
    r"""Divide a tensor by its spectral norm, the largest factor by which its matrix stretches a vector.

    .. math::
        W_{SN} = \frac{W}{\sigma(W)}, \qquad \sigma(W) = \max_{h \ne 0} \frac{\|W h\|_2}{\|h\|_2} \approx u^H W v

    The matrix has ``dim`` as rows and all other dimensions as columns; a vector is divided by its length. The singular
    vectors :math:`u` and :math:`v` are the buffers ``_u`` and ``_v``. They start from 15 power iterations on random
    vectors. In training mode they advance by ``n_power_iterations`` once for each change of the original, that is once
    for each optimizer step: the first read after it computes and uses the new vectors, and the buffers take them over
    when the module's forward ends. Further reads, a second forward, and recomputation under activation checkpointing
    use the same vectors, where torch would advance them each time. In eval mode they stand still.

    Args:
        module: the module that owns the tensor.
        name: the tensor's name.
        n_power_iterations: power iterations for each read in training mode.
        eps: smallest norm that is divided by within the power iteration.
        dim: the dimension of the outputs: 0, and 1 for transposed convolutions.
        coefficient: the norm of the result. With this or one of the next two the family
            :class:`~torchkiln.families.SpectralNorm` is registered, whose state dict torch's does not load.
        cap: divide only where the norm is above ``coefficient``.
        tolerance: iterate to this relative accuracy, in place of ``n_power_iterations``.
        optimizer: the optimizer, or optimizers, that train the tensor; see
            :func:`~torchkiln.parametrize.register_parametrization`, as for ``tied_in``. torch has neither.
        tied_in: the model whose other modules with the same parameter are parametrized as well.

    Shape:
        Any but a scalar; ``_u`` has the length of ``dim`` and ``_v`` the product of the others.

    Returns:
        ``module``.

    Raises:
        ParametrizationError: no such tensor, or ``n_power_iterations`` is not positive.
        IndexError: ``dim`` is not a dimension of the tensor.

    Example:
        >>> layer = spectral_norm(nn.Linear(20, 40), n_power_iterations=20).eval()
        >>> bool(torch.linalg.matrix_norm(layer.weight, 2) < 1.2)
        True

    References:
        Miyato et al., "Spectral Normalization for Generative Adversarial Networks", arXiv:1802.05957.
    """
    weight = _tensor(module, name)
    if dim is None:
        transposed = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        dim = 1 if isinstance(module, transposed) else 0
    step: nn.Module = _SpectralNorm(weight, n_power_iterations, dim, eps)
    if coefficient != 1 or cap or tolerance is not None:
        steps = {"steps": n_power_iterations} if tolerance is None else {"tolerance": tolerance}
        step = SpectralNorm(coefficient, cap=cap, dim=dim, **steps)
    register_parametrization(module, name, step, optimizer=optimizer, tied_in=tied_in)
    return module
