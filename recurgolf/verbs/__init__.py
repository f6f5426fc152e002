"""Verbs that work on what is finished: one module each, with `main(arguments) -> exit code`."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

MODULES = {
    "adapters": "adapters",
    "audit": "audit",
    "board": "board",
    "compare": "compare",
    "completion": "completion",
    "control": "control",
    "evaluate": "evaluate",
    "export": "export",
    "import": "import_checkpoint",
    "pack": "pack",
    "resume": "resume",
    "sample": "sample",
    "search": "search",
    "sweep": "sweep",
    "sync": "sync",
}
"""Verb -> module in this package; each is imported when it is asked for."""


def run(verb: str, arguments: Sequence[str]) -> int:
    """Carry out a verb; the exit code."""
    return import_module(f"recurgolf.verbs.{MODULES[verb]}").main(arguments)
