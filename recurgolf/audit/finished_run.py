"""A finished run under audit: its artifact, its data, its ledgers, and the seven checks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recurgolf.artifact import ArtifactError, load
from recurgolf.artifact.code import PACKED_NAME
from recurgolf.artifact.decode import MissingLibrary
from recurgolf.artifact.score import check_data, rebuild, text_of
from recurgolf.audit.accounts import (
    ValidationText,
    byte_check,
    limits_check,
    separation_check,
)
from recurgolf.audit.check import FAIL, NOT_APPLICABLE, PASS, Audit, Check, not_applicable
from recurgolf.audit.prediction import causality, normalised, score_before_update, single_pass
from recurgolf.audit.reduced_text import trial
from recurgolf.audit.separation import shared_documents
from recurgolf.config import ConfigError, from_dict, kind_of
from recurgolf.data import Dataset
from recurgolf.data.calibration_text import CalibrationText
from recurgolf.data.shards import Tokens
from recurgolf.eval import Eval, ScoredModel, Text
from recurgolf.eval.several import FOLDER as SCORES
from recurgolf.eval.several import kept_settings, named_protocols
from recurgolf.run import Run

FILE = "audit.json"
CALIBRATION_ROWS = 64
"""Rows of calibration text that are made again and looked at."""

Say = Callable[[str], None]


def audit_run(folder: Path, say: Say = lambda line: None) -> Audit:
    """Audit a finished run by its folder; several ranks' runs are audited by one process.

    Args:
        say: told what is being done, a line at a time.

    Raises:
        ConfigError: no finished run, a damaged artifact, or data that are not the run's.
    """
    began, run, path = time.perf_counter(), Run.read(folder), folder / "artifact.bin"
    if not path.exists():
        raise ConfigError(f"{folder} has no artifact.bin: the run did not finish")
    try:
        scored_model = rebuild(load(path))
        dataset = run.data.prepare(say)
        check_data(scored_model.metadata, dataset)
    except (ArtifactError, MissingLibrary) as error:
        raise ConfigError(f"{path}: {error}") from None
    summary = _read(folder / "summary.json")
    protocols = protocols_of(run, folder)
    checks = prediction_checks(protocols, scored_model, text_of(dataset), say)
    checks += [
        byte_check(validation_text(dataset), summary.get("evals", {})),
        _separation(run, scored_model, dataset, say),
        _limits(run, folder, summary),
    ]
    facts = {
        "fingerprint": run.fingerprint,
        "text": dataset.fingerprint,
        "protocols": list(protocols),
        "seconds": round(time.perf_counter() - began, 3),
    }
    return Audit(checks, facts)


def protocols_of(run: Run, folder: Path) -> dict[str, Eval]:
    """All that a run has been scored by, at its end and by `recurgolf evaluate` since.

    Numbers of passes are left out: they change the model's depth, not what a protocol may know.
    """
    asked = [run.eval.alone, *(item.alone for item in run.eval.also)]
    for path in sorted((folder / SCORES).glob("*.npz")):
        asked.append(from_dict(Eval, {**kept_settings(path)[0], "passes": None}))
    return named_protocols(asked, run.trainer.seq_len)


def prediction_checks(
    protocols: Sequence[Eval] | Mapping[str, Eval],
    scored_model: ScoredModel,
    text: Text,
    say: Say = lambda line: None,
    seed: int = 0,
) -> list[Check]:
    """Checks 1 to 4 over every protocol; of each check the worst finding, with its protocol.

    Args:
        protocols: by name, or called by their kinds.
    """
    if isinstance(protocols, Mapping):
        names, protocols = list(protocols), list(protocols.values())
    else:
        names = [kind_of(protocol) for protocol in protocols]
    found: list[list[Check]] = []
    was_training = scored_model.model.training
    scored_model.model.eval()
    try:
        for name, protocol in zip(names, protocols, strict=True):
            say(f"audit: {name} on changed text ...")
            found.append(_prediction_checks(protocol, scored_model, text, seed))
    finally:
        scored_model.model.train(was_training)
    return [_worst(checks, names) for checks in zip(*found, strict=True)]


def _prediction_checks(
    protocol: Eval, scored_model: ScoredModel, text: Text, seed: int
) -> list[Check]:
    tried = trial(protocol, scored_model, text)
    passed_once = single_pass(tried)
    if passed_once.number is None:
        others = ("causality", "normalised", "score_before_update")
        return [*(not_applicable(name, passed_once.line) for name in others), passed_once]
    chance = np.random.default_rng(seed)
    with torch.no_grad():
        return [
            causality(tried, chance),
            normalised(tried, chance),
            score_before_update(tried, chance),
            passed_once,
        ]


def _worst(checks: Sequence[Check], protocols: Sequence[str]) -> Check:
    order = {FAIL: 2, NOT_APPLICABLE: 1, PASS: 0}
    ranked = [
        (order[check.verdict], check.number or 0.0, -place) for place, check in enumerate(checks)
    ]
    worst = checks[ranked.index(max(ranked))]
    if len(checks) == 1:
        return worst
    line = f"{protocols[checks.index(worst)]}: {worst.line}"
    return Check(worst.name, worst.number, worst.verdict, line)


def validation_text(dataset: Dataset) -> ValidationText:
    """What the byte check looks at, of a data set."""
    entries: list[Any] = dataset.manifest.get("datasets") or []
    entry = next((e for e in entries if e.get("name") == dataset.name), {})
    return ValidationText(
        dataset.validation_tokens(),
        dataset.tokenizer,
        dataset.byte_count,
        dataset.val_byte_sidecar,
        dataset.val_documents,
        entry.get("stats") or {},
        dataset.name,
    )


def _separation(run: Run, scored_model: ScoredModel, dataset: Dataset, say: Say) -> Check:
    if not dataset.train_shards:
        return not_applicable("separation", "the data set has no training shards to compare with")
    say(f"audit: comparing {dataset.train_tokens:,} training tokens with validation ...")
    tokens, bos = dataset.validation_tokens(), dataset.tokenizer.bos_id
    shared = shared_documents(tokens, dataset.train_shards, bos)
    return separation_check(shared, calibration_rows(run, scored_model, dataset), tokens, bos)


def calibration_rows(run: Run, scored_model: ScoredModel, dataset: Dataset) -> list[Tokens]:
    """Rows that the run's quantizer was calibrated on, made again; empty where it needs none."""
    calibration = run.quant.calibration
    if not calibration.reads_training_data or all(r.method != "gptq" for r in run.quant.rules):
        return []
    length = calibration.seq_len or run.trainer.seq_len
    count = min(calibration.sequences, CALIBRATION_ROWS)
    numbers = np.linspace(0, calibration.sequences - 1, count).astype(int).tolist()
    model, plan = scored_model.model, scored_model.plan()
    seeds = run.seed_of("data"), run.seed_of("noise")
    source = CalibrationText(dataset, model, plan, *seeds, run.data.vocab_size)
    return list(calibration.rows(source, numbers, length).numpy().astype(np.uint16))


def _limits(run: Run, folder: Path, summary: dict[str, Any]) -> Check:
    if not summary:
        return not_applicable("limits", f"{folder} has no summary.json: no ledger of its clocks")
    steps = max(int(summary.get("steps", 1)), 1)
    return limits_check(
        run.budget,
        summary.get("seconds", {}),
        float(summary.get("train_seconds", 0.0)) / steps,
        {name: folder / name for name in ("artifact.bin", PACKED_NAME)},
        {"artifact_bytes": summary["artifact_bytes"]},
    )


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}
