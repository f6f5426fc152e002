"""quant.fill_budget in a run: the search of `quant/fill.py` over files that are really packed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurgolf.artifact import pack_bytes
from recurgolf.data.calibration_text import CalibrationText
from recurgolf.model.transformer import Transformer
from recurgolf.plan import check_budget
from recurgolf.quant import TensorRule, dequantize_state, quantize_state
from recurgolf.quant.fill import Filled, Rules, fill
from recurgolf.training.packing import metadata

if TYPE_CHECKING:
    from recurgolf.training.job import Job


PROBED_TOKENS = 4096
"""Tokens on which the damage of a group is measured; its square root is far below what groups
differ by."""


def fill_rules(
    job: Job,
    model: Transformer,
    state: Mapping[str, Tensor],
    rules: Mapping[str, TensorRule],
    grams: Mapping[str, Tensor],
) -> Filled:
    """The rules that fill what the code leaves of the budget; the same on every rank.

    Args:
        state: the tensors that go into the file.
        rules: of the run's configuration.
        grams: for weights under gptq; error is then of the layer's output.

    Raises:
        ConfigError: the code alone exceeds the budget, or the coarsest choice still does.
    """
    found: Filled | None = None
    if job.ranks.is_first:
        with job.clock.phase("quantization"), torch.no_grad():
            job.log.line("choosing bits and clips that fill the budget ...")
            found = _found(job, model, state, rules, grams)
            for line in found.render():
                job.log.line(line)
    filled = job.ranks.broadcast(found)
    assert filled is not None
    return filled


def _found(
    job: Job,
    model: Transformer,
    state: Mapping[str, Tensor],
    rules: Mapping[str, TensorRule],
    grams: Mapping[str, Tensor],
) -> Filled:
    code, budget = job.plan.code_bytes, job.run.budget.artifact_bytes
    check_budget(code, budget)
    header = metadata(job.run, job.dataset)

    def measure(candidate: Rules) -> int:
        stored = quantize_state(state, candidate, grams)
        return len(pack_bytes(header, stored, job.run.artifact.codec)[0])

    moved = output_damage(job, model)

    def damage(own: Rules) -> float:
        return moved(dequantize_state(quantize_state({n: state[n] for n in own}, own, grams)))

    return fill(state, rules, budget - code, measure, grams=grams, damage=damage)


def probed_rows(job: Job, model: Transformer) -> Tensor:
    """Token ids of the calibration's text [rows, length], `PROBED_TOKENS` at most."""
    run, calibration = job.run, job.run.quant.calibration
    length = calibration.seq_len or run.trainer.seq_len
    count = min(max(PROBED_TOKENS // length, 1), calibration.sequences)
    seeds = run.seed_of("data"), run.seed_of("noise")
    text = CalibrationText(job.dataset, model, run.eval_plan, *seeds, run.data.vocab_size)
    return calibration.rows(text, range(count), length).to(model.embed.weight.device)


def output_damage(job: Job, model: Transformer) -> Callable[[Mapping[str, Tensor]], float]:
    """Weights in place of the model's -> KL divergence of its predictions, in nats per token.

    Of the calibration's text, in the plan that is scored. The model stays as it is.
    """
    rows, plan = probed_rows(job, model), job.run.eval_plan
    parameters = dict(model.named_parameters())

    def predictions() -> list[Tensor]:
        was_training = model.training
        model.eval()
        try:
            # Row by row: a vocabulary times all tokens need not fit into memory at once.
            return [model(row[None], plan).float().log_softmax(-1) for row in rows]
        finally:
            model.train(was_training)

    exact = predictions()

    def damage(values: Mapping[str, Tensor]) -> float:
        before = {name: parameters[name].detach().clone() for name in values}
        try:
            for name, value in values.items():
                parameters[name].copy_(value)
            moved = predictions()
        finally:
            for name, value in before.items():
                parameters[name].copy_(value)
        pairs = zip(exact, moved, strict=True)
        total = sum(float((p.exp() * (p - q)).sum()) for p, q in pairs)
        return total / rows.numel()

    return damage
