"""Learning-rate schedules: the factor on every group's rate, a pure function of progress.

Rank 0 evaluates it and hands the number round, so that ranks with different clocks agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from recurgolf.config import Checked, option
from recurgolf.limits import at_least


def training_fraction(
    step: int, total_steps: int, elapsed_seconds: float = 0.0, max_seconds: float | None = None
) -> float:
    """Share of training done: of the time where there is a limit, of the steps otherwise."""
    if max_seconds:
        return elapsed_seconds / max_seconds
    return step / max(total_steps, 1)


@option("optimizer/schedule", "constant")
@dataclass
class Schedule(Checked):
    """A linear warm-up, then 1. The other schedules add what happens at the end."""

    warmup_steps: Annotated[int, at_least(0)] = 0
    """Steps over which the rate grows linearly from 1/n; 0: none."""

    def lr_scale(
        self,
        step: int,
        total_steps: int,
        elapsed_seconds: float = 0.0,
        max_seconds: float | None = None,
    ) -> float:
        """The factor for the step after `step` finished ones.

        Args:
            total_steps: steps of the whole run if nothing stops it earlier.
            elapsed_seconds: training time so far.
            max_seconds: the limit on it, reserves already taken off; None: no limit, and the
                factor depends on steps alone.
        """
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        return warm * self.warmdown(step, total_steps, elapsed_seconds, max_seconds)

    def warmdown(
        self, step: int, total_steps: int, elapsed_seconds: float, max_seconds: float | None
    ) -> float:
        """The factor without the warm-up."""
        return 1.0


@option("optimizer/schedule", "steps")
@dataclass
class StepsSchedule(Schedule):
    """Falls linearly towards 0 over the last steps; a clock has no influence."""

    warmdown_steps: Annotated[int, at_least(0)] = 1200
    """Steps that the fall takes."""
    min_lr: Annotated[float, at_least(0)] = 0.0
    """The factor does not fall below this."""

    def warmdown(
        self, step: int, total_steps: int, elapsed_seconds: float, max_seconds: float | None
    ) -> float:
        left = max(total_steps - step, 0)
        if left >= self.warmdown_steps:
            return 1.0
        return max(left / self.warmdown_steps, self.min_lr)


@option("optimizer/schedule", "fraction")
@dataclass
class FractionSchedule(Schedule):
    """Falls linearly towards 0 over the last share of training, in time or else in steps."""

    warmdown_fraction: Annotated[float, at_least(0)] = 0.72
    """Share of training that the fall takes."""
    min_lr: Annotated[float, at_least(0)] = 0.0
    """The factor does not fall below this."""

    def warmdown(
        self, step: int, total_steps: int, elapsed_seconds: float, max_seconds: float | None
    ) -> float:
        fraction = training_fraction(step, total_steps, elapsed_seconds, max_seconds)
        if self.warmdown_fraction == 0 or fraction < 1 - self.warmdown_fraction:
            return 1.0
        return max((1 - fraction) / self.warmdown_fraction, self.min_lr)


@option("optimizer/schedule", "wallclock")
@dataclass
class WallclockSchedule(Schedule):
    """The official baseline's: falls to 0 over the time that `warmdown_steps` steps will take.

    A step is taken to last as long as the mean so far. Where fewer steps fit into the limit than
    `warmdown_steps`, the factor falls from the start. Without a limit it falls over the last steps
    of the run.
    """

    warmdown_steps: Annotated[int, at_least(0)] = 1200
    """The fall takes as long as so many steps."""

    def warmdown(
        self, step: int, total_steps: int, elapsed_seconds: float, max_seconds: float | None
    ) -> float:
        if self.warmdown_steps == 0:
            return 1.0
        if max_seconds:
            left = max(max_seconds - elapsed_seconds, 0.0)
            needed = self.warmdown_steps * elapsed_seconds / max(step, 1)
            return left / max(needed, 1e-12) if left <= needed else 1.0
        if max(total_steps - self.warmdown_steps, 0) <= step < total_steps:
            return (total_steps - step) / self.warmdown_steps
        return 1.0
