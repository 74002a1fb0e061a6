"""What the caller knows and a file cannot say: name patterns to maps and to normalized dims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from fnmatch import fnmatchcase

from torchkiln._core.errors import CheckpointError
from torchkiln._core.spellings.described import Described

__all__ = ["ASSUMPTIONS", "Options", "Patterns"]

ASSUMPTIONS = ("cayley", "data", "householder", "identity", "matrix_exp", "spectral_norm", "weight_norm")
MAPS = ("cayley", "householder", "matrix_exp")


class Patterns:
    """Name patterns that remember which of them were of use."""

    def __init__(self, patterns: Sequence[str]) -> None:
        # An exact name is meant more than a wildcard is, wherever it stands.
        self._patterns = sorted(patterns, key=lambda pattern: any(sign in pattern for sign in "*?["))
        self._used: set[str] = set()

    def match(self, *names: str) -> str | None:
        """Return the first pattern that matches one of the names."""
        for pattern in self._patterns:
            if any(name == pattern or fnmatchcase(name, pattern) for name in names):
                return pattern
        return None

    def use(self, pattern: str) -> None:
        """Remember that a pattern made a difference."""
        self._used.add(pattern)

    @property
    def unused(self) -> list[str]:
        """Patterns that made none."""
        return [pattern for pattern in self._patterns if pattern not in self._used]


class Options:
    """``assume`` and ``dims`` of one call, looked up by a tensor's name with or without its group's path.

    Args:
        assume: Name pattern to one of :data:`ASSUMPTIONS`.
        dims: Name pattern to a normalized dim, None for all dims at once.

    Raises:
        CheckpointError: A value of `assume` is unknown.
    """

    def __init__(
        self, assume: Mapping[str, str] | None = None, dims: Mapping[str, int | None] | None = None
    ) -> None:
        self._assume = dict(assume or {})
        self._dims = dict(dims or {})
        for pattern, value in self._assume.items():
            if value not in ASSUMPTIONS:
                raise CheckpointError(
                    f'assume["{pattern}"]: expected one of {", ".join(ASSUMPTIONS)}, got {value!r}.'
                )
        self._assume_patterns = Patterns(list(self._assume))
        self._dim_patterns = Patterns(list(self._dims))
        self._path: tuple[str, ...] = ()
        self._expected: Mapping[str, int] = {}
        self._described: Mapping[str, Described] = {}

    def within(self, path: tuple[str, ...]) -> Options:
        """Return these options for the names of one group; what is of use is remembered in both."""
        view = copy(self)
        view._path = path
        return view

    def expecting(self, dims: Mapping[str, int]) -> Options:
        """Return these options for a module that is known to have some tensors.

        Args:
            dims: The tensors' names, and which dimension a spectral norm of them normalizes unless it is told another.
        """
        view = copy(self)
        view._expected = dims
        return view

    def describing(self, tensors: Mapping[str, Described]) -> Options:
        """Return these options for names of which the file itself says what they are.

        Args:
            tensors: What it says, by the tensor's name.
        """
        view = copy(self)
        view._described = tensors
        return view

    def description(self, name: str) -> Described | None:
        """Return what the file says of a tensor, None where it says nothing."""
        return self._described.get(name)

    def expects(self, name: str) -> bool:
        """Return whether it is known that there is a tensor with this name."""
        return name in self._expected

    def likely_dim(self, name: str) -> int | None:
        """Return the dimension that a spectral norm of a tensor most likely normalizes, where its module is known."""
        return self._expected.get(name)

    def says(self, name: str, *values: str) -> str | None:
        """Return what `assume` says about a tensor, if it is one of the values."""
        pattern = self._assume_patterns.match(name, self._full(name))
        if pattern is None or self._assume[pattern] not in values:
            return None
        self._assume_patterns.use(pattern)
        return self._assume[pattern]

    def dim_of(self, name: str, *, fitting: Sequence[int | None], ndim: int) -> tuple[bool, int | None]:
        """Return whether `dims` chooses among the fitting dims of a tensor, and which one.

        Raises:
            CheckpointError: It names a dim that does not fit, and not by a wildcard meant for other tensors.
        """
        pattern = self._dim_patterns.match(name, self._full(name))
        if pattern is None:
            return False, None
        dim = self._dims[pattern]
        dim = dim + ndim if dim is not None and dim < 0 else dim
        if dim in fitting:
            self._dim_patterns.use(pattern)
            return True, dim
        if len(fitting) == 1 and pattern not in (name, self._full(name)):
            return False, None
        choices = " or ".join(str(choice) for choice in fitting)
        raise CheckpointError(
            f"{self._full(name)}: dims says {self._dims[pattern]}, but the shapes fit {choices}."
        )

    def check_used(self, where: str) -> None:
        """Raise if a pattern made no difference: it says something about the file that is not so.

        Raises:
            CheckpointError: Names the argument and its pattern.
        """
        for argument, patterns in (("assume", self._assume_patterns), ("dims", self._dim_patterns)):
            if patterns.unused:
                raise CheckpointError(
                    f'{argument}: "{patterns.unused[0]}" is of no use to any parametrized tensor of {where}.\n'
                    "Run inspect for the names and what they need."
                )

    def _full(self, name: str) -> str:
        return ".".join((*self._path, name))
