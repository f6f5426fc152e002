"""Low-rank correction of the quantization error (LQER, arXiv 2402.02446).

W ≈ Q(W) + Lᵀ R with L [rank, rows] and R [rank, cols] the best in the mean squared change of the
layer's outputs: for inputs with Gram matrix H = C Cᵀ that is the truncated SVD of (W - Q) C, times
C⁻¹ (arXiv 2410.06040, theorem 1). Without a Gram matrix it is the SVD of the error itself.
The factors are stored as tensors of their own, one scale per vector, beside the codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from recurgolf.config import Checked
from recurgolf.limits import at_least
from recurgolf.quant.clip import MaxClip
from recurgolf.quant.entropy import predicted_bytes
from recurgolf.quant.quantized_tensor import LQER_PARTS, QuantizedTensor, Stored
from recurgolf.quant.quantizer_grid import QuantizerGrid
from recurgolf.quant.rtn import rtn_quantize

_DAMPING = 1e-6
_MAX_RETRIES = 8


@dataclass(frozen=True)
class LowRankCorrection(Checked):
    """How a correction is stored.

    Attributes:
        rank: vectors on each side.
        bits: width of their codes, 2 to 8; None: float16.
        symmetric: codes without an offset.
    """

    rank: Annotated[int, at_least(1)]
    bits: Annotated[int | None, at_least(2, at_most=8)] = 8
    symmetric: bool = True

    def predicted_bytes(self, shape: tuple[int, int]) -> float:
        """Expected coded bytes of both factors for a weight [rows, cols]."""
        if self.bits is None:
            return 2.0 * self.rank * sum(shape)
        spec = QuantizerGrid(self.bits, MaxClip(), None, self.symmetric)
        return sum(predicted_bytes(spec, (self.rank, side)) for side in shape)

    def store(self, vectors: Tensor) -> Stored:
        """Vectors [rank, n] as they go into the file."""
        if self.bits is None:
            return vectors.to(torch.float16)
        codes, scales = rtn_quantize(
            vectors, bits=self.bits, clip=MaxClip(), symmetric=self.symmetric
        )
        return QuantizedTensor(codes, scales, self.bits, None, self.symmetric, "lqer", "max")


def correct(
    name: str, error: Tensor, correction: LowRankCorrection, gram: Tensor | None = None
) -> dict[str, Stored]:
    """The factors that make up for the error W - Q(W) [rows, cols] of a weight, by stored name.

    Args:
        gram: [cols, cols] of the layer's inputs, any scale.
    """
    left, right = low_rank(error.float(), correction.rank, gram)
    parts = (correction.store(left), correction.store(right))
    return {name + suffix: part for suffix, part in zip(LQER_PARTS, parts, strict=True)}


def low_rank(error: Tensor, rank: int, gram: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """L [rank, rows] and R [rank, cols] with Lᵀ R closest to the error where inputs are busy."""
    root = torch.eye(error.shape[1]) if gram is None else _root(gram.float())
    if gram is not None:
        # Inputs that are always zero: whatever happens there costs nothing.
        error = torch.where(gram.diagonal() == 0, 0.0, error)
    u, s, vh = torch.linalg.svd(error @ root, full_matrices=False)
    size = s[:rank].sqrt()
    left = (u[:, :rank] * size).T
    right = torch.linalg.solve_triangular(root, size[:, None] * vh[:rank], upper=False, left=False)
    return left.contiguous(), right.contiguous()


def _root(gram: Tensor) -> Tensor:
    """Lower C with C Cᵀ = gram, slightly damped; more where that is not positive definite."""
    mean = gram.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    for retry in range(_MAX_RETRIES):
        damped = gram + torch.eye(len(gram)) * (mean * _DAMPING * 10.0**retry)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower
    raise ValueError("lqer: the Gram matrix is not a sum of squares")
