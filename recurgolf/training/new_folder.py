"""Run folders that no training has made: packed, merged and imported weights."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recurgolf.eval.several import named_protocols
from recurgolf.folders import made_whole
from recurgolf.model.transformer import Transformer
from recurgolf.run import Run
from recurgolf.seal import seal
from recurgolf.training import checkpoint
from recurgolf.training.finish import finish
from recurgolf.training.job import Job
from recurgolf.training.non_finite import check_weights
from recurgolf.training.packing import write_artifact
from recurgolf.training.quantize import quantize_model
from recurgolf.training.resume import CHECKPOINTS
from recurgolf.training.scoring import score_all
from recurgolf.training.summary import Summary, Trained


@contextlib.contextmanager
def new_folder(run: Run, folder: Path) -> Iterator[Job]:
    """A job in a folder that appears under its name when the block ends well, and else not."""
    # A Run that was read keeps what stood in its file, an older version's among it.
    run = dataclasses.replace(run)
    with made_whole(folder) as draft:
        run.write(draft)
        job = Job.watched(run, draft, known_as=folder)
        yield job
        job.log.close()
        seal(draft)


def keep_weights(job: Job, model: Transformer, origin: Mapping[str, Any]) -> None:
    """A checkpoint at step 0 that holds the weights alone: `pack` and `adapters` start from it.

    Args:
        origin: JSON-able facts that stand in its state.
    """
    run = job.run
    state = {"fingerprint": run.fingerprint, "run": run.to_dict(), "tokens": 0, **origin}
    checkpoint.save(job.folder / CHECKPOINTS, 0, {"model": dict(model.state_dict())}, state)


def pack(job: Job, model: Transformer) -> None:
    """The model's file, the code that counts and the ledger, without a score."""
    check_weights(model, job.run.quant.keep_dtype)
    stored = quantize_model(job, model)
    assert stored is not None, "one process alone is rank 0"
    write_artifact(job, stored)


def pack_and_score(job: Job, model: Transformer, trained: Trained | None = None) -> Summary:
    """The same end as a trained run's.

    Args:
        trained: what came before; None: no training, and the weights are scored now.
    """
    model.to(job.device).eval()
    if trained is None:
        trained = Trained(0, 0, 0, val_bpb_of(job, model))
    return finish(job, model, trained)


def val_bpb_of(job: Job, model: Transformer) -> float:
    """The headline score of a model that is in memory."""
    name, headline = next(iter(named_protocols([job.run.eval], job.run.trainer.seq_len).items()))
    with job.clock.phase("validation"):
        return score_all(job, {name: headline}, job.scored(model))[name].val_bpb


__all__ = ["keep_weights", "new_folder", "pack", "pack_and_score", "val_bpb_of"]
