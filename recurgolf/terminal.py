"""A bar on a terminal that keeps what matters, the score and the time left, however narrow."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from recurgolf.log import Bar, Log, plain_console
from recurgolf.notebook import NotebookBar, in_notebook

TENTHS = 10
"""So many lines of a bar stay in the scrollback."""
_FIRST_TO_GO = ("lr ", "visits", "tok/s", "loss", "step ")
"""Parts of a line that a narrow terminal does without, in this order."""


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
    """A line of parts between bars, less the parts for which there is no room.

    Args:
        room: characters.
        without: a word that a part which is never wanted has.
    """
    parts = [part for part in text.split(" | ") if not without or without not in part]
    for word in _FIRST_TO_GO:
        if len(" | ".join(parts)) <= room:
            break
        parts = [part for part in parts if word not in part]
    if len(" | ".join(parts)) > room:
        parts = [part.rpartition(", ")[2] for part in parts]  # of the time, what is left
    return " | ".join(parts)[: max(0, room)]
