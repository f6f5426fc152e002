"""A bar in a notebook: one line of output that changes in place.

A notebook is no terminal: control codes would stand in it as they are, and every line would be
kept. Its own way is a display with an id, whose content is exchanged.
"""

from __future__ import annotations

import sys
import time
from typing import Any
from weakref import WeakKeyDictionary

from recurgolf.log import Bar, Log

SECONDS_BETWEEN_UPDATES = 0.2
WIDTH = 30
_LINES: WeakKeyDictionary[Log, Any] = WeakKeyDictionary()
"""What IPython gives to exchange the line of a log."""


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; never imports anything to find out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class NotebookBar(Bar):
    """All bars of a log take turns on one line, which stays as the last one left it."""

    def __init__(self, log: Log, what: str, total: int):
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        super().__init__(log, what, total)
        self.done, self.text, self.last = 0, "", 0.0
        if log not in _LINES:
            _LINES[log] = display(self._content, raw=True, display_id=True)

    def at(self, done: int, text: str = "", line: bool = False) -> None:
        self.done, self.text = done, text or self.text
        if line:
            self.log.note(text)
        if time.monotonic() - self.last >= SECONDS_BETWEEN_UPDATES:
            self._show()

    def close(self) -> None:
        self._show()

    def _show(self) -> None:
        self.last = time.monotonic()
        _LINES[self.log].update(self._content, raw=True)

    @property
    def _content(self) -> dict[str, str]:
        total = max(1, self.total)
        bar = ("#" * (WIDTH * self.done // total)).ljust(WIDTH, ".")
        return {"text/plain": f"{self.what} [{bar}] {self.done}/{total} {self.text}".rstrip()}
