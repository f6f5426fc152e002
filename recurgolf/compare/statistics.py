"""Is one setting better than another? Tests over seeds and over documents, done by scipy.

The question is always the same: is the candidate's loss lower than the baseline's by more than a
margin? The challenge's rule is a margin of 0.005 nats per token at p < 0.01 (one-sided). `gain` is
baseline minus candidate throughout, so that a gain above zero means that the candidate is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

MARGIN_NATS = 0.005
"""The challenge's margin, in nats per token."""
CONFIDENCE = 0.95
"""Of the intervals."""
POWER = 0.8
"""Probability of a decision that `seeds_needed` aims at."""
MOST_SEEDS = 1000
"""A search for the number of seeds ends here."""


@dataclass(frozen=True)
class Test:
    """One test of `gain > margin`, and of its mirror images.

    Attributes:
        n: values of candidate and baseline; for a paired test the number of pairs, twice.
        gain: estimate of baseline - candidate.
        t, df: of `gain > margin`; None for the bootstrap.
        p_better: probability of such a gain or a larger one, were the true gain just `margin`.
        p_worse: the same for a loss beyond the margin (`gain < -margin`).
        p_level: of `|gain| < margin` by two one-sided tests; 1 without a margin.
        interval: confidence interval of the gain, two-sided.
    """

    method: str
    n: tuple[int, int]
    gain: float
    t: float | None
    df: float | None
    p_better: float
    p_worse: float
    p_level: float
    interval: tuple[float, float]
    confidence: float = CONFIDENCE


def margin_bpb(tokens: int, num_bytes: int, nats: float = MARGIN_NATS) -> float:
    """A margin in nats per token as bits per byte, for the text at hand."""
    return nats / math.log(2) * tokens / num_bytes


def welch(candidate: Sequence[float], baseline: Sequence[float], margin: float) -> Test | None:
    """Welch's t-test of two independent samples; None where they cannot be tested.

    That is with fewer than two values on a side, or without any variation on either.
    """
    a, b = np.asarray(candidate, float), np.asarray(baseline, float)
    if min(len(a), len(b)) < 2 or (np.ptp(a) == 0 and np.ptp(b) == 0):
        return None

    def test(shift: float, alternative: str) -> Any:
        return stats.ttest_ind(b - shift, a, equal_var=False, alternative=alternative)

    return _t_test("welch", (len(a), len(b)), float(b.mean() - a.mean()), test, margin)


def paired(candidate: Sequence[float], baseline: Sequence[float], margin: float) -> Test | None:
    """The t-test of pairs (same seed, same order); None as in `welch`."""
    gains = np.asarray(baseline, float) - np.asarray(candidate, float)
    if len(gains) < 2 or np.ptp(gains) == 0:
        return None

    def test(shift: float, alternative: str) -> Any:
        return stats.ttest_1samp(gains, shift, alternative=alternative)

    n = (len(gains), len(gains))
    return _t_test("paired", n, float(gains.mean()), test, margin)


def _t_test(
    method: str, n: tuple[int, int], gain: float, test: Callable[[float, str], Any], margin: float
) -> Test:
    """All questions put to one t-test: (shift, alternative) -> scipy's result for gain - shift."""
    beyond = test(margin, "greater")
    interval = test(0.0, "two-sided").confidence_interval(CONFIDENCE)
    within = (test(-margin, "greater").pvalue, test(margin, "less").pvalue)
    return Test(
        method=method,
        n=n,
        gain=gain,
        t=float(beyond.statistic),
        df=float(beyond.df),
        p_better=float(beyond.pvalue),
        p_worse=float(test(-margin, "less").pvalue),
        p_level=float(max(within)) if margin else 1.0,
        interval=(float(interval.low), float(interval.high)),
    )


def over_documents(
    candidate: np.ndarray,
    baseline: np.ndarray,
    num_bytes: np.ndarray,
    margin: float,
    resamples: int = 9999,
) -> Test | None:
    """Paired bootstrap over documents: would the gain hold on other documents of this kind?

    It says nothing about other seeds. None with fewer than two documents that have bytes.

    Args:
        candidate, baseline: nats per document [n], means over the seeds of a setting.
        num_bytes: bytes per document [n].
        margin: in bits per byte.
        resamples: draws; the chance in them is fixed.
    """
    kept = num_bytes > 0
    gains, sizes = (baseline - candidate)[kept], num_bytes[kept].astype(float)
    if len(gains) < 2:
        return None

    def ratio(nats: np.ndarray, divisor: np.ndarray, axis: int = -1) -> np.ndarray:
        return nats.sum(axis) / (math.log(2) * divisor.sum(axis))

    found = stats.bootstrap(
        (gains, sizes),
        ratio,
        paired=True,
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 5_000_000 // len(gains)),
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    draws, gain = found.bootstrap_distribution, float(ratio(gains, sizes))

    def share(exceeding: np.ndarray) -> float:
        # One more than counted: no bootstrap proves a probability of zero.
        return float((1 + np.count_nonzero(exceeding)) / (1 + len(draws)))

    # Draws scatter around the estimate as estimates scatter around the truth.
    above, below = share(draws <= margin), share(draws >= -margin)
    return Test(
        method="documents",
        n=(len(gains), len(gains)),
        gain=gain,
        t=None,
        df=None,
        p_better=above,
        p_worse=below,
        p_level=max(share(draws <= -margin), share(draws >= margin)) if margin else 1.0,
        interval=(float(found.confidence_interval.low), float(found.confidence_interval.high)),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values of several questions asked at once, raised so that together they err as one would.

    Holm, "A simple sequentially rejective multiple test procedure" (1979).
    """
    order = np.argsort(p_values)
    raised, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        raised[index] = largest
    return raised


def seeds_needed(
    gain: float,
    deviations: tuple[float, float],
    margin: float,
    alpha: float,
) -> int | None:
    """Seeds per side with which Welch's test would most likely decide, were the estimates true.

    Whichever of the questions (beyond the margin, beyond it the other way, within it) has the
    answer yes is asked. None where more than `MOST_SEEDS` would be needed.
    """
    distance = abs(abs(gain) - margin)
    # Within the margin both of its ends have to be excluded.
    inner = margin - abs(gain) if abs(gain) < margin else None
    for n in range(2, MOST_SEEDS + 1):
        a, b = (d * d / n for d in deviations)
        error = math.sqrt(a + b)
        if error == 0:
            return 2
        df = (a + b) ** 2 / ((a * a + b * b) / (n - 1))
        critical = stats.t.ppf(1 - alpha, df)
        if inner is None:
            reached = float(stats.nct.sf(critical, df, distance / error))
        else:
            far = (margin + abs(gain)) / error
            misses = stats.nct.cdf(critical, df, inner / error) + stats.nct.cdf(critical, df, far)
            reached = 1 - float(misses)
        if reached >= POWER:
            return n
    return None
