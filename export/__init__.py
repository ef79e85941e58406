"""What the graphs become: the methods that are compiled, one file per target, and the check against eager."""

from __future__ import annotations

if not __name__.startswith("penguin_edge."):
    raise ImportError(
        f"got 'import {__name__}', wanted 'import penguin_edge.export': this folder installs inside the package; "
        "run 'pip install -e .' in the repository root and import it by its full name"
    )
