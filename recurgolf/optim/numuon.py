"""NuMuon: Muon whose update keeps only the leading singular directions, fewer as training goes on.

Described in openai/parameter-golf #38 in words only; the schedule here is the reading given with
`rank_at`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from recurgolf.config import ConfigError
from recurgolf.optim.muon import Muon
from recurgolf.optim.newton_schulz import DTYPES


def rank_at(fraction: float, full: int, min_rank: float) -> int:
    """Directions kept: `full` at the start, a share `min_rank` at the end, by half a cosine."""
    cosine = 0.5 * (1 + math.cos(math.pi * min(max(fraction, 0.0), 1.0)))
    # Rounding first: 0.3 * 10 is a hair above 3 and would keep a fourth direction.
    return max(1, math.ceil(round(full * (min_rank + (1 - min_rank) * cosine), 9)))


class NuMuon(Muon):
    """Muon with U_k V_k^T of an exact decomposition instead of Newton-Schulz.

    Before each step, every group's `fraction` must be set to the fraction of training done.

    Args:
        min_rank: share of the directions that is left at the end, above 0 and at most 1.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.04, *, min_rank: float, **options: Any):
        if not 0 < min_rank <= 1:
            raise ConfigError(f"numuon: min_rank={min_rank}: a share above 0, at most 1")
        super().__init__(params, lr, **options)
        for group in self.param_groups:
            group.update(min_rank=min_rank, fraction=None)

    def orthogonalize(self, matrices: Tensor, group: dict[str, Any]) -> Tensor:
        if group["fraction"] is None:
            raise ConfigError(
                "numuon: the rank depends on the fraction of training; pass it to step"
            )
        rank = rank_at(group["fraction"], min(matrices.shape[-2:]), group["min_rank"])
        u, _, vh = torch.linalg.svd(matrices.float(), full_matrices=False)
        return (u[..., :rank] @ vh[..., :rank, :]).to(DTYPES[group["ns_dtype"]])
