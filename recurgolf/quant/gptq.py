"""GPTQ: rounding column by column, every error pushed into the columns still to come.

Frantar et al., arXiv 2210.17323, algorithm 1: with H = Gram matrix of the inputs and U the upper
Cholesky factor of H⁻¹, rounding column j leaves e = (w_j - q_j) / U_jj, and the later columns take
w -= e · U_j. Blocks of columns are finished before the rest of the matrix hears of them, so most of
the arithmetic is matrix products; layers of one shape go through the column loop together.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recurgolf.config import ConfigError
from recurgolf.quant.clip import Clip
from recurgolf.quant.quantized_tensor import dequantize
from recurgolf.quant.quantizer_grid import Grid, QuantizerGrid, fit_grids
from recurgolf.quant.rtn import checked_scales

_MAX_RETRIES = 8
# Layers of one shape that share a column loop; bounds the memory of their factors.
_BATCH_BYTES = 2**28


@dataclass(frozen=True)
class GptqResult:
    """One quantized weight and what it took.

    Attributes:
        codes, scales: as `rtn_quantize` gives them.
        dead_columns: inputs that were always zero; their weights became zero.
        damping: share of the mean diagonal that was added in the end.
        retries: how often the factorisation failed and the damping was raised tenfold.
        error: trace(ΔH Δᵀ) / rows with the undamped H, Δ the change of the weight; the mean
            squared change of an output, in units of the gram's scale.
    """

    codes: Tensor
    scales: Tensor
    dead_columns: int
    damping: float
    retries: int
    error: float


def gptq_quantize(
    weight: Tensor,
    gram: Tensor,
    *,
    bits: int,
    clip: Clip,
    block_size: int = 128,
    damping: float = 0.01,
    act_order: bool = True,
    group_size: int | None = None,
    symmetric: bool = True,
    scale_floor: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize a weight [rows, cols] given the Gram matrix [cols, cols] of its inputs.

    Args:
        gram: XᵀX of the inputs, any positive scale; float32 whatever the inputs were.
        block_size: columns finished before the rest is updated; changes the speed and, within
            rounding, not the result.
        damping: share of the mean diagonal added to it.
        act_order: the columns with the largest mean square first.

    Returns:
        Codes int8 [rows, cols] and scales, which come from the weight before any update.

    Warns:
        RuntimeWarning: the damping had to be raised; `gptq_quantize_many` returns by how much.
    """
    spec = QuantizerGrid(bits, clip, group_size, symmetric, scale_floor)
    result = gptq_quantize_many(
        [weight], [gram], spec, block_size=block_size, damping=damping, act_order=act_order
    )[0]
    if result.retries:
        warnings.warn(
            f"gptq: the Gram matrix was not positive definite; damping raised from {damping:g} to "
            f"{result.damping:g}",
            RuntimeWarning,
            stacklevel=2,
        )
    return result.codes, result.scales


def gptq_quantize_many(
    weights: Sequence[Tensor],
    grams: Sequence[Tensor],
    spec: QuantizerGrid,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    act_order: bool = True,
) -> list[GptqResult]:
    """`gptq_quantize` over several weights, those of one shape together; results in their order."""
    _check(weights, grams, block_size, damping)
    results: dict[int, GptqResult] = {}
    for members in _batches(weights):
        layers = [
            _Layer.prepare(weights[i].detach().float(), grams[i].float(), damping, act_order)
            for i in members
        ]
        results.update(zip(members, _quantize_layers(layers, spec, block_size), strict=True))
    return [results[i] for i in range(len(weights))]


@dataclass
class _Layer:
    """A weight ready for the column loop.

    `weight` has its dead columns zeroed, `original` has not (scales come from it); both keep their
    order. `order` is the order of rounding, `factor` the upper Cholesky factor of the inverse of
    the damped Gram matrix in that order.
    """

    original: Tensor
    weight: Tensor
    gram: Tensor
    order: Tensor
    factor: Tensor
    dead: Tensor
    damping: float
    retries: int

    @classmethod
    def prepare(cls, weight: Tensor, gram: Tensor, damping: float, act_order: bool) -> _Layer:
        dead = gram.diagonal() == 0
        zeroed = torch.where(dead, 0.0, weight)
        alive = gram.clone()
        alive.diagonal()[dead] = 1.0
        mean = alive.diagonal().mean()
        share = damping
        for retries in range(_MAX_RETRIES + 1):
            share = damping * 10.0**retries
            damped = alive.clone()
            damped.diagonal().add_(share * mean)
            diag = damped.diagonal()
            order = torch.argsort(diag, descending=True) if act_order else torch.arange(len(diag))
            factor = _inverse_factor(damped[order][:, order])
            if factor is not None:
                return cls(weight, zeroed, gram, order, factor, dead, share, retries)
        raise ValueError(
            f"gptq: the Gram matrix has no Cholesky factor even with damping {share:g}; it is not "
            "a sum of squares"
        )


def _inverse_factor(matrix: Tensor) -> Tensor | None:
    """Upper U with UᵀU = matrix⁻¹, or None where the matrix is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    if failed or not torch.isfinite(upper).all():
        return None
    return upper


def _quantize_layers(
    layers: list[_Layer], spec: QuantizerGrid, block_size: int
) -> list[GptqResult]:
    fitted = [fit_grids(layer.original, spec, layer.gram.diagonal()) for layer in layers]
    best: list[tuple[float, Tensor, Grid]] = []
    for grids in zip(*fitted, strict=True):
        codes = _column_loop(layers, list(grids), block_size)
        tries = [
            (_error(layer, code, grid), code, grid)
            for layer, code, grid in zip(layers, codes, grids, strict=True)
        ]
        # Strictly better only: of equal candidates the first stays, as in the public search.
        best = [
            new if new[0] < old[0] else old for old, new in zip(best or tries, tries, strict=True)
        ]
    return [
        GptqResult(
            codes=codes.to(torch.int8),
            scales=checked_scales(grid, layer.weight),
            dead_columns=int(layer.dead.sum()),
            damping=layer.damping,
            retries=layer.retries,
            error=_hessian_error(layer, codes, grid),
        )
        for layer, (_, codes, grid) in zip(layers, best, strict=True)
    ]


def _column_loop(layers: list[_Layer], grids: list[Grid], block_size: int) -> list[Tensor]:
    """Codes [rows, cols] of every layer; all layers have one shape and share the loop."""
    rows, cols = layers[0].weight.shape
    low, high = grids[0].spec.range
    sign = grids[0].spec.bits == 1 and grids[0].spec.symmetric
    # Columns lead, [cols, layers, rows], so that one column of all layers is one piece of memory.
    weight = torch.stack([layer.weight[:, layer.order].T for layer in layers], dim=1).contiguous()
    factor = torch.stack([layer.factor for layer in layers])
    step, offset = _ordered_columns(layers, grids, cols)
    codes = torch.empty_like(weight)
    pivots = factor.diagonal(dim1=1, dim2=2).T.unsqueeze(-1)
    for start in range(0, cols, block_size):
        stop = min(start + block_size, cols)
        errors = torch.empty(stop - start, len(layers), rows)
        inner = factor[:, start:stop, start:stop].permute(1, 2, 0).contiguous().unsqueeze(-1)
        for j in range(start, stop):
            column, at = weight[j], min(j, len(step) - 1)
            scaled = (column - offset[at]) / step[at] if offset is not None else column / step[at]
            code = scaled.round_().clamp_(low, high)
            if sign:
                code = torch.where(column < 0, -1.0, 1.0)
            codes[j] = code
            value = code * torch.where(step[at].isinf(), 0.0, step[at])
            if offset is not None:
                value += offset[at]
            error = torch.sub(column, value, out=errors[j - start]).div_(pivots[j])
            weight[j + 1 : stop].sub_(error * inner[j - start, j + 1 - start :])
        if stop < cols:
            # [layers, later columns, block] @ [layers, block, rows]
            change = factor[:, start:stop, stop:].mT @ errors.transpose(0, 1)
            weight[stop:].sub_(change.transpose(0, 1))
    return [
        torch.empty_like(layer.weight).index_copy_(1, layer.order, codes[:, i].T)
        for i, layer in enumerate(layers)
    ]


def _ordered_columns(
    layers: list[_Layer], grids: list[Grid], cols: int
) -> tuple[Tensor, Tensor | None]:
    """Steps and offsets [1 or cols, layers, rows] in each layer's own order of rounding."""
    steps, offsets = [], []
    for layer, grid in zip(layers, grids, strict=True):
        step, offset = grid.columns(cols)
        grouped = step.shape[1] > 1 and grid.spec.group_size is not None
        steps.append((step[:, layer.order] if grouped else step[:, :1]).T)
        offsets.append((offset[:, layer.order] if grouped else offset[:, :1]).T)
    symmetric = grids[0].offset is None
    return torch.stack(steps, dim=1), None if symmetric else torch.stack(offsets, dim=1)


def hessian_error(change: Tensor, gram: Tensor) -> float:
    """trace(Δ H Δᵀ) / rows: mean squared change of an output, in units of the gram's scale."""
    return float(((change @ gram) * change).sum() / change.shape[0])


def _change(layer: _Layer, codes: Tensor, grid: Grid) -> Tensor:
    spec = grid.spec
    return layer.weight - dequantize(
        codes, grid.scales, group_size=spec.group_size, symmetric=spec.symmetric
    )


def _error(layer: _Layer, codes: Tensor, grid: Grid) -> float:
    # Plain and not Hessian-weighted, as in the public percentile search.
    return float(_change(layer, codes, grid).square().mean())


def _hessian_error(layer: _Layer, codes: Tensor, grid: Grid) -> float:
    return hessian_error(_change(layer, codes, grid), layer.gram)


def _batches(weights: Sequence[Tensor]) -> list[list[int]]:
    """Indices of weights of one shape, in runs whose factors fit the memory set aside."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, weight in enumerate(weights):
        by_shape.setdefault(tuple(weight.shape), []).append(i)
    batches = []
    for (_, cols), members in by_shape.items():
        size = max(_BATCH_BYTES // (4 * cols * cols), 1)
        batches += [members[i : i + size] for i in range(0, len(members), size)]
    return batches


def _check(
    weights: Sequence[Tensor], grams: Sequence[Tensor], block_size: int, damping: float
) -> None:
    if block_size < 1:
        raise ConfigError(f"gptq: block_size={block_size}; at least 1")
    if not damping > 0:
        raise ConfigError(f"gptq: damping={damping}; above 0, 0.01 is usual")
    for weight, gram in zip(weights, grams, strict=True):
        if weight.ndim != 2 or weight.numel() == 0:
            raise ValueError(f"gptq: a weight of shape {tuple(weight.shape)}; a matrix is needed")
        cols = weight.shape[1]
        if tuple(gram.shape) != (cols, cols):
            raise ValueError(
                f"gptq: a Gram matrix of shape {tuple(gram.shape)} for a weight of shape "
                f"{tuple(weight.shape)}; [{cols}, {cols}] is needed"
            )
        if not torch.isfinite(gram).all() or not torch.isfinite(weight).all():
            raise ValueError("gptq: the weight or its Gram matrix has entries that are not finite")
