"""A Gated DeltaNet layer with the parameter names of the published models, as ours.

Two layouts are in use. The split one has our names. The fused one (`in_proj_qkvz`, `in_proj_ba`)
interleaves by key head: for every key head its rows of q, k, v and z, then for every key head its
rows of b and a; a key head owns num_value_heads / num_key_heads value heads. Low-rank factors
`lora.<projection>.A` [rank, in] and `.B` [out, rank] follow their projection: of a fused one, every
part takes A whole and its own rows of B.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from recurgolf.config import ConfigError
from recurgolf.importers import Weights
from recurgolf.importers.source import read_weights
from recurgolf.lora import LowRank
from recurgolf.model.mixers.gated_deltanet import PROJECTIONS, GatedDeltaNetConfig

_SIZES: dict[str, tuple[str, Any]] = {
    "num_key_heads": ("linear_num_key_heads", None),
    "num_value_heads": ("linear_num_value_heads", None),
    "key_head_dim": ("linear_key_head_dim", None),
    "value_head_dim": ("linear_value_head_dim", None),
    "conv_size": ("linear_conv_kernel_dim", 4),
    "norm_eps": ("rms_norm_eps", 1e-6),
}
"""Our field -> the source's key, and what the published models have; None: it must be given."""

SETTINGS = {key for key, _ in _SIZES.values()}
SETTINGS |= {"hidden_size", "hidden_act", "lora_alpha", "lora_scale"}
"""What a layer reads of its network's configuration, which says much else."""

_FUSED = {"in_proj_qkvz": ("in_proj_qkv", "in_proj_z"), "in_proj_ba": ("in_proj_b", "in_proj_a")}


class ImportedLayer(nn.Module):
    """One Gated DeltaNet layer: `model(hidden) -> hidden`, [b, t, d] both.

    Attributes:
        layer: the layer under our names.
        factors: its low-rank factors, `lora/<projection>/A` and `B`.
        passed_over: names in its network's configuration that it does not read.
    """

    def __init__(self, config: Mapping[str, Any], weights: Weights):
        super().__init__()
        source = read_weights(weights)
        self.config = settings_of(config)
        ours, state = layer_state_from(self.config, source)
        self.passed_over = [key for key in self.config if key not in SETTINGS]
        self.layer = ours.build(int(self.config["hidden_size"]))
        self.layer.load_state_dict({n: t for n, t in state.items() if not n.startswith("lora.")})
        self.factors = nn.ParameterDict(
            {
                name.replace(".", "/"): tensor.detach().clone()
                for name, tensor in state.items()
                if name.startswith("lora.")
            }
        )

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mix along t; `mask` is 1 for tokens and 0 for padding [b, t]."""
        adapters = {}
        for name in sorted(n for n in self.factors if n.endswith("/A")):
            a, b = self.factors[name], self.factors[f"{name[:-1]}B"]
            adapters[name.split("/")[1]] = LowRank(a, b, self._scale(a.shape[0]))
        return self.layer.segment(hidden, adapters, mask=mask)[0]

    def _scale(self, rank: int) -> float:
        alpha = self.config.get("lora_alpha")
        return float(self.config.get("lora_scale", 1.0 if alpha is None else alpha / rank))


def layer_state_from(
    config: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> tuple[GatedDeltaNetConfig, dict[str, Tensor]]:
    """The configuration and the state dict of `GatedDeltaNet` for a foreign layer.

    Every tensor is a view or an indexing of its source, so gradients flow back to the source.

    Args:
        config: the source's own keys (`hidden_size`, `linear_num_key_heads`, ...), or a mapping
            that holds them under `hyperparameters`.
        weights: fused or split projections, `conv1d.weight`, `A_log`, `dt_bias`, `norm.weight`,
            and possibly `lora.*`.

    Returns:
        The configuration, and the tensors by our names; factors as `lora.<projection>.A` and `.B`.

    Raises:
        ConfigError: a missing or another key, a tensor that is missing, of another shape, or of no
            use here, half a pair of factors. The message names it.
    """
    config = settings_of(config)
    ours = _config_from(config)
    shapes = _source_shapes(ours, int(config["hidden_size"]), weights)
    state: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if name.startswith("lora."):
            _check_factor(name, weights, shapes)
        elif name not in shapes:
            raise ConfigError(f"gated delta layer: no use for the tensor {name!r}")
        elif tensor.shape != shapes[name]:
            raise ConfigError(
                f"gated delta layer: {name} is {tuple(tensor.shape)}, the configuration asks for "
                f"{shapes[name]}"
            )
        state.update(_renamed(name, tensor, ours))
    return ours, state


def settings_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, perhaps under `hyperparameters`; capitals and small letters are the same."""
    return {key.lower(): value for key, value in config.get("hyperparameters", config).items()}


def _config_from(config: Mapping[str, Any]) -> GatedDeltaNetConfig:
    needed = [key for key, usual in _SIZES.values() if usual is None]
    for key in ("hidden_size", *needed):
        if key not in config:
            raise ConfigError(f"gated delta layer: the configuration lacks {key!r}")
    activation = config.get("hidden_act", "silu")
    if activation not in ("silu", "swish"):
        raise ConfigError(f"gated delta layer: hidden_act={activation!r}; only 'silu' is known")
    return GatedDeltaNetConfig(
        **{field: config.get(key, usual) for field, (key, usual) in _SIZES.items()}
    )


def _source_shapes(
    config: GatedDeltaNetConfig, dim: int, weights: Mapping[str, Tensor]
) -> dict[str, tuple[int, ...]]:
    """What must be there, by source name; fused or split as the weights are, for each pair."""
    linear = config.projections(dim)
    for fused, parts in _FUSED.items():
        if f"{fused}.weight" in weights:
            linear[fused] = (dim, sum(linear.pop(part)[1] for part in parts))
    shapes: dict[str, tuple[int, ...]] = {
        f"{name}.weight": (out_dim, in_dim) for name, (in_dim, out_dim) in linear.items()
    }
    channels = 2 * config.key_dim + config.value_dim
    shapes["conv1d.weight"] = (channels, 1, config.conv_size)
    shapes["A_log"] = shapes["dt_bias"] = (config.num_value_heads,)
    shapes["norm.weight"] = (config.value_head_dim,)
    for name in shapes:
        if name not in weights:
            raise ConfigError(f"gated delta layer: the tensor {name!r} is missing")
    return shapes


def _check_factor(
    name: str, weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    parts = name.split(".")
    projection = parts[1]
    linear = PROJECTIONS + tuple(_FUSED)
    known = projection in linear and f"{projection}.weight" in shapes
    if len(parts) != 3 or parts[2] not in ("A", "B") or not known:
        raise ConfigError(f"gated delta layer: no use for the tensor {name!r}")
    a, b = (weights.get(f"lora.{projection}.{half}") for half in "AB")
    if a is None or b is None:
        raise ConfigError(f"gated delta layer: {name!r} without the other half of its pair")
    out_dim, in_dim = shapes[f"{projection}.weight"]
    rank = a.shape[0]
    if a.shape != (rank, in_dim) or b.shape != (out_dim, rank):
        raise ConfigError(
            f"gated delta layer: lora.{projection} has A {tuple(a.shape)} and B {tuple(b.shape)}; "
            f"the projection asks for [rank, {in_dim}] and [{out_dim}, rank]"
        )


def _renamed(name: str, tensor: Tensor, config: GatedDeltaNetConfig) -> dict[str, Tensor]:
    """One source tensor as one or two of ours."""
    fused = next((key for key in _FUSED if key in name.split(".")), None)
    if fused is None:
        return {name: tensor}
    names = [name.replace(fused, part) for part in _FUSED[fused]]
    if name.endswith(".A"):
        return dict.fromkeys(names, tensor)
    split = {"in_proj_qkvz": _split_qkvz, "in_proj_ba": _split_ba}[fused]
    return dict(zip(names, split(tensor, config), strict=True))


def _split_qkvz(rows: Tensor, config: GatedDeltaNetConfig) -> tuple[Tensor, Tensor]:
    """Rows by key head [q | k | v of its value heads | z of its value heads] -> (q|k|v, z)."""
    value_rows = config.value_dim // config.num_key_heads
    by_head = rows.unflatten(0, (config.num_key_heads, -1))
    q, k, v, z = (
        part.flatten(0, 1)
        for part in by_head.split(
            [config.key_head_dim, config.key_head_dim, value_rows, value_rows], 1
        )
    )
    return torch.cat([q, k, v]), z


def _split_ba(rows: Tensor, config: GatedDeltaNetConfig) -> tuple[Tensor, Tensor]:
    """Rows by key head [b of its value heads | a of its value heads] -> (b, a)."""
    b, a = rows.unflatten(0, (config.num_key_heads, -1)).chunk(2, 1)
    return b.flatten(0, 1), a.flatten(0, 1)
