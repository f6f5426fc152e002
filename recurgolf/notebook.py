"""A bar in a notebook: one line of output that changes in place.

A notebook is no terminal: control codes would stand in it as they are, and every line would be
kept. Its own way is a display with an id, whose content is exchanged.
"""

from __future__ import annotations

import sys
import time
from typing import Any

SECONDS_BETWEEN_UPDATES = 0.2
WIDTH = 30


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook; never imports anything to find out."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


class NotebookBar:
    """What a `Bar` uses of rich's Progress, for the one task that it has."""

    def __init__(self, what: str, total: int):
        from IPython.display import display  # pyright: ignore[reportMissingImports]

        self.what, self.fields = what, {"completed": 0, "total": total, "text": ""}
        self.last = time.monotonic()
        self.handle = display(self._content, raw=True, display_id=True)

    def update(self, task: Any, **fields: Any) -> None:
        self.fields |= fields
        if time.monotonic() - self.last >= SECONDS_BETWEEN_UPDATES:
            self._show()

    def stop(self) -> None:
        """Show where it ended; it stays there."""
        self._show()

    def _show(self) -> None:
        self.last = time.monotonic()
        self.handle.update(self._content, raw=True)

    @property
    def _content(self) -> dict[str, str]:
        done, total = self.fields["completed"], max(1, self.fields["total"])
        bar = ("#" * (WIDTH * done // total)).ljust(WIDTH, ".")
        return {"text/plain": f"{self.what} [{bar}] {done}/{total} {self.fields['text']}".rstrip()}
