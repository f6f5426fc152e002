"""What a process that scores may still touch, held by the kernel (Landlock, Linux 5.13 on).

A process that has called `restrict` reads the files it was given and nothing else, writes into the
folder that it was given and nowhere else, opens no connection, and cannot undo it; neither can the
processes that it starts. This holds for C++ and Rust as well, which Python's audit hooks do not
see. Without Landlock nothing is restricted, and `restrict` says so.

The module imports nothing of the package: the counted program's interpreter is given its source.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import sys
import sysconfig
from collections.abc import Iterable
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF, _NO_NEW_PRIVILEGES = 444, 445, 446, 38
_EXECUTE, _WRITE, _READ, _LIST, _TRUNCATE = 1, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_ON_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE | 1 << 15
_SYSTEM = ("/usr/bin", "/usr/share", "/etc", "/proc", "/sys")
_SHARED = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/local")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
KEPT = (*_SYSTEM, *_DEVICES)
"""What any process may read."""
PROGRAM = ("torch", "numpy", "sentencepiece", "brotli", "zstandard", "flash-linear-attention")
"""Distributions that a counted program may need, with all that they require."""


def restrict(readable: Iterable[str], writable: Iterable[str], listable: Iterable[str] = ()) -> str:
    """Take from this process all files but these, and the network.

    Args:
        readable, writable: files, and folders with all in them.
        listable: folders whose names may be listed, so that modules are found in them.

    Returns:
        Why nothing was restricted; empty where it was.
    """
    if sys.platform != "linux":
        return "this system has no Landlock"
    library = ctypes.CDLL(None, use_errno=True)
    version = library.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        return "this kernel has no Landlock"
    # Rights came with versions; what a kernel does not know it refuses.
    files = (1 << (13, 14, 15, 15)[min(version, 4) - 1]) - 1 if version < 5 else (1 << 16) - 1
    asked = struct.pack("QQQ", files, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    rules = library.syscall(_CREATE_RULESET, asked, ctypes.c_size_t(size), 0)
    allowed = [(path, _EXECUTE | _READ | _LIST) for path in (*readable, *_SYSTEM)]
    allowed += [(path, files) for path in writable]
    allowed += [(path, _READ | _WRITE) for path in _DEVICES]
    allowed += [(path, _LIST) for path in listable]
    for path, rights in allowed:
        try:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        if not os.path.isdir(path):
            rights &= _ON_FILES
        if rights & files:
            library.syscall(_ADD_RULE, rules, 1, struct.pack("=Qi", rights & files, place), 0)
        os.close(place)
    library.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    failed = library.syscall(_RESTRICT_SELF, rules, 0)
    os.close(rules)
    return f"Landlock failed: {os.strerror(ctypes.get_errno())}" if failed else ""


class Readable:
    """A finder of modules that does not find those whose files cannot be read."""

    def __init__(self, finder: Any, without: str = ""):
        self.finder, self.without = finder, without

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name.partition(".")[0] == self.without:
            return None
        found = self.finder.find_spec(name, path, target)
        if found is not None and found.has_location:
            try:
                open(found.origin, "rb").close()
            except OSError:
                return None
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.finder, name)


def hide_unreadable(without: str = "") -> None:
    """Let imports not find what this process may not read, nor the package `without`."""
    sys.meta_path[:] = [Readable(finder, without) for finder in sys.meta_path]


@functools.cache
def libraries(names: tuple[str, ...] = PROGRAM) -> list[str]:
    """Files and folders of installed distributions, of all that they require, and of Python."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue
        needs = [need for need in found[name].requires or [] if "extra ==" not in need]
        waiting += [match[0] for need in needs if (match := re.match(r"[\w.-]+", need))]
    tops = {
        str(one.locate_file(file.parts[0]))
        for one in found.values()
        for file in one.files or []
        if file.parts[0] not in ("..", "__pycache__", "/")
    }
    shared = {*_SHARED, os.path.join(sys.base_prefix, "lib"), sysconfig.get_path("stdlib")}
    loaded = os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
    return [*sorted(tops), *_without_packages(shared), *filter(None, loaded)]


def _without_packages(folders: Iterable[str]) -> list[str]:
    """What lies in folders of Python or the system, without the packages somebody installed."""
    found = []
    for folder in {os.path.realpath(folder) for folder in folders}:
        names = os.listdir(folder) if os.path.isdir(folder) else []
        found += [
            os.path.join(folder, name)
            for name in names
            if not re.match(r"(site|dist)-packages$|python\d|python3|lib(64)?$", name)
        ]
    return sorted(found)
