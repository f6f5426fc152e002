"""Orthogonalisation by a quintic Newton-Schulz iteration (kellerjordan.github.io/posts/muon)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

A, B, C = 3.4445, -4.7750, 2.0315
"""The quintic's coefficients: steepest at zero among those that keep singular values near 1."""

EPS = 1e-7


def _scale_first(x: Tensor) -> Tensor:
    gram = x @ x.mT
    return A * x + (B * gram + (C * gram) @ gram) @ x


def _square_first(x: Tensor) -> Tensor:
    gram = x @ x.mT
    return A * x + (B * gram + C * (gram @ gram)) @ x


def _fused(x: Tensor) -> Tensor:
    gram = x @ x.mT
    multiply_add = torch.addmm if x.ndim == 2 else torch.baddbmm
    polynomial = multiply_add(gram, gram, gram, beta=B, alpha=C)
    return multiply_add(x, polynomial, x, beta=A)


ARITHMETIC: dict[str, Callable[[Tensor], Tensor]] = {
    "scale_first": _scale_first,
    "square_first": _square_first,
    "fused": _fused,
}
"""One iteration, three orders of rounding; in bfloat16 they differ by up to 0.06 per entry."""


DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "float32": torch.float32}


def zeropower(
    matrices: Tensor,
    steps: int = 5,
    dtype: torch.dtype = torch.bfloat16,
    arithmetic: str = "scale_first",
) -> Tensor:
    """An approximate U V^T of each matrix's singular value decomposition U S V^T.

    Args:
        matrices: [..., rows, cols]; any number of leading dimensions.
        steps: iterations; 5 bring singular values to about 0.7 to 1.2.
        dtype: of the iteration and of the result.
        arithmetic: order of the operations, a key of `ARITHMETIC`.
    """
    iteration = ARITHMETIC[arithmetic]
    x = matrices.to(dtype)
    # The Frobenius norm bounds the largest singular value, and the quintic needs them at most 1.
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + EPS)
    tall = x.size(-2) > x.size(-1)
    # The Gram matrix of the shorter side is the cheap one.
    x = x.mT if tall else x
    for _ in range(steps):
        x = iteration(x)
    return x.mT if tall else x
