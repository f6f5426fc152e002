"""Scoring in a run and in `recurgolf evaluate`, with a bar that tells the time left."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from recurgolf.artifact.score import text_of
from recurgolf.config import kind_of
from recurgolf.data import Dataset
from recurgolf.eval import Eval, Score, ScoredModel, Text, score
from recurgolf.eval.several import settings_of
from recurgolf.log import Log
from recurgolf.training.distributed import Ranks
from recurgolf.training.telemetry import curves

if TYPE_CHECKING:
    from recurgolf.training.trainer import Trainer


def validate(trainer: Trainer) -> Score:
    """Score the unpacked model under the run's protocol."""
    with trainer.clock.phase("validation"):
        result = shown(trainer.run.eval.alone, scored_model_of(trainer), trainer.text, trainer)
    trainer.log.line(
        f"step {trainer.step:5d}/{trainer.config.steps} | val_loss {result.val_loss:.4f} | "
        f"val_bpb {result.val_bpb:.4f}"
    )
    values = {"val/loss": result.val_loss, "val/bpb": result.val_bpb}
    if trainer.ranks.is_first:
        plan = trainer.run.looping.eval_plan(trainer.run.model.num_blocks)
        values |= curves(trainer, plan, "validation")
    # It counts as made when it is recorded; no signal comes between.
    with trainer.signals.deferred():
        if trainer.ranks.is_first:
            trainer.tracker.log({**values, **trainer.progress()}, step=trainer.step)
        trainer.validated[trainer.step] = result.val_bpb
    trainer.signals.stop_if_heard()
    return result


def scored_model_of(trainer: Trainer, model: torch.nn.Module | None = None) -> ScoredModel:
    """The trainer's model, or another one of the same run, as protocols see it."""
    run = trainer.run
    model = trainer.model if model is None else model
    return ScoredModel(model, run.looping, run.trainer.seq_len, trainer.device)


def shown(
    protocol: Eval, scored_model: ScoredModel, text: Text, where: Trainer | Log, what: str = ""
) -> Score:
    """A protocol's score over all ranks, with a bar that tells the time left.

    Args:
        where: a trainer, for its log and ranks, or a log alone.
        what: words for the bar; empty: the protocol's kind.
    """
    log, ranks = (where, Ranks()) if isinstance(where, Log) else (where.log, where.ranks)
    began = time.monotonic()
    with log.bar(f"scoring {what or kind_of(protocol)}", 1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            if bar.live is not None:
                bar.live.update(bar.task, total=total)
            left = (time.monotonic() - began) * (total - done) / done
            bar.at(done, f"{left:.0f} s left")
            if not isinstance(where, Log) and 20 * done >= total:
                where.caps.expect(where.clock.running, left, "use fewer windows or fewer passes")

        return score(
            protocol,
            scored_model,
            text,
            rank=ranks.rank,
            world_size=ranks.world_size,
            all_reduce=all_reduced if ranks.world_size > 1 else None,
            progress=progress,
        )


def all_reduced(tensor: Tensor) -> Tensor:
    """A tensor's sum over ranks, on its own device where the backend works there."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = tensor.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def score_all(
    protocols: Mapping[str, Eval],
    scored_model: ScoredModel,
    text: Text,
    where: Trainer | Log,
) -> dict[str, Score]:
    """Score by each protocol, in order; what differs only in name is scored once.

    Returns:
        Name -> score; what a protocol measured besides follows it as name/variant.
    """
    found: dict[str, Score] = {}
    known: dict[str, Score] = {}
    for name, protocol in protocols.items():
        settings = {**settings_of(protocol), "passes": None}
        key = json.dumps([settings, scored_model.plan(protocol.passes).blocks])
        if key not in known:
            known[key] = shown(protocol, scored_model, text, where, name)
        found[name] = known[key]
        for variant, own in known[key].variants.items():
            found[f"{name}/{variant}"] = own
    return found


def entry_of(result: Score, dataset: Dataset) -> dict[str, float]:
    """The entry of an evaluation in summary.json's `evals`.

    `bytes` are those of the table (or sidecar) over the targets scored. `raw_bytes`, where the raw
    text is known, are that text's, less the share of what the protocol left out; by them
    `val_bpb_raw` divides.
    """
    entry = result.to_dict()
    if dataset.val_raw_bytes is None:
        return entry
    sidecar = dataset.val_byte_sidecar
    counted = dataset.val_bytes if sidecar is None else int(sidecar.sum())
    raw_bytes = result.bytes * dataset.val_raw_bytes / counted
    raw_bpb = result.val_bpb * counted / dataset.val_raw_bytes
    return {**entry, "raw_bytes": raw_bytes, "val_bpb_raw": raw_bpb}


__all__ = [
    "entry_of",
    "score_all",
    "scored_model_of",
    "shown",
    "text_of",
    "validate",
]
