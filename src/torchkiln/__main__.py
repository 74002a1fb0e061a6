"""``python -m torchkiln``: the command line."""

import sys

from torchkiln._cli import main

sys.exit(main())
