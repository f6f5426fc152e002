"""The flat control of a looped run: no loop and no adapters, at equal bytes, FLOPs or seconds.

A loop is worth what it gains over the network that spends the same differently. Every control has
the looped run's bytes, which wider MLPs take up; at equal FLOPs or seconds it trains for more steps
as well.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from recurgolf.config import ConfigError, suggestion
from recurgolf.looping import LoopPlan
from recurgolf.optim import build as build_optimizers
from recurgolf.plan import flops_per_token, make_plan, packed_shapes, predicted_lines, shapes_of
from recurgolf.run import Run
from recurgolf.training.precision import autocast, resolve_precision

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
    match: str
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

    Raises:
        ConfigError: nothing loops, or no control comes within 1 %.
    """
    if match not in MATCHES:
        raise ConfigError(f"{KEY}={match!r}{suggestion(match, MATCHES)}")
    looped = compose(overrides)
    if looped.plan(1.0).num_visits <= looped.model.num_blocks and looped.lora.rank == 0:
        raise ConfigError(f"{looped.name} loops nothing: it is its own flat control")
    if looped.quant.fill_budget:
        raise ConfigError("quant.fill_budget=true makes every file as large as the budget")
    kept = [one for one in overrides if _group(one) not in ("looping", "lora", "name")]
    own = [*kept, "looping=none", "lora=none", f"name={looped.name}_flat"]
    if getattr(looped.quant.qat, "blocks", None) == "looped":
        # What is trained to bear rounding stays the same blocks; here none of them loops.
        own = [one for one in own if not one.startswith("quant.qat.blocks=")]
        own.append("quant.qat.blocks=all")
    flat = compose(own)
    widened, found = _widened(flat, make_plan(looped).total_bytes)
    own = [one for one in own if not one.startswith("model.mlp_mult=")]
    own.append(f"model.mlp_mult={widened.model.mlp_mult!r}")
    if match == "bytes":
        return _checked(Control(own, match, make_plan(looped).total_bytes, found))
    cost = MATCHES[match]
    wanted, one = cost(looped, widened)
    steps = max(1, round(wanted * looped.trainer.steps / one))
    own = [override for override in own if not override.startswith("trainer.steps=")]
    own.append(f"trainer.steps={steps}")
    return _checked(Control(own, match, wanted * looped.trainer.steps, one * steps))


def _checked(control: Control) -> Control:
    if abs(control.ratio - 1) > TOLERANCE:
        raise ConfigError(
            f"no flat control within {TOLERANCE:.0%}: {control.found:,.0f} against "
            f"{control.wanted:,.0f} {control.match} at {' '.join(control.overrides)}"
        )
    return control


def _group(override: str) -> str:
    return override.lstrip("+~").partition("=")[0].partition(".")[0].partition("/")[0]


def _widened(flat: Run, wanted: int) -> tuple[Run, int]:
    """The flat run whose MLPs are so wide that its bytes come nearest to those wanted."""
    code = make_plan(flat).code_bytes
    dim = flat.model.dim

    def with_width(width: int) -> Run:
        # The upper half of the last unit, so that rounding down gives this very width.
        return replace(flat, model=replace(flat.model, mlp_mult=round((width + 0.5) / dim, 6)))

    def total(width: int) -> int:
        run = with_width(width)
        return code + round(
            sum(line.predicted for line in predicted_lines(run, packed_shapes(shapes_of(run))))
        )

    narrow, wide = 1, max(2, int(flat.model.mlp_mult * dim))
    while total(wide) < wanted and wide < 64 * dim:
        narrow, wide = wide, 2 * wide
    while wide - narrow > 1:
        middle = (narrow + wide) // 2
        narrow, wide = (middle, wide) if total(middle) < wanted else (narrow, middle)
    best = min((narrow, wide), key=lambda width: abs(total(width) - wanted))
    return with_width(best), total(best)


def _plan_shares(run: Run) -> dict[LoopPlan, float]:
    """Every plan of a training, and its share of the steps."""
    counts = Counter(run.plan((i + 0.5) / _FRACTIONS) for i in range(_FRACTIONS))
    return {plan: count / _FRACTIONS for plan, count in counts.items()}


def _flops(looped: Run, flat: Run) -> tuple[float, float]:
    """FLOPs of one mean step of both."""
    first, second = (
        run.trainer.batch_tokens
        * sum(share * flops_per_token(run, plan) for plan, share in _plan_shares(run).items())
        for run in (looped, flat)
    )
    return first, second


def _seconds(looped: Run, flat: Run) -> tuple[float, float]:
    """Seconds of one mean step of both on this machine, timed in turns."""
    steps = [_steps_of(run) for run in (looped, flat)]
    taken: dict[tuple[int, LoopPlan], list[float]] = {}
    for number in range(_ROUNDS + 1):
        for which, (step, shares) in enumerate(steps):
            for plan in shares:
                began = time.perf_counter()
                step(plan)
                # The first of each warms up.
                if number:
                    taken.setdefault((which, plan), []).append(time.perf_counter() - began)
    first, second = (
        sum(share * statistics.median(taken[which, plan]) for plan, share in shares.items())
        for which, (_, shares) in enumerate(steps)
    )
    return first, second


def _steps_of(run: Run) -> tuple[Callable[[LoopPlan], None], dict[LoopPlan, float]]:
    """A training step on random tokens as one rank would take it, and the plans it takes."""
    device = torch.device(run.trainer.device)
    if run.trainer.threads:
        torch.set_num_threads(run.trainer.threads)
    precision = resolve_precision(run.trainer.precision, device)
    model = run.build_model().to(device).train()
    optimizers = build_optimizers(
        run.optimizer,
        model,
        passes=run.looping.passes_of(run.model.num_blocks),
        looped_blocks=run.largest_plan.looped_blocks,
    )
    micro = run.trainer.batch_tokens // (run.trainer.devices * run.trainer.grad_accum)
    shape = (max(1, micro // run.trainer.seq_len), run.trainer.seq_len)
    ids = torch.randint(run.model.vocab_size, shape, device=device)

    def step(plan: LoopPlan) -> None:
        for _ in range(run.trainer.grad_accum):
            with autocast(precision, device):
                loss = model(ids, plan, ids)
            loss.backward()
        optimizers.clip_gradients()
        optimizers.step(0.0, run.optimizer.momentum_at(0), 1.0)
        optimizers.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return step, _plan_shares(run)


MATCHES: dict[str, Callable[[Run, Run], tuple[float, float]]] = {
    "bytes": lambda looped, flat: (1.0, 1.0),
    "flops": _flops,
    "seconds": _seconds,
}
"""What to hold equal -> its amount in one step of the looped run and of the control."""

__all__ = ["KEY", "MATCHES", "TOLERANCE", "Control", "flat_control"]
