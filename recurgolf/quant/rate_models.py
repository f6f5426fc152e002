"""How many bits a code costs, by the codes that a tensor has now: the rate models of `rate.py`.

A model turns counts of the codes -127 to 127 into a table of bits. Scales have closed forms or are
found on the counts, so that nothing here is a parameter: at the best scale the bits do not change
with it (envelope theorem), and their gradient is that of the codes alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from recurgolf.config import option

LIMIT = 127
CODES = 2 * LIMIT + 1
_PLACES = torch.arange(-LIMIT, LIMIT + 1, dtype=torch.float64)
_EDGES = torch.arange(-LIMIT, LIMIT, dtype=torch.float64) + 0.5


PRIOR = 0.02
"""Weight of the Laplace curve beside a histogram, for codes that did not come."""


class RateModel:
    """Counts of codes -> bits of codes."""

    def table(self, counts: Tensor) -> Tensor:
        """Bits [255] float64 of every code from -127 to 127; counts [255]."""
        raise NotImplementedError


@option("quant/rate_model", "histogram")
class Histogram(RateModel):
    """How often each code came, both signs together, blended with a Laplace curve: what a coder
    with a table per tensor takes (soft histograms: parameter-golf #1805)."""

    def table(self, counts: Tensor) -> Tensor:
        both = (counts + counts.flip(0)) / 2
        share = both / both.sum().clamp_min(1)
        blend = (1 - PRIOR) * share + PRIOR * Laplace().table(counts).neg().exp2()
        return -blend.log2()


class _Curve(RateModel):
    """A distribution of one scale, integrated over the cell of every code."""

    def below(self, edges: Tensor) -> Tensor:
        """Its cumulative distribution function at scale 1."""
        raise NotImplementedError

    def scale(self, counts: Tensor) -> float:
        """The scale, in steps."""
        raise NotImplementedError

    def table(self, counts: Tensor) -> Tensor:
        cumulative = self.below(_EDGES / self.scale(counts))
        ends = torch.cat([cumulative.new_zeros(1), cumulative, cumulative.new_ones(1)])
        # Differences of numbers close to 1 lose their digits: the upper half mirrors the lower.
        cells = ends.diff()
        cells[LIMIT + 1 :] = cells[:LIMIT].flip(0)
        return -cells.clamp_min(2.0**-40).log2()


@option("quant/rate_model", "laplace")
class Laplace(_Curve):
    """Two-sided exponential: bits grow with |code|, its rate is an L1 norm in units of the step."""

    def below(self, edges: Tensor) -> Tensor:
        tail = 0.5 * edges.abs().neg().exp()
        return torch.where(edges < 0, tail, 1 - tail)

    def scale(self, counts: Tensor) -> float:
        # Of the geometric distribution of |code| >= 1: mean m gives a ratio of (m - 1) / m.
        share = counts / counts.sum().clamp_min(1)
        mean = float((share * _PLACES.abs()).sum())
        # sinh(1 / 2b) = 1 / (2 mean) for rounded Laplace numbers.
        return 0.5 / math.asinh(0.5 / max(mean, 1e-3))


@option("quant/rate_model", "logistic")
class Logistic(_Curve):
    """Discretized logistic: round at the top, straight tails."""

    def below(self, edges: Tensor) -> Tensor:
        return torch.sigmoid(edges)

    def scale(self, counts: Tensor) -> float:
        share = counts / counts.sum().clamp_min(1)
        mean = float((share * _PLACES.abs()).sum())
        return max(mean, 0.05) / (2 * math.log(2))


@option("quant/rate_model", "gaussian")
class Gaussian(_Curve):
    """Normal: what a coder without tables would assume; large codes are dear."""

    def below(self, edges: Tensor) -> Tensor:
        return torch.special.ndtr(edges)

    def scale(self, counts: Tensor) -> float:
        share = counts / counts.sum().clamp_min(1)
        return max(float((share * _PLACES.square()).sum()), 0.02) ** 0.5


__all__ = ["CODES", "LIMIT", "Gaussian", "Histogram", "Laplace", "Logistic", "RateModel"]
