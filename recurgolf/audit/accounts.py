"""Checks of what is counted: bytes of text, text shared with training, clocks and sizes.

Everything is counted again from files: the text is decoded, the artifact measured, seconds taken
from the ledger of phases and held against the budget's caps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from recurgolf.artifact.score import text_of
from recurgolf.audit.check import FAIL, PASS, Check
from recurgolf.audit.separation import Overlap, overlap_with_rows
from recurgolf.budget import TRAINING, Budget
from recurgolf.data import Dataset
from recurgolf.data.byte_count import decoded as decoded_texts
from recurgolf.data.shards import Tokens
from recurgolf.data.tokenizer import normalizer_of

PUBLIC_DOCUMENTS = 50_000
PUBLIC_BYTES = 151_080_891
"""Of the challenge's public validation set (canonical count, openai/parameter-golf #1804)."""
PUBLIC_SLACK = 1e-4
"""The exports of several tokenizers differ by their ragged tails."""
PUBLIC_TOKENS = {1024: (62_021_632, 1024), 8192: (40_540_160, 2048)}
"""Vocabulary -> usable targets of its public export, and the row length they are whole rows of."""

RAW_SLACK = 1e-3
"""Share by which decoded text may be longer than the raw text: NFKC spells some signs out."""
RAW_RANGE = 0.02
"""Share by which told bytes of a raw text that is not here may exceed the decoded text."""
SHARED = 0.01
"""Share of validation bytes that honest text has in common with training: set phrases, tables."""

WRITTEN = (TRAINING, "checkpoint")
"""Phases that may end a step behind the cap that ends training."""


def byte_check(
    data: Dataset,
    evals: Mapping[str, Mapping[str, float]],
    times: Mapping[str, np.ndarray] | None = None,
    raw_bytes: int | None = None,
    altered: str = "",
) -> Check:
    """Decode the validation text and compare: table, sidecar, manifest, raw text, public totals,
    and the divisor of every score.

    Args:
        evals: `evals` of summary.json.
        times: protocol -> how often each target was scored, where that was measured.
        raw_bytes: of the raw text, counted again; None where it is not here.
        altered: where the tokens are not those of the raw text.
    """
    counted = data.byte_count.total(data.tokens)
    texts = decoded_texts(data.tokens, data.tokenizer)
    decoded = sum(len(text.encode()) for _, text in texts)
    wrong = [altered] if altered else []
    if counted != decoded:
        wrong.append(f"the table counts {counted:,} bytes, the decoded text has {decoded:,}")
    sidecar = data.val_byte_sidecar
    total = counted if sidecar is None else int(np.asarray(sidecar, np.int64).sum())
    wrong += _against_raw(data, raw_bytes, decoded, total)
    entries = data.manifest.get("datasets") or []
    stats = next((e.get("stats") or {} for e in entries if e.get("name") == data.name), {})
    for key, found in {"tokens_val": len(data.tokens), "docs_val": data.val_documents}.items():
        if key in stats and int(stats[key]) != found:
            wrong.append(f"the manifest says {key}={stats[key]}, there are {found}")
    wrong += _public_totals(data, total)
    targets = len(data.tokens) - 1
    for name, entry in evals.items():
        tokens, size = entry.get("tokens", targets), entry.get("bytes", total)
        if tokens > targets:
            wrong.append(f"{name} scored {tokens:,} targets of {targets:,}")
        if size > total or (tokens == targets and size != total):
            wrong.append(f"{name} divided by {size:,} bytes, the text has {total:,}")
        elif times is not None and name in times and len(times[name]):
            own = bytes_of(data, times[name])
            if size != own:
                wrong.append(f"{name} divided by {size:,} bytes, its targets have {own:,}")
    line = f"bytes that table and decoded text differ by; {decoded:,} bytes in {targets:,} targets"
    if sidecar is not None:
        line += f", {total:,} by the sidecar"
    if raw_bytes is not None:
        line += f", {raw_bytes:,} in the raw text"
    line = "; ".join([line, *wrong])
    return Check("bytes", abs(counted - decoded), FAIL if wrong else PASS, line)


def bytes_of(data: Dataset, times: np.ndarray) -> int:
    """Bytes of the targets that were scored, every one as often as it was."""
    whole = text_of(data)
    return int((whole.bytes_of(0, whole.num_targets) * times).sum())


def _against_raw(data: Dataset, raw: int | None, decoded: int, total: int) -> list[str]:
    """Where decoded text, sidecar and manifest count more than the text before the tokenizer."""
    wrong = []
    rewritten, told = normalizer_of(data.tokenizer.path), data.val_raw_bytes
    if raw is not None:
        if decoded > raw * (1 + RAW_SLACK):
            how = f" (its normalizer: {rewritten})" if rewritten else ""
            wrong.append(
                f"the tokenizer makes {decoded:,} bytes of {raw:,} of raw text{how}, so val_bpb is "
                "not bits per byte of that text"
            )
        if told is not None and told != raw:
            wrong.append(f"the manifest says {told:,} bytes of raw text, there are {raw:,}")
    elif rewritten:
        wrong.append(
            f"the tokenizer rewrites text ({rewritten}), and the raw text is not here to count"
        )
    elif told is not None and told > decoded * (1 + RAW_RANGE):
        wrong.append(
            f"the manifest says {told:,} bytes of raw text, which is not here, but it decodes to "
            f"{decoded:,}"
        )
    most = decoded if raw is None else max(raw, decoded)
    if total > most * (1 if raw is None else 1 + RAW_SLACK):
        wrong.append(f"the sidecar counts {total:,} bytes, the text has {most:,}")
    return wrong


def _public_totals(data: Dataset, total: int) -> list[str]:
    """Differences from the public validation set, where the data claims to be it."""
    if not (data.name.startswith("fineweb10B") and data.val_documents == PUBLIC_DOCUMENTS):
        return []
    wrong = []
    if abs(total - PUBLIC_BYTES) > PUBLIC_SLACK * PUBLIC_BYTES:
        wrong.append(f"{total:,} bytes, but the public validation set has {PUBLIC_BYTES:,}")
    tokens, row = PUBLIC_TOKENS.get(data.tokenizer.vocab_size, (0, 1))
    usable = (len(data.tokens) - 1) // row * row
    # Another tokenizer of the same size, such as one for re-cased text, has a total of its own.
    if tokens and data.name == f"fineweb10B_sp{data.tokenizer.vocab_size}" and usable != tokens:
        wrong.append(f"{usable:,} targets in rows of {row}, the public export has {tokens:,}")
    return wrong


def separation_check(
    overlap: Overlap,
    calibration: Sequence[Tokens],
    val_tokens: Tokens,
    bos_id: int,
    sizes: np.ndarray | None = None,
) -> Check:
    """Judge what training and calibration share with validation.

    Args:
        calibration: rows of tokens that the quantizer was calibrated on; empty without any.
        sizes: bytes of every validation token; None: all count alike.
    """
    weight = np.ones(len(val_tokens)) if sizes is None else sizes
    share = float(weight[overlap.seen].sum() / max(weight.sum(), 1))
    touching = overlap_with_rows(calibration, val_tokens, bos_id)
    line = (
        f"share of the validation bytes that stand in {overlap.train_tokens:,} tokens of training "
        f"text, whole, in parts or with gaps (at most {SHARED:g}); {overlap.whole:,} documents are "
        "in both"
    )
    if len(calibration):
        line += f"; {touching} of {len(calibration)} calibration rows looked at are validation text"
    if overlap.examples and share > SHARED:
        block, where = overlap.examples[0]
        line += f"; the first: block {block} of validation, near token {where:,} of training"
    wrong = share > SHARED or overlap.whole or touching
    return Check("separation", round(share, 6), FAIL if wrong else PASS, line)


def limits_check(
    budget: Budget,
    seconds: Mapping[str, float],
    step_seconds: float,
    sizes: Mapping[str, Path],
    claimed: Mapping[str, float],
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
    total = sum(path.stat().st_size for name, path in sizes.items() if name not in missing)
    used.append(f"{total:,} of {budget.artifact_bytes:,} bytes")
    largest = max(largest, total / budget.artifact_bytes)
    if total > budget.artifact_bytes:
        wrong.append(f"{total - budget.artifact_bytes:,} bytes over the budget")
    for name, value in claimed.items():
        if int(value) != total and not missing:
            wrong.append(f"summary.json says {name}={int(value):,}, the files have {total:,}")
    line = "; ".join([f"largest share of a cap: {', '.join(used)}", *wrong])
    return Check("limits", round(largest, 6), FAIL if wrong else PASS, line)
