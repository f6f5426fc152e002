"""Runs found in folders.

Their files are read as plain data, so that a run of an older version, or one whose components are
not installed here, can still be compared.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from recurgolf.config import ConfigError
from recurgolf.disk import DamagedFile, read_json
from recurgolf.folders import walked
from recurgolf.log import counted
from recurgolf.older import modern
from recurgolf.run import fingerprint_of
from recurgolf.seal import audit_state
from recurgolf.settings import NOT_FINGERPRINTED

OVERRIDES = ".hydra/overrides.yaml"
"""In the folder of every run: what was typed for it."""
SKIPPED_FOLDERS = {"checkpoints", "wandb", "scores", ".hydra", "moved_aside", "__pycache__"}
_NEEDED = ("artifact_bytes", "val_tokens", "val_bytes", "steps", "train_seconds")
"""Figures of a summary that every comparison reads, besides val_bpb."""
_MAPPINGS = ("evals", "by_passes", "text", "environment")
_NO_SETTINGS = ("name", "seed", "seeds", "tracker", "plugins")
_NO_PROTOCOL = {"batch_tokens", "passes", "also", "rope_scale", "audit"}
"""Fields of an evaluation that say how the model is run, not what is scored."""


@dataclass(frozen=True)
class FoundRun:
    """A run's folder.

    Attributes:
        config: content of run.json.
        summary: content of summary.json; None where the run has no figures.
        ended: when summary.json was written, Unix seconds.
        status: finished | over_budget | diverged | unfinished.
    """

    folder: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    ended: float = 0.0
    status: str = "unfinished"

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.folder.name))

    @cached_property
    def seed(self) -> str:
        """All of a run's sources of chance: `3`, or `3 data=7` where one has a seed of its own."""
        own = {k: v for k, v in (self.config.get("seeds") or {}).items() if v is not None}
        return " ".join([str(self.config.get("seed")), *(f"{k}={own[k]}" for k in sorted(own))])

    @cached_property
    def settings(self) -> dict[str, str]:
        """Everything in run.json that can change a result, but for chance: `lora.rank` -> `2`."""
        kept = {key: value for key, value in self.config.items() if key not in _NO_SETTINGS}
        with contextlib.suppress(ConfigError):  # an option that is gone is a setting all the same
            kept = modern(kept)
        found = dict(_flat(kept, ""))
        return {
            k: v for k, v in found.items() if k not in {f"trainer.{n}" for n in NOT_FINGERPRINTED}
        }

    @cached_property
    def chosen(self) -> dict[str, str]:
        """The options that the command line named: `quant` -> `int6_tiny`; {} where it is gone."""
        pairs = [override.partition("=") for override in read_overrides(self.folder)]
        return {key: value for key, _, value in pairs if key and "." not in key}

    @property
    def text(self) -> dict[str, str]:
        """What was scored: fingerprint of the text, tokenizer; by sizes where they are not told."""
        assert self.summary is not None
        told = self.summary.get("text") or {}
        sizes = f"{self.summary['val_tokens']:,} tokens, {self.summary['val_bytes']:,} bytes"
        return {
            "validation text": told.get("fingerprint") or sizes,
            "tokenizer": told.get("tokenizer") or f"of {self.settings.get('data.vocab_size')}",
        }

    @property
    def scored_text(self) -> str:
        """Fingerprint of the validation text; empty where it is not told."""
        told = (self.summary or {}).get("text")
        return str(told.get("fingerprint", "")) if isinstance(told, Mapping) else ""

    @property
    def protocol(self) -> str:
        """The settings of the headline evaluation that say what is scored: `sliding seq_len=…`."""
        node = dict(self.config.get("eval") or {})
        kind = node.pop("kind", "?")
        node["seq_len"] = node.get("seq_len") or (self.config.get("trainer") or {}).get("seq_len")
        shown = [f"{k}={v}" for k, v in sorted(node.items()) if k not in _NO_PROTOCOL]
        return " ".join([kind, *shown])

    @property
    def audit(self) -> str:
        """What is known of the score: `passed`, `not audited`, `failed: bytes`."""
        return audit_state(self.folder)

    @property
    def hardware(self) -> str:
        """`NVIDIA H100 x 8, bfloat16`: other machines and precisions give other figures."""
        told = (self.summary or {}).get("environment") or {}
        ranks, threads = told.get("ranks", 1), told.get("threads")
        device = str(told.get("device", "unknown machine"))
        many = f" x {ranks}" if ranks != 1 else ""
        on_cpu = (self.config.get("trainer") or {}).get("device") == "cpu"
        of_cpu = f", {counted(threads, 'thread')}" if on_cpu and threads else ""
        return f"{device}{many}{of_cpu}, {told.get('precision', 'unknown precision')}"


def find_runs(folders: Iterable[Path], left_out: list[str] | None = None) -> list[FoundRun]:
    """Every run in or below the folders, in order of their paths.

    Args:
        left_out: takes a line for every run with a damaged file; without it that is an error.
    """
    found: dict[Path, FoundRun] = {}
    damaged: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; give folders of runs or sweeps")
        paths = [path.resolve() for path in folders_with("run.json", folder)]
        if not paths:
            raise ConfigError(f"{folder}: no run in or below it (a run's folder has a run.json)")
        for path in paths:
            try:
                found[path] = read_run(path)
            except DamagedFile as error:
                damaged.append(str(error))
            except FileNotFoundError as error:
                damaged.append(f"{error.filename}: a link to what is not there")
    if damaged and (left_out is None or not found):
        raise ConfigError("; ".join(damaged))
    if left_out is not None:
        left_out += [f"left out: {line}" for line in dict.fromkeys(damaged)]
    return list(found.values())


def read_run(folder: Path) -> FoundRun:
    """A run's folder, finished or not."""
    config = read_json(folder / "run.json")
    for name in ("seeds", "trainer", "eval"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise DamagedFile(f"{folder / 'run.json'} is damaged: {name} is no object")
    path = folder / "summary.json"
    try:
        summary = read_json(path)
    except FileNotFoundError:
        return FoundRun(folder, config, None)
    if stale := foreign_summary(folder):
        print(f"{folder}: {stale}: left out", file=sys.stderr)
        return FoundRun(folder, config, None)
    told = summary.get("status")
    # Earlier versions wrote NaN as the score of such a run and called it finished.
    if told == "diverged" or (told is not None and summary.get("val_bpb", 0) is None):
        return FoundRun(folder, config, None, status="diverged")
    if (folder / "failure.txt").exists():  # of a later attempt; the summary is of an earlier one
        return FoundRun(folder, config, None)
    _check_summary(path, summary)
    status = str(summary.get("status", "finished"))
    return FoundRun(folder, config, summary, path.stat().st_mtime, status)


def foreign_summary(folder: Path) -> str:
    """What is wrong where summary.json is not of the run in run.json; empty where it is."""
    try:
        told = read_json(folder / "summary.json")["fingerprint"]
        own = fingerprint_of(read_json(folder / "run.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # absent, damaged or of another version: told by who reads it
    return "" if told == own else f"its summary.json is of another run ({told}, run.json: {own})"


def _check_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Refuse a summary that figures cannot be taken from."""
    for name in ("val_bpb", *_NEEDED):
        if not is_figure(summary.get(name)):
            raise DamagedFile(f"{path} is damaged: {name} is {summary.get(name)!r:.40}")
    for name in _MAPPINGS:
        if not isinstance(summary.get(name) or {}, Mapping):
            raise DamagedFile(f"{path} is damaged: {name} is no object")
    if not all(isinstance(entry, Mapping) for entry in (summary.get("evals") or {}).values()):
        raise DamagedFile(f"{path} is damaged: an entry of evals is no object")
    if not isinstance(summary.get("within_budget"), bool):
        raise DamagedFile(f"{path} is damaged: within_budget is neither true nor false")


def is_figure(value: Any) -> bool:
    """Whether something read from a file is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


def folders_with(name: str, folder: Path, without: Iterable[str] = ()) -> list[Path]:
    """The folders in and below this one that have a file of this name: 9 before 10."""
    below = walked(folder, {*SKIPPED_FOLDERS, *without})
    found = [path for path, _ in below if os.path.lexists(path / name)]
    return sorted(found, key=lambda path: [numeric(part) for part in path.parts])


def read_overrides(folder: Path) -> list[str]:
    """What was typed for a folder's run, or recorded for a sweep's job; [] where it is gone."""
    try:
        told = yaml.safe_load((folder / OVERRIDES).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return []
    return [str(item) for item in told] if isinstance(told, list) else []


def _flat(node: Mapping[str, Any], path: str) -> Iterable[tuple[str, str]]:
    for key, value in node.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            if "kind" in value:
                yield here, str(value["kind"])
            yield from _flat({k: v for k, v in value.items() if k != "kind"}, here)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            yield from _flat({str(n): item for n, item in enumerate(value)}, here)
        else:
            yield here, value if isinstance(value, str) else json.dumps(value)


def numeric(text: str) -> tuple[tuple[int, str], ...]:
    """Sorts 9 before 10."""
    return tuple(
        (int(part or -1) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", text)
    )
