"""The maps that normalize: what they promise about their values, and their derivatives against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from torchkiln.families._maps import norms, scale, spectral_batch, spectral_norm
from torchkiln.families._maps.spectral_norm import Iterate


def free(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_weight_normalize_gives_slices_of_the_lengths_asked_for(dim):
    V = free((3, 4, 5))
    g = norms.norm_except(V, dim) * 2 + 1
    W = norms.weight_normalize(V, g, dim)
    torch.testing.assert_close(norms.norm_except(W, dim), g)
    torch.testing.assert_close(W, V * (g / norms.norm_except(V, dim)))


def test_weight_normalize_over_the_whole_tensor():
    V = free((3, 4))
    W = norms.weight_normalize(V, torch.tensor(2.0, dtype=torch.float64), -1)
    torch.testing.assert_close(W, 2 * V / V.norm())


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
# torch scripts some of its decompositions when forward mode is first used.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_weight_normalize_differentiates_twice(dim):
    V = free((3, 4, 2)).requires_grad_()
    g = (norms.norm_except(V.detach(), dim) + 1).requires_grad_()
    assert gradcheck(lambda V, g: norms.weight_normalize(V, g, dim), (V, g), check_forward_ad=True)
    assert gradgradcheck(lambda V, g: norms.weight_normalize(V, g, dim), (V, g))


def test_weight_normalize_differentiates_where_a_slice_is_one_number():
    V, g = free((4,)).requires_grad_(), free((4,)).requires_grad_()
    assert gradcheck(lambda V, g: norms.weight_normalize(V, g, 0), (V, g))
    assert gradgradcheck(lambda V, g: norms.weight_normalize(V, g, 0), (V, g))


def second_derivatives(V: Tensor, g: Tensor, normalize: Callable[[Tensor, Tensor], Tensor]) -> list[Tensor]:
    W = normalize(V, g)
    first = torch.autograd.grad(W.pow(3).sum(), (V, g), create_graph=True)
    again = torch.autograd.grad(W.pow(3).sum(), (V, g), create_graph=True)
    return [*torch.autograd.grad(first[0].pow(2).sum(), (V, g), retain_graph=True), again[0], again[1]]


# The kernel's own second derivative is wrong, and mended by a hook.
@pytest.mark.parametrize("how", ["plain", "not contiguous", "checkpointed", "saved on the CPU"])
def test_the_second_derivative_of_the_kernel_is_that_of_the_formula(how):
    V, g = free((4, 3)).requires_grad_(), free((4, 1)).requires_grad_()

    def by_kernel(V: Tensor, g: Tensor) -> Tensor:
        if how == "checkpointed":
            W: Tensor = checkpoint(norms.weight_normalize, V, g, 0, use_reentrant=False)
            return W
        if how == "not contiguous":
            V = V.t().contiguous().t()
        with save_on_cpu() if how == "saved on the CPU" else nullcontext():
            return norms.weight_normalize(V, g, 0)

    expected = second_derivatives(V, g, lambda V, g: V * (g / V.norm(dim=1, keepdim=True)))
    torch.testing.assert_close(second_derivatives(V, g, by_kernel), expected)


def test_a_graph_that_is_kept_is_mended_once():
    V, g = free((4, 3)).requires_grad_(), free((4, 1)).requires_grad_()
    W = norms.weight_normalize(V, g, 0)
    calls = torch.utils.hooks.RemovableHandle.next_id
    for _ in range(3):
        torch.autograd.grad(W.sum(), (V, g), create_graph=True)
    assert torch.utils.hooks.RemovableHandle.next_id == calls + 1


def test_the_kernel_and_the_formula_agree():
    V, g = free((5, 3)), free((5, 1))
    under_vmap = torch.func.vmap(lambda V, g: norms.weight_normalize(V, g, 0))(V[None], g[None])[0]
    torch.testing.assert_close(norms.weight_normalize(V, g, 0), under_vmap)
    torch.testing.assert_close(norms.weight_normalize(V.requires_grad_(), g, 0), under_vmap)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
@pytest.mark.parametrize(("shape", "dim"), [((4, 3), 0), ((4, 3), 1), ((2, 3, 4), 1), ((2, 3, 4), 2)])
def test_power_iteration_finds_the_largest_singular_value(shape, dim, dtype):
    W = free(shape, dtype)
    M = spectral_norm.as_matrix(W, dim)
    u, v = (torch.nn.functional.normalize(free((n,), dtype), dim=0) for n in M.shape)
    u, v, _ = spectral_norm.power_iteration(M, u, v, steps=500, eps=1e-12)
    normalized = spectral_norm.as_matrix(spectral_norm.spectral_normalize(W, Iterate(u, v), dim), dim)
    torch.testing.assert_close(
        torch.linalg.matrix_norm(normalized, 2), torch.tensor(1.0, dtype=torch.float64)
    )


def test_spectral_normalize_differentiates_with_constant_vectors():
    u, v = (torch.nn.functional.normalize(free((n,)), dim=0) for n in (4, 3))
    assert gradcheck(
        lambda W: spectral_norm.spectral_normalize(W, Iterate(u, v), 0), free((4, 3)).requires_grad_()
    )


@pytest.fixture
def _every_weight_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spectral_norm, "LARGE", 0)


LARGE = pytest.mark.usefixtures("_every_weight_is_large")


@LARGE
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((4, 3), 0), ((4, 3), 1), ((4, 4), 1), ((2, 3, 4), 0), ((2, 3, 4), 1), ((2, 3, 4), 2)],
)
def test_the_gradient_for_large_weights_is_the_derivative(shape, dim):
    rows = spectral_norm.as_matrix(torch.empty(shape), dim).shape
    at = Iterate(*(torch.nn.functional.normalize(free((n,)), dim=0) for n in rows))

    def normalize(W: Tensor) -> Tensor:
        return spectral_norm.spectral_normalize(W, at, dim)

    W = free(shape).requires_grad_()
    assert gradcheck(normalize, W)
    assert gradgradcheck(normalize, W)


@LARGE
def test_large_and_small_weights_are_divided_alike():
    W = free((4, 3)).requires_grad_()
    u, v = (torch.nn.functional.normalize(free((n,)), dim=0) for n in W.shape)
    image = W.detach().mT @ u
    large = [spectral_norm.spectral_normalize(W, Iterate(u, v, known), 0) for known in (None, image)]
    large.append(spectral_norm.spectral_normalize(W, Iterate(u, v), 0, trains=False))
    expected = W / torch.dot(u, W @ v)
    G = free((4, 3))
    for one in large:
        torch.testing.assert_close(one, expected)
        torch.testing.assert_close(
            torch.autograd.grad(one, W, G), torch.autograd.grad(expected, W, G, retain_graph=True)
        )
    assert torch.equal(large[0], large[1])
    assert torch.equal(large[0], large[2])


@LARGE
def test_a_large_weight_has_gradients_again_from_a_kept_graph_and_for_a_batch():
    W = free((4, 3)).requires_grad_()
    u, v = (torch.nn.functional.normalize(free((n,)), dim=0) for n in W.shape)
    value, expected = spectral_norm.spectral_normalize(W, Iterate(u, v), 0), W / torch.dot(u, W @ v)
    for G in free((2, 4, 3)):
        torch.testing.assert_close(
            torch.autograd.grad(value, W, G, retain_graph=True),
            torch.autograd.grad(expected, W, G, retain_graph=True),
        )
    batch = free((5, 4, 3))
    torch.testing.assert_close(
        torch.autograd.grad(value, W, batch, is_grads_batched=True),
        torch.autograd.grad(expected, W, batch, is_grads_batched=True),
    )


@LARGE
def test_a_large_weight_has_its_gradient_under_compiled_autograd():
    from torch._dynamo import compiled_autograd  # half a second, at the collection of tests otherwise

    W = free((4, 3)).requires_grad_()
    u, v = (torch.nn.functional.normalize(free((n,)), dim=0) for n in W.shape)
    G = free((4, 3))
    (expected,) = torch.autograd.grad(W / torch.dot(u, W @ v), W, G)
    with compiled_autograd._enable(torch.compile(backend="eager", fullgraph=True)):
        spectral_norm.spectral_normalize(W, Iterate(u, v), 0).backward(G)
    torch.testing.assert_close(W.grad, expected)


DIVIDED: dict[str, Callable[[Tensor], Tensor]] = {
    "spectral norm": lambda W: spectral_norm.spectral_normalize(
        W, Iterate(W[:, 0].detach(), W[0].detach()), 0
    ),
    "a batch": lambda W: spectral_batch.normalize(W[None], W[None, :, 0].detach(), W[None, 0].detach()),
    "sphere": lambda W: scale.onto_sphere(W, 2.0, (1,)),
    "weight norm": lambda W: norms.weight_normalize(W, torch.ones(4, 1, dtype=W.dtype), 0),
}


@LARGE
@pytest.mark.parametrize("name", DIVIDED)
def test_who_looks_at_the_gradient_of_the_result_sees_what_arrives_there(name):
    value = DIVIDED[name](free((4, 3)).requires_grad_())
    G, seen = torch.randn_like(value), []
    (asked,) = torch.autograd.grad(value, value, G, retain_graph=True)
    value.register_hook(seen.append)
    value.retain_grad()
    value.backward(G)
    assert all(torch.equal(found, G) for found in (asked, value.grad, *seen))


@LARGE
def test_a_large_weight_that_is_written_to_before_the_backward_pass_is_an_error():
    W = free((4, 3)).requires_grad_()
    u, v = (torch.nn.functional.normalize(free((n,)), dim=0) for n in W.shape)
    value = spectral_norm.spectral_normalize(W, Iterate(u, v), 0)
    with torch.no_grad():
        W.add_(1)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 1, expected 0"):
        value.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_spectral_normalize_rounds_once(dtype):
    W, u, v = free((4, 3)).to(dtype), free((4,)).to(dtype), free((3,)).to(dtype)
    wide = spectral_norm.spectral_normalize(W.float(), Iterate(u.float(), v.float()), 0)
    assert torch.equal(spectral_norm.spectral_normalize(W, Iterate(u, v), 0), wide.to(dtype))


def test_as_matrix_keeps_the_order_of_the_other_dimensions():
    W = torch.arange(24).view(2, 3, 4)
    assert spectral_norm.as_matrix(W, 2)[1].tolist() == W[:, :, 1].flatten().tolist()


@pytest.mark.parametrize(
    ("shape", "dims", "radius"),
    [((4, 3), (-1,), 1.0), ((4, 3), (0, 1), 2.5), ((2, 3, 4), (1, 2), 3.0), ((3,), (), 2.0)],
)
def test_the_explicit_gradient_on_a_sphere_is_the_derivative(shape, dims, radius):
    X, G = free(shape).requires_grad_(), free(shape)
    value = scale.onto_sphere(X, radius, dims)
    plain = scale.rescale(X, scale.norm(X, dims), to=radius, dims=dims)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(torch.autograd.grad(value, X, G), torch.autograd.grad(plain, X, G))
    assert gradcheck(lambda X: scale.onto_sphere(X, radius, dims), X)
    assert gradgradcheck(lambda X: scale.onto_sphere(X, radius, dims), X)


def test_a_sphere_keeps_the_gradient_of_zeros_beside_others():
    X = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    value = scale.onto_sphere(X, 5.0, (-1,))
    torch.testing.assert_close(value, torch.tensor([[3.0, 4.0], [5.0 / 2**0.5] * 2]))
    (gradient,) = torch.autograd.grad(value, X, torch.tensor([[4.0, -3.0], [1.0, 1.0]]))
    torch.testing.assert_close(gradient, torch.tensor([[4.0, -3.0], [5.0, 5.0]]))
