"""Whether the data behind finished runs are still those that they were trained and scored on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from recurgolf.artifact import ArtifactError, load
from recurgolf.artifact.decode import MissingLibrary
from recurgolf.config import ConfigError, to_dict
from recurgolf.data import Dataset
from recurgolf.run import Run
from recurgolf.training import checkpoint
from recurgolf.training.packing import ARTIFACT
from recurgolf.training.resume import CHECKPOINTS
from recurgolf.training.summary import Summary


def check_own_data(folder: Path, dataset: Dataset, text: bool = True) -> None:
    """Refuse another tokenizer or text than a run's own: what differs would look like its doing.

    Args:
        folder: the run's.
        text: whether the validation text must be the same, and not the tokenizer alone.

    Raises:
        ConfigError: what differs.
    """
    told = recorded_data(folder)
    now = {"tokenizer": dataset.tokenizer.sha256, "text": dataset.fingerprint}
    for key, what in {"tokenizer": "tokenizer", "text": "validation text"}.items():
        if told.get(key) not in (None, "", now[key]) and (text or key == "tokenizer"):
            raise ConfigError(
                f"{folder} was made with {what} {told[key][:12]}…, its data in {dataset.folder} "
                f"now have {now[key][:12]}…: bring them back as they were"
            )


def check_comparable(folders: Iterable[Path], trust: bool = False) -> None:
    """Refuse to add runs to finished ones whose data have changed: their figures would stand in one
    table with those of another text.

    Args:
        folders: of the finished ones.
        trust: import plugins of theirs that are not installed.

    Raises:
        ConfigError: the first of them whose data are gone or others, and what differs.
    """
    now: dict[str, Dataset] = {}
    for folder in folders:
        run = Run.read(folder, trust)
        data = now.setdefault(str(to_dict(run.data)), run.data.prepare())
        check_own_data(folder, data)
        newest = checkpoint.newest(folder / CHECKPOINTS)
        state = checkpoint.read_state(newest) if newest else {}
        if "data" in state:
            data.check_contents(state["data"])


def recorded_data(folder: Path) -> dict[str, Any]:
    """Tokenizer and text by the artifact's header, else by the summary; {} where nothing tells."""
    with contextlib.suppress(OSError, ArtifactError, MissingLibrary):
        header = load(folder / ARTIFACT).metadata
        return {"tokenizer": header.get("tokenizer"), "text": header.get("text")}
    with contextlib.suppress(OSError, ValueError, TypeError):
        told = Summary.read(folder).text
        return {"tokenizer": told.get("tokenizer"), "text": told.get("fingerprint")}
    return {}
