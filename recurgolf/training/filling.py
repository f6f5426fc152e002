"""quant.fill_budget in a run: the search of `quant/fill.py` over files that are really packed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from recurgolf.artifact import pack_bytes
from recurgolf.artifact.code import codes_of
from recurgolf.data import Dataset
from recurgolf.log import Log
from recurgolf.plan import check_budget
from recurgolf.quant import TensorRule, quantize_state
from recurgolf.quant.fill import Filled, Rules, fill
from recurgolf.run import Run
from recurgolf.training.clock import Clock
from recurgolf.training.distributed import Ranks
from recurgolf.training.packing import metadata


def fill_rules(
    run: Run,
    state: Mapping[str, Tensor],
    rules: Mapping[str, TensorRule],
    grams: Mapping[str, Tensor],
    dataset: Dataset,
    ranks: Ranks,
    clock: Clock,
    log: Log,
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
    if ranks.is_first:
        with clock.phase("quantization"), torch.no_grad():
            log.line("choosing bits and clips that fill the budget ...")
            found = _found(run, state, rules, grams, dataset)
            for line in found.render():
                log.line(line)
    filled = ranks.decided(found)
    assert filled is not None
    return filled


def _found(
    run: Run,
    state: Mapping[str, Tensor],
    rules: Mapping[str, TensorRule],
    grams: Mapping[str, Tensor],
    dataset: Dataset,
) -> Filled:
    code = codes_of(run).counted.packed_bytes
    check_budget(code, run.budget.artifact_bytes)
    header = metadata(run, dataset)

    def measure(candidate: Rules) -> int:
        stored = quantize_state(state, candidate, grams)
        return len(pack_bytes(header, stored, run.artifact.codec)[0])

    return fill(state, rules, run.budget.artifact_bytes - code, measure, grams=grams)
