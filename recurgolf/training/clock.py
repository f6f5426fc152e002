"""One ledger of clocks: how long each phase of a run took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

PHASES = ("setup", "warmup", "training", "validation", "quantization", "packing", "evaluation")


class Clock:
    """Seconds per phase. Phases do not nest: entering one pauses the one around it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._running: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time spent inside to `name`."""
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

    def state_dict(self) -> dict[str, float]:
        return {name: self.elapsed(name) for name in self.seconds}

    def load_state_dict(self, seconds: dict[str, float]) -> None:
        self.seconds.update(seconds)
