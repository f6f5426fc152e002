"""quant.fill_budget in a run: the search of `quant/fill.py` over files that are really packed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurgolf.artifact import pack_bytes
from recurgolf.plan import check_budget
from recurgolf.quant import TensorRule, quantize_state
from recurgolf.quant.fill import Filled, Rules, fill
from recurgolf.training.packing import metadata

if TYPE_CHECKING:
    from recurgolf.training.job import Job


def fill_rules(
    job: Job,
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
            found = _found(job, state, rules, grams)
            for line in found.render():
                job.log.line(line)
    filled = job.ranks.broadcast(found)
    assert filled is not None
    return filled


def _found(
    job: Job,
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

    return fill(state, rules, budget - code, measure, grams=grams)
