"""``python -m torchkiln.testing [FAMILY ...]``: the matrix of families and laws."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from torchkiln.testing import check
from torchkiln.testing._catalogue import names, rows
from torchkiln.testing._report import matrix


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the laws, print what they say, and return 1 if one is broken."""
    parser = argparse.ArgumentParser(prog="python -m torchkiln.testing", description=__doc__)
    parser.add_argument("family", nargs="*", help="families to check, all by default")
    options = parser.parse_args(arguments)
    for name in options.family:
        if name not in names():
            parser.error(f"no family is called {name}; there are {', '.join(names())}")
    chosen = [row for row in rows() if not options.family or type(row.family).__name__ in options.family]
    reports = [check(row.family, row.example) for row in chosen]
    sys.stdout.write(matrix(reports) + "\n")
    return int(any(not report.ok for report in reports))


if __name__ == "__main__":
    sys.exit(main())
