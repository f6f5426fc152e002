"""quant.fill_budget in a run: the search of `quant/fill.py` over files that are really packed."""

from __future__ import annotations

from recurgolf.plan import check_budget
from recurgolf.quant.fill import Filled, Rules, fill
from recurgolf.training.probe import Probe, by_the_first


def fill_rules(probe: Probe, rules: Rules) -> Filled:
    """The rules that fill what the code leaves of the budget; the same on every rank.

    Args:
        rules: of the run's configuration.

    Raises:
        ConfigError: the code alone exceeds the budget, or the coarsest choice still does.
    """
    return by_the_first(probe.job, lambda: _found(probe, rules))


def _found(probe: Probe, rules: Rules) -> Filled:
    job = probe.job
    code, budget = job.plan.code_bytes, job.run.budget.artifact_bytes
    job.log.line("choosing bits and clips that fill the budget ...")
    check_budget(code, budget)
    room = budget - code
    found = fill(probe.state, rules, room, probe.size, grams=probe.grams, damage=probe.damage)
    for line in found.render():
        job.log.line(line)
    return found
