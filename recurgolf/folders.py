"""Names of folders that the program makes: nobody else's, and plain enough to need no quotes."""

from __future__ import annotations

import re
from pathlib import Path


def claimed(folder: Path) -> Path:
    """Make a new folder under this name, or with `_2`, `_3`, … behind it where the name is taken.

    Of several processes that ask for one name at the same moment each gets a folder of its own.
    """
    place, number = folder, 1
    while True:
        try:
            place.mkdir(parents=True)
            return place
        except FileExistsError:
            number += 1
            place = folder.with_name(f"{folder.name}_{number}")


def plain_name(text: str) -> str:
    """A text as the name of a folder that no shell and no override has to quote."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-.") or "run"


def moved_aside(path: Path, place: Path) -> Path:
    """Move a folder into `place`, under its own name and a number that is free there."""
    place.mkdir(parents=True, exist_ok=True)
    number = 1
    while (aside := place / f"{path.name}_{number}").exists():
        number += 1
    path.rename(aside)
    return aside
