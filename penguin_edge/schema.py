"""Rules that say what a value read from a file must be, written as data.

| rule     | takes                                                                                                |
|----------|------------------------------------------------------------------------------------------------------|
| `Whole`  | an integer between two limits; `true` is none                                                        |
| `Real`   | a finite number between two limits                                                                   |
| `Flag`   | true or false                                                                                        |
| `Text`   | a string up to a length, of a pattern or of a set of words                                           |
| `Rows`   | a list of one kind                                                                                   |
| `Record` | an object with these fields, some of which may be absent, and no others unless it is `open`          |
| `Table`  | an object of any keys that fit a rule, with values of one kind                                       |
| `Maybe`  | null, or what another rule takes                                                                     |
| `Free`   | anything that JSON holds: for what is kept and shown and never computed with                         |

A rule's `check` raises `SchemaError` with one sentence: where, what was got, what was wanted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

LARGEST = 2**53
"""Whole numbers up to here mean the same in every language that reads JSON."""


WHOLE = "the whole"
"""What a message calls a value that is not part of another."""


class SchemaError(ValueError):
    """A value that breaks its rule; whoever read the file says what to do about it."""


class Rule(Protocol):
    """What a value must be."""

    def check(self, value: Any, where: str) -> None:
        """Refuse a value that breaks the rule.

        Args:
            where: the place of the value, such as `model.text`; empty for the whole file.
        Raises:
            SchemaError: one sentence that begins with `where`.
        """
        ...


def _wrong(where: str, value: Any, wanted: str) -> SchemaError:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError):
        text = repr(value)
    return SchemaError(f"{where or WHOLE} is {text if len(text) <= 60 else text[:57] + '...'}, wanted {wanted}")


def _between(least: float, most: float) -> str:
    return f"{least:,} to {most:,}" if most < LARGEST else f"at least {least:,}"


@dataclass(frozen=True)
class Whole:
    least: int = 0
    most: int = LARGEST

    def check(self, value: Any, where: str) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or not self.least <= value <= self.most:
            limits = "" if self.least <= -LARGEST else f", {_between(self.least, self.most)}"
            raise _wrong(where, value, f"a whole number{limits}")


@dataclass(frozen=True)
class Real:
    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    """Lower limit that is itself refused."""

    def check(self, value: Any, where: str) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or not (self.least <= value <= self.most and value > self.above):
            limits = [f"above {self.above:g}"] * math.isfinite(self.above)
            limits += [f"at least {self.least:g}"] * math.isfinite(self.least)
            limits += [f"at most {self.most:g}"] * math.isfinite(self.most)
            raise _wrong(where, value, " and ".join(["a finite number", *limits]))


@dataclass(frozen=True)
class Flag:
    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, bool):
            raise _wrong(where, value, "true or false")


@dataclass(frozen=True)
class Text:
    words: tuple[str, ...] = ()
    """Words that alone are taken, where any are named."""
    pattern: str = ""
    """A regular expression for the whole string, and what to call it in a message."""
    called: str = ""
    longest: int = 4096

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, str) or len(value) > self.longest:
            limit = "" if self.longest >= LARGEST else f" of at most {self.longest} characters"
            raise _wrong(where, value, f"a string{limit}")
        if self.words and value not in self.words:
            raise _wrong(where, value, f"one of {', '.join(self.words)}")
        if self.pattern and not re.fullmatch(self.pattern, value):
            raise _wrong(where, value, self.called or f"a string like {self.pattern}")


@dataclass(frozen=True)
class Rows:
    item: Rule
    least: int = 0
    most: int = 1_000_000

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, list) or not self.least <= len(value) <= self.most:
            wanted = f"{self.least}" if self.least == self.most else _between(self.least, self.most)
            raise _wrong(where, value, f"a list with {wanted} entries")
        for i, item in enumerate(value):
            self.item.check(item, f"{where}[{i}]")


@dataclass(frozen=True)
class Record:
    fields: Mapping[str, Rule]
    optional: Mapping[str, Rule] = field(default_factory=dict)
    open: bool = False
    """Whether fields that are not named may stand there, too."""

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            raise _wrong(where, value, "an object")
        for name in self.fields:
            if name not in value:
                raise SchemaError(f"{where or WHOLE} has no {name}")
        for name, item in value.items():
            rule = self.fields.get(name) or self.optional.get(name)
            if rule is not None:
                rule.check(item, f"{where}.{name}".lstrip("."))
            elif not self.open:
                known = ", ".join(sorted({**self.fields, **self.optional}))
                raise SchemaError(f"{where or WHOLE} has an unknown field {name[:40]!r}; known: {known}")


@dataclass(frozen=True)
class Table:
    key: Rule
    item: Rule
    least: int = 0
    most: int = 1_000_000

    def check(self, value: Any, where: str) -> None:
        if not isinstance(value, dict) or not self.least <= len(value) <= self.most:
            raise _wrong(where, value, f"an object with {_between(self.least, self.most)} fields")
        for name, item in value.items():
            self.key.check(name, f"a key of {where or WHOLE}")
            self.item.check(item, f"{where}.{name[:60]}".lstrip("."))


@dataclass(frozen=True)
class Maybe:
    rule: Rule

    def check(self, value: Any, where: str) -> None:
        if value is not None:
            self.rule.check(value, where)


@dataclass(frozen=True)
class Free:
    def check(self, value: Any, where: str) -> None:
        pass
