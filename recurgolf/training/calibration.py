"""Calibration in a run: text, forwards of the final weights, Gram matrices over all ranks."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from recurgolf.config import ConfigError
from recurgolf.data import Dataset
from recurgolf.data.calibration_text import CalibrationText
from recurgolf.model.linear import Embedding, Linear
from recurgolf.model.transformer import Transformer
from recurgolf.quant import GramCollector
from recurgolf.run import Run
from recurgolf.training.distributed import Ranks

if TYPE_CHECKING:
    from recurgolf.training.job import Job


def readout_name(model: Transformer) -> str:
    """Name of the matrix that the main head multiplies by."""
    return "embed.weight" if model.lm_head is None else "lm_head.weight"


def layers_of(model: Transformer) -> dict[str, Linear]:
    """Weight name -> linear layer, of all whose inputs hooks can see."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, Linear) and module is not model.lm_head
    }


def tables_of(model: Transformer) -> dict[str, int]:
    """Weight name -> columns, of the tables that are looked up and do not read out.

    An error in a row of theirs is the error of what comes out: every column counts alike.
    """
    return {
        f"{name}.weight": module.embedding_dim
        for name, module in model.named_modules()
        if isinstance(module, Embedding) and f"{name}.weight" != readout_name(model)
    }


def check_calibration(
    run: Run, model: Transformer, dataset: Dataset, names: Collection[str]
) -> None:
    """Refuse, before training, what calibration could not give after it.

    Args:
        names: weights whose rule says gptq.

    Raises:
        ConfigError: a weight whose inputs nobody sees; more text than there is.
    """
    known = {*layers_of(model), *tables_of(model), readout_name(model)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ConfigError(
            f"quant: method gptq for {', '.join(unknown)}, which no layer multiplies its inputs "
            "by; give a rule with method rtn before it"
        )
    if not names:
        return
    calibration, plan = run.quant.calibration, run.eval_plan
    calibration.check_text(dataset.train_tokens, run.trainer.seq_len)
    passes = max(visit.nth for visit in plan.visits) + 1
    weights = calibration.visit_weights[:passes]
    if weights and not any(weights):
        raise ConfigError(
            f"quant.calibration.visit_weights={calibration.visit_weights}: the {passes} visits of "
            f"a looped block in the scored plan {plan.describe()} all count 0"
        )


@torch.no_grad()
def collect_grams(job: Job, model: Transformer, names: Collection[str]) -> dict[str, Tensor]:
    """Gram matrices of the inputs of these weights, the same on every rank.

    The model runs as it will be scored: in evaluation mode, under the plan for scoring, adapters
    included. Every rank takes its share of the rows; memory does not grow with their number.
    """
    run, ranks = job.run, job.ranks
    calibration, plan = run.quant.calibration, run.eval_plan
    length = calibration.seq_len or run.trainer.seq_len
    device = model.embed.weight.device
    tables = {name: cols for name, cols in tables_of(model).items() if name in names}
    layers = {name: layer for name, layer in layers_of(model).items() if name in names}
    readout = readout_name(model)
    reads = {readout: model.readout.shape[1]} if readout in names else {}
    looped = tuple(f"blocks.{block}." for block in plan.looped_blocks)
    weights = {n: calibration.visit_weights for n in layers if n.startswith(looped)}
    collector = GramCollector(layers, reads, weights, device)
    seeds = run.seed_of("data"), run.seed_of("noise")
    text = CalibrationText(job.dataset, model, plan, *seeds, run.data.vocab_size)
    mine = range(ranks.rank, calibration.sequences, ranks.world_size)
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(mine), calibration.batch):
            # Sampling runs the layers too, so it happens before the hooks are in place.
            rows = calibration.rows(text, mine[start : start + calibration.batch], length)
            with collector:
                collector.begin(rows.numel())
                hidden = model.hidden(rows.to(device), plan)
                read = hidden if model.head_proj is None else model.head_proj(hidden)
                if reads:
                    collector.add(readout, read)
    finally:
        model.train(was_training)
    if ranks.world_size > 1:
        for total in collector.sums.values():
            dist.all_reduce(total)
        collector.tokens = int(ranks.all_reduce([collector.tokens])[0])
    grams = collector.grams() if collector.sums else {}
    return {**grams, **{name: torch.eye(cols) for name, cols in tables.items()}}


def broadcast_weights(model: Transformer, weights: Mapping[str, Tensor], ranks: Ranks) -> None:
    """Put rank 0's weights into the model of every rank."""
    parameters = dict(model.named_parameters())
    # Rank 0 comes from quantizing, which may have taken longer than a collective may wait.
    ranks.barrier()
    with torch.no_grad():
        for name in sorted(weights):
            if ranks.is_first:
                parameters[name].copy_(weights[name])
            if ranks.world_size > 1:
                dist.broadcast(parameters[name].data, src=0)
