"""Ranks that change different things are told so, all of them and by name, before any waits for another.

A change of a module that is trained on several processes has to be made on each of them. Each one writes what it is
about to do to the store of the process group, waits a bounded time for what the others write, and raises where that
differs. No collective is involved, so none can hang.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from torchkiln._core.errors import ParametrizationError

__all__ = ["agree", "ranks_of_mesh"]

# How long ranks may be apart. They come from the same line of the same program, but may have been at work before.
PATIENCE = timedelta(seconds=60)

Ranks = tuple[int, ...]


def ranks_of_mesh(mesh: Any) -> list[Ranks]:
    """Return the ranks of this process's group in each dimension of a device mesh."""
    return [tuple(dist.get_process_group_ranks(mesh.get_group(dim))) for dim in range(mesh.ndim)]


def agree(intent: str, groups: Iterable[Ranks]) -> None:
    """Raise on every rank unless all ranks of each group have the same ``intent``.

    Args:
        intent: What this rank is about to do, and on what.
        groups: The ranks that have to agree; each of them calls this with the same group.

    Raises:
        ParametrizationError: Another rank intends something else, or did not come in time.
    """
    for ranks in sorted(set(groups)):
        if len(ranks) > 1:
            _agree_in(ranks, intent)


def _agree_in(ranks: Ranks, intent: str) -> None:
    name = "torchkiln/" + "-".join(map(str, ranks))
    store: Any = distributed_c10d.PrefixStore(name, distributed_c10d._get_default_store())
    me = dist.get_rank()
    turn = store.add(f"turns of {me}", 1)
    store.set(f"{turn}/{me}", intent)
    intents = {rank: _intent_of(store, f"{turn}/{rank}") for rank in ranks}
    if len(set(intents.values())) > 1:
        told = "; ".join(f"rank {rank}: {text or 'nothing'}" for rank, text in intents.items())
        absent = any(text is None for text in intents.values())
        late = f" within {PATIENCE.total_seconds():g} s" if absent else ""
        raise ParametrizationError(
            f"the ranks disagree on what to change{late}; nothing was changed.\n{told}.\n"
            "Register, remove and bake the same tensors in the same order on every rank."
        )


def _intent_of(store: Any, key: str) -> str | None:
    """Return what another rank has written; None where it has not come in time."""
    try:
        store.wait([key], PATIENCE)
    except dist.DistStoreError:
        return None
    text: str = store.get(key).decode()
    return text
