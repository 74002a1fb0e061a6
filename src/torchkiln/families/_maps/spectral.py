"""Functions of eigenvalues and singular values whose derivatives stay finite where these repeat.

torch differentiates the eigenvectors, which divides by differences of eigenvalues. A function of the whole matrix needs
only the divided differences of the function, which have a limit. Second derivatives are refused, not wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchkiln._core.errors import ParametrizationError
from torchkiln.families._maps.elementwise import Map, softplus, softplus_inverse

__all__ = ["SPECTRAL", "apply_spectral", "nearest_definite", "polar", "spectral_inverse"]

# Each function with its derivative and its inverse.
SPECTRAL: dict[str, tuple[Map, Map, Map]] = {
    "exponential": (torch.exp, torch.exp, torch.log),
    "softplus": (softplus, torch.sigmoid, softplus_inverse),
}


class _Spectral(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
        values, V = torch.linalg.eigh(A)
        return (V * SPECTRAL[name][0](values)[..., None, :].to(V.dtype)) @ V.mH, values, V

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: tuple[Tensor, ...]) -> None:
        A, ctx.name = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(A, *output[1:])

    @staticmethod
    def backward(ctx: Any, G: Tensor, *_: Tensor) -> tuple[Tensor, None]:
        return _SpectralDerivative.apply(*ctx.saved_tensors, G, ctx.name), None  # type: ignore[no-untyped-call]  # torch's


class _SpectralDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, values: Tensor, V: Tensor, G: Tensor, name: str) -> Tensor:  # noqa: ARG004  # A: see backward
        D = _divided_differences(values, name).to(V.dtype)
        return V @ (D * (V.mH @ G @ V)) @ V.mH

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: there is no second derivative."""

    @staticmethod
    def backward(*_: Any) -> Any:
        raise _no_second_derivative()


def _no_second_derivative() -> ParametrizationError:
    return ParametrizationError(
        "Functions of singular values and eigenvalues are differentiable once here.\n"
        'For second derivatives use another map, such as "cholesky" or "qr".'
    )


def _divided_differences(values: Tensor, name: str) -> Tensor:
    f, derivative, _ = SPECTRAL[name]
    a, b = values[..., :, None], values[..., None, :]
    difference = a - b
    # Closer than this the quotient loses more digits than the derivative at the middle is off.
    near = difference.abs() < torch.finfo(values.dtype).eps ** (1 / 3) * (1 + a.abs())
    quotient = (f(a) - f(b)) / torch.where(near, 1, difference)
    return torch.where(near, derivative((a + b) / 2), quotient)


def apply_spectral(A: Tensor, name: str) -> Tensor:
    """Return the function ``name`` of a Hermitian matrix.

    Example:
        >>> apply_spectral(torch.zeros(2, 2), "exponential")
        tensor([[1., 0.],
                [0., 1.]])
    """
    result: Tensor = _Spectral.apply((A + A.mH) / 2, name)[0]  # type: ignore[no-untyped-call]  # torch's
    return result


def spectral_inverse(A: Tensor, name: str) -> Tensor:
    """Return the Hermitian matrix that :func:`apply_spectral` sends to ``A``, positive definite."""
    values, V = torch.linalg.eigh(A)
    # Rounding may leave an eigenvalue of a definite matrix at 0 or below.
    values = values.clamp(min=torch.finfo(values.dtype).tiny)
    result: Tensor = (V * SPECTRAL[name][2](values)[..., None, :].to(V.dtype)) @ V.mH
    return result


def nearest_definite(A: Tensor) -> Tensor:
    """Return ``A`` where it is positive definite, else the nearest such matrix, up to the rounding unit."""
    H = (A + A.mH) / 2
    symmetric = (A.mH == A).all(-1, keepdim=True).all(-2, keepdim=True)
    definite = (torch.linalg.cholesky_ex(H).info == 0)[..., None, None]
    values, V = torch.linalg.eigh(H)
    eps = torch.finfo(values.dtype).eps * max(A.shape[-1], 1)
    scale = values.abs().amax(-1, keepdim=True) if A.shape[-1] else values
    floor = torch.where(scale > 0, scale, 1) * eps
    nearest = (V * values.clamp(min=floor)[..., None, :].to(V.dtype)) @ V.mH
    nearest = (nearest + nearest.mH) / 2
    return torch.where(definite, torch.where(symmetric, A, H), nearest)


class _Polar(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        U, S, Vh = torch.linalg.svd(A, full_matrices=False)
        return U @ Vh, U, S, Vh

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*inputs, *output[1:])

    @staticmethod
    def backward(ctx: Any, G: Tensor, *_: Tensor) -> Tensor:
        return _PolarDerivative.apply(*ctx.saved_tensors, G)  # type: ignore[no-untyped-call, no-any-return]  # torch's


class _PolarDerivative(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(A: Tensor, U: Tensor, S: Tensor, Vh: Tensor, G: Tensor) -> Tensor:
        floor = torch.finfo(S.dtype).eps * max(A.shape[-2:])
        S = torch.maximum(S, S[..., :1] * floor).clamp(min=torch.finfo(S.dtype).tiny).to(U.dtype)
        GV = G @ Vh.mH
        K = U.mH @ GV
        turn = U @ ((K - K.mH) / (S[..., :, None] + S[..., None, :]))
        leave = (GV - U @ K) / S[..., None, :]
        return (turn + leave) @ Vh

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Keep nothing: there is no second derivative."""

    @staticmethod
    def backward(*_: Any) -> Any:
        raise _no_second_derivative()


def polar(A: Tensor) -> Tensor:
    r"""Return :math:`U V^H` of :math:`A = U S V^H`: the nearest matrix with orthonormal columns, for a tall ``A``.

    Example:
        >>> polar(torch.tensor([[3.0, 0.0], [0.0, 0.5]]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    result: Tensor = _Polar.apply(A)[0]  # type: ignore[no-untyped-call]  # torch's
    return result
