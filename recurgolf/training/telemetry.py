"""What the loop does to the residual stream: figures per visit and per pass, as `loop/…` curves.

One small batch, always the same (the beginning of the training text), is sent through the model
and watched from outside: no random number is drawn, no parameter gets a gradient, no mode stays
changed, so a run with telemetry has the same weights as one without. The time is counted as
validation, not as training.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recurgolf.config import ConfigError
from recurgolf.data.shards import Shard
from recurgolf.looping import Looping, LoopPlan, Visit
from recurgolf.model.transformer import Transformer
from recurgolf.training.network import uncompiled

if TYPE_CHECKING:
    from recurgolf.data import Dataset
    from recurgolf.data.byte_count import ByteCount
    from recurgolf.training.job import Job
    from recurgolf.training.state import TrainState

LEVELS: dict[str, tuple[str, ...]] = {
    "none": (),
    "validation": ("validation",),
    "log": ("validation", "log"),
}
"""Value of trainer.telemetry -> the moments at which the loop is looked at."""

ROWS = 2
"""Sequences of the watched batch."""
VALIDATION_WINDOWS = 16
"""Windows of the validation text, from its beginning, on which the passes are compared."""


def curves(job: Job, state: TrainState, plan: LoopPlan, moment: str) -> dict[str, float]:
    """The `loop/…` figures that `trainer.telemetry` asks for at this moment; {} for none.

    Args:
        plan: the visits to watch.
        moment: log | validation.
    """
    config, model, dataset = job.run.trainer, state.model, job.dataset
    if moment not in LEVELS[config.telemetry] or not job.ranks.is_first:
        return {}
    with job.clock.phase("validation"), uncompiled(), undisturbed(model):
        found = visit_curves(model, plan, *watched_batch(dataset, config.seq_len, job.device))
        if moment == "validation":
            found |= bpb_by_passes(
                model,
                job.run.looping,
                dataset.validation_tokens(),
                dataset.byte_count,
                seq_len=config.seq_len,
                sidecar=dataset.val_byte_sidecar,
            )
    return found


@contextmanager
def undisturbed(model: Transformer) -> Iterator[None]:
    """Evaluation mode and a random state that are both put back."""
    training, rng = model.training, torch.get_rng_state()
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        torch.set_rng_state(rng)


def watched_batch(dataset: Dataset, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Inputs and targets [rows, length]: the first tokens of the training text."""
    tokens = Shard(dataset.train_shards[0])
    rows = max(1, min(ROWS, (len(tokens) - 1) // length))
    ids = torch.from_numpy(tokens[: rows * length + 1].astype(np.int64)).to(device)
    count = len(ids) - 1
    return ids[:-1].view(rows, count // rows), ids[1:].view(rows, count // rows)


def visit_curves(
    model: Transformer, plan: LoopPlan, inputs: Tensor, targets: Tensor
) -> dict[str, float]:
    """Figures of every visit v of a plan, and of every pass k of its core.

    With x_v the state behind visit v and x_-1 the embedding, all [rows, length, dim]:

    - `loop/residual_rms/visitNN`: root of the mean square of x_v;
    - `loop/cosine/visitNN`: mean over tokens of cos(x_v, x_v-1), 1 where a visit changes nothing;
    - `loop/grad_norm/visitNN`: ||dL/dx_v|| of the mean loss, from the first visit that gradients
      reach on;
    - `loop/adapter_norm/visitNN`: ||scale B A|| over the visit's adapters together;
    - `loop/contraction/passKK`: ||y_k - y_k-1|| / ||y_k-1 - y_k-2|| with y_k the state behind the
      k-th pass and y_0 in front of the core, from the second pass on; below 1 the passes settle.

    Args:
        inputs, targets: token ids [rows, length].
    """
    states: list[Tensor] = []
    with torch.enable_grad():
        before = model.embedded(inputs)
        hidden = model.hidden(inputs, plan, observe=lambda _, state: states.append(state))
        loss = F.cross_entropy(model.logits(hidden).float().flatten(0, 1), targets.flatten())
        reached = [v for v, state in enumerate(states) if state.requires_grad]
        gradients = torch.autograd.grad(loss, [states[v] for v in reached], allow_unused=True)
    found: dict[str, float] = {}
    with torch.no_grad():
        chain = [state.detach().float() for state in (before, *states)]
        for position, visit in enumerate(plan.visits):
            name, state = f"visit{position:02d}", chain[position + 1]
            found[f"loop/residual_rms/{name}"] = state.square().mean().sqrt().item()
            cosine = F.cosine_similarity(state, chain[position], dim=-1).mean()
            found[f"loop/cosine/{name}"] = cosine.item()
            norm = adapter_norm(model, visit)
            if norm is not None:
                found[f"loop/adapter_norm/{name}"] = norm
        for position, gradient in zip(reached, gradients, strict=True):
            if gradient is not None:
                found[f"loop/grad_norm/visit{position:02d}"] = gradient.float().norm().item()
        found |= contraction(plan, chain)
    return found


def contraction(plan: LoopPlan, chain: list[Tensor]) -> dict[str, float]:
    """Ratios of successive changes over the passes of the core.

    Args:
        chain: the state in front of the first visit, then behind every visit.
    """
    start, stop = plan.core
    # A pass begins where the core's first block comes round again.
    begins = [p for p in range(start, stop) if plan.blocks[p] == plan.blocks[start]]
    ends = [chain[p] for p in [*begins, stop]]
    steps = [(after - before).norm().item() for before, after in itertools.pairwise(ends)]
    return {
        f"loop/contraction/pass{number:02d}": second / first if first else math.nan
        for number, (first, second) in enumerate(itertools.pairwise(steps), 2)
    }


def adapter_norm(model: Transformer, visit: Visit) -> float | None:
    """Frobenius norm over all corrections of one visit; None where it has none.

    An adapter is linear, so what it makes of the unit matrix is its matrix.
    """
    if model.adapters is None:
        return None
    adapters = model.adapters.of_visit(visit)
    if not adapters:
        return None
    shapes, device = model.config.projections(visit.block), model.embed.weight.device
    squares = [
        adapter(torch.eye(shapes[name][0], device=device)).double().square().sum()
        for name, adapter in adapters.items()
    ]
    return torch.stack(squares).sum().sqrt().item()


@torch.no_grad()
def bpb_by_passes(
    model: Transformer,
    looping: Looping,
    tokens: np.ndarray,
    byte_count: ByteCount,
    *,
    seq_len: int,
    sidecar: np.ndarray | None = None,
) -> dict[str, float]:
    """`loop/bpb/passesNN`: bits per byte of the first validation windows by number of passes.

    It is a sample, for curves: what counts is scored on the whole text with `eval.passes`. Empty
    where the schedule visits every block once.

    Args:
        tokens: the validation stream, uint16 [n].
        seq_len: length of a window.
        sidecar: bytes of every token [n] where the exporter counted them; they then count.
    """
    num_blocks, device = model.config.num_blocks, model.embed.weight.device
    most = looping.passes_of(num_blocks)
    if most == 1:
        return {}
    count = max(1, min(VALIDATION_WINDOWS, (len(tokens) - 1) // seq_len))
    ids = torch.from_numpy(tokens[: count * seq_len + 1].astype(np.int64))
    counted = byte_count.to("cpu").count(ids[1:], ids[:-1]) if sidecar is None else sidecar[1:]
    num_bytes = int(counted[: count * seq_len].sum())
    inputs, targets = (ids[part].to(device) for part in (slice(-1), slice(1, None)))
    found = {}
    for passes in range(1, most + 1):
        try:
            plan = looping.eval_plan(num_blocks, passes)
        except ConfigError:  # a schedule that cannot be run with so many
            continue
        nats = 0.0
        for row, wanted in zip(inputs.view(count, -1), targets.view(count, -1), strict=True):
            logits = model.logits(model.hidden(row[None], plan))[0].float()
            nats += F.cross_entropy(logits, wanted, reduction="sum").item()
        found[f"loop/bpb/passes{passes:02d}"] = nats / (math.log(2) * num_bytes)
    return found
