"""How many bits a code costs, by the codes that a tensor has now: the rate models of `rate.py`.

A model turns counts of the codes -127 to 127, of any number of tensors, into tables of bits. Scales
follow from the counts, so that nothing here is a parameter: at the best scale the bits do not
change with it (envelope theorem), and their gradient is that of the codes alone.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from recurgolf.config import option

LIMIT = 127
CODES = 2 * LIMIT + 1


def _codes(like: Tensor) -> Tensor:
    return torch.arange(-LIMIT, LIMIT + 1, dtype=like.dtype, device=like.device)


def _share(counts: Tensor) -> Tensor:
    return counts / counts.sum(-1, keepdim=True).clamp_min(1)


def _mean_magnitude(counts: Tensor) -> Tensor:
    return (_share(counts) * _codes(counts).abs()).sum(-1, keepdim=True)


PRIOR = 0.02
"""Weight of the Laplace curve beside a histogram, for codes that did not come."""


class RateModel:
    """Counts of codes -> bits of codes."""

    def table(self, counts: Tensor) -> Tensor:
        """Bits [..., 255] of every code from -127 to 127; counts [..., 255] float64."""
        raise NotImplementedError


@option("quant/rate_model", "histogram")
class Histogram(RateModel):
    """How often each code came, both signs together, blended with a Laplace curve: what a coder
    with a table per tensor takes (soft histograms: parameter-golf #1805)."""

    def table(self, counts: Tensor) -> Tensor:
        both = (counts + counts.flip(-1)) / 2
        blend = (1 - PRIOR) * _share(both) + PRIOR * Laplace().table(counts).neg().exp2()
        return -blend.log2()


class _Curve(RateModel):
    """A distribution of one scale, integrated over the cell of every code."""

    def below(self, edges: Tensor) -> Tensor:
        """Its cumulative distribution function at scale 1."""
        raise NotImplementedError

    def scale(self, counts: Tensor) -> Tensor:
        """The scales [..., 1], in steps."""
        raise NotImplementedError

    def table(self, counts: Tensor) -> Tensor:
        edges = _codes(counts)[:-1] + 0.5
        ends = F.pad(self.below(edges / self.scale(counts)), (1, 0))
        ends = F.pad(ends, (0, 1), value=1.0)
        # Differences of numbers close to 1 lose their digits: the upper half mirrors the lower.
        cells = ends.diff()
        cells[..., LIMIT + 1 :] = cells[..., :LIMIT].flip(-1)
        return -cells.clamp_min(2.0**-40).log2()


@option("quant/rate_model", "laplace")
class Laplace(_Curve):
    """Two-sided exponential: bits grow with |code|, its rate is an L1 norm in units of the step."""

    def below(self, edges: Tensor) -> Tensor:
        tail = 0.5 * edges.abs().neg().exp()
        return torch.where(edges < 0, tail, 1 - tail)

    def scale(self, counts: Tensor) -> Tensor:
        # sinh(1 / 2b) = 1 / (2 mean) for rounded Laplace numbers.
        return 0.5 / (0.5 / _mean_magnitude(counts).clamp_min(1e-3)).asinh()


@option("quant/rate_model", "logistic")
class Logistic(_Curve):
    """Discretized logistic: round at the top, straight tails."""

    def below(self, edges: Tensor) -> Tensor:
        return torch.sigmoid(edges)

    def scale(self, counts: Tensor) -> Tensor:
        return _mean_magnitude(counts).clamp_min(0.05) / (2 * math.log(2))


@option("quant/rate_model", "gaussian")
class Gaussian(_Curve):
    """Normal: what a coder without tables would assume; large codes are dear."""

    def below(self, edges: Tensor) -> Tensor:
        return torch.special.ndtr(edges)

    def scale(self, counts: Tensor) -> Tensor:
        square = (_share(counts) * _codes(counts).square()).sum(-1, keepdim=True)
        return square.clamp_min(0.02).sqrt()


__all__ = ["CODES", "LIMIT", "Gaussian", "Histogram", "Laplace", "Logistic", "RateModel"]
