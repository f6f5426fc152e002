"""One ledger of clocks: how long each phase of a run took, and what that means for its caps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from recurgolf.budget import PHASES, TRAINING, Budget


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
        """Seconds of a phase, the running stretch included."""
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

    def load_state_dict(self, seconds: dict[str, float]) -> None:
        self.seconds.update(seconds)

    def add(self, seconds: dict[str, float]) -> None:
        """Count what another process spent on the same run before this one."""
        for name, value in seconds.items():
            self.seconds[name] += value


class CapWatch:
    """Says, once for each cap, that a run is going to break it.

    Args:
        say: takes the line.
    """

    def __init__(self, budget: Budget, clock: Clock, say: Callable[[str], None]):
        self.budget, self.clock, self.say = budget, clock, say
        self._told: set[str] = set()

    def expect(self, phase: str, more_seconds: float, remedy: str) -> None:
        """Compare the caps that count a phase with what is spent and what is still to come."""
        for name, cap in self.budget.all_caps.items():
            if phase not in cap.phases or name in self._told or cap.seconds is None:
                continue
            spent = self.clock.total(cap.phases)
            if spent + more_seconds > cap.seconds:
                self._told.add(name)
                self.say(
                    f"{phase} will take about {spent + more_seconds:.0f} s by the time measured so "
                    f"far; the cap {name} is {cap.seconds:.0f} s ({' + '.join(cap.phases)}): "
                    f"{remedy}"
                )


def caps_used(budget: Budget, clock: Clock, step_seconds: float = 0.0) -> dict[str, dict[str, Any]]:
    """Cap -> its seconds, those used, the phases that count, and whether it was kept.

    Args:
        step_seconds: of a training step. Training ends with the step that reaches its cap, as in
            the official script, so so much more is still within it.
    """
    used = {}
    for name, cap in budget.all_caps.items():
        spent = clock.total(cap.phases)
        used[name] = {
            "seconds": cap.seconds,
            "used": round(spent, 3),
            "phases": list(cap.phases),
            "kept": cap.seconds is None
            or spent <= cap.seconds + (2 * step_seconds if name == TRAINING else 0.0),
        }
    return used


def cap_lines(caps: dict[str, dict[str, Any]]) -> list[str]:
    """A line of the result for every cap."""
    return [
        f"cap {name:<12}{cap['used']:.0f} of {cap['seconds']:.0f} s "
        f"({' + '.join(cap['phases'])}){'' if cap['kept'] else ': BROKEN'}"
        for name, cap in caps.items()
        if cap["seconds"] is not None
    ]


__all__ = ["CapWatch", "Clock", "cap_lines", "caps_used"]
