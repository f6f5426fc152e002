"""Gated DeltaNet (2412.06464): the gated delta rule as a token mixer.

Projections, a short causal convolution, the rule on normalised queries and keys, a gated norm and
the output projection. Shapes: B batch, T tokens, Hk key heads, Hv value heads (a multiple of Hk),
K key width, V value width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recurgolf.config import ConfigError, option, suggestion
from recurgolf.model.mixers.delta_rule import gated_delta_rule

Adapter = Callable[[Tensor], Tensor]
"""What is added to a projection's output, computed from the projection's input."""

PROJECTIONS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
"""The linear layers of `GatedDeltaNet`: what adapters can be put on."""

QK_NORM_EPS = 1e-6
"""Under the root of the L2 norm of queries and keys."""


@option("model/mixer", "gated_deltanet")
@dataclass
class GatedDeltaNetConfig:
    """Gated DeltaNet: a state of fixed size per value head instead of a cache of keys and values.

    At model.dim=512 the defaults have about the parameters of full attention.
    """

    num_key_heads: int = 4
    num_value_heads: int = 4
    """A multiple of num_key_heads; decay and writing strength are per value head."""
    key_head_dim: int = 64
    value_head_dim: int = 128
    conv_size: int = 4
    """Tokens seen by the causal convolution before the rule, the current one included."""
    norm_eps: float = 1e-6
    """Under the root of the norm behind the rule."""
    chunk_size: int = 64
    """Tokens solved at once; time and memory only, the result does not depend on it."""

    def __post_init__(self) -> None:
        sizes = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim")
        for name in (*sizes, "conv_size", "chunk_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.mixer.{name}={getattr(self, name)}: at least 1")
        if self.num_value_heads % self.num_key_heads:
            raise ConfigError(
                f"model.mixer.num_value_heads={self.num_value_heads} is not a multiple of "
                f"model.mixer.num_key_heads={self.num_key_heads}"
            )

    @property
    def key_dim(self) -> int:
        """Width of all queries, and of all keys."""
        return self.num_key_heads * self.key_head_dim

    @property
    def value_dim(self) -> int:
        """Width of all values, and of the gate z."""
        return self.num_value_heads * self.value_head_dim

    def projections(self, dim: int) -> dict[str, tuple[int, int]]:
        """Linear projections by name -> (in_dim, out_dim)."""
        return {
            "in_proj_qkv": (dim, 2 * self.key_dim + self.value_dim),
            "in_proj_z": (dim, self.value_dim),
            "in_proj_b": (dim, self.num_value_heads),
            "in_proj_a": (dim, self.num_value_heads),
            "out_proj": (self.value_dim, dim),
        }

    def build(self, dim: int) -> GatedDeltaNet:
        """The layer for hidden states of width `dim`."""
        return GatedDeltaNet(dim, self)


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
        for name in PROJECTIONS:
            self.add_module(name, nn.Linear(*shapes[name], bias=False))
        self.conv1d = nn.Conv1d(channels, channels, config.conv_size, groups=channels, bias=False)
        self.A_log = nn.Parameter(torch.empty(config.num_value_heads))
        self.dt_bias = nn.Parameter(torch.empty(config.num_value_heads))
        self.norm = GatedRMSNorm(config.value_head_dim, config.norm_eps)
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
        self,
        x: Tensor,
        adapters: Mapping[str, Adapter] | None = None,
        state: GatedDeltaState | None = None,
    ) -> Tensor:
        """Mix [B, T, dim] along T, causally.

        Args:
            x: hidden states [B, T, dim].
            adapters: projection name -> what is added to its output; None or a missing name is
                the plain projection, bit for bit.
            state: what the tokens before x left; None: there were none.

        Raises:
            ConfigError: an adapter for a projection that there is not.
        """
        return self.segment(x, adapters, state)[0]

    def segment(
        self,
        x: Tensor,
        adapters: Mapping[str, Adapter] | None = None,
        state: GatedDeltaState | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, GatedDeltaState]:
        """`forward` that also returns the state behind the last token, to go on from.

        Args:
            mask: 1 for tokens and 0 for padding [B, T]; padding is zeroed before the projections.
        """
        for name in adapters or ():
            if name not in PROJECTIONS:
                raise ConfigError(
                    f"adapters: no projection {name!r}{suggestion(name, PROJECTIONS)}"
                )
        if mask is not None:
            x = x * mask[..., None].to(x.dtype)
        config = self.config
        mixed = self._project("in_proj_qkv", x, adapters)
        z = self._project("in_proj_z", x, adapters)
        b = self._project("in_proj_b", x, adapters)
        a = self._project("in_proj_a", x, adapters)

        mixed, conv = self._convolve(mixed, None if state is None else state.conv)
        q, k, v = mixed.split([config.key_dim, config.key_dim, config.value_dim], -1)
        output, recurrent = gated_delta_rule(
            _l2_normed(q.unflatten(-1, (config.num_key_heads, -1))),
            _l2_normed(k.unflatten(-1, (config.num_key_heads, -1))),
            v.unflatten(-1, (config.num_value_heads, -1)),
            b.to(_wide(b)).sigmoid(),
            self._log_decay(a),
            None if state is None else state.recurrent,
            chunk_size=config.chunk_size,
        )
        output = self.norm(output, z.unflatten(-1, (config.num_value_heads, -1)))
        y = self._project("out_proj", output.flatten(-2), adapters)
        return y, GatedDeltaState(recurrent, conv)

    def _project(self, name: str, x: Tensor, adapters: Mapping[str, Adapter] | None) -> Tensor:
        y = self.get_submodule(name)(x)
        adapter = adapters.get(name) if adapters else None
        return y if adapter is None else y + adapter(x).to(y.dtype)

    def _convolve(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Causal convolution per channel, then SiLU; also the inputs that the next token needs."""
        taps = self.conv1d.weight[:, 0].to(x.dtype)  # [channels, conv_size], the last is now
        length, reach = x.shape[1], taps.shape[1] - 1
        past = x.new_zeros(x.shape[0], reach, x.shape[2]) if before is None else before.to(x.dtype)
        x = torch.cat([past, x], 1)
        # A sum of shifted products, since conv1d would have T last: two transposes saved.
        mixed = x[:, reach:] * taps[:, reach]
        for j in range(reach):
            mixed = mixed + x[:, j : j + length] * taps[:, j]
        return F.silu(mixed), x[:, length:]

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
