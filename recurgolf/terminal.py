"""The bars of a terminal, which keeps the score and the time left however narrow it is, and of a
notebook.

A notebook is no terminal: control codes would stand in it as they are, and every line would be
kept. Its own way is a display with an id, whose content is exchanged.
"""

from __future__ import annotations

import sys
import time
from typing import Any
from weakref import WeakKeyDictionary

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from recurgolf.log import Bar, Log, plain_console

TENTHS = 10
"""So many lines of a bar stay in the scrollback."""
_FIRST_TO_GO = ("lr ", "visits", "tok/s", "loss", "step ")
"""Parts of a line that a narrow terminal does without, in this order."""
SECONDS_BETWEEN_UPDATES = 0.2
WIDTH = 30
"""Of the bar in a notebook."""
_LINES: WeakKeyDictionary[Log, Any] = WeakKeyDictionary()
"""What IPython gives to exchange the line of a log."""


def terminal_bar(log: Log, what: str, total: int) -> Bar:
    """A bar where the console is a terminal whose cursor moves, or a notebook; else lines."""
    console = log.console or plain_console()
    if in_notebook():
        return NotebookBar(log, what, total)
    if not console.is_interactive:
        return Bar(log, what, total)
    return TerminalBar(log, what, total, console)


class TerminalBar(Bar):
    """The bar goes away when it is closed; a line for every tenth of the way stays."""

    def __init__(self, log: Log, what: str, total: int, console: Console):
        super().__init__(log, what, total)
        self.console, self.text, self.tenths = console, "", 0
        # A validation's bar stands in for that of the training around it.
        self.outer: TerminalBar | None = log.shown
        if self.outer is not None:
            self.outer.live.stop()
        log.shown = self
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[text]}"),
        )
        self.live = Progress(*columns, console=console, transient=True, expand=True)
        self.task = self.live.add_task(what, total=total, text="")
        self.live.start()

    def at(self, done: int, text: str = "", line: bool = False) -> None:
        """Move to `done`; without a text the one before stays on the bar."""
        self.text = text or self.text
        # Description, numbers and at least a short bar stand beside it.
        room = self.console.width - len(self.what) - 2 * len(f"{self.total}") - 14
        shown = brief(self.text, room, without="step ")
        self.live.update(self.task, completed=done, total=self.total, text=shown)
        if not line:
            return
        self.log.note(text)
        tenths = TENTHS * done // max(1, self.total)
        if self.log.console is not None and tenths > self.tenths:
            self.tenths = tenths
            self.log.console.print(brief(text, self.console.width - 1), markup=False)

    def close(self) -> None:
        self.live.stop()
        self.log.shown = self.outer
        if self.outer is not None:
            self.outer.live.start()


def brief(text: str, room: int, without: str = "") -> str:
    """A line of parts between bars, less those with `without` in them and those that do not fit."""
    parts = [part for part in text.split(" | ") if not without or without not in part]
    for word in _FIRST_TO_GO:
        if len(" | ".join(parts)) <= room:
            break
        parts = [part for part in parts if word not in part]
    if len(" | ".join(parts)) > room:
        parts = [part.rpartition(", ")[2] for part in parts]  # of the time, what is left
    return " | ".join(parts)[: max(0, room)]


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
