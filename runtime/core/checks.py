"""Arguments that a caller gives in Python, held against the same rules as what comes from files."""

from __future__ import annotations

from typing import Any

import numpy as np

from penguin_edge.errors import InputError
from penguin_edge.schema import Rule, SchemaError


def check_options(**given: tuple[Any, Rule]) -> None:
    """Refuse the first option, by its name, whose value breaks its rule; NumPy's numbers count as numbers.

    Raises:
        InputError: one sentence: which option, what was got, what was wanted.
    """
    for name, (value, rule) in given.items():
        try:
            rule.check(value.item() if isinstance(value, np.generic) else value, name)
        except SchemaError as error:
            raise InputError(f"{error}") from None
