"""Gated DeltaNet (2412.06464): the gated delta rule as a token mixer.

Projections, a short causal convolution, the rule on normalised queries and keys, a gated norm and
the output projection. Shapes: B batch, T tokens, Hk key heads, Hv value heads (a multiple of Hk),
K key width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurgolf.config import ConfigError, option, suggestion
from recurgolf.limits import at_least
from recurgolf.model.linear import Linear, init_linear
from recurgolf.model.mixers import Mixer
from recurgolf.model.mixers.delta_rule import gated_delta_rule
from recurgolf.model.visit import VisitInputs

Adapter = Callable[[Tensor], Tensor]
"""What is added to a projection's output, computed from the projection's input."""

PROJECTIONS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
"""The linear layers of `GatedDeltaNet`: what adapters can be put on."""

QK_NORM_EPS = 1e-6
"""Under the root of the L2 norm of queries and keys."""


@option("model/mixer", "gated_deltanet")
@dataclass
class GatedDeltaNetConfig(Mixer):
    """Gated DeltaNet: a state of fixed size per value head instead of a cache of keys and values.

    The default widths give about the parameters of attention with half as many key heads as
    queries, in the proportions of the paper (values twice as wide as keys).
    """

    num_key_heads: Annotated[int, at_least(1)] = 2
    """Heads of queries and keys."""
    num_value_heads: Annotated[int, at_least(1)] = 4
    """A multiple of num_key_heads; decay and writing strength are per value head."""
    key_head_dim: Annotated[int, at_least(0)] = 0
    """0: 3/8 of model.dim over all key heads, to the nearest multiple of 8."""
    value_head_dim: Annotated[int, at_least(0)] = 0
    """0: 3/4 of model.dim over all value heads, to the nearest multiple of 8."""
    conv_size: Annotated[int, at_least(1)] = 4
    """Tokens seen by the causal convolution before the rule, the current one included."""
    norm_eps: float = 1e-6
    """Under the root of the norm behind the rule."""
    chunk_size: Annotated[int, at_least(1)] = 64
    """Tokens solved at once; time and memory only, the result does not depend on it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_value_heads % self.num_key_heads:
            raise ConfigError(
                f"model.mixer.num_value_heads={self.num_value_heads} is not a multiple of "
                f"model.mixer.num_key_heads={self.num_key_heads}"
            )

    def sized(self, dim: int) -> GatedDeltaNetConfig:
        """With the widths that 0 stands for, for hidden states of width `dim`."""

        def share(width: float, heads: int) -> int:
            return max(1, round(width / heads / 8)) * 8

        return replace(
            self,
            key_head_dim=self.key_head_dim or share(dim * 3 / 8, self.num_key_heads),
            value_head_dim=self.value_head_dim or share(dim * 3 / 4, self.num_value_heads),
        )

    @property
    def key_dim(self) -> int:
        """Width of all queries, and of all keys; of a sized configuration."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of all values, and of the gate z; of a sized configuration."""
        return self.num_value_heads * self.value_head_dim

    def projections(self, dim: int) -> dict[str, tuple[int, int]]:
        sized = self.sized(dim)
        return {
            "in_proj_qkv": (dim, 2 * sized.key_dim + sized.value_dim),
            "in_proj_z": (dim, sized.value_dim),
            "in_proj_b": (dim, self.num_value_heads),
            "in_proj_a": (dim, self.num_value_heads),
            "out_proj": (sized.value_dim, dim),
        }

    def build(
        self, dim: int, block: int = 0, num_blocks: int = 1, norm_eps: float | None = None
    ) -> GatedDeltaNet:
        """The layer for hidden states of width `dim`, the same in every block.

        Args:
            norm_eps: of the model's norms; the norm behind the rule has its own.
        """
        return GatedDeltaNet(dim, self.sized(dim))

    def flops(self, dim: int, length: int) -> int:
        sized, chunk = self.sized(dim), min(self.chunk_size, length)
        k, v = sized.key_head_dim, sized.value_head_dim
        by_key_head = 4 * chunk * k  # k k^T and q k^T
        by_value_head = 6 * k * v + chunk * (k + 3 * v)  # the state; the solve and the reading
        conv = 2 * self.conv_size * (2 * sized.key_dim + sized.value_dim)
        return self.num_key_heads * by_key_head + self.num_value_heads * by_value_head + conv


class GatedDeltaState(NamedTuple):
    """What a segment leaves to the next; `detach` it yourself to truncate the gradient.

    Attributes:
        recurrent: the memory of every value head [B, Hv, K, V].
        conv: the last inputs of the convolution [B, conv_size - 1, 2 Hk K + Hv V].
    """

    recurrent: Tensor
    conv: Tensor


class GatedDeltaNet(nn.Module):
    """The layer; parameters have the names of the split form of the published models.

    No projection has a bias, so a zero input writes nothing and only lets the state decay.
    """

    def __init__(self, dim: int, config: GatedDeltaNetConfig):
        super().__init__()
        self.config = config
        shapes = config.projections(dim)
        channels = shapes["in_proj_qkv"][1]
        self.in_proj_qkv = Linear(*shapes["in_proj_qkv"])
        self.in_proj_z = Linear(*shapes["in_proj_z"])
        self.in_proj_b = Linear(*shapes["in_proj_b"])
        self.in_proj_a = Linear(*shapes["in_proj_a"])
        self.out_proj = Linear(*shapes["out_proj"], zero_init=True)
        self.conv1d = nn.Conv1d(channels, channels, config.conv_size, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.num_value_heads))
        self.norm = GatedRMSNorm(config.value_head_dim, config.norm_eps)
        if self.A_log.is_meta:
            return
        # For use alone; a model sets its linear layers by its own rules afterwards.
        for name in PROJECTIONS:
            init_linear(self.get_submodule(name), "uniform", zero_output=False)  # type: ignore[arg-type]
        self.reset_gates()

    @torch.no_grad()
    def reset_gates(self) -> None:
        """Spread the memory's half-lives as Mamba-2 does (2405.21060, section 8).

        A is uniform in [1, 16], softplus(dt_bias) log-uniform in [0.001, 0.1] per token.
        """
        self.A_log.uniform_(1, 16).log_()
        steps = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(0.1)).exp_()
        self.dt_bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus

    def forward(
        self, x: Tensor, inputs: VisitInputs | Mapping[str, Adapter] | None = None
    ) -> Tensor:
        """Mix [B, T, dim] along T, causally.

        Args:
            x: hidden states [B, T, dim].
            inputs: of a visit, in a model; for the layer alone, its adapters by projection. Without
                an adapter a projection is the plain one, bit for bit.

        Raises:
            ConfigError: adapters given alone that are for no projection of this layer.
        """
        if isinstance(inputs, VisitInputs):
            own = {n: adapter for n, adapter in inputs.adapters.items() if n in PROJECTIONS}
            return self.segment(x, own, documents=inputs.documents)[0]
        return self.segment(x, inputs)[0]

    def segment(
        self,
        x: Tensor,
        adapters: Mapping[str, Adapter] | None = None,
        state: GatedDeltaState | None = None,
        mask: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, GatedDeltaState]:
        """The layer, and the state behind the last token to go on from.

        Args:
            adapters: projection name -> what is added to its output.
            state: what the tokens before x left; None: there were none.
            mask: 1 for tokens and 0 for padding [B, T]; padding is zeroed before the projections.
            documents: document number of every token [B, T]; each document starts afresh, but for
                the first, which continues `state`.
        """
        adapters = adapters or {}
        for name in adapters:
            if name not in PROJECTIONS:
                raise ConfigError(
                    f"adapters: no projection {name!r}{suggestion(name, PROJECTIONS)}"
                )
        if mask is not None:
            x = x * mask[..., None].to(x.dtype)
        config = self.config
        mixed = self.in_proj_qkv(x, adapters.get("in_proj_qkv"))
        z = self.in_proj_z(x, adapters.get("in_proj_z"))
        b = self.in_proj_b(x, adapters.get("in_proj_b"))
        a = self.in_proj_a(x, adapters.get("in_proj_a"))

        mixed, conv = self._convolve(mixed, None if state is None else state.conv, documents)
        q, k, v = mixed.split([config.key_dim, config.key_dim, config.value_dim], -1)
        output, recurrent = gated_delta_rule(
            _l2_normed(q.unflatten(-1, (config.num_key_heads, -1))),
            _l2_normed(k.unflatten(-1, (config.num_key_heads, -1))),
            v.unflatten(-1, (config.num_value_heads, -1)),
            b.to(_wide(b)).sigmoid(),
            _forgetting_at_starts(self._log_decay(a), documents),
            None if state is None else state.recurrent,
            form="auto",
            chunk_size=config.chunk_size,
        )
        output = self.norm(output, z.unflatten(-1, (config.num_value_heads, -1)))
        y = self.out_proj(output.flatten(-2), adapters.get("out_proj"))
        return y, GatedDeltaState(recurrent, conv)

    def _convolve(
        self, x: Tensor, before: Tensor | None, documents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Causal convolution per channel, then SiLU; also the inputs that the next token needs."""
        taps = self.conv1d.weight[:, 0].to(x.dtype)  # [channels, conv_size], the last is now
        length, reach = x.shape[1], taps.shape[1] - 1
        past = x.new_zeros(x.shape[0], reach, x.shape[2]) if before is None else before.to(x.dtype)
        x = torch.cat([past, x], 1)
        # A sum of shifted products, since conv1d would have T last: two transposes saved.
        mixed = x[:, reach:] * taps[:, reach]
        if documents is None:
            for j in range(reach):
                mixed = mixed + x[:, j : j + length] * taps[:, j]
            return F.silu(mixed), x[:, length:]
        owner = torch.cat([documents[:, :1].expand(-1, reach), documents], 1)
        for j in range(reach):
            same = (owner[:, j : j + length] == documents)[..., None]
            mixed = mixed + torch.where(same, x[:, j : j + length], 0) * taps[:, j]
        last = (owner[:, length:] == owner[:, -1:])[..., None]
        return F.silu(mixed), torch.where(last, x[:, length:], 0)

    def _log_decay(self, a: Tensor) -> Tensor:
        """-exp(A_log) softplus(a + dt_bias), the rate held finite so that 0 times it stays 0."""
        dtype = _wide(a)
        rate = self.A_log.to(dtype).exp().clamp(max=torch.finfo(dtype).max)
        return -rate * F.softplus(a.to(dtype) + self.dt_bias.to(dtype))


class GatedRMSNorm(nn.Module):
    """`x / rms(x) * weight * silu(gate)` over each head's width, computed in float32 or wider."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        dtype = _wide(x)
        normed = F.rms_norm(x.to(dtype), (x.shape[-1],), self.weight.to(dtype), self.eps)
        return (normed * F.silu(gate.to(dtype))).to(x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _forgetting_at_starts(log_decay: Tensor, documents: Tensor | None) -> Tensor:
    """-inf where another document begins [B, T, Hv]."""
    if documents is None:
        return log_decay
    starts = F.pad(documents[:, 1:] != documents[:, :-1], (1, 0))
    return log_decay.masked_fill(starts[..., None], -torch.inf)


def _l2_normed(x: Tensor) -> Tensor:
    x = x.to(_wide(x))
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + QK_NORM_EPS)


__all__ = [
    "PROJECTIONS",
    "Adapter",
    "GatedDeltaNet",
    "GatedDeltaNetConfig",
    "GatedDeltaState",
    "GatedRMSNorm",
    "gated_delta_rule",
]
