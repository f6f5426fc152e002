"""Times taken in turns, and ratios of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping


def interleaved(
    sides: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, float]:
    """Median milliseconds of each side, taken in turns so that a busy machine hits both alike."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + warmup):
        for name, step in sides.items():
            began = time.perf_counter()
            step()
            if turn >= warmup:
                times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def show_ratio(what: str, times: dict[str, float], over: str, under: str, limit: float) -> None:
    ratio = times[over] / times[under]
    for name, value in times.items():
        print(f"  {name:<28}{value:9.2f} ms")
    print(f"{what}: {ratio:.3f} (at most {limit})\n")
