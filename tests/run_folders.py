"""Folders as runs leave them, with figures of a test's choosing: for what only reads folders."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
from smoke_runs import composed

from recurgolf.run import fingerprint_of

TOKENS, BYTES = 40_000, 100_000
MACHINE = {"device": "test processor", "ranks": 1, "threads": 1, "precision": "float32"}
TEXT = {"name": "text", "fingerprint": "a" * 64, "tokenizer": "b" * 64}


def config(seed: int, *overrides: str, name: str = "smoke") -> dict[str, Any]:
    """What run.json holds."""
    data = copy.deepcopy(composed("experiment=smoke", "tracker=none", *overrides).to_dict())
    return {**data, "seed": seed, "name": name}


def summary(seed: int, val_bpb: float, **figures: Any) -> dict[str, Any]:
    """What summary.json holds."""
    entry = {"val_bpb": val_bpb, "tokens": TOKENS, "bytes": BYTES, "seconds": 1.0}
    return {
        "val_bpb": val_bpb,
        "val_loss": val_bpb * np.log(2) * BYTES / TOKENS,
        "val_bpb_raw": val_bpb - 0.001,
        "pre_quant_val_bpb": val_bpb - 0.01,
        "evals": {"sliding": entry},
        "artifact_bytes": 900_000,
        "bytes_model": 860_000,
        "bytes_code": 40_000,
        "bytes_code_raw": 90_000,
        "budget_bytes": 1_000_000,
        "within_budget": True,
        "params": 2_000_000,
        "effective_params": 3_000_000,
        "steps": 430,
        "tokens": 1_761_280,
        "train_seconds": 180.0,
        "tokens_per_second": 9_784.9,
        "peak_memory_bytes": 10**9,
        "val_tokens": TOKENS,
        "val_bytes": BYTES,
        "seed": seed,
        "fingerprint": f"{seed:016x}",
        "status": "finished",
        "environment": MACHINE,
        "text": TEXT,
        **figures,
    }


def write_run(
    folder: Path,
    seed: int,
    val_bpb: float | None,
    *overrides: str,
    name: str = "smoke",
    nats: np.ndarray | None = None,
    sizes: np.ndarray | None = None,
    **figures: Any,
) -> Path:
    """A run's folder; without `val_bpb` one that did not finish.

    Args:
        nats, sizes: of every document; they are kept as scores/sliding.npz.
    """
    folder.mkdir(parents=True)
    data = config(seed, *overrides, name=name)
    (folder / "run.json").write_text(json.dumps(data))
    if val_bpb is not None:
        told = {"fingerprint": fingerprint_of(data), **figures}
        (folder / "summary.json").write_text(json.dumps(summary(seed, val_bpb, **told)))
    if nats is not None and sizes is not None:
        (folder / "scores").mkdir()
        np.savez_compressed(
            folder / "scores" / f"{data['eval']['kind']}.npz",
            nats=nats,
            tokens=np.ones_like(sizes),
            bytes=sizes,
            text=np.array("c" * 64),
            protocol=np.array("{}"),
        )
    return folder


def write_metrics(folder: Path, steps: int, losses: list[float], **last: float) -> None:
    """metrics.jsonl with a training loss at evenly spaced steps; `last` stands on the last line.

    Names may be written with two underscores for a slash.
    """
    lines = [{"event": "start", "time": 0.0, "values": {"run_id": "x", "resumed": False}}]
    for number, loss in enumerate(losses, 1):
        step = steps * number // len(losses)
        own = (
            {key.replace("__", "/"): v for key, v in last.items()} if number == len(losses) else {}
        )
        axes = {"step": step, "tokens": 4096 * step, "train_seconds": step / 2}
        lines.append({"event": "metrics", "time": 1.0, **axes, "train/loss": loss, **own})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
