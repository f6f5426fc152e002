"""What the importers share about weights: reading them, and where every tensor lies.

An importer says where every tensor of its source lies in our model, slice by slice (`Place`). From
that list alone follow loading and the checks of names and shapes.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from recurgolf.config import ConfigError, suggestion
from recurgolf.model.transformer import Transformer

Index = tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """`source[source_index]` is `ours[our_index]`, transposed where it says so.

    Attributes:
        rows: length of the source tensor's first dimension; None: as its places need.
    """

    source: str
    ours: str
    source_index: Index = ()
    our_index: Index = ()
    transposed: bool = False
    rows: int | None = None

    def from_source(self, tensor: Tensor) -> Tensor:
        piece = tensor[self.source_index]
        return piece.mT if self.transposed else piece

    def from_ours(self, tensor: Tensor) -> Tensor:
        piece = tensor[self.our_index]
        return piece.mT if self.transposed else piece


@dataclasses.dataclass(frozen=True)
class System:
    """How one public system is read.

    Attributes:
        name: what `importers.load` calls it.
        experiment: the experiment that a Run starts from.
        defaults: the source's settings that reach the Run, and their values there.
        overrides: settings -> what they change in the experiment, as composition takes it.
        places: (model, settings, weights) -> where every tensor lies; by their names alone, where
            nothing is said.
        idle: further settings of the source, which change neither its model nor its score.
        off: further settings of the source that are not reproduced -> the value that asks for
            nothing; any other is refused.
        aliases: other spellings of settings -> the one in `defaults`.
    """

    name: str
    experiment: str
    defaults: Mapping[str, Any]
    overrides: Callable[[Mapping[str, Any]], dict[str, Any]]
    places: Callable[[Transformer, Mapping[str, Any], Mapping[str, Tensor]], list[Place]] = (
        lambda model, settings, weights: whole_places(model)
    )
    idle: frozenset[str] = frozenset()
    off: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_weights(weights: str | Path | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict in float32 from `.safetensors`, or from `.pt` without running code in it."""
    path: Any = "given" if isinstance(weights, Mapping) else Path(weights)
    if isinstance(weights, Mapping):
        tensors: Any = weights
    elif not path.is_file():
        raise ConfigError(f"weights {path}: no such file")
    elif path.suffix == ".safetensors":
        try:
            tensors = safetensors.torch.load_file(path)
        except (safetensors.SafetensorError, OSError) as error:
            raise ConfigError(f"weights {path}: no whole .safetensors file ({error})") from None
    elif path.suffix in (".pt", ".pth", ".bin"):
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch's unpickler raises many kinds
            raise ConfigError(f"weights {path}: no plain state dict ({_reason(error)})") from None
    else:
        raise ConfigError(f"weights {path}: expected .safetensors or .pt")
    if not isinstance(tensors, Mapping):
        raise ConfigError(f"weights {path}: holds a {type(tensors).__name__}, not a state dict")
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ConfigError(f"weights {path}: {name!r} is a {type(tensor).__name__}, no tensor")
        bad = int((~tensor.isfinite()).sum())
        if bad:
            raise ConfigError(
                f"weights {path}: {bad:,} of {tensor.numel():,} values in {name!r} are not finite"
            )
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def _reason(error: Exception) -> str:
    """One line of what torch's unpickler says in many."""
    code = re.search(r"Unsupported (?:global|class|operand)[^.\n]*?GLOBAL (\S+)", str(error))
    if code:
        return f"it asks for {code.group(1)}, and code in a file is not run; save tensors alone"
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@torch.no_grad()
def lay(model: nn.Module, places: Iterable[Place], weights: Mapping[str, Tensor]) -> None:
    """Write a source's weights into our parameters."""
    places = list(places)
    ours = dict(model.named_parameters())
    _check(places, ours, weights)
    for place in places:
        place_in = ours[place.ours].data[place.our_index]
        place_in.copy_(place.from_source(weights[place.source]))


def _check(places: list[Place], ours: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    shapes = _source_shapes(places, ours)
    for name in weights:
        if name not in shapes and weights[name].numel():
            raise ConfigError(
                f"weights: no use for {name!r} {tuple(weights[name].shape)} under this "
                f"configuration{suggestion(name, shapes)}"
            )
    for name, shape in shapes.items():
        if name not in weights:
            raise ConfigError(f"weights: {name!r} {shape} is missing under this configuration")
        if tuple(weights[name].shape) != shape:
            raise ConfigError(
                f"weights: {name} is {tuple(weights[name].shape)}, the configuration asks for "
                f"{shape}"
            )
    filled = dict.fromkeys(ours, 0)
    for place in places:
        filled[place.ours] += place.from_ours(ours[place.ours]).numel()
    left = [name for name, count in filled.items() if count != ours[name].numel()]
    assert not left, f"an importer forgot a part of {left}"


def _source_shapes(places: list[Place], ours: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape that every source tensor must have."""
    shapes: dict[str, tuple[int, ...]] = {}
    for place in places:
        piece = tuple(place.from_ours(ours[place.ours]).shape)
        if place.source_index:
            rows = [p.source_index[0] for p in places if p.source == place.source]
            needed = 1 + max(row for row in rows if isinstance(row, int))
            piece = (place.rows or needed, *piece)
        shapes[place.source] = piece
    return shapes


BLOCK_NAMES = {
    "attn.c_q.weight": "mixer.q_proj.weight",
    "attn.c_k.weight": "mixer.k_proj.weight",
    "attn.c_v.weight": "mixer.v_proj.weight",
    "attn.proj.weight": "mixer.o_proj.weight",
    "attn.q_gain": "mixer.q_gain",
    "mlp.fc.weight": "mlp.up_proj.weight",
    "mlp.proj.weight": "mlp.down_proj.weight",
    "attn_scale": "mixer_scale",
    "mlp_scale": "mlp_scale",
    "resid_mix": "input_mix.weight",
    "resid_mix_logit": "input_mix.logit",
    "dtg_gate.weight": "update_gate.weight",
    "dtg_gate.bias": "update_gate.bias",
}
"""Names inside a block that the systems have inherited from the baseline -> ours."""

MODEL_NAMES = {
    "tok_emb.weight": "embed.weight",
    "lm_head.weight": "lm_head.weight",
    "embed_proj.weight": "embed_proj.weight",
    "head_proj.weight": "head_proj.weight",
    "skip_weights": "skips.weight",
    "skip_gates": "skips.gate",
    "smear.gate": "smear.gate",
    "bigram.embed.weight": "bigram.embed.weight",
    "bigram.proj.weight": "bigram.proj.weight",
    "bigram.scale": "bigram.scale",
    "ve_shared.embed.weight": "value_embed.embed.weight",
    "ve_shared.proj.weight": "value_embed.proj.weight",
    "ve_shared.scale": "value_embed.scale",
    "ts_attn": "mixer_visit_gain",
    "ts_mlp": "mlp_visit_gain",
}
"""Names outside the blocks -> ours."""


def whole_places(model: Transformer) -> list[Place]:
    """The places of all tensors that only have another name, as far as the model has them."""
    names = dict(MODEL_NAMES)
    for block in range(len(model.blocks)):
        for source, ours in BLOCK_NAMES.items():
            names[f"blocks.{block}.{source}"] = f"blocks.{block}.{ours}"
    for head in range(model.config.mtp_heads):
        names[f"mtp_heads.{head}.weight"] = f"mtp.heads.{head}.weight"
    have = {name for name, _ in model.named_parameters()}
    return [Place(source, ours) for source, ours in names.items() if ours in have]
