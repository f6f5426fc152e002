"""How long each phase of a run took, and what that means for the caps of its budget."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from recurgolf.budget import PHASES, TRAINING, Budget
from recurgolf.run import Run


class Clock:
    """Seconds per phase. Phases do not nest: entering one pauses the one around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._running: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent inside to `name`."""
        assert name in self.seconds, f"{name} is no phase; budget.py lists them"
        now = time.perf_counter()
        if self._running:
            outer, since = self._running[-1]
            self.seconds[outer] += now - since
        self._running.append((name, now))
        try:
            yield
        finally:
            now = time.perf_counter()
            name, since = self._running.pop()
            self.seconds[name] += now - since
            if self._running:
                outer, _ = self._running[-1]
                self._running[-1] = (outer, now)

    def elapsed(self, name: str) -> float:
        """Seconds of a phase, up to now if it is running."""
        seconds = self.seconds[name]
        if self._running and self._running[-1][0] == name:
            seconds += time.perf_counter() - self._running[-1][1]
        return seconds

    @property
    def running(self) -> str:
        """The innermost phase now; empty outside all."""
        return self._running[-1][0] if self._running else ""

    def total(self, names: Iterable[str]) -> float:
        """Seconds of several phases together."""
        return sum(self.elapsed(name) for name in names)

    def state_dict(self) -> dict[str, float]:
        return {name: self.elapsed(name) for name in self.seconds}

    def add(self, seconds: dict[str, float]) -> None:
        """Count what another process spent on the same run before this one."""
        for name, value in seconds.items():
            self.seconds[name] += value


class Caps:
    """The caps of a budget against the clock: a warning as soon as one will break, and the account.

    Args:
        say: takes a line.
    """

    def __init__(self, budget: Budget, clock: Clock, say: Callable[[str], None]):
        self.budget, self.clock, self.say = budget, clock, say
        self._warned: set[str] = set()
        self._foretold = False

    def warn(self, phase: str, more_seconds: float, remedy: str) -> None:
        """Say once for each cap that counts a phase if what is still to come will break it."""
        for name, cap in self.budget.all_caps.items():
            if phase not in cap.phases or name in self._warned or cap.seconds is None:
                continue
            expected = self.clock.total(cap.phases) + more_seconds
            if expected > cap.seconds:
                self._warned.add(name)
                self.say(
                    f"{phase} will take about {expected:.0f} s by the time measured so far; the "
                    f"cap {name} is {cap.seconds:.0f} s ({' + '.join(cap.phases)}): {remedy}"
                )

    def warn_of_training(self, run: Run, step: int, visits: int) -> None:
        """Say once how long training will take, and when the clock will end it early.

        The time of a step is taken to grow with its visits, so that a loop which starts late does
        not come as a surprise.

        Args:
            visits: in all steps so far.
        """
        config, cap = run.trainer, run.budget.max_train_seconds
        if config.progress == "wallclock" or step < min(10, config.steps):
            return
        left = range(step, config.steps, max(1, (config.steps - step) // 50))
        sampled = [run.plan(one / config.steps).num_visits for one in left]
        per_visit = self.clock.elapsed(TRAINING) / visits
        more = per_visit * sum(sampled) * (config.steps - step) / max(len(sampled), 1)
        minutes, seconds = divmod(round(self.clock.elapsed(TRAINING) + more), 60)
        if minutes and not self._foretold:
            self.say(f"about {minutes}:{seconds:02d} of training in all, at this speed")
        self._foretold = True
        if cap is None:
            return
        self.warn(
            TRAINING,
            more,
            f"it will end before step {config.steps}; lower trainer.steps, or "
            "let schedules follow the clock (trainer.progress=wallclock)",
        )

    def used(self, step_seconds: float = 0.0) -> dict[str, dict[str, Any]]:
        """Cap -> its seconds, those used, the phases that count, and whether it was kept.

        Args:
            step_seconds: of a training step. Training ends with the step that reaches its cap, as
                in the official script, so that much more still counts as kept.
        """
        used = {}
        for name, cap in self.budget.all_caps.items():
            spent = self.clock.total(cap.phases)
            allowed = 2 * step_seconds if name == TRAINING else 0.0
            used[name] = {
                "seconds": cap.seconds,
                "used": round(spent, 3),
                "phases": [p for p in cap.phases if p != "base" or self.clock.seconds[p]],
                "kept": cap.seconds is None or spent <= cap.seconds + allowed,
            }
        return used


__all__ = ["Caps", "Clock"]
