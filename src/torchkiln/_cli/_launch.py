"""The processes that torchrun started together, as one group; a command run alone has none."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

__all__ = ["launched_group"]

_TERMINATED = 143


@contextmanager
def launched_group() -> Iterator[dist.ProcessGroup | None]:
    """Yield the group of the processes of this job, None where torchrun started none.

    When one of them ends, torchrun terminates the others. They leave by an exception, so that what they have begun to
    write is removed.
    """
    if not dist.is_torchelastic_launched():
        yield None
        return
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    dist.init_process_group("gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()
        signal.signal(signal.SIGTERM, before)
