"""The texts of a run under audit: validation as tokens and raw, and all that training has read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from recurgolf.artifact.score import text_of
from recurgolf.audit.accounts import separation_check
from recurgolf.audit.check import FAIL, Check, not_applicable
from recurgolf.audit.separation import overlap_with_training
from recurgolf.config import REGISTRY, ConfigError, from_dict
from recurgolf.data import Data, DataError, Dataset
from recurgolf.data.byte_count import check_texts, decoded
from recurgolf.data.dataset import raw_texts
from recurgolf.disk import read_json


def raw_texts_of(config: Mapping[str, Any], dataset: Dataset) -> list[str] | None:
    """The documents that the validation tokens were made of; None where they are not here."""
    node = config.get("data") or {}
    known = REGISTRY["data"].get(node.get("kind", ""))
    if known is not None and hasattr(known, "corpus"):
        try:
            return from_dict(Data, node).corpus().read().validation  # type: ignore[attr-defined]
        except (DataError, OSError):
            return None
    return raw_texts(dataset)


def other_than_raw(dataset: Dataset, texts: list[str] | None) -> str:
    """Where the validation tokens are not those of the raw text; empty where they are."""
    if texts is None:
        return ""
    if len(texts) != dataset.val_documents:
        return f"{dataset.val_documents:,} documents of tokens, {len(texts):,} of raw text"
    try:
        check_texts(
            decoded(dataset.validation_tokens(), dataset.tokenizer), texts, dataset.tokenizer
        )
    except DataError as error:
        return str(error)
    return ""


def separation_of(
    config: Mapping[str, Any], dataset: Dataset, calibration: list[np.ndarray]
) -> Check:
    """What training shares with validation: the run's own text and that of the runs whose weights
    it began with."""
    if not dataset.train_shards:
        return not_applicable("separation", "the data set has no training shards to compare with")
    tokens, bos = dataset.validation_tokens(), dataset.tokenizer.bos_id
    shards, unknown = _shards_of_bases(config, dataset)
    overlap = overlap_with_training(tokens, [*dataset.train_shards, *shards], bos)
    sizes = np.concatenate(([0], text_of(dataset).bytes_of(0, len(tokens) - 1)))
    found = separation_check(overlap, calibration, tokens, bos, sizes)
    return replace(found, verdict=FAIL, line=f"{found.line}; {unknown}") if unknown else found


def _shards_of_bases(config: Mapping[str, Any], dataset: Dataset) -> tuple[list[Path], str]:
    """Training shards of the runs that weights come from (`trainer.base`); which are not here."""
    shards: list[Path] = []
    seen: set[Path] = set()
    while base := (config.get("trainer") or {}).get("base"):
        folder, own = Path(base).resolve(), config.get("data")
        if folder in seen:
            break
        seen.add(folder)
        unknown = (
            f"could not be compared: what the weights of {base}, with which this run began, have "
            "read; bring that folder and its data back, and audit again"
        )
        try:
            config = read_json(folder / "run.json")
            node = config.get("data") or {}
            if node == own:
                before = dataset
            elif REGISTRY["data"].get(node.get("kind", "")) is None:
                return shards, unknown
            else:
                before = from_dict(Data, node).prepare()
            states = sorted((folder / "checkpoints").glob("step_*/state.json"))
            read = read_json(states[-1]).get("data") if states else None
        except (ConfigError, OSError):
            return shards, unknown
        same = before.tokenizer.sha256 == dataset.tokenizer.sha256 and before.train_shards
        if not same or read not in (None, before.contents):
            return shards, unknown
        shards += [] if before is dataset else before.train_shards
    return shards, ""
