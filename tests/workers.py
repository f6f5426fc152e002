"""What pytest-xdist's workers share: a folder, work that is done once, and turns on the machine."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder of this test session, the same one in every worker."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextlib.contextmanager
def locked(path: Path, shared: bool = False) -> Iterator[None]:
    """Hold the lock that a file stands for; `shared` holders exclude only the others."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        try:
            yield
        finally:
            # Not left to closing: a process that a test forked may still hold the file open.
            fcntl.flock(file, fcntl.LOCK_UN)


@contextlib.contextmanager
def turn(folder: Path, alone: bool) -> Iterator[None]:
    """One test's turn on the machine: beside others, or `alone` when all of them have ended.

    Whoever waits to be alone holds the gate, so that no new test begins in front of it.
    """
    with contextlib.ExitStack() as room:
        with locked(folder / "gate.lock"):
            room.enter_context(locked(folder / "room.lock", shared=not alone))
        yield
