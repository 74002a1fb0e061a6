"""What one process of the pool does: take a case, run it in a process group of its own, send back the outcome."""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchkiln import TorchkilnWarning

# How long a collective waits. A case that fails on one rank closes its connections, and the others fail at once.
PATIENCE = timedelta(seconds=20)


def serve(connection: Connection, rank: int, port: int, dump: Path) -> None:
    """Run the cases that arrive, until the connection closes."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    warnings.simplefilter("error", TorchkilnWarning)
    with dump.open("w") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        store = dist.TCPStore("localhost", port, is_master=False, wait_for_workers=False)
        while True:
            try:
                number, world, job = pickle.loads(connection.recv_bytes())
            except EOFError:
                return
            # A fresh group for each case: what one leaves pending does not reach the next one.
            group = dist.PrefixStore(str(number), store)
            outcome = _outcome(job, rank=rank, world=world, store=group)
            connection.send_bytes(pickle.dumps((number, *outcome)))


def _outcome(job: bytes, *, rank: int, world: int, store: dist.Store) -> tuple[Any, str | None]:
    """Return what the case returns, or the traceback of what it raised."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=PATIENCE)
    try:
        torch.manual_seed(0)
        case: Callable[..., Any]
        case, arguments = pickle.loads(job)
        value = case(**arguments)
        pickle.dumps(value)
        with suppress(RuntimeError):  # another rank has failed, and says so itself
            dist.barrier()  # nobody closes while another one still reads
        return value, None
    except BaseException:  # noqa: BLE001  whatever it is, the test has to hear of it
        return None, traceback.format_exc()
    finally:
        torch._dynamo.reset()
        dist.destroy_process_group()
