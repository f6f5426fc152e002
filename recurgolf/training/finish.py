"""The end of a run: averaged weights, the file, and the score of that file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from recurgolf.artifact import load
from recurgolf.artifact.score import rebuild
from recurgolf.config import kind_of
from recurgolf.eval import Score
from recurgolf.plan import make_plan
from recurgolf.training.packing import ARTIFACT, LEDGER, write_artifact
from recurgolf.training.report import environment, show
from recurgolf.training.summary import Summary

if TYPE_CHECKING:
    from recurgolf.training.trainer import Trainer


def finish(trainer: Trainer) -> Summary:
    """Average, checkpoint, quantise, pack, reload and score; writes everything but the training.

    Every rank scores its share; rank 0 alone writes files.
    """
    run, log, clock, ranks = trainer.run, trainer.log, trainer.clock, trainer.ranks
    averaged = trainer.averager.averaged_state()
    trainer.save()
    if averaged is not None:
        trainer.model.load_state_dict(averaged)
        log.line(f"weights: {trainer.averager.status()}")
    before = trainer.validate()
    plan = make_plan(run)
    if ranks.is_first:
        write_artifact(trainer, plan)
    ranks.wait()
    with clock.phase("evaluation"):
        scorable = rebuild(load(trainer.folder / ARTIFACT))
        result = trainer.score(scorable.model.to(trainer.device), run.eval)
    summary = summarize(trainer, plan.effective_params, before, result)
    if ranks.is_first:
        summary.write(trainer.folder)
        trainer.tracker.summary(summary.to_dict())
        for file in (ARTIFACT, "run.json"):
            name = f"{run.name}-{run.seed}-{Path(file).stem}"
            facts = {"val_bpb": summary.val_bpb, "fingerprint": summary.fingerprint}
            trainer.tracker.log_artifact(trainer.folder / file, name, facts)
        show(trainer, summary, plan.lines)
    ranks.wait()
    return summary


def summarize(trainer: Trainer, effective_params: int, before: Score, result: Score) -> Summary:
    """The figures of a run whose files are written."""
    run, folder, clock = trainer.run, trainer.folder, trainer.clock
    ledger = json.loads((folder / LEDGER).read_text())
    bytes_model = (folder / ARTIFACT).stat().st_size
    bytes_code = ledger["code"]["packed"]
    total = bytes_model + bytes_code
    tokens = trainer.step * run.trainer.batch_tokens
    seconds = clock.seconds["training"]
    peak = max(trainer.ranks.gathered(trainer.peak_memory()))
    return Summary(
        val_bpb=result.val_bpb,
        val_loss=result.val_loss,
        val_bpb_raw=raw_bpb(trainer, result),
        pre_quant_val_bpb=before.val_bpb,
        evals={kind_of(run.eval): result.to_dict()},
        artifact_bytes=total,
        bytes_model=bytes_model,
        bytes_code=bytes_code,
        bytes_code_raw=ledger["code"]["raw"],
        budget_bytes=run.budget.artifact_bytes,
        within_budget=total <= run.budget.artifact_bytes,
        params=trainer.params,
        effective_params=effective_params,
        steps=trainer.step,
        tokens=tokens,
        train_seconds=round(seconds, 3),
        tokens_per_second=round(tokens / seconds, 1),
        peak_memory_bytes=peak,
        val_tokens=result.tokens,
        val_bytes=result.bytes,
        seed=run.seed,
        fingerprint=run.fingerprint,
        status="finished" if total <= run.budget.artifact_bytes else "over_budget",
        folder=str(folder),
        seconds={name: round(value, 3) for name, value in clock.seconds.items()},
        environment=environment(trainer),
    )


def raw_bpb(trainer: Trainer, result: Score) -> float | None:
    """Bits per byte of the raw text; a protocol that drops the tail drops its share of bytes."""
    dataset, sidecar = trainer.dataset, trainer.dataset.val_byte_sidecar
    counted = dataset.val_bytes if sidecar is None else int(sidecar.sum())
    return (
        None if dataset.val_raw_bytes is None else result.val_bpb * counted / dataset.val_raw_bytes
    )
