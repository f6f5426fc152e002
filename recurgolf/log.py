"""What a person sees while a run goes on: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from recurgolf.notebook import NotebookBar, in_notebook

SECONDS_BETWEEN_LINES = 10.0


class Log:
    """Lines to the console and to a file. Ranks other than the first get `Log(None, False)`.

    Args:
        stderr: the console is standard error, where standard output is for a program to read.
    """

    def __init__(self, path: Path | None, console: bool = True, stderr: bool = False):
        self.path, self.alone = path, False
        self.file = path.open("a", buffering=1) if path is not None else None
        # The kernel of a notebook sets FORCE_COLOR, which its ranks inherit.
        terminal = None if (sys.stderr if stderr else sys.stdout).isatty() else False
        options = {"highlight": False, "soft_wrap": True, "force_terminal": terminal}
        self.console = Console(**options, stderr=stderr) if console else None

    def line(self, text: str) -> None:
        self.note(text)
        if self.console is not None:
            self.console.print(text, markup=False)
            lost = getattr(sys.stdout, "lost", "")
            if lost and not self.alone:
                self.note(f"console: {lost}; what follows is in this file alone")
            self.alone = bool(lost)

    def note(self, text: str) -> None:
        """To the file alone: what the bar already shows."""
        if self.file is None:
            return
        try:
            self.file.write(text + "\n")
        except OSError as error:
            # A copy of the console is no reason to end a run.
            self.close()
            self.line(f"{self.path}: {error.strerror}; what follows is on the console alone")

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Bar]:
        """Progress over `total` units; close it before printing a table."""
        bar = Bar(self, what, total)
        try:
            yield bar
        finally:
            bar.close()

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # what it still holds will not fit either
                self.file.close()
            self.file = None


def time_left(done: int, total: int, seconds: float, cap: float | None) -> str:
    """`3:05 left`: to the last step at the pace so far, or to the cap where that comes first.

    Args:
        seconds: on the training clock so far.
        cap: where it ends; None: nowhere.
    """
    left, whose = seconds / max(1, done) * (total - done), ""
    if cap is not None and cap - seconds < left:
        left, whose = max(0.0, cap - seconds), f" of the cap of {cap:.0f} s"
    minutes, rest = divmod(round(left), 60)
    return f"{minutes}:{rest:02d} left{whose}"


class Bar:
    """A bar where the console is a terminal; elsewhere a line now and then."""

    def __init__(self, log: Log, what: str, total: int):
        self.log, self.what, self.total = log, what, total
        self.live: Progress | NotebookBar | None = None
        self.task = TaskID(0)
        self.text = ""
        self.last_line = time.monotonic()
        if log.console is not None and in_notebook():
            self.live = NotebookBar(what, total)
        elif log.console is not None and log.console.is_interactive:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(),
            )
            self.live = live = Progress(*columns, console=log.console, transient=True)
            self.task = live.add_task(what, total=total, text="")
            live.start()

    def at(self, done: int, text: str = "", line: bool = False) -> None:
        """Move to `done`; with `line` the text is also written as a line of the log.

        Without a text the one before stays on the bar.
        """
        if self.live is not None:
            self.text = text or self.text
            self.live.update(self.task, completed=done, text=self.text)
            if line:
                self.log.note(text)
        elif line:
            self.log.line(text)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.log.line(f"{self.what} {done:,}/{self.total:,} {text}".rstrip())
            self.last_line = time.monotonic()

    def close(self) -> None:
        if self.live is not None:
            self.live.stop()
