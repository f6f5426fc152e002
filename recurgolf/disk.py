"""Errors of a disk that name the file.

Python says which file could not be opened, but not which one could not grow.
"""

from __future__ import annotations

import contextlib
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


__all__ = ["writing"]
