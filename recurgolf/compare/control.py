"""The flat control of a looped run: no loop and no adapters, at equal bytes, FLOPs or seconds.

A loop is worth what it gains over the network that spends the same differently. Every control has
the looped run's bytes, which wider MLPs take up; at equal FLOPs or seconds it trains for more steps
as well.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recurgolf.config import ConfigError, suggestion
from recurgolf.log import Log
from recurgolf.looping import LoopPlan
from recurgolf.overrides import group_of
from recurgolf.plan import flops_per_token, make_plan, packed_shapes, predicted_lines, shapes_of
from recurgolf.run import Run
from recurgolf.tracker import NoTracking
from recurgolf.training.job import Job
from recurgolf.training.trainer import Trainer

KEY = "compare.match"
TOLERANCE = 0.01
"""How far a control may be from what it is to equal."""
_FRACTIONS = 200
"""Moments of training at which a schedule is asked for its plan."""
_ROUNDS = 5


@dataclass(frozen=True)
class Control:
    """A flat control as overrides, and how well it matches.

    Attributes:
        overrides: what to compose, in place of the looped run's own.
        wanted, found: the matched quantity of the looped run and of the control.
    """

    overrides: list[str]
    wanted: float
    found: float

    @property
    def ratio(self) -> float:
        return self.found / self.wanted


def flat_control(
    overrides: Sequence[str], match: str, compose: Callable[[Sequence[str]], Run]
) -> Control:
    """The control of what these overrides compose.

    Args:
        match: `bytes`, `flops` (of the whole training) or `seconds` (steps timed on this machine).
    """
    if match != "bytes" and match not in PER_STEP:
        raise ConfigError(f"{KEY}={match!r}{suggestion(match, ('bytes', *PER_STEP))}")
    looped = compose(overrides)
    if looped.plan(1.0).num_visits <= looped.model.num_blocks and looped.lora.rank == 0:
        raise ConfigError(f"{looped.name} loops nothing: it is its own flat control")
    if looped.quant.fill_budget:
        raise ConfigError("quant.fill_budget=true makes every file as large as the budget")
    # Of two values for one key the later one counts.
    own = [one for one in overrides if group_of(one) not in ("looping", "lora")]
    own += ["looping=none", "lora=none", f"name={looped.name}_flat"]
    if getattr(looped.quant.qat, "blocks", None) == "looped":
        # What is trained to bear rounding stays the same blocks; here none of them loops.
        own.append("quant.qat.blocks=all")
    flat = _widened(compose(own), make_plan(looped).total_bytes)
    own.append(f"model.mlp_mult={flat.model.mlp_mult!r}")
    wanted, found = make_plan(looped).total_bytes, make_plan(flat).total_bytes
    if match in PER_STEP:
        of_looped, of_flat = PER_STEP[match](looped, flat)
        wanted = of_looped * looped.trainer.steps
        steps = max(1, round(wanted / of_flat))
        found = of_flat * steps
        own.append(f"trainer.steps={steps}")
    control = Control(own, wanted, found)
    if abs(control.ratio - 1) > TOLERANCE:
        raise ConfigError(
            f"no flat control within {TOLERANCE:.0%}: {found:,.0f} against {wanted:,.0f} {match} "
            f"at {' '.join(own)}"
        )
    return control


def _widened(flat: Run, wanted: int) -> Run:
    """The flat run with MLPs so wide that its bytes come nearest to those wanted."""
    code = make_plan(flat).code_bytes
    dim = flat.model.dim

    def with_width(width: int) -> Run:
        # Half a unit more, so that rounding down gives this very width.
        return replace(flat, model=replace(flat.model, mlp_mult=round((width + 0.5) / dim, 6)))

    def total(width: int) -> float:
        run = with_width(width)
        lines = predicted_lines(run, packed_shapes(shapes_of(run)))
        return code + sum(line.predicted for line in lines)

    narrow, wide = 1, max(2, int(flat.model.mlp_mult * dim))
    while total(wide) < wanted and wide < 64 * dim:
        narrow, wide = wide, 2 * wide
    while wide - narrow > 1:
        middle = (narrow + wide) // 2
        narrow, wide = (middle, wide) if total(middle) < wanted else (narrow, middle)
    return with_width(min((narrow, wide), key=lambda width: abs(total(width) - wanted)))


def _plan_shares(run: Run) -> dict[LoopPlan, float]:
    """Every plan of a training, and its share of the steps."""
    counts = Counter(run.plan((i + 0.5) / _FRACTIONS) for i in range(_FRACTIONS))
    return {plan: count / _FRACTIONS for plan, count in counts.items()}


def _flops(looped: Run, flat: Run) -> list[float]:
    """FLOPs of one mean step of both."""
    return [
        run.trainer.batch_tokens
        * sum(share * flops_per_token(run, plan) for plan, share in _plan_shares(run).items())
        for run in (looped, flat)
    ]


def _seconds(looped: Run, flat: Run) -> list[float]:
    """Seconds of one mean step of both, as one rank takes it on this machine; timed in turns."""
    runs = (looped, flat)
    taken: dict[tuple[int, LoopPlan], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        trainers = [_trainer(run, Path(folder)) for run in runs]
        for turn in range(_ROUNDS + 1):
            for which, run in enumerate(runs):
                for plan in _plan_shares(run):
                    began = time.perf_counter()
                    # Its loss is read, which waits for a GPU.
                    trainers[which].train_step(plan, 1.0, 1.0)
                    # The first of each warms up.
                    if turn:
                        taken.setdefault((which, plan), []).append(time.perf_counter() - began)
        for trainer in trainers:
            trainer.job.tracker.finish()
    return [
        sum(share * statistics.median(taken[which, plan]) for plan, share in plans.items())
        for which, plans in enumerate(map(_plan_shares, runs))
    ]


def _trainer(run: Run, folder: Path) -> Trainer:
    """A trainer in this process with one rank's share of the batch, that says and keeps nothing."""
    config = run.trainer
    share = replace(config, devices=1, batch_tokens=config.batch_tokens // config.devices)
    alone = replace(run, trainer=share, tracker=NoTracking())
    trainer = Trainer(Job.watched(alone, folder, log=Log(None, console=False)))
    trainer.setup()
    return trainer


PER_STEP: dict[str, Callable[[Run, Run], list[float]]] = {
    "flops": _flops,
    "seconds": _seconds,
}
"""What to hold equal besides bytes -> its amount in one step of the looped run and the control."""
