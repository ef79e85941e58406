"""`python -m penguin_edge` is the same as the console script `penguin-edge`.

Python puts the working directory first on the import path for `-m`, where a `token.py` of the user's would be taken for
a module of the library; it goes from there as soon as this file runs. Only `python -P -m penguin_edge` and the console
script never have it there, so that a folder `penguin_edge` in the working directory cannot come before this one.
"""

from __future__ import annotations

import contextlib
import os
import sys

with contextlib.suppress(OSError):  # a working directory that is gone
    if not sys.flags.safe_path and sys.path[:1] in ([""], [os.getcwd()]):
        del sys.path[0]

from penguin_edge.commands.cli import main

if __name__ == "__main__":
    sys.exit(main())
