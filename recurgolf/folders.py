"""The folders this program makes: unique names that need no quotes, one process at a time, whole or
not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from recurgolf.config import ConfigError


class InUse(ConfigError):
    """Another process works in a folder."""


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


def check_new(folder: Path) -> None:
    """Refuse a destination that holds something."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder} is no folder: name one that is new or empty")
    if any(folder.iterdir()):
        raise ConfigError(f"{folder} is not empty: name a folder that is new or empty")


@contextlib.contextmanager
def made_whole(folder: Path) -> Iterator[Path]:
    """A draft that takes this folder's name when the block ends well, and else is gone.

    Meanwhile the name is held: of several processes that want it at one moment, one gets it, and
    the others are refused before their work.

    Raises:
        ConfigError: the folder holds something, or another process is making it.
    """
    check_new(folder)
    place, is_ours = folder.resolve(), not folder.exists()
    place.mkdir(parents=True, exist_ok=True)
    with only_one(place, "is writing this folder"):
        check_new(folder)  # whoever held the name may have just given it back, filled
        draft = place.with_name(f".{place.name}.{os.getpid()}")
        try:
            draft.mkdir()
            yield draft
            draft.rename(place)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            with contextlib.suppress(OSError):
                if is_ours:
                    place.rmdir()
            raise


@contextlib.contextmanager
def only_one(folder: Path, does: str, wait: float = 0.0) -> Iterator[None]:
    """Keep a second process from working in the same folder.

    The lock is on the folder itself and ends with the process, however it ends.

    Args:
        does: what the other one does, for the message: `is training in this folder`.
        wait: seconds for which another process may still be ending.

    Raises:
        InUse: somebody else works there.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + wait
        while not _locked(handle):
            if time.monotonic() > deadline:
                raise InUse(f"{folder}: another process {does}")
            time.sleep(0.1)
        yield
    finally:
        os.close(handle)


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def walked(folder: Path, without: Collection[str] = ()) -> Iterator[tuple[Path, list[str]]]:
    """Every folder in and below this one with the names in it that are no folders; links are
    followed, and what several names lead to comes once.
    """
    seen: set[str] = set()
    for here, below, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            below.clear()
            continue
        seen.add(real)
        below[:] = sorted(name for name in below if name not in without)
        yield Path(here), files


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
