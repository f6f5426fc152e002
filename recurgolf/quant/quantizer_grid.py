"""The grid of a weight: a step (and an offset) per row or per group, shared by every quantizer.

Rounding, GPTQ and quantization-aware training all take their grids from here, so that bits, clip
and groups cannot disagree between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import torch
from torch import Tensor

from recurgolf.config import Checked, ConfigError
from recurgolf.limits import at_least, one_of
from recurgolf.quant.clip import Clip, MaxClip
from recurgolf.quant.quantized_tensor import code_range, per_column


@dataclass(frozen=True)
class QuantizerGrid(Checked):
    """What fixes a grid.

    The last three exist to reproduce public systems bit for bit; the defaults are right.
    """

    bits: Annotated[int, at_least(1, at_most=8)]
    clip: Clip = field(default_factory=MaxClip)
    group_size: Annotated[int | None, at_least(1)] = None
    """Columns that share a step; None: the whole row."""
    symmetric: bool = True
    """No offset. Two symmetric bits are ternary codes, one is the sign."""
    scale_floor: Annotated[str | None, one_of("inv_qmax")] = None
    """compat: `inv_qmax` never lets a row's step fall below 1 / highest code."""
    code_scale: Annotated[str, one_of("stored", "float32")] = "stored"
    """compat: `float32` rounds with the step before it was rounded to the stored type."""
    vector_zero_scale: float = 0.0
    """compat: the step of an all-zero tensor that is no matrix."""
    scale_dtype: torch.dtype = torch.float16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.clip, Clip):
            raise ConfigError(
                f"quant: clip={self.clip!r}; an object of a class of quant/clip.py, "
                "as in SigmaClip(12.85)"
            )

    @property
    def range(self) -> tuple[int, int]:
        return code_range(self.bits, self.symmetric)


@dataclass(frozen=True)
class Grid:
    """Where the codes of one weight [rows, cols] lie.

    Attributes:
        step: [rows] or [rows, groups] float32, as the codes are rounded with.
        offset: the same shape, value of code 0; None where symmetric.
        scales: what is stored; see `quantized_tensor.dequantize`.
    """

    spec: QuantizerGrid
    step: Tensor
    offset: Tensor | None
    scales: Tensor

    def columns(self, cols: int) -> tuple[Tensor, Tensor]:
        """Step and offset of every column, broadcastable over [rows, cols]; a dead step is inf."""
        shape = (self.step.shape[0], cols)
        # A step of zero (an empty row, or one below float16) gives code 0 and not 0 / 0.
        step = torch.where(self.step > 0, self.step, torch.inf)
        offset = torch.zeros_like(step) if self.offset is None else self.offset
        group_size = self.spec.group_size
        return per_column(step, shape, group_size), per_column(offset, shape, group_size)

    def round(self, weight: Tensor) -> Tensor:
        """Codes of a weight, still float32."""
        if self.spec.bits == 1 and self.spec.symmetric:
            return torch.where(weight < 0, -1.0, 1.0)
        step, offset = self.columns(weight.shape[1])
        scaled = weight / step if self.offset is None else (weight - offset) / step
        return torch.clamp(torch.round(scaled), *self.spec.range)


def fit_grids(weight: Tensor, spec: QuantizerGrid, gram_diag: Tensor | None = None) -> list[Grid]:
    """Grids for a weight [rows, cols] float32, one for each candidate of the clip rule."""
    size = spec.group_size or max(weight.shape[1], 1)
    parts = weight.split(size, dim=1)
    diags = [None] * len(parts) if gram_diag is None else gram_diag.split(size)
    fitted = [
        [_fit_part(part, clip, spec) for clip in spec.clip.candidates(part, diag)]
        for part, diag in zip(parts, diags, strict=True)
    ]
    return [_join(list(groups), spec) for groups in zip(*fitted, strict=True)]


def vector_grid(values: Tensor, spec: QuantizerGrid) -> Grid:
    """The one-row grid of a tensor [n] that is no matrix; the scale floor does not apply to it."""
    clip = spec.clip.vector_value(values)
    step, offset = _step_offset(values[None], clip[None], spec)
    step = torch.where(clip > 0, step, spec.vector_zero_scale)
    return _stored(step, offset, spec)


def limited(weight: Tensor, spec: QuantizerGrid) -> Tensor:
    """The weight as the clip rule wants it rounded, group by group."""
    size = spec.group_size or max(weight.shape[1], 1)
    parts = weight.split(size, dim=1)
    return torch.cat([spec.clip.limit(part, spec.clip.clip_value(part)) for part in parts], dim=1)


def _fit_part(part: Tensor, clip: Tensor, spec: QuantizerGrid) -> tuple[Tensor, Tensor]:
    step, offset = _step_offset(part, clip, spec)
    if spec.scale_floor == "inv_qmax":
        step = step.clamp_min(1.0 / spec.range[1])
    return step, offset


def _step_offset(part: Tensor, clip: Tensor, spec: QuantizerGrid) -> tuple[Tensor, Tensor]:
    low, high = spec.range
    if spec.symmetric:
        return clip / high, torch.zeros_like(clip)
    bottom = torch.maximum(part.amin(dim=1), -clip)
    top = torch.maximum(torch.minimum(part.amax(dim=1), clip), bottom)
    step = (top - bottom) / (high - low)
    return step, bottom - low * step


def _join(groups: list[tuple[Tensor, Tensor]], spec: QuantizerGrid) -> Grid:
    if spec.group_size is None:
        return _stored(*groups[0], spec)
    steps, offsets = zip(*groups, strict=True)
    return _stored(torch.stack(steps, dim=1), torch.stack(offsets, dim=1), spec)


def _stored(step: Tensor, offset: Tensor, spec: QuantizerGrid) -> Grid:
    parts = step if spec.symmetric else torch.stack([step, offset])
    scales = parts.to(spec.scale_dtype)
    if spec.code_scale == "stored":
        rounded = scales.float()
        step, offset = (rounded, offset) if spec.symmetric else rounded.unbind(0)
    return Grid(spec, step, None if spec.symmetric else offset, scales)
