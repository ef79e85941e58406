"""What the numbers become: schemes, calibration and the quality report."""

from __future__ import annotations

if not __name__.startswith("penguin_edge."):
    raise ImportError(
        f"got 'import {__name__}', wanted 'import penguin_edge.quantize': this folder installs inside the package; "
        "run 'pip install -e .' in the repository root and import it by its full name"
    )
