"""What an option's field may hold, declared beside the field and checked whenever it is built.

    passes: Annotated[int, at_least(1)] = 2
    ramp_fraction: Annotated[float, at_least(0, at_most=1)] = 0.0
    measure: Annotated[str, one_of("kl", "top")] = "kl"

null passes wherever the type allows it. On a list, a range or a choice holds for every entry. A
subclass that only changes a default keeps the limits of its base. Relations between fields are
code, in the class's `__post_init__` or `check`.
"""

from __future__ import annotations

import difflib
import functools
import math
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any


class Limit:
    """A condition on one value; its text is what a message says would be right."""

    def holds(self, value: Any) -> bool:
        raise NotImplementedError

    def hint(self, value: Any) -> str:
        """What to add about this very value; empty: nothing."""
        return ""


@dataclass(frozen=True)
class Range(Limit):
    """A finite number between two ends, of which each may itself be out."""

    low: float = -math.inf
    high: float = math.inf
    low_is_out: bool = False
    high_is_out: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.low_is_out else value >= self.low
        below = value < self.high if self.high_is_out else value <= self.high
        return above and below and math.isfinite(value)

    def hint(self, value: float) -> str:
        return "" if math.isfinite(value) else ", and a finite number"

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.low_is_out else 'at least'} {self.low}"
        if self.low_is_out:
            return f"above {self.low} and {'below' if self.high_is_out else 'at most'} {self.high}"
        return f"from {self.low} to {'below ' if self.high_is_out else ''}{self.high}"


@dataclass(frozen=True)
class Choice(Limit):
    """One of some words."""

    words: tuple[str, ...]

    def holds(self, value: str) -> bool:
        return value in self.words

    def hint(self, value: str) -> str:
        near = difflib.get_close_matches(str(value), self.words, n=1)
        return f" (did you mean {near[0]!r}?)" if near else ""

    def __str__(self) -> str:
        return " or ".join(self.words) if len(self.words) < 3 else f"one of {', '.join(self.words)}"


@dataclass(frozen=True)
class NotEmpty(Limit):
    """A text or a list with something in it."""

    def holds(self, value: Any) -> bool:
        return bool(value)

    def __str__(self) -> str:
        return "must not be empty"


def at_least(low: float, *, at_most: float = math.inf, below: float = math.inf) -> Range:
    return Range(low, min(at_most, below), high_is_out=below < math.inf)


def above(low: float, *, at_most: float = math.inf, below: float = math.inf) -> Range:
    return Range(low, min(at_most, below), low_is_out=True, high_is_out=below < math.inf)


def one_of(*words: str | Iterable[str]) -> Choice:
    """Words, or collections of words such as the keys of a table."""
    return Choice(tuple(w for one in words for w in ([one] if isinstance(one, str) else one)))


not_empty = NotEmpty()


@functools.cache
def limits_of(cls: type) -> Mapping[str, tuple[Limit, ...]]:
    """Field -> its limits, for the fields of a class that have any."""
    found: dict[str, tuple[Limit, ...]] = {}
    for base in reversed(cls.__mro__):
        hints = typing.get_type_hints(base, include_extras=True)
        for name in vars(base).get("__annotations__", {}):
            extras = getattr(hints[name], "__metadata__", ())
            if limits := tuple(extra for extra in extras if isinstance(extra, Limit)):
                found[name] = limits
    return found


def refused(cls: type, values: Mapping[str, Any], path: str) -> str | None:
    """What is wrong with the first value that breaks a limit of its field: the message.

    Args:
        values: by field; those that are missing are not looked at.
        path: dotted path of the node; empty where nobody knows it.
    """
    for name, limits in limits_of(cls).items():
        value = values.get(name)
        if value is None:
            continue
        for limit in limits:
            several = isinstance(value, list) and not isinstance(limit, NotEmpty)
            for item in value if several else [value]:
                if not limit.holds(item):
                    key = f"{path}.{name}" if path else name
                    each = "each " if several else ""
                    return f"{key}={value!r}: {each}{limit}{limit.hint(item)}"
    return None
