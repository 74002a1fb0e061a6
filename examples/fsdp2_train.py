"""Train a network with norms on several processes, save it, and take the norms out of the file and of the model.

    torchrun --nproc-per-node 2 examples/fsdp2_train.py

Each process holds a part of every parameter (FSDP2). The checkpoint is baked by all of them together, each its part;
the live model is baked in place, stays sharded, and goes on training.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import torchkiln
from torchkiln import checkpoint
from torchkiln.parametrizations import spectral_norm, weight_norm


def network(*, normed: bool) -> nn.Sequential:
    """Return the network, with its norms or as it is without them."""
    layers = [nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 4)]
    if normed:
        layers = [weight_norm(layers[0]), spectral_norm(layers[1]), weight_norm(layers[2])]
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])


def shard(model: nn.Sequential) -> None:
    """Shard every layer over all processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int) -> tuple[float, float]:
    """Fit each process's part of the data, and return the first and the last loss."""
    data = torch.Generator().manual_seed(dist.get_rank())
    x = torch.randn(128, 16, generator=data)
    target = torch.stack([x[:, :4].sum(1), x[:, 4:8].prod(1), x[:, 8:].amax(1), x.norm(dim=1)], dim=1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], losses[-1]


def say(text: object) -> None:
    """Print once, not by every process."""
    if dist.get_rank() == 0:
        print(text)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Return what the model makes of ``x`` in eval mode."""
    result: Tensor = model.eval()(x)
    return result


def main() -> None:
    """Train, save, bake the file, bake the model, export."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = network(normed=True)
    shard(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    first, last = train(model, optimizer, steps=50)
    say(f"trained on {dist.get_world_size()} processes: loss {first:.3f}, then {last:.3f}")

    save({"model": get_model_state_dict(model)}, checkpoint_id="trained")
    report = checkpoint.bake("trained", "plain", group=dist.group.WORLD)
    say(
        f"baked the file: {len(report.rows)} tensors by {len(list(Path('plain').glob('*.distcp')))} processes"
    )

    x = torch.linspace(-1, 1, 32).view(2, 16)
    before = outputs(model, x)
    say(torchkiln.bake(model, optimizer=optimizer))
    weight = model[0].weight
    assert isinstance(weight, DTensor)
    say(f"baked the model: {tuple(weight.shape)}, of which {tuple(weight.to_local().shape)} is here")
    torch.testing.assert_close(outputs(model, x), before)
    first, last = train(model.train(), optimizer, steps=10)
    say(f"trained on without norms: loss {first:.3f}, then {last:.3f}")

    plain = network(normed=False)
    checkpoint.load_weights(plain, "plain")
    program = torch.export.export(plain.eval(), (x,))
    difference = (program.module()(x) - before).abs().max().item()
    say(
        f"exported the baked file: {len(program.state_dict)} plain tensors, outputs differ by {difference:.0e}"
    )
    assert difference < 1e-5
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
