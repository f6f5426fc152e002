"""Clip rules: the largest magnitude of a row that its codes still reach.

The clip decides the step (`clip / highest code`) and with it both the error and, after entropy
coding, the bytes: a wide clip is a coarse grid whose codes crowd around zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor

from recurgolf.config import Checked, option
from recurgolf.limits import above, at_least, not_empty

# torch.quantile refuses inputs of more than 16 million entries.
_QUANTILE_ENTRIES = 2**24
# Midpoints of equal slices of probability: how a random row's largest entry is spread.
_NODES = (np.arange(16) + 0.5) / 16


@dataclass
class Clip(Checked):
    """One clip value per row of a weight."""

    def clip_value(self, weight: Tensor, gram_diag: Tensor | None = None) -> Tensor:
        """Largest magnitude that the codes reach, float32 [rows], for a weight [rows, cols].

        Args:
            gram_diag: [cols], mean square of every input; only Hessian-aware rules look at it.
        """
        raise NotImplementedError

    def candidates(self, weight: Tensor, gram_diag: Tensor | None = None) -> list[Tensor]:
        """Clip values to try; the quantizer keeps those with the least squared error."""
        return [self.clip_value(weight, gram_diag)]

    def vector_value(self, values: Tensor) -> Tensor:
        """The clip, a scalar, of a tensor [n] that is no matrix and gets one scale."""
        return self.clip_value(values[None])[0]

    def limit(self, weight: Tensor, clip: Tensor) -> Tensor:
        """The weight as it is rounded; most rules let the highest code do the clipping."""
        return weight

    def limit_vector(self, values: Tensor) -> Tensor:
        """`limit` for a tensor [n] that is no matrix."""
        return values

    def ratios(self, cols: int, spread: Any) -> list[np.ndarray]:
        """Expected candidates in units of σ, each an array over equally likely rows.

        Args:
            spread: what the weights of a row follow, an `entropy.Spread`.
        """
        raise NotImplementedError


@option("quant/clip", "max")
@dataclass
class MaxClip(Clip):
    """The row's largest magnitude: nothing is clipped."""

    def clip_value(self, weight: Tensor, gram_diag: Tensor | None = None) -> Tensor:
        return weight.abs().amax(dim=1)

    def ratios(self, cols: int, spread: Any) -> list[np.ndarray]:
        return [_magnitude_quantiles(1.0, cols, spread)]


@option("quant/clip", "percentile")
@dataclass
class PercentileClip(Clip):
    """A percentile of the row's magnitudes (the official baseline: 99.99984)."""

    percentile: Annotated[float, above(0, at_most=100)] = 99.99984

    def clip_value(self, weight: Tensor, gram_diag: Tensor | None = None) -> Tensor:
        return _row_quantile(weight, self.percentile / 100.0)

    def limit(self, weight: Tensor, clip: Tensor) -> Tensor:
        # Of consequence only where a scale floor makes the highest code lie beyond the clip.
        return torch.clamp(weight, -clip[:, None], clip[:, None])

    def ratios(self, cols: int, spread: Any) -> list[np.ndarray]:
        return [_magnitude_quantiles(self.percentile / 100.0, cols, spread)]


@option("quant/clip", "sigma")
@dataclass
class SigmaClip(Clip):
    """k standard deviations of the row (SDClip); unbiased, as the public record's.

    With entropy coding k is the knob of size: at 6 bits about log2(31 / k * 4.13) bits a weight.
    """

    k: Annotated[float, above(0)] = 12.85

    def clip_value(self, weight: Tensor, gram_diag: Tensor | None = None) -> Tensor:
        return _or_max(self.k * _row_std(weight), weight)

    def ratios(self, cols: int, spread: Any) -> list[np.ndarray]:
        return [np.array([self.k])]


@option("quant/clip", "percentile_search")
@dataclass
class PercentileSearchClip(Clip):
    """Of several percentiles the one with the least squared error of the whole weight."""

    percentiles: Annotated[list[float], not_empty, above(0, at_most=100)] = field(
        default_factory=lambda: [99.9, 99.95, 99.99, 99.999, 100.0]
    )

    def clip_value(self, weight: Tensor, gram_diag: Tensor | None = None) -> Tensor:
        return weight.abs().amax(dim=1)

    def candidates(self, weight: Tensor, gram_diag: Tensor | None = None) -> list[Tensor]:
        return [_row_quantile(weight, value / 100.0) for value in self.percentiles]

    def ratios(self, cols: int, spread: Any) -> list[np.ndarray]:
        return [_magnitude_quantiles(value / 100.0, cols, spread) for value in self.percentiles]


@option("quant/clip", "mean_sigma_clamp")
@dataclass
class MeanSigmaClamp(Clip):
    """Clamps a row to mean ± kσ and takes the largest magnitude that is left."""

    k: Annotated[float, above(0)] = 2.5
    clamp_vectors: bool = True
    """compat: false lets values of a 1-D tensor beyond mean ± kσ round to codes further out."""

    def clip_value(self, weight: Tensor, gram_diag: Tensor | None = None) -> Tensor:
        return _or_max(self.limit(weight, weight).abs().amax(dim=1), weight)

    def limit_vector(self, values: Tensor) -> Tensor:
        return self.limit(values[None], values)[0] if self.clamp_vectors else values

    def limit(self, weight: Tensor, clip: Tensor) -> Tensor:
        if weight.shape[1] < 2:
            return weight
        mean = weight.mean(dim=1, keepdim=True)
        spread = self.k * weight.std(dim=1, keepdim=True)
        return torch.clamp(weight, mean - spread, mean + spread)

    def ratios(self, cols: int, spread: Any) -> list[np.ndarray]:
        return [np.minimum(_magnitude_quantiles(1.0, cols, spread), self.k)]


@option("quant/clip", "hessian_sigma")
@dataclass
class HessianSigmaClip(Clip):
    """k·σ, where σ is partly measured with every column weighted by its input's mean square.

    clip = k · ((1 - lam) · σ + lam · σ_H), where σ_H² is the variance of the row under the weights
    h_j. Rows that vary most on busy inputs keep more range; lam = 0 is SigmaClip. Without a Gram
    matrix all inputs count alike.
    """

    k: Annotated[float, above(0)] = 12.85
    lam: Annotated[float, at_least(0, at_most=1)] = 0.175

    def clip_value(self, weight: Tensor, gram_diag: Tensor | None = None) -> Tensor:
        importance = weight.new_ones(weight.shape[1]) if gram_diag is None else gram_diag.float()
        total = importance.sum().clamp_min(torch.finfo(torch.float32).tiny)
        mean = (weight @ importance / total)[:, None]
        weighted = ((weight - mean).square() @ importance / total).sqrt()
        clip = self.k * ((1 - self.lam) * _row_std(weight) + self.lam * weighted)
        return _or_max(clip, weight)

    def ratios(self, cols: int, spread: Any) -> list[np.ndarray]:
        return [np.array([self.k])]


@option("quant/clip", "mean_abs")
@dataclass
class MeanAbsClip(Clip):
    """A multiple of the row's mean magnitude: the scale of sign (1) and ternary (2 bits) codes.

    At one bit, factor 1 is the scale of least squared error (XNOR-Net, arXiv 1603.05279, eq. 6);
    with two symmetric bits the codes are -1, 0, 1 as in BitNet b1.58 (arXiv 2402.17764).
    """

    factor: Annotated[float, above(0)] = 1.0

    def clip_value(self, weight: Tensor, gram_diag: Tensor | None = None) -> Tensor:
        return self.factor * weight.abs().mean(dim=1)

    def ratios(self, cols: int, spread: Any) -> list[np.ndarray]:
        return [np.array([self.factor * spread.mean_magnitude])]


def _row_std(weight: Tensor) -> Tensor:
    if weight.shape[1] < 2:
        return weight.new_zeros(weight.shape[0])
    return weight.std(dim=1)


def _or_max(clip: Tensor, weight: Tensor) -> Tensor:
    """Rows without spread (one column, or all equal but for rounding) keep their own magnitude."""
    largest = weight.abs().amax(dim=1)
    return torch.where(clip > 1e-6 * largest, clip, largest)


def _row_quantile(weight: Tensor, share: float) -> Tensor:
    magnitude = weight.abs()
    rows = max(_QUANTILE_ENTRIES // max(weight.shape[1], 1), 1)
    parts = [torch.quantile(part, share, dim=1) for part in magnitude.split(rows)]
    return torch.cat(parts) if parts else magnitude.new_zeros(0)


def _magnitude_quantiles(share: float, cols: int, spread: Any) -> np.ndarray:
    """Spread of the `share` quantile of `cols` magnitudes over equally likely rows."""
    from scipy import special  # here: only predictions should pay for the import

    place = share * (cols - 1)
    # Order statistics of uniform variables are beta distributed; a place between two of them is
    # taken as the beta of the fraction. Magnitudes |x| < m have probability 2 F(m) - 1.
    uniform = special.betaincinv(place + 1, cols - place, _NODES)
    return np.asarray(spread.ppf((1 + uniform) / 2))
