"""Parity with recorded sets of the reference implementation.

The folder comes from PENGUIN_GOLDEN (default: the set kept here); media lie in `media/` beside it. Every case is
discovered from the files and tables present: what a set lacks gives no case. Tolerances are those of the set's README.
"""

from __future__ import annotations

import pytest

# The parts are no test files of their own: without this their assertions would not say what they saw.
pytest.register_assert_rewrite("golden_model", "golden_pixels", "golden_tra")

from golden_model import *  # noqa: E402, F403
from golden_pixels import *  # noqa: E402, F403
from golden_tra import *  # noqa: E402, F403
