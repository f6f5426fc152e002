"""Standard output and error whose failure never ends a run.

The reader may be gone, the terminal closed, missing or without Unicode: no result depends on it.
"""

from __future__ import annotations

import codecs
import contextlib
import locale
import os
import sys
from collections.abc import Iterator
from typing import Any

PLAIN = {"±": "+-", "…": "...", "×": "x", "→": "->", "–": "-", "—": "-", "─": "-", "│": "|"}
"""What stands for a character where the console does not have it; others are written as \\uXXXX."""


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or ascii(c)[1:-1] for c in text), error.end


codecs.register_error("recurgolf.plain", lambda error: _plain(error))


class Steady:
    """A text stream that may be lost; everything else is the stream's.

    Attributes:
        lost: why nothing reaches anybody any more; empty while it does.
    """

    def __init__(self, stream: Any):
        self.stream, self.lost = stream, ""

    def write(self, text: str) -> int:
        try:
            self.stream.write(text)
        except (OSError, ValueError) as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except (OSError, ValueError) as error:
            self._lose(error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def _lose(self, error: Exception) -> None:
        self.lost = getattr(error, "strerror", None) or str(error)
        # What is still in the buffer must go somewhere, or the interpreter complains at its end.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)


@contextlib.contextmanager
def steady_output() -> Iterator[None]:
    """Inside, writing to standard output and error never raises."""
    for number in range(3):  # else the next file that is opened would be taken for the console
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_steady(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        sys.stdout, sys.stderr = before


def _steady(stream: Any) -> Any:
    if stream is None:
        return Steady(open(os.devnull, "w", encoding="utf-8"))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        stream.reconfigure(errors="recurgolf.plain")
    return Steady(stream)


def use_unicode() -> None:
    """Where the locale is not UTF-8, start this command again in Python's UTF-8 mode.

    Files are UTF-8 whatever the locale; only what is printed follows it.
    """
    if sys.flags.utf8_mode or codecs.lookup(locale.getpreferredencoding(False)).name == "utf-8":
        return
    printed = getattr(sys.stdout, "encoding", None)
    if printed:
        os.environ.setdefault("PYTHONIOENCODING", printed)
    os.environ["PYTHONUTF8"] = "1"
    os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
