"""The null object that the exported program gives in place of what looks after a run.

The program repeats a run that went well. It trains, packs and scores exactly as that run did, but
keeps no checkpoints and no curves, tracks nothing, and does not watch for signals or caps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Nothing:
    """Takes any call, is any attribute of itself, a context, an empty mapping, and false."""

    def __init__(self, *given: Any, **named: Any):
        pass

    def __call__(self, *given: Any, **named: Any) -> Nothing:
        return self

    def __getattr__(self, name: str) -> Any:
        return self

    def __bool__(self) -> bool:
        return False

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __enter__(self) -> Nothing:
        return self

    def __exit__(self, *error: Any) -> None:
        pass


def no_words(*given: Any) -> str:
    """Suggests no other spelling."""
    return ""


def found(key: Any, find: Callable[[], Any]) -> Any:
    """Finds out anew, every time."""
    return find()


def as_it_is(node: Any) -> Any:
    """The program's own Run is of this version."""
    return node
