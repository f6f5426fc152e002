"""Checks 5 to 7: bytes of text, documents that training shares with validation, clocks and sizes.

Everything is counted again from files: the text is decoded, the artifact measured, seconds taken
from the ledger of phases and held against the budget's caps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recurgolf.audit.check import FAIL, PASS, Check
from recurgolf.audit.separation import NEAR, Shared, shingle_share
from recurgolf.budget import TRAINING, Budget
from recurgolf.data.byte_count import ByteCount, decoded_bytes
from recurgolf.data.shards import Tokens
from recurgolf.data.tokenizer import Tokenizer

PUBLIC_DOCUMENTS = 50_000
PUBLIC_BYTES = 151_080_891
"""Of the challenge's public validation set (canonical count, openai/parameter-golf #1804)."""
PUBLIC_SLACK = 1e-4
"""The exports of several tokenizers differ by their ragged tails."""
PUBLIC_TOKENS = {1024: (62_021_632, 1024), 8192: (40_540_160, 2048)}
"""Vocabulary -> usable targets of its public export, and the row length they are whole rows of."""

WRITTEN = (TRAINING, "checkpoint")
"""Phases that may end a step behind the cap that ends training."""


@dataclass(frozen=True)
class ValidationText:
    """What the byte check looks at.

    Attributes:
        byte_count: the table that the scores were divided by.
        sidecar: bytes of every token as the exporter counted them, where a data set has it.
        documents: number of documents.
        entry: the data set's statistics in its manifest, {} without one.
        name: of the data set.
    """

    tokens: Tokens
    tokenizer: Tokenizer
    byte_count: ByteCount
    sidecar: np.ndarray | None
    documents: int
    entry: Mapping[str, Any]
    name: str


def byte_check(text: ValidationText, evals: Mapping[str, Mapping[str, float]]) -> Check:
    """Decode the validation text and compare: table, manifest, public totals, and every score.

    Args:
        evals: `evals` of summary.json.
    """
    counted = text.byte_count.total(text.tokens)
    decoded = decoded_bytes(text.tokens, text.tokenizer)
    wrong: list[str] = []
    if counted != decoded:
        wrong.append(f"the table counts {counted:,} bytes, the decoded text has {decoded:,}")
    total = counted
    if text.sidecar is not None:
        total = int(np.asarray(text.sidecar).astype(np.int64).sum())
    known = {"tokens_val": len(text.tokens), "docs_val": text.documents}
    for key, found in known.items():
        if key in text.entry and int(text.entry[key]) != found:
            wrong.append(f"the manifest says {key}={text.entry[key]}, there are {found}")
    wrong += _public_totals(text, total)
    targets = len(text.tokens) - 1
    for name, entry in evals.items():
        tokens, size = entry.get("tokens", targets), entry.get("bytes", total)
        if tokens > targets:
            wrong.append(f"{name} scored {tokens:,} targets of {targets:,}")
        if size > total or (tokens == targets and size != total):
            wrong.append(f"{name} divided by {size:,} bytes, the text has {total:,}")
    line = f"bytes that table and decoded text differ by; {decoded:,} bytes in {targets:,} targets"
    if text.sidecar is not None:
        line += f", {total:,} by the sidecar"
    line = "; ".join([line, *wrong])
    return Check("bytes", abs(counted - decoded), FAIL if wrong else PASS, line)


def _public_totals(text: ValidationText, total: int) -> list[str]:
    """Differences from the public validation set, where the data claims to be it."""
    if not (text.name.startswith("fineweb10B") and text.documents == PUBLIC_DOCUMENTS):
        return []
    wrong = []
    if abs(total - PUBLIC_BYTES) > PUBLIC_SLACK * PUBLIC_BYTES:
        wrong.append(f"{total:,} bytes, but the public validation set has {PUBLIC_BYTES:,}")
    tokens, row = PUBLIC_TOKENS.get(text.tokenizer.vocab_size, (0, 1))
    usable = (len(text.tokens) - 1) // row * row
    # Another tokenizer of the same size, such as one for re-cased text, has a total of its own.
    if tokens and text.name == f"fineweb10B_sp{text.tokenizer.vocab_size}" and usable != tokens:
        wrong.append(f"{usable:,} targets in rows of {row}, the public export has {tokens:,}")
    return wrong


def separation_check(
    shared: Shared, calibration: Sequence[Tokens], val_tokens: Tokens, bos_id: int
) -> Check:
    """Judge what training and calibration share with validation.

    Args:
        calibration: rows of tokens that the quantizer was calibrated on; empty without any.
    """
    touching = sum(share >= NEAR for share in shingle_share(calibration, val_tokens, bos_id))
    found = len(shared.exact) + len(shared.near) + touching
    line = (
        f"documents that training shares with validation: {len(shared.exact)} the same, "
        f"{len(shared.near)} nearly the same, of {shared.train_documents:,} and "
        f"{shared.val_documents:,}"
    )
    if len(calibration):
        line += f"; {touching} of {len(calibration)} calibration rows looked at are validation text"
    examples = [*shared.exact.items(), *((a, b) for a, (b, _) in shared.near.items())]
    if examples:
        ours, theirs = examples[0]
        line += f"; training document {ours} is validation document {theirs}"
    return Check("separation", found, FAIL if found else PASS, line)


def limits_check(
    budget: Budget,
    seconds: Mapping[str, float],
    step_seconds: float,
    sizes: Mapping[str, Path],
    claimed: Mapping[str, float],
    reads: Callable[[Path], int] = lambda path: path.stat().st_size,
) -> Check:
    """Hold phases against caps, and the files against the budget and against what was claimed.

    Args:
        seconds: phase -> seconds, of summary.json.
        step_seconds: of one training step: training ends behind the step that reaches its cap.
        sizes: the files that count.
        claimed: name in summary.json -> bytes it says, for `artifact_bytes`.
    """
    wrong: list[str] = []
    used: list[str] = []
    largest = 0.0
    for name, cap in budget.all_caps.items():
        if cap.seconds is None:
            continue
        spent = sum(seconds.get(phase, 0.0) for phase in cap.phases)
        allowed = cap.seconds
        if name == TRAINING and not sum(
            seconds.get(p, 0.0) for p in cap.phases if p not in WRITTEN
        ):
            # The step that reaches the cap is finished, and what it made is written to disk.
            # Calibration behind it has no such excuse: its seconds had to be kept in reserve.
            allowed += step_seconds + seconds.get("checkpoint", 0.0)
        used.append(f"{name} {spent:.1f} of {cap.seconds:.0f} s")
        largest = max(largest, spent / cap.seconds)
        if spent > allowed:
            parts = " + ".join(f"{p} {seconds.get(p, 0.0):.1f}" for p in cap.phases)
            wrong.append(f"cap {name}: {parts} s is more than {cap.seconds:.0f} s")
    missing = [name for name, path in sizes.items() if not path.exists()]
    wrong += [f"{name} is not there" for name in missing]
    total = sum(reads(path) for name, path in sizes.items() if name not in missing)
    used.append(f"{total:,} of {budget.artifact_bytes:,} bytes")
    largest = max(largest, total / budget.artifact_bytes)
    if total > budget.artifact_bytes:
        wrong.append(f"{total - budget.artifact_bytes:,} bytes over the budget")
    for name, value in claimed.items():
        if int(value) != total and not missing:
            wrong.append(f"summary.json says {name}={int(value):,}, the files have {total:,}")
    line = "; ".join([f"largest share of a cap: {', '.join(used)}", *wrong])
    return Check("limits", round(largest, 6), FAIL if wrong else PASS, line)
