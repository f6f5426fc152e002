"""What a person sees while a run goes on: plain lines here; terminal.py has the bar."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0


class Log:
    """Lines to the console and to a file. Ranks other than the first get `Log(None, False)`.

    Args:
        console: whether lines are shown; the bar is, wherever there is one.
        stderr: the console is standard error, where standard output is for a program to read.
        bar: what shows progress; None: lines now and then.
    """

    def __init__(
        self,
        path: Path | None,
        console: bool = True,
        stderr: bool = False,
        bar: Callable[[Log, str, int], Bar] | None = None,
    ):
        self.path, self.alone, self.make_bar = path, False, bar
        self.shown: Any = None
        """The bar that is on the screen."""
        self.file = path.open("a", buffering=1) if path is not None else None
        self.console = plain_console(stderr) if console else None

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
        bar = (self.make_bar or Bar)(self, what, total)
        try:
            yield bar
        finally:
            bar.close()

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # what it still holds will not fit either
                self.file.close()
            self.file = None


def counted(number: int, what: str) -> str:
    """`1 seed`, `3 seeds`."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def time_left(done: int, total: int, seconds: float, cap: float | None) -> str:
    """`3:05 left`: to the last step at the pace so far, or to the cap where that comes first."""
    left, whose = seconds / max(1, done) * (total - done), ""
    if cap is not None and cap - seconds < left:
        left, whose = max(0.0, cap - seconds), f" of the cap of {cap:.0f} s"
    minutes, rest = divmod(round(left), 60)
    return f"{minutes}:{rest:02d} left{whose}"


def plain_console(
    stderr: bool = False, file: TextIO | None = None, width: int | None = None
) -> Console:
    """A console without colours that takes no pipe and no notebook for a terminal.

    Args:
        file: where lines go instead of the standard streams.
        width: characters of a line where no terminal sets it; None: rich's 80.
    """
    stream = file or (sys.stderr if stderr else sys.stdout)
    terminal = stream.isatty()
    return Console(
        highlight=False,
        soft_wrap=True,
        stderr=stderr,
        file=file,
        width=None if terminal else width,
        # The kernel of a notebook sets FORCE_COLOR, which its ranks inherit.
        force_terminal=None if terminal else False,
        # There rich would ignore `file`, and show every line as an output of its own.
        force_jupyter=False,
    )


class Bar:
    """Progress as a line now and then."""

    def __init__(self, log: Log, what: str, total: int):
        self.log, self.what, self.total = log, what, total
        self.last_line = time.monotonic()

    def at(self, done: int, text: str = "", line: bool = False) -> None:
        """Move to `done`; with `line` the text is also written as a line of the log."""
        if line:
            self.log.line(text)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.log.line(f"{self.what} {done:,}/{self.total:,} {text}".rstrip())
            self.last_line = time.monotonic()

    def close(self) -> None:
        """Nothing is left behind."""
