"""What the tests of sharded tensors share: parametrizations by name, and tensors laid out over processes."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torchkiln import families, parametrizations, parametrize


class Doubled(nn.Module):
    """A step of a user: it looks at the whole matrix, and knows nothing of processes."""

    def forward(self, X: Tensor) -> Tensor:
        return X.triu() + X.triu(1).mT

    def right_inverse(self, A: Tensor) -> Tensor:
        return A.triu()


class LowRankUpdate(nn.Module):
    """A step with parameters of its own, and no inverse."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.linspace(-1, 1, 2 * weight.shape[0]).view(-1, 2))
        self.B = nn.Parameter(torch.linspace(1, 2, 2 * weight.shape[1]).view(2, -1))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.A @ self.B


def register(make: Callable[[Tensor], nn.Module]) -> Callable[[nn.Module], nn.Module]:
    return lambda layer: parametrize.register_parametrization(layer, "weight", make(layer.weight))


STEPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "weight norm": parametrizations.weight_norm,
    "weight norm of columns": lambda layer: parametrizations.weight_norm(layer, dim=1),
    "weight norm of all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral norm": parametrizations.spectral_norm,
    "exponential": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="matrix_exp"),
    "cayley": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "householder": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
    "elementwise": register(lambda _: families.Interval(-2.0, 2.0)),
    "rows": register(lambda _: families.Sphere()),
    "several originals": register(lambda _: families.LowRank(2)),
    "user": register(lambda _: Doubled()),
    "user with parameters": register(LowRankUpdate),
}
BUILT_IN = ("weight norm", "spectral norm", "exponential", "cayley", "householder")


def line(world: int | None = None) -> DeviceMesh:
    return init_device_mesh("cpu", (world or dist.get_world_size(),))


def full(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def shard_weight(layer: nn.Module, mesh: DeviceMesh, dim: int) -> None:
    layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(dim)]))


def assert_near(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(full(got), full(expected), rtol=1e-4, atol=1e-5)
