"""At the end of training: whether an average of the weights is its result."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from recurgolf.model.transformer import Transformer
from recurgolf.training.job import Job
from recurgolf.training.probe import probed_rows
from recurgolf.training.quantize import as_packed
from recurgolf.training.state import TrainState


def averaged_weights(job: Job, state: TrainState) -> dict[str, Tensor] | None:
    """The averaged weights; None where there are none, or where the last ones are better."""
    averaged = state.averager.averaged_state()
    if averaged is None or not job.run.quant.qat.learns_steps:
        return averaged
    return None if is_worse(job, state, averaged) else averaged


def is_worse(job: Job, state: TrainState, averaged: Mapping[str, Tensor]) -> bool:
    """Whether the last weights predict the calibration's text better than their average, as packed.

    Training saw the codes of the last weights; what lies between them rounds to others, so that an
    average can lose to its own end. The state is as before afterwards.
    """
    model, losses = state.model, list[float]()
    last = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for weights in (last, averaged):
        model.load_state_dict(weights)
        state.qat.settle()
        with job.clock.phase("quantization"):
            losses.append(_loss(job, as_packed(job.run, model)))
    model.load_state_dict(last)
    worse = job.ranks.broadcast(losses[0] < losses[1])
    if worse:
        job.log.line(
            f"weights: the last ones, {losses[0]:.4f} nats per token of calibration text as "
            f"packed; their average ({state.averager.status()}) has {losses[1]:.4f}"
        )
    return worse


@torch.no_grad()
def _loss(job: Job, model: Transformer) -> float:
    model.eval()
    rows = probed_rows(job, model)
    each = [model(row[None], job.run.eval_plan)[0, :-1].float() for row in rows]
    nats = [F.cross_entropy(one, row[1:]) for one, row in zip(each, rows, strict=True)]
    return float(torch.stack(nats).mean())
