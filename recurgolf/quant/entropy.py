"""How many bits the codes will take, before any weight exists.

A coded file pays for the entropy of the codes and not for their width: at 6 bits and a clip of 6 σ
it is 4.4 bits a weight. The model takes the entries of a row as independent draws from a
distribution of variance 1, Gaussian or Student's t for the heavier tails of trained weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from recurgolf.quant.quantized_tensor import scale_shape
from recurgolf.quant.quantizer_grid import QuantizerGrid

_FLOAT16_SCALE_BITS = 11.0
"""Coded bits of a float16 scale: the mantissa is noise, sign and exponent are nearly constant."""
_MIN_DF, _MAX_DF = 2.05, 50.0
"""Beyond the upper end a row is as good as Gaussian; below 2 it has no variance."""


class Spread(NamedTuple):
    """A distribution of variance 1: its cdf, the inverse of that, and E|x|."""

    cdf: Callable[[np.ndarray], np.ndarray]
    ppf: Callable[[np.ndarray], np.ndarray]
    mean_magnitude: float


def spread(tail_df: float | None = None) -> Spread:
    """The distribution that entries follow: Gaussian, or Student's t."""
    # Here, since only predictions should pay for scipy; stats would take a second to import.
    from scipy import special

    if tail_df is None:
        return Spread(special.ndtr, special.ndtri, math.sqrt(2 / math.pi))
    if tail_df <= 2:
        raise ValueError(f"tail_df={tail_df}; above 2, or the weights have no variance")
    scale = np.sqrt((tail_df - 2) / tail_df)
    return Spread(
        lambda x: special.stdtr(tail_df, x / scale),
        lambda q: special.stdtrit(tail_df, q) * scale,
        _mean_magnitude(tail_df),
    )


def predicted_bits(spec: QuantizerGrid, cols: int, tail_df: float | None = None) -> float:
    """Expected entropy of one code, in bits, for rows of `cols` entries.

    Args:
        tail_df: degrees of freedom of Student's t for the entries, see `fit_tail`; None: Gaussian.
    """
    from scipy import special

    entries = min(spec.group_size or cols, cols)
    law = spread(tail_df)
    candidates = []
    for ratios in spec.clip.ratios(entries, law):
        rows = _row_grids(spec, ratios, entries, law)
        probabilities = np.mean([_code_probabilities(spec, *row, law) for row in rows], axis=0)
        error = _expected_error(spec, *rows[len(rows) // 2], law)
        candidates.append((error, probabilities))
    _, probabilities = min(candidates, key=lambda candidate: candidate[0])
    return float(special.entr(probabilities / probabilities.sum()).sum() / np.log(2))


def predicted_bytes(
    spec: QuantizerGrid, shape: tuple[int, int], tail_df: float | None = None
) -> float:
    """Expected coded bytes of a matrix [rows, cols]: its codes and its scales."""
    num_scales = int(np.prod(scale_shape(shape, spec.group_size, spec.symmetric)))
    bits = predicted_bits(spec, shape[1], tail_df) * shape[0] * shape[1]
    return (bits + _FLOAT16_SCALE_BITS * num_scales) / 8


def code_entropy(codes: Tensor) -> float:
    """Zeroth-order entropy of integer codes, bits per code; 0 for an empty tensor."""
    counts = torch.bincount(codes.flatten().to(torch.int64) + 128).double()
    share = counts[counts > 0] / counts.sum().clamp_min(1)
    return float(-(share * share.log2()).sum())


def fit_tail(weights: Iterable[Tensor]) -> float | None:
    """Degrees of freedom of Student's t from the entries of rows; None: as good as Gaussian.

    Matches E|w| / σ inside rows, which is steadier than the kurtosis. Rows are compared with their
    own σ, so that rows of different size do not pass for tails.
    """
    total, magnitude = 0, 0.0
    for weight in weights:
        rows = weight.detach().double()
        rows = rows - rows.mean(dim=1, keepdim=True)
        rows = rows / rows.std(dim=1, keepdim=True).clamp_min(1e-30)
        total, magnitude = total + rows.numel(), magnitude + float(rows.abs().sum())
    ratio = magnitude / max(total, 1)
    if ratio > _mean_magnitude(_MAX_DF):
        return None
    if ratio < _mean_magnitude(_MIN_DF):
        return _MIN_DF
    from scipy import optimize

    found = optimize.root_scalar(
        lambda df: _mean_magnitude(df) - ratio, bracket=(_MIN_DF, _MAX_DF), method="brentq"
    )
    return float(found.root)


def _mean_magnitude(df: float) -> float:
    """E|x| of Student's t scaled to variance 1."""
    from scipy import special

    return float(2 * np.sqrt(df - 2) / ((df - 1) * special.beta(df / 2, 0.5)))


def _row_grids(
    spec: QuantizerGrid, ratios: np.ndarray, entries: int, law: Spread
) -> list[tuple[float, float]]:
    """Step and offset of equally likely rows; `ratios` are their clips in units of σ."""
    low, high = spec.range
    if spec.symmetric:
        return [(float(ratio) / high, 0.0) for ratio in ratios]
    # Top and bottom of a row are independent extremes, cut where the clip lies.
    quantiles = (np.arange(16) + 0.5) / 16
    extremes = np.minimum(law.ppf(quantiles ** (1 / entries)), np.max(ratios))
    pairs = [(top, -extreme) for top in extremes for extreme in extremes]
    steps = [(float(top - bottom) / (high - low), float(bottom)) for top, bottom in pairs]
    return [(step, bottom - low * step) for step, bottom in steps]


def _code_probabilities(spec: QuantizerGrid, step: float, offset: float, law: Spread) -> np.ndarray:
    low, high = spec.range
    sign = spec.bits == 1 and spec.symmetric
    edges = np.zeros(1) if sign else (np.arange(low, high) + 0.5) * step + offset
    return np.diff(np.concatenate([[0.0], law.cdf(edges), [1.0]]))


def _expected_error(spec: QuantizerGrid, step: float, offset: float, law: Spread) -> float:
    """Rounding and clipping error of an entry of variance 1, by quadrature."""
    x = law.ppf((np.arange(4096) + 0.5) / 4096)
    codes = np.clip(np.round((x - offset) / step), *spec.range)
    return float(np.mean((x - codes * step - offset) ** 2))
