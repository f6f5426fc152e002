"""Plain lines where the program has no library for a pretty terminal: the names of `rich` it uses.

The exported program imports this module in rich's place.
"""

from __future__ import annotations

import sys
from typing import Any


class Console:
    """Prints texts and tables, without markup, to a file or to stdout."""

    def __init__(self, file: Any = None, **style: Any):
        self.file = file

    def print(self, what: Any = "", **style: Any) -> None:
        print(what, file=self.file or sys.stdout, flush=True)


class Table:
    """Rows under headings, in aligned columns."""

    def __init__(self, **style: Any):
        self.rows: list[list[str]] = [[]]

    def add_column(self, heading: str = "", **style: Any) -> None:
        self.rows[0].append(heading)

    def add_row(self, *cells: str, **style: Any) -> None:
        self.rows.append(list(cells))

    def add_section(self) -> None:
        """A line between parts, which plain text does without."""

    def __str__(self) -> str:
        widths = [max(map(len, column)) for column in zip(*self.rows, strict=True)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in self.rows
        )


def escape(text: str) -> str:
    """The text: there is no markup."""
    return text


class box:
    """Styles of a table's frame, which plain text does without."""

    SIMPLE_HEAD = SIMPLE = MINIMAL = None
