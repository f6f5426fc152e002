"""Files that are there whole or not at all, and errors of a disk that name the file.

Python says which file could not be opened, but not which one could not grow.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def writing(path: Path, size: int = 0) -> Iterator[None]:
    """Inside, a file or folder is written; an error of the disk then tells which and how much.

    Args:
        size: bytes that are to be written; 0: not known.

    Raises:
        OSError: the disk's own, with `filename`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        needed = f" (it needs {size:,} bytes)" if size else ""
        raise OSError(error.errno, f"{error.strerror or error}{needed}", str(path)) from None


def write_file(path: Path, content: str | bytes) -> None:
    """Write a file beside its place, have the disk hold it, and rename it.

    Whatever goes wrong, what was there under the name before is still there, whole.

    Raises:
        OSError: the disk's own, with `filename`.
    """
    data = content.encode() if isinstance(content, str) else content
    draft = path.with_name(f".{path.name}.draft")
    with writing(path, len(data)):
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
    flush(path.parent)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file, or the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = ["flush", "write_file", "writing"]
