"""`python -m penguin_edge` is the same as the console script `penguin-edge`."""

from __future__ import annotations

import sys

from penguin_edge.cli import main

if __name__ == "__main__":
    sys.exit(main())
