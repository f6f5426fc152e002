"""Looping schedules: which blocks a forward pass visits, and in which order.

A schedule is a pure function `plan(fraction) -> LoopPlan` of training progress, so all ranks and
all reruns agree. A plan is hashable: compiled graphs are keyed by it, and it numbers the visits of
every block, which indexes per-iteration adapters and per-visit scales. The model sees plans and
knows nothing of schedules.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, NamedTuple

from recurgolf.config import Checked, ConfigError, kind_of, option
from recurgolf.limits import at_least


class Visit(NamedTuple):
    """One application of a block: `nth` is 0 on the block's first visit, 1 on its second, ..."""

    block: int
    nth: int


@dataclass(frozen=True)
class LoopPlan:
    """The visits of one forward pass.

    Attributes:
        blocks: block index of every visit, in order.
        core: half-open range of visit positions that form the recurrent core; before it comes the
            prelude, after it the coda. `(n, n)` if nothing repeats.
        grad_from: position of the first visit that gradients reach; earlier visits run without
            a graph (truncated backpropagation through depth).
    """

    blocks: tuple[int, ...]
    core: tuple[int, int]
    grad_from: int = 0

    @cached_property
    def visits(self) -> tuple[Visit, ...]:
        seen: dict[int, int] = {}
        visits = []
        for block in self.blocks:
            visits.append(Visit(block, seen.get(block, 0)))
            seen[block] = seen.get(block, 0) + 1
        return tuple(visits)

    @property
    def num_visits(self) -> int:
        return len(self.blocks)

    @property
    def looped_blocks(self) -> tuple[int, ...]:
        """Blocks of the core, ascending; empty if nothing repeats."""
        return tuple(sorted(set(self.blocks[self.core[0] : self.core[1]])))

    def describe(self) -> str:
        """`0 (1 2)x3 3`, for logs and `recurgolf plan`."""
        start, stop = self.core
        parts = [" ".join(map(str, self.blocks[:start]))]
        if stop > start:
            core = self.blocks[start:stop]
            period = len(set(core))
            parts.append(f"({' '.join(map(str, core[:period]))})x{len(core) // period}")
        parts.append(" ".join(map(str, self.blocks[stop:])))
        return " ".join(part for part in parts if part)


@dataclass
class Looping(Checked):
    """A schedule of plans over `num_blocks` blocks."""

    def check(self, num_blocks: int) -> None:
        """Refuse a band of blocks that the model does not have."""

    def plan(self, num_blocks: int, fraction: float = 1.0) -> LoopPlan:
        """The plan at `fraction` of training: 0 at the start, 1 at the end."""
        raise NotImplementedError

    def eval_plan(self, num_blocks: int, passes: int | None = None) -> LoopPlan:
        """The plan for scoring: by default the one that training ends with.

        Args:
            passes: number of passes through the looped blocks, instead of the configured one.
                A schedule must honor it or raise; `check_passes` enforces that.

        Raises:
            ConfigError: this schedule cannot do that many passes.
        """
        trained = self.passes_of(num_blocks)
        if passes not in (None, trained):
            raise ConfigError(
                f"eval passes={passes} asked for, but looping={kind_of(self)} has {trained} and "
                "nothing else; choose another looping option"
            )
        return self.plan(num_blocks)

    def check_passes(self, num_blocks: int, asked: Iterable[int]) -> None:
        """Refuse numbers of passes that the schedule cannot do, and schedules that ignore `passes`.

        With the latter, every number of passes would report the score of the same plan.
        """
        for passes in asked:
            self.eval_plan(num_blocks, passes)
        for passes in sorted({2, *asked} - {1}):
            try:
                fewer, more = (self.eval_plan(num_blocks, n) for n in (passes - 1, passes))
            except ConfigError:
                continue
            if fewer == more:
                raise ConfigError(
                    f"looping={kind_of(self)} plans the same visits for {passes - 1} and for "
                    f"{passes} passes ({more.describe()}): its eval_plan must heed `passes`, or "
                    "raise a ConfigError for numbers that it cannot do"
                )

    def all_plans(self, num_blocks: int) -> list[LoopPlan]:
        """Every plan that training goes through, in order: what warm-up has to compile."""
        plans: dict[LoopPlan, None] = {}
        for permille in range(1001):
            plans.setdefault(self.plan(num_blocks, permille / 1000))
        return list(plans)

    def passes_of(self, num_blocks: int) -> int:
        """The most visits to one block in training."""
        return max(visit.nth + 1 for visit in self.plan(num_blocks, 1.0).visits)

    def largest_plan(self, num_blocks: int) -> LoopPlan:
        """The plan with the most visits, in training or scoring: it sizes per-visit parameters."""
        plans = [*self.all_plans(num_blocks), self.eval_plan(num_blocks)]
        return max(plans, key=lambda plan: plan.num_visits)


@option("looping", "none")
@dataclass
class NoLooping(Looping):
    """No recurrence: every block once."""

    def plan(self, num_blocks: int, fraction: float = 1.0) -> LoopPlan:
        return LoopPlan(tuple(range(num_blocks)), (num_blocks, num_blocks))


@dataclass
class _Repeat(Looping):
    """Repeats a contiguous band of blocks, which subclasses define."""

    passes: Annotated[int, at_least(1)] = 2
    """Passes through the band in training."""
    passes_eval: Annotated[int | None, at_least(1)] = None
    """Passes in scoring; null: as in training."""
    start_fraction: Annotated[float, at_least(0, at_most=1)] = 0.0
    """Fraction of training at which looping starts; before it, every block runs once."""
    ramp_fraction: Annotated[float, at_least(0, at_most=1)] = 0.0
    """Fraction of training, from the start of looping, over which passes grow one by one."""
    backprop_passes: Annotated[int | None, at_least(1)] = None
    """Backpropagate through this many last passes only; null: through all."""

    def band(self, num_blocks: int) -> tuple[int, int]:
        """First block of the band, and the first one after it."""
        raise NotImplementedError

    def passes_at(self, fraction: float) -> int:
        if fraction < self.start_fraction:
            return 1
        if self.ramp_fraction == 0 or self.passes == 1:
            return self.passes
        grown = (fraction - self.start_fraction) / self.ramp_fraction
        return min(2 + int(grown * (self.passes - 1)), self.passes)

    def plan(self, num_blocks: int, fraction: float = 1.0) -> LoopPlan:
        return self._unrolled(num_blocks, self.passes_at(fraction))

    def eval_plan(self, num_blocks: int, passes: int | None = None) -> LoopPlan:
        if passes is not None and passes < 1:
            raise ConfigError(f"eval passes={passes}: at least 1")
        return self._unrolled(num_blocks, passes or self.passes_eval or self.passes)

    def _unrolled(self, num_blocks: int, passes: int) -> LoopPlan:
        start, stop = self.band(num_blocks)
        width = stop - start
        blocks = (*range(start), *(tuple(range(start, stop)) * passes), *range(stop, num_blocks))
        kept = min(self.backprop_passes or passes, passes)
        return LoopPlan(
            blocks,
            core=(start, start + width * passes),
            grad_from=0 if kept == passes else start + width * (passes - kept),
        )


@option("looping", "segment")
@dataclass
class SegmentLooping(_Repeat):
    """Repeats a band of blocks in the middle (as the public golf records do)."""

    start: int = 1
    """First block of the band."""
    end: int = 1
    """Last block of the band, inclusive."""

    def check(self, num_blocks: int) -> None:
        if not 0 <= self.start <= self.end < num_blocks:
            raise ConfigError(
                f"looping.start={self.start} to looping.end={self.end} is not a range of the "
                f"model's {num_blocks} blocks (0 to {num_blocks - 1})"
            )

    def band(self, num_blocks: int) -> tuple[int, int]:
        return self.start, self.end + 1


@option("looping", "cycle")
@dataclass
class CycleLooping(_Repeat):
    """Runs the whole stack `passes` times (Universal Transformer, 1807.03819)."""

    def band(self, num_blocks: int) -> tuple[int, int]:
        return 0, num_blocks


@option("looping", "prelude_core_coda")
@dataclass
class PreludeCoreCoda(_Repeat):
    """`prelude` blocks once, the core repeatedly, `coda` blocks once (Huginn, 2502.05171)."""

    prelude: Annotated[int, at_least(0)] = 1
    """Blocks in front of the core, once each."""
    coda: Annotated[int, at_least(0)] = 1
    """Blocks behind the core, once each."""

    def check(self, num_blocks: int) -> None:
        if self.prelude + self.coda >= num_blocks:
            raise ConfigError(
                f"looping.prelude={self.prelude} + looping.coda={self.coda} leaves no core in a "
                f"model of {num_blocks} blocks: together at most {num_blocks - 1}"
            )

    def band(self, num_blocks: int) -> tuple[int, int]:
        return self.prelude, num_blocks - self.coda
