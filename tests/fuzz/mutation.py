"""Mutations of pickles by whole opcodes, which keep more of them that can be loaded than those of bytes do."""

from __future__ import annotations

import pickletools
import random
from collections.abc import Callable

from tests.fuzz.distributed import MARK

__all__ = ["PICKLED", "mutated"]

# The targets whose inputs are pickles.
PICKLED = frozenset({"dcp_metadata", "dcp_pickles", "torch_pickle"})

# What both unpicklers know, and what they do not.
_NAMES = (
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "torch._utils _rebuild_sparse_tensor",
    "torch._utils _rebuild_qtensor",
    "torch._utils _rebuild_meta_tensor_no_storage",
    "torch._utils _rebuild_device_tensor_from_cpu_tensor",
    "torch._tensor _rebuild_from_type_v2",
    "torch.serialization _get_layout",
    "torch.nn.parameter Parameter",
    "torch FloatStorage",
    "torch QUInt8Storage",
    "torch.storage UntypedStorage",
    "torch Tensor",
    "torch Size",
    "torch device",
    "torch bfloat16",
    "torch sparse_coo",
    "collections OrderedDict",
    "collections Counter",
    "_codecs encode",
    "builtins set",
    "builtins bytearray",
    "torch.distributed.checkpoint.metadata TensorStorageMetadata",
    "torch.distributed.checkpoint.metadata BytesStorageMetadata",
    "torch.distributed.checkpoint.metadata MetadataIndex",
    "torch.distributed.checkpoint.filesystem _StorageInfo",
    "pathlib PosixPath",
    "os system",
)
_GLOBALS = tuple(f"c{name}\n".replace(" ", "\n").encode() for name in _NAMES)
_NUMBERS = (b"K\0", b"K\1", b"J\xff\xff\xff\xff", b"J\xff\xff\xff\x7f", b"\x8a\x08" + b"\xff" * 7 + b"\x7f")
_PLAIN = (
    b"N",
    b"\x88",
    b"\x89",
    b")",
    b"]",
    b"}",
    b"(",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"R",
    b"b",
    b"0",
    b"2",
)


def mutated(data: bytes, size: int, seed: int, *, bytewise: Callable[[bytes, int], bytes]) -> bytes:
    """Change an input a little: a third of the time its bytes, otherwise the opcodes of one of its pickles.

    Args:
        data: The input.
        size: The most that may come back.
        seed: What the change depends on.
        bytewise: The mutation of bytes.
    """
    dice = random.Random(seed)
    parts = data.split(MARK)
    index = dice.randrange(len(parts))
    opcodes = _opcodes(parts[index])
    if len(opcodes) < 2 or not dice.randrange(3):
        return bytewise(data, size)
    for _ in range(dice.choice((1, 1, 2, 4))):
        _change(opcodes, dice)
    parts[index] = b"".join(opcodes)
    if not dice.randrange(8):
        dice.shuffle(parts)
    return MARK.join(parts)[:size]


def _opcodes(data: bytes) -> list[bytes]:
    """Return the opcodes with their arguments, and what follows the last that can be read as a piece of its own."""
    starts = []
    try:
        starts += [position or 0 for _, _, position in pickletools.genops(data)]
    except Exception:  # noqa: BLE001  # damage of any kind
        starts = starts or [0]
    return [data[start:stop] for start, stop in zip(starts, [*starts[1:], len(data)], strict=True)]


def _change(opcodes: list[bytes], dice: random.Random) -> None:
    here, there = dice.randrange(len(opcodes)), dice.randrange(len(opcodes))
    kind = dice.randrange(6)
    if kind == 0 and len(opcodes) > 2:
        del opcodes[here]
    elif kind == 1:
        opcodes.insert(here, opcodes[there])
    elif kind == 2:
        opcodes[here], opcodes[there] = opcodes[there], opcodes[here]
    elif kind == 3:
        opcodes.insert(here, dice.choice(_GLOBALS + _NUMBERS + _PLAIN))
    elif kind == 4:
        same = [index for index, code in enumerate(opcodes) if code[:1] == opcodes[here][:1]]
        opcodes[here] = opcodes[dice.choice(same)]
    else:
        names = [index for index, code in enumerate(opcodes) if code[:1] in (b"c", b"K", b"J", b"M")]
        index = dice.choice(names) if names else here
        opcodes[index] = dice.choice(_GLOBALS if opcodes[index][:1] == b"c" else _NUMBERS)
