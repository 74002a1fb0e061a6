"""The laws every parametrization obeys, for the families of the catalogue and for your own.

``python -m torchkiln.testing`` prints the matrix of families and laws.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from torchkiln._core.errors import ParametrizationError
from torchkiln.testing._catalogue import label
from torchkiln.testing._laws import LAWS, LawBrokenError, NotApplicableError, Subject
from torchkiln.testing._report import Report, Result

__all__ = ["Report", "Result", "check"]


def check(parametrization: nn.Module, example: Tensor, *, laws: Iterable[str] | None = None) -> Report:
    """Put a parametrization to every law: values, inverse, gradients, batches, training, compilation, copies, baking.

    The parametrization is copied and stays as it is. Any module with a ``forward`` will do; one derived from
    ``torchkiln.Parametrization`` says more about itself, and more laws apply to it.

    Args:
        parametrization: As for ``register_parametrization``.
        example: A tensor to register it on; small ones are fast.
        laws: The names of those to check, all by default; :class:`Result` has them.

    Returns:
        One result for each law; ``report.ok`` says whether none is broken, ``str(report)`` shows all.

    Raises:
        ParametrizationError: There is no such law.

    Example:
        >>> import torch
        >>> class Doubled(nn.Module):
        ...     def forward(self, X):
        ...         return 2 * X
        ...     def right_inverse(self, X):
        ...         return X  # forgets to divide
        >>> print(check(Doubled(), torch.ones(2), laws=["shape", "inverse", "sample"]))
        Doubled()
          shape    passed
          inverse  failed   a value it had computed is off by ...
          sample   skipped  it has no sample()
    """
    names = list(LAWS) if laws is None else list(laws)
    unknown = [name for name in names if name not in LAWS]
    if unknown:
        raise ParametrizationError(f"There is no law {unknown[0]!r}; there are {', '.join(LAWS)}.")
    subject = Subject(parametrization, example.detach())
    return Report(label(parametrization), tuple(_verdict(name, subject) for name in names))


def _verdict(name: str, subject: Subject) -> Result:
    try:
        LAWS[name](subject)
    except NotApplicableError as reason:
        return Result(name, "skipped", str(reason))
    except LawBrokenError as reason:
        return Result(name, "failed", str(reason))
    except Exception as error:  # noqa: BLE001  # whatever a parametrization raises is what the report is about
        line = (str(error).splitlines() or [""])[0]
        return Result(name, "failed", f"{type(error).__name__}: {line}")
    return Result(name, "passed")
