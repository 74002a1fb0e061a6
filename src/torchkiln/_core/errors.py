"""The exceptions torchkiln raises, each also the built-in that torch raises in its place.

::

    Exception
    +-- TorchkilnError
        +-- ParametrizationError (ValueError)   a parametrization, tensor or model is not what the call needs
        |   +-- NothingToFoldError              a strict bake found nothing to do
        +-- ComputedTensorError (KeyError)      a parameter is to take the name of a computed tensor
        +-- InverseError (RuntimeError)         assignment needs a right_inverse that is not there
        +-- CheckpointError (ValueError)        a file cannot be read, understood or written
            +-- OutputExistsError (FileExistsError)

Messages say where, what was expected, what was got, and what to do, in at most three lines; where torch has a
message for the same misuse, ours begins with torch's text.
"""

from __future__ import annotations

__all__ = [
    "CheckpointError",
    "ComputedTensorError",
    "InverseError",
    "NothingToFoldError",
    "OutputExistsError",
    "ParametrizationError",
    "TorchkilnError",
    "TorchkilnWarning",
    "describe",
]


class TorchkilnError(Exception):
    """The root: ``except TorchkilnError`` catches whatever torchkiln raises on purpose."""


class ParametrizationError(TorchkilnError, ValueError):
    """A parametrization, a tensor or a model is not what the call needs."""


class NothingToFoldError(ParametrizationError):
    """A strict bake or restore found nothing to do."""


class ComputedTensorError(TorchkilnError, KeyError):
    """A parameter is to take the name of a computed tensor."""

    __str__ = Exception.__str__  # KeyError shows the repr of its message, which has two lines


class InverseError(TorchkilnError, RuntimeError):
    """A parametrized tensor was assigned to, and a step has no ``right_inverse``."""


class CheckpointError(TorchkilnError, ValueError):
    """A checkpoint file cannot be read, understood or written."""


class OutputExistsError(CheckpointError, FileExistsError):
    """The output exists and the caller did not ask to replace it."""


class TorchkilnWarning(UserWarning):
    """Something was done that the caller may not expect; nothing is wrong yet."""


def describe(module: object) -> str:
    """Return ``module``'s repr where it is one line, else its class alone: messages never print a whole model."""
    text = repr(module)
    return text if "\n" not in text else f"{type(module).__name__}(...)"
