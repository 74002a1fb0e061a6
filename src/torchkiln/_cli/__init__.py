"""The command ``torchkiln``: its entry point, which also works where the ``cli`` extra is not installed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]

_EXTRA = frozenset({"rich", "typer"})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: The words after ``torchkiln``; those of the process by default.

    Returns:
        0 done, 1 the answer is no or a file could not be handled, 2 wrong usage or a missing extra, 130 interrupted,
        143 and 129 ended by SIGTERM and SIGHUP,
        141 the reader of the output went away.
    """
    try:
        from torchkiln._cli._app import run
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _EXTRA:
            raise
        print(f"torchkiln: the command line needs {package}: pip install 'torchkiln[cli]'", file=sys.stderr)
        return 2
    return run(sys.argv[1:] if arguments is None else arguments)
