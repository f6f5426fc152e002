"""quant.tolerance in a run: steps that were tuned on one network, made to fit the one at hand."""

from __future__ import annotations

import math

from recurgolf.quant.fill import Rules, finer
from recurgolf.training.probe import Probe, by_the_first

TRIES = 6
FINEST = 2.0**-6
"""The smallest share: finer than the finest step from any that rules may say."""


def step_share(probe: Probe, rules: Rules, tolerance: float) -> float:
    """The share of the rules' steps at which packing costs at most `tolerance` bits per byte.

    1 where the rules' own steps do, and as small as the budget allows where it has too little room.
    The cost is the KL divergence of predictions on the calibration's text with every matrix
    quantized, which grows with the square of the steps. The same on every rank.
    """
    return by_the_first(probe.job, lambda: _found(probe, rules, tolerance))


def _found(probe: Probe, rules: Rules, tolerance: float) -> float:
    if finer(rules, FINEST) == rules:
        return 1.0
    job = probe.job
    bits_per_byte = job.text.num_targets / job.dataset.val_bytes / math.log(2)
    room = job.run.budget.artifact_bytes - job.plan.code_bytes
    matrices = {name: rule for name, rule in rules.items() if rule.grid is not None}

    def cost(share: float) -> float:
        return probe.damage(finer(matrices, share)) * bits_per_byte

    def fits(share: float) -> bool:
        return probe.size(finer(rules, share)) <= room

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
