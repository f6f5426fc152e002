"""The end of a run: averaged weights, the file, and the score of that file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from recurgolf.artifact import load
from recurgolf.artifact.score import rebuild
from recurgolf.data.shard_fingerprints import check_unchanged
from recurgolf.eval import Score
from recurgolf.eval.several import by_passes, named_protocols, write_scores
from recurgolf.plan import make_plan
from recurgolf.seal import seal
from recurgolf.training.clock import cap_lines, caps_used
from recurgolf.training.packing import ARTIFACT, LEDGER, write_artifact
from recurgolf.training.quantize import quantization_summary, quantize_model
from recurgolf.training.report import environment, show
from recurgolf.training.scoring import entry_of, score_all, scored_model_of, validate
from recurgolf.training.summary import Summary
from recurgolf.training.trajectory import trajectory, trajectory_lines, validation_windows

if TYPE_CHECKING:
    from recurgolf.training.trainer import Trainer


def finish(trainer: Trainer) -> Summary:
    """Average, checkpoint, quantize, pack, reload and score; writes everything but the training.

    Every rank scores its share; rank 0 alone writes files.
    """
    run, log, clock, ranks = trainer.run, trainer.log, trainer.clock, trainer.ranks
    averaged = trainer.averager.averaged_state()
    trainer.save("packing")
    if averaged is not None:
        trainer.model.load_state_dict(averaged)
        log.line(f"weights: {trainer.averager.status()}")
    before = validate(trainer)
    plan = make_plan(run)
    stored = quantize_model(run, trainer.model, trainer.dataset, ranks, clock, log)
    if stored is not None:
        write_artifact(run, trainer.folder, stored, trainer.dataset, plan, clock, log)
    ranks.wait()
    with clock.phase("evaluation"):
        scorable = rebuild(load(trainer.folder / ARTIFACT))
        scored_model = scored_model_of(trainer, scorable.model.to(trainer.device))
        protocols = named_protocols([run.eval], run.trainer.seq_len)
        scores = score_all(protocols, scored_model, trainer.text, trainer)
    check_unchanged(trainer.dataset.files)
    result = next(iter(scores.values()))
    summary = summarize(trainer, plan.effective_params, before, scores)
    summary.by_passes = by_passes(scores, protocols, scored_model)
    if stored is not None:
        ids = validation_windows(trainer.val_tokens, run.trainer.seq_len)
        gap = result.val_bpb - before.val_bpb
        summary.quantization = quantization_summary(stored)
        summary.trajectory = trajectory(trainer.model, scorable.model, run.eval_plan, ids, gap)
        for line in trajectory_lines(summary.trajectory):
            log.line(line)
        write_scores(trainer.folder, scores, protocols, trainer.dataset.fingerprint)
        summary.write(trainer.folder)
        gap = summary.val_bpb - summary.pre_quant_val_bpb
        trainer.tracker.summary({**summary.to_dict(), "quantization_gap": gap})
        for file in (ARTIFACT, "run.json"):
            name = f"{run.name}-{run.seed}-{Path(file).stem}"
            facts = {"val_bpb": summary.val_bpb, "fingerprint": summary.fingerprint}
            trainer.tracker.log_artifact(trainer.folder / file, name, facts)
        show(trainer, summary, plan.lines)
        for line in cap_lines(summary.caps):
            log.line(line)
        seal(trainer.folder)
        if run.eval.audit:
            # The audit stands above training: it reads what a run has left.
            from recurgolf.audit import audit_at_the_end

            audit_at_the_end(trainer.folder, log)
    ranks.wait()
    return summary


def summarize(
    trainer: Trainer, effective_params: int, before: Score, scores: dict[str, Score]
) -> Summary:
    """The figures of a run whose files are written.

    Args:
        scores: by name, the headline first.
    """
    evals = {name: entry_of(score, trainer.dataset) for name, score in scores.items()}
    result, headline = next(iter(scores.values())), next(iter(evals.values()))
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
        val_bpb_raw=headline.get("val_bpb_raw"),
        pre_quant_val_bpb=before.val_bpb,
        evals=evals,
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
        val_raw_bytes=headline.get("raw_bytes"),
        seed=run.seed,
        fingerprint=run.fingerprint,
        status="finished" if total <= run.budget.artifact_bytes else "over_budget",
        folder=str(folder),
        skipped_steps=trainer.skipped,
        caps=caps_used(run.budget, clock, seconds / max(trainer.step, 1)),
        seconds={name: round(value, 3) for name, value in clock.seconds.items()},
        environment=environment(trainer),
        text={
            "name": trainer.dataset.name,
            "fingerprint": trainer.dataset.fingerprint,
            "tokenizer": trainer.dataset.tokenizer.sha256,
        },
    )
