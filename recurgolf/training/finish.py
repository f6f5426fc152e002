"""The one end of all runs: from final weights to the file that counts, its score and the summary.

The trainer ends here, and so do the verbs that pack, merge or import weights.
"""

from __future__ import annotations

import json
import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from recurgolf.artifact import load
from recurgolf.artifact.score import rebuild
from recurgolf.data.tokenizer import normalizer_of
from recurgolf.eval import Eval, Score
from recurgolf.eval.several import by_passes, named_protocols
from recurgolf.model.transformer import Transformer
from recurgolf.training.packing import ARTIFACT, LEDGER, write_artifact
from recurgolf.training.quantize import as_packed, quantization_summary, quantize_model
from recurgolf.training.scoring import entry_of, score_all
from recurgolf.training.summary import Summary, Trained, environment

if TYPE_CHECKING:
    from recurgolf.training.job import Job


@dataclass
class Outcome:
    """What `Job.report` looks at besides the summary.

    Attributes:
        exact, packed: the network before packing, and as it was read back from the file.
        scores: by name, the headline first.
    """

    exact: Transformer
    packed: Transformer
    protocols: dict[str, Eval]
    scores: dict[str, Score]


def finish(job: Job, model: Transformer, trained: Trained) -> Summary:
    """Quantize, pack, read the file back and score it; writes everything but the training.

    Every rank scores its share; rank 0 alone writes files.

    Args:
        model: with its final weights, on the job's device.
        trained: what came before, and how the weights scored.
    """
    run, folder, ranks = job.run, job.folder, job.ranks
    job.guard.check_end(job, model, trained.val_bpb)
    stored = quantize_model(job, model)
    if stored is not None:
        write_artifact(job, stored)
    ranks.barrier()
    with job.clock.phase("evaluation"):
        # What is scored is what a stranger would get: the file, read from disk.
        packed = job.scored(rebuild(load(folder / ARTIFACT)).model)
        protocols = named_protocols([run.eval], run.trainer.seq_len)
        scores = score_all(job, protocols, packed)
    summary = summarize(job, model, trained, scores)
    job.guard.check_end(job, packed.model, summary.val_bpb)
    summary.by_passes = by_passes(scores, protocols, packed)
    if stored is not None:
        summary.quantization = quantization_summary(stored)
        job.report(job, summary, Outcome(as_packed(run, model), packed.model, protocols, scores))
    ranks.barrier()
    return summary


def summarize(job: Job, model: Transformer, trained: Trained, scores: dict[str, Score]) -> Summary:
    """The figures of a run whose files are written. Collective.

    Args:
        scores: by name, the headline first.
    """
    run, clock, dataset = job.run, job.clock, job.dataset
    evals = {name: entry_of(score, dataset) for name, score in scores.items()}
    result, headline = next(iter(scores.values())), next(iter(evals.values()))
    code = json.loads((job.folder / LEDGER).read_text())["code"]
    bytes_model = (job.folder / ARTIFACT).stat().st_size
    total, budget = bytes_model + code["packed"], run.budget.artifact_bytes
    seconds = clock.seconds["training"]
    return Summary(
        val_bpb=result.val_bpb,
        val_loss=result.val_loss,
        val_bpb_raw=headline.get("val_bpb_raw"),
        pre_quant_val_bpb=trained.val_bpb,
        evals=evals,
        artifact_bytes=total,
        bytes_model=bytes_model,
        bytes_code=code["packed"],
        bytes_code_raw=code["raw"],
        budget_bytes=budget,
        within_budget=total <= budget,
        params=model.num_parameters,
        effective_params=job.plan.effective_params,
        steps=trained.steps,
        tokens=trained.tokens,
        train_seconds=round(seconds, 3),
        tokens_per_second=round(trained.tokens / seconds, 1) if seconds else 0.0,
        peak_memory_bytes=max(job.ranks.all_gather(peak_memory(job.device))),
        val_tokens=result.tokens,
        val_bytes=result.bytes,
        val_raw_bytes=headline.get("raw_bytes"),
        seed=run.seed,
        fingerprint=run.fingerprint,
        status="finished" if total <= budget else "over_budget",
        folder=str(job.known_as),
        skipped_steps=trained.skipped,
        caps=dict(job.caps.used(seconds / max(trained.steps, 1))),
        seconds={name: round(value, 3) for name, value in clock.seconds.items()},
        environment=environment(job),
        text={
            "name": dataset.name,
            "fingerprint": dataset.fingerprint,
            "tokenizer": dataset.tokenizer.sha256,
        },
        normalizer=normalizer_of(dataset.tokenizer.path),
    )


def peak_memory(device: torch.device) -> int:
    """Bytes at most so far: of the GPU where there is one, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


__all__ = ["Outcome", "finish"]
