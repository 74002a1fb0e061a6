"""Drop-in for ``torch.nn.utils.parametrize``: the same names, signatures, state-dict keys and errors."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType

from torch import Tensor

from torchkiln._core.cache import cached, get_count, set_count, shared_scope
from torchkiln._core.chain import ParametrizationList, is_parametrized
from torchkiln._core.register import register_parametrization, transfer_parametrizations_and_params
from torchkiln._core.remove import remove_parametrizations, type_before_parametrizations

__all__ = [
    "ParametrizationList",
    "cached",
    "is_parametrized",
    "register_parametrization",
    "remove_parametrizations",
    "transfer_parametrizations_and_params",
    "type_before_parametrizations",
]


class _Module(ModuleType):
    """This module's own class: outside code writes to torch's two private names, and the writes must count."""

    @property
    def _cache_enabled(self) -> int:
        return get_count()

    @_cache_enabled.setter
    def _cache_enabled(self, count: int) -> None:
        set_count(count)

    @property
    def _cache(self) -> dict[tuple[int, str], Tensor]:
        return shared_scope()

    @_cache.setter
    def _cache(self, values: Mapping[tuple[int, str], Tensor]) -> None:
        given = dict(values)
        shared_scope().clear()
        shared_scope().update(given)


sys.modules[__name__].__class__ = _Module
