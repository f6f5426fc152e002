"""Causal grouped-query attention with normed queries and keys and a learned gain per head.

Shapes: B batch, T positions that are attended to, R the last of them, whose output is wanted
(R = T in training), H query heads, K key and value heads, E width of a head, D = H E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurgolf.config import ConfigError, option
from recurgolf.limits import at_least
from recurgolf.model.linear import Linear
from recurgolf.model.mixers import Mixer
from recurgolf.model.norm import rms_norm
from recurgolf.model.rope import rotate
from recurgolf.model.visit import VisitInputs


@option("model/mixer", "attention")
@dataclass
class AttentionConfig(Mixer):
    """Softmax attention (formulae: the official baseline; XSA and partial RoPE are options)."""

    num_heads: Annotated[int | None, at_least(1)] = None
    """Query heads; null: one per 64 channels of model.dim."""
    num_kv_heads: Annotated[int | None, at_least(1)] = None
    """Key and value heads (grouped-query attention, 2305.13245); null: half as many as query
    heads, or one where that does not divide them."""
    q_gain_init: float = 1.5
    """Start of the learned gain on every query head, applied after the rotation."""
    xsa: bool = False
    """Exclusive self attention: take from each output its part along its own position's value."""
    xsa_last: int | None = None
    """XSA only in the last n blocks (of all blocks, not visits); null: in all."""

    def heads(self, dim: int) -> tuple[int, int]:
        """Query heads, and key and value heads, of a model of width `dim`."""
        queries = max(1, dim // 64) if self.num_heads is None else self.num_heads
        if self.num_kv_heads is not None:
            return queries, self.num_kv_heads
        return queries, queries // 2 if queries % 2 == 0 else 1

    def check(self, dim: int) -> None:
        queries, keys = self.heads(dim)
        even = 0 if dim % 2 else dim // 2
        if dim % queries:
            raise ConfigError(
                f"model.dim={dim} is not divisible by model.mixer.num_heads={queries}"
                f"{_fitting(even)}"
            )
        if queries % keys:
            raise ConfigError(
                f"model.mixer.num_heads={queries} is not a multiple of "
                f"model.mixer.num_kv_heads={keys}{_fitting(queries)}"
            )
        if dim // queries % 2:
            raise ConfigError(
                f"model.dim={dim} / model.mixer.num_heads={queries} gives heads of "
                f"{dim // queries}; rotary positions need an even number{_fitting(even)}"
            )

    def projections(self, dim: int) -> dict[str, tuple[int, int]]:
        queries, keys = self.heads(dim)
        kv_dim = dim // queries * keys
        return {
            "q_proj": (dim, dim),
            "k_proj": (dim, kv_dim),
            "v_proj": (dim, kv_dim),
            "o_proj": (dim, dim),
        }

    def build(self, dim: int, block: int, num_blocks: int, norm_eps: float) -> Attention:
        xsa = self.xsa and (self.xsa_last is None or block >= num_blocks - self.xsa_last)
        return Attention(dim, self, xsa, norm_eps)

    def flops(self, dim: int, length: int) -> int:
        return 4 * dim * (length + 1) // 2


def _fitting(number: int) -> str:
    found = [str(n) for n in range(1, number + 1) if number % n == 0]
    return f" ({', '.join(found) or 'no number'} would do)"


class Attention(nn.Module):
    """Attention over [batch, length, dim]; the projections take per-visit adapters."""

    def __init__(self, dim: int, config: AttentionConfig, xsa: bool, norm_eps: float):
        super().__init__()
        self.num_heads, self.num_kv_heads = config.heads(dim)
        self.xsa, self.norm_eps = xsa, norm_eps
        kv_dim = dim // self.num_heads * self.num_kv_heads
        self.q_proj = Linear(dim, dim)
        self.k_proj = Linear(dim, kv_dim)
        self.v_proj = Linear(dim, kv_dim)
        self.o_proj = Linear(dim, dim, zero_init=True)
        self.q_gain = nn.Parameter(torch.full((self.num_heads,), config.q_gain_init))

    def forward(self, x: Tensor, inputs: VisitInputs) -> Tensor:
        batch, length, dim = x.shape
        adapters, first = inputs.adapters, inputs.read_from

        def heads(y: Tensor, count: int) -> Tensor:  # (B, T, h E) -> (B, h, T, E)
            return y.unflatten(-1, (count, -1)).transpose(1, 2)

        q = heads(self.q_proj(x[:, first:], adapters.get("q_proj")), self.num_heads)  # (B, H, R, E)
        k = heads(self.k_proj(x, adapters.get("k_proj")), self.num_kv_heads)  # (B, K, T, E)
        v = self.v_proj(x, adapters.get("v_proj"))  # (B, T, K E)
        if inputs.values is not None:
            v = v + inputs.values.to(v.dtype)
        v = heads(v, self.num_kv_heads)
        cos, sin = inputs.rope
        # Norm before rotation, gain after it: the gain is then the temperature of a head, which
        # neither the norm nor the angle can undo.
        q = rotate(rms_norm(q, self.norm_eps), (cos[first:], sin[first:]))
        k = rotate(rms_norm(k, self.norm_eps), inputs.rope)
        q = q * self.q_gain.to(q.dtype)[:, None, None]
        y = self._attend(q, k.to(q.dtype), v.to(q.dtype), inputs.documents)
        if self.xsa:
            y = self._without_own_value(y, v[:, :, first:])
        y = y.transpose(1, 2).reshape(batch, length - first, dim)
        return self.o_proj(y, adapters.get("o_proj"))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None) -> Tensor:
        grouped = self.num_heads != self.num_kv_heads
        queries, length = q.shape[2], k.shape[2]
        if documents is None and queries == length:
            # Without an explicit mask torch may take its fused kernels.
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        first = length - queries  # the queries are those of the last positions
        mask = torch.ones(queries, length, dtype=torch.bool, device=q.device).tril(first)
        if documents is not None:
            mask = (mask & (documents[:, first:, None] == documents[:, None, :]))[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=grouped)

    def _without_own_value(self, y: Tensor, v: Tensor) -> Tensor:
        """y - (y . v/|v|) v/|v| with the value of the same position and kv head."""
        batch, _, length, head_dim = y.shape
        direction = F.normalize(v, dim=-1)[:, :, None]  # (B, K, 1, R, E)
        # Consecutive query heads share a kv head, as enable_gqa has it.
        grouped = y.view(batch, self.num_kv_heads, -1, length, head_dim)  # (B, K, H / K, R, E)
        along = (grouped * direction).sum(-1, keepdim=True)
        return (grouped - along * direction).view_as(y)
