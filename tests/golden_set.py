"""The recorded set under test: its folder, its media and its tables."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

GOLDEN = Path(os.environ.get("PENGUIN_GOLDEN", Path(__file__).parent / "golden"))
MEDIA = GOLDEN.parent / "media"
TABLES: dict[str, Any] = json.loads((GOLDEN / "tables.json").read_text(encoding="utf-8"))
