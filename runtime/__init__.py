"""How a bundle runs: engines and the session. No torch and no engine is imported here."""

from __future__ import annotations

if not __name__.startswith("penguin_edge."):
    raise ImportError(
        f"got 'import {__name__}', wanted 'import penguin_edge.runtime': this folder installs inside the package; "
        "run 'pip install -e .' in the repository root and import it by its full name"
    )
