"""Parity with recorded sets of the reference implementation.

The folder comes from PENGUIN_GOLDEN (default: the set kept here); media lie in `media/` beside it. Every case is
discovered from the files and tables present: what a set lacks gives no case. Tolerances are those of the set's README.
"""

from __future__ import annotations

from golden_losses import *  # noqa: F403
from golden_model import *  # noqa: F403
from golden_pixels import *  # noqa: F403
from golden_schedule import *  # noqa: F403
from golden_tra import *  # noqa: F403
from golden_training_data import *  # noqa: F403
