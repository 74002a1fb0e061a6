"""What a training step sends between processes, by collective: plain and parametrized layers under torch's engines.

Run by itself, since it needs several processes::

    torchrun --nproc-per-node 2 -m benchmarks.communication

A number is the bytes that one process gives to, or gets from, a collective in one forward and backward pass: the whole
gathered tensor, the whole tensor that is reduced. It counts calls, not time.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

from torchkiln.parametrizations import orthogonal, spectral_norm, weight_norm

SIZE = 256

NORMS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "plain": lambda layer: layer,
    "weight_norm": weight_norm,
    "weight_norm, dim=1": lambda layer: weight_norm(layer, dim=1),
    "spectral_norm": spectral_norm,
    "orthogonal": orthogonal,
}
KINDS = {"all_gather": "all-gather", "allgather": "all-gather", "reduce_scatter": "reduce-scatter"}
KINDS |= {"all_reduce": "all-reduce", "allreduce": "all-reduce", "broadcast": "broadcast"}


class Counting(TorchDispatchMode):
    """Adds up the bytes of each collective."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(issubclass(one, DTensor) for one in types):
            return NotImplemented  # it comes again with what each process has
        result = func(*args, **kwargs or {})
        if func.namespace in ("c10d", "_c10d_functional"):
            kind = next((kind for name, kind in KINDS.items() if name in func.__name__), None)
            if kind is not None:
                self.bytes[kind] += max(map(_size, _tensors((args, result))), default=0)
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def engines() -> dict[str, Callable[[nn.Module], None]]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def parallel(style: Any) -> Callable[[nn.Module], None]:
        return lambda layer: (parallelize_module(layer, mesh, style), None)[1]

    return {
        "FSDP2": lambda layer: (fully_shard(layer, mesh=mesh), None)[1],
        "column-wise": parallel(ColwiseParallel()),
        "row-wise": parallel(RowwiseParallel()),
    }


def step(layer: nn.Module, engine: str) -> Counter[str]:
    """Return what one training step sends, after a first one that sets things up."""
    width = SIZE // dist.get_world_size() if engine == "row-wise" else SIZE
    x = torch.randn(8, width)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    layer(x).sum().backward()
    optimizer.step()  # after which state that follows the weight advances
    optimizer.zero_grad()
    with Counting() as counting:
        layer(x).sum().backward()
    return counting.bytes


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    weight = SIZE * SIZE * 4
    columns = ("all-gather", "reduce-scatter", "all-reduce")
    if dist.get_rank() == 0:
        print(
            f"{dist.get_world_size()} processes, a {SIZE} x {SIZE} layer in float32: its weight has {weight:,} bytes"
        )
        print(f"{'engine':12} {'layer':20} " + " ".join(f"{column:>15}" for column in columns))
    source = nn.Linear(SIZE, SIZE)
    for engine, distribute in engines().items():
        for name, norm in NORMS.items():
            layer = norm(copy.deepcopy(source))
            distribute(layer)
            found = step(layer, engine)
            if dist.get_rank() == 0:
                print(f"{engine:12} {name:20} " + " ".join(f"{found[column]:15,}" for column in columns))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
