"""Plugins that a folder names run only if they are installed or trusted."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import PathFinder
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from recurgolf.config import ConfigError, load_plugins


def check_trusted(plugins: Any, trust: bool) -> None:
    """Refuse plugins that are not installed: a folder that somebody sent may hold anything.

    A module that this process has imported already was asked for by its user.
    """
    if not isinstance(plugins, list) or not all(isinstance(name, str) for name in plugins):
        raise ConfigError(f"plugins={plugins!r}: a list of names of modules")
    load_plugins()
    foreign = {
        name: where
        for name in plugins
        if name not in sys.modules and (where := _foreign(name)) is not None
    }
    if not foreign:
        return
    if not trust:
        listed = ", ".join(f"{name} ({where})" for name, where in foreign.items())
        raise ConfigError(
            f"the run names plugins that are not installed: {listed}; --trust (in Python "
            "trust=True) runs their code"
        )
    look_in_working_folder()


def look_in_working_folder() -> None:
    """Make modules beside the place where the command is typed importable, behind all others."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def _foreign(name: str) -> str | None:
    """Where a module lies that is not installed; None for one that is."""
    top = name.partition(".")[0]
    try:
        spec = importlib.util.find_spec(top) or PathFinder.find_spec(top, [os.getcwd()])
    except (ImportError, ValueError):
        spec = None
    places = [*(spec.submodule_search_locations or []), spec.origin] if spec else []
    if spec is not None and spec.origin in ("built-in", "frozen"):
        return None
    found = [os.path.realpath(place) for place in places if place]
    homes = [os.path.realpath(home) for home in _installed()]
    # All parts of a namespace package: one of them may lie in the folder.
    outside = [p for p in found if not any(p.startswith(home + os.sep) for home in homes)]
    return (outside or [None])[0] if found else "not found"


def _installed() -> Sequence[str]:
    """Folders whose modules are installed, those of editable installations among them."""
    homes = [sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib")]
    for distribution in distributions():
        # What a project's folder itself says of it (an egg-info) is no installation.
        path = getattr(distribution, "_path", None)
        if path is None or str(Path(path).parent) not in homes:
            continue
        told = json.loads(distribution.read_text("direct_url.json") or "{}")
        if told.get("dir_info", {}).get("editable"):
            homes.append(unquote(urlparse(told["url"]).path))
    return homes
