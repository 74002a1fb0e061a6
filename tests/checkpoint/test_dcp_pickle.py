"""The unpickler of metadata takes members of enumerations as any Python pickles them, and no other attribute."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

from torchkiln._core.errors import CheckpointError
from torchkiln.checkpoint._dcp_pickle import load_plain


class _Attribute:
    """Is pickled as an attribute of something."""

    def __init__(self, of: Any, name: str) -> None:
        self.of, self.name = of, name

    def __reduce__(self) -> Any:
        return getattr, (self.of, self.name)


def test_a_member_of_an_enumeration_may_be_an_attribute_of_its_class() -> None:
    member = _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    assert load_plain(pickle.dumps(_Attribute(_MEM_FORMAT_ENCODING, member.name)), Path("x")) is member


@pytest.mark.parametrize(
    ("of", "name"),
    [
        (Metadata, "__init__"),
        (_MEM_FORMAT_ENCODING, "__class__"),
        (_MEM_FORMAT_ENCODING, "mro"),
        ("text", "format"),
    ],
)
def test_no_other_attribute_is_taken(of: Any, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"builtins\.getattr of what is no enumeration"):
        load_plain(pickle.dumps(_Attribute(of, name)), Path("x"))
