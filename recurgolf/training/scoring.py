"""Scoring in a run and in `recurgolf evaluate`, with a bar that tells the time left."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from recurgolf.config import kind_of
from recurgolf.data import Dataset
from recurgolf.eval import Eval, Score, ScoredModel, score
from recurgolf.eval.several import settings_of
from recurgolf.training.quantize import as_packed

if TYPE_CHECKING:
    from recurgolf.training.job import Job
    from recurgolf.training.state import TrainState


def validate(job: Job, state: TrainState) -> Score:
    """Score a copy of the model as it trains, for the log and the tracker.

    A protocol may change the weights that it scores; those that train, and are saved, it never
    has, so that a signal can end it anywhere.
    """
    run, step = job.run, state.step
    with job.clock.phase("validation"):
        result = scored(job, run.eval.alone, job.scored(as_packed(run, state.model)))
    job.log.line(
        f"step {step:5d}/{run.trainer.steps} | val_loss {result.val_loss:.4f} | "
        f"val_bpb {result.val_bpb:.4f}"
    )
    values = {"val/loss": result.val_loss, "val/bpb": result.val_bpb}
    if job.ranks.is_first:
        plan = run.looping.eval_plan(run.model.num_blocks)
        values |= job.telemetry(job, state, plan, "validation")
    # A validation counts as made once it is recorded, so no signal may come between the two.
    with job.signals.deferred():
        if job.ranks.is_first:
            job.tracker.log({**values, **job.axes(step)}, step=step)
        state.validated[step] = result.val_bpb
    job.signals.stop_if_heard()
    return result


def scored(job: Job, protocol: Eval, scored_model: ScoredModel, what: str = "") -> Score:
    """A protocol's score over all ranks.

    Args:
        what: words for the bar; empty: the protocol's kind.
    """
    began = time.monotonic()
    with job.log.bar(f"scoring {what or kind_of(protocol)}", 1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            left = (time.monotonic() - began) * (total - done) / done
            bar.at(done, f"{left:.0f} s left")
            # Earlier, the first windows' start-up would make the estimate too long.
            if 20 * done >= total:
                job.caps.warn(job.clock.running, left, "use fewer windows or fewer passes")

        return score(protocol, scored_model, job.text, share=job.ranks.share, progress=progress)


def score_all(
    job: Job, protocols: Mapping[str, Eval], scored_model: ScoredModel
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
            known[key] = scored(job, protocol, scored_model, name)
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
