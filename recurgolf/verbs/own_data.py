"""Whether the data behind a finished run are still those that it was trained and scored on."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from recurgolf.artifact import ArtifactError, load
from recurgolf.artifact.decode import MissingLibrary
from recurgolf.config import ConfigError
from recurgolf.data import Dataset
from recurgolf.training.packing import ARTIFACT
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


def recorded_data(folder: Path) -> dict[str, Any]:
    """Tokenizer and text by the artifact's header, else by the summary; {} where nothing tells."""
    with contextlib.suppress(OSError, ArtifactError, MissingLibrary):
        header = load(folder / ARTIFACT).metadata
        return {"tokenizer": header.get("tokenizer"), "text": header.get("text")}
    with contextlib.suppress(OSError, ValueError, TypeError):
        told = Summary.read(folder).text
        return {"tokenizer": told.get("tokenizer"), "text": told.get("fingerprint")}
    return {}
