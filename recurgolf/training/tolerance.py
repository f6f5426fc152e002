"""quant.tolerance in a run: steps that were tuned on one network, made to fit the one at hand."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurgolf.artifact import pack_bytes
from recurgolf.model.transformer import Transformer
from recurgolf.quant import TensorRule, dequantize_state, quantize_state
from recurgolf.quant.fill import finer
from recurgolf.training.filling import output_damage
from recurgolf.training.packing import metadata

if TYPE_CHECKING:
    from recurgolf.training.job import Job

TRIES = 6
FINEST = 2.0**-6
"""The smallest share: finer than the finest step from any that rules may say."""


def step_share(
    job: Job,
    model: Transformer,
    state: Mapping[str, Tensor],
    rules: Mapping[str, TensorRule],
    grams: Mapping[str, Tensor],
) -> float:
    """The share of the rules' steps at which packing costs at most `quant.tolerance`.

    1 where the rules' own steps do, and as small as the budget allows where it has too little room.
    The cost is the KL divergence of predictions on the calibration's text with every matrix
    quantized, which grows with the square of the steps. The same on every rank.

    Args:
        state: the tensors that go into the file.
        grams: for weights under gptq.
    """
    share = 1.0
    if job.ranks.is_first:
        with job.clock.phase("quantization"), torch.no_grad():
            share = _found(job, model, state, rules, grams)
    return job.ranks.broadcast(share)


def _found(
    job: Job,
    model: Transformer,
    state: Mapping[str, Tensor],
    rules: Mapping[str, TensorRule],
    grams: Mapping[str, Tensor],
) -> float:
    tolerance, least = job.run.quant.tolerance, finer(rules, FINEST)
    if tolerance is None or least == rules:
        return 1.0
    moved = output_damage(job, model)
    bits_per_byte = job.text.num_targets / job.dataset.val_bytes / math.log(2)
    room = job.run.budget.artifact_bytes - job.plan.code_bytes
    header = metadata(job.run, job.dataset)
    matrices = {name: state[name] for name, rule in rules.items() if rule.grid is not None}

    def cost(share: float) -> float:
        stored = quantize_state(matrices, finer(rules, share), grams)
        return moved(dequantize_state(stored)) * bits_per_byte

    def fits(share: float) -> bool:
        stored = quantize_state(state, finer(rules, share), grams)
        return len(pack_bytes(header, stored, job.run.artifact.codec)[0]) <= room

    share = 1.0
    before = found = cost(share)
    for _ in range(TRIES):
        if found <= tolerance or share == FINEST:
            break
        share = max(0.9 * share * math.sqrt(tolerance / found), FINEST)
        found = cost(share)
    if share < 1 and not fits(share):
        low, share = share, 1.0
        for _ in range(TRIES):
            middle = math.sqrt(low * share)
            low, share = (low, middle) if fits(middle) else (middle, share)
    if share < 1:
        job.log.line(
            f"the rules' steps would cost {before:.4f} bits per byte here, more than "
            f"quant.tolerance={tolerance:g}: taken {share:.2f} times as large"
        )
    return share
