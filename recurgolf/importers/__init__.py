"""Other people's checkpoints: weights with their own names and settings, as a Run and a model.

    imported = load("per_iteration_lora", config, "model.safetensors")
    logits = imported.model(input_ids)
    imported.run.write(folder)

Every tensor of a source is used, or the import fails naming it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recurgolf.composing import compose
from recurgolf.config import ConfigError, import_modules, suggestion
from recurgolf.importers import gated_delta_layer
from recurgolf.importers.settings import read_settings, without_bearing
from recurgolf.importers.source import Place, System, lay, read_weights
from recurgolf.looping import LoopPlan
from recurgolf.lora import LowRank
from recurgolf.model.transformer import Transformer
from recurgolf.overrides import quoted
from recurgolf.run import Run

SYSTEMS: dict[str, System] = {
    name.rpartition(".")[2]: sys.modules[name].SYSTEM
    for name in import_modules(__name__)
    if hasattr(sys.modules[name], "SYSTEM")
}
"""Whole systems by name: the modules of this package that define a SYSTEM."""

Weights = str | Path | Mapping[str, Tensor]
"""A state dict, or its file."""

_OF_TRAINING = frozenset(
    {"optimizer", "optimizer.schedule", "averaging", "eval", "quant", "quant.qat", "artifact.codec"}
)
"""Groups whose option may be exchanged without changing what the weights mean."""
_OF_ALL_OPTIONS = frozenset({"eval.seq_len"})
"""Settings in them that every option has."""


@dataclass
class Imported:
    """A source read in.

    Attributes:
        run: the experiment that the source's settings describe; None for a single layer.
        model: the module with the source's weights, see `ImportedModel` and `ImportedLayer`.
        places: where every tensor of the source lies in `model.transformer`.
        passed_over: names in the source's settings that change neither the model nor its score.
    """

    run: Run | None
    model: nn.Module
    places: list[Place] = field(default_factory=list)
    passed_over: list[str] = field(default_factory=list)


class ImportedModel(nn.Module):
    """A Transformer that knows its Run's plans: `model(input_ids)` and `model.loss(...)`.

    In training mode it runs the plan of training's end, in evaluation mode the one for scoring.

    Attributes:
        transformer: the network under our names.
    """

    def __init__(self, run: Run, transformer: Transformer):
        super().__init__()
        self.run, self.transformer = run, transformer
        self.looping_active = True

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [b, t, v] after the soft cap for token ids [b, t]."""
        return self.transformer(input_ids, self.plan)

    def loss(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Mean loss in nats per token; in training mode with the extra heads' share."""
        return self.transformer(input_ids, self.plan, target_ids)

    def set_looping(self, active: bool) -> None:
        """False runs every block once, as training does before a delayed looping begins."""
        self.looping_active = active

    @property
    def plan(self) -> LoopPlan:
        """The visits of the next forward."""
        if not self.looping_active:
            return self.run.looping.eval_plan(self.run.model.num_blocks, 1)
        return self.run.plan(1.0) if self.training else self.run.eval_plan


class ImportedLayer(nn.Module):
    """One Gated DeltaNet layer: `model(hidden) -> hidden`, [b, t, d] both.

    Attributes:
        layer: the layer under our names.
        factors: its low-rank factors, `lora/<projection>/A` and `B`.
    """

    def __init__(self, config: Mapping[str, Any], source: Mapping[str, Tensor]):
        super().__init__()
        self.config = gated_delta_layer.settings_of(config)
        ours, state = gated_delta_layer.layer_state_from(self.config, source)
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


def load(
    system: str,
    config: Mapping[str, Any],
    weights: Weights,
    overrides: Sequence[str] = (),
) -> Imported:
    """Read somebody's checkpoint.

    Args:
        system: `baseline`, `per_iteration_lora`, `universal_rank1`, `parallel_recurrent`, or
            `gated_delta_layer` for a single layer.
        config: the source's own hyper-parameters, perhaps under `hyperparameters`; the spelling of
            its environment variables, in capitals, works too. A layer with adapters takes their
            factor as `lora_scale`, or `lora_alpha` over their rank; 1 without.
        weights: a state dict with the source's names, or its file, `.safetensors` or `.pt`; code
            in it is not run.
        overrides: of the Run, behind what the settings say; none for a layer.

    Raises:
        ConfigError: an unknown system, a setting that cannot be, a tensor that is missing, of
            another shape or of no use. The message names it.
    """
    readers: dict[str, Callable[[Mapping[str, Any], Weights], Imported]] = {
        name: lambda config, weights, found=found: _load_system(found, config, weights, overrides)
        for name, found in SYSTEMS.items()
    }
    readers["gated_delta_layer"] = _load_layer
    if system not in readers:
        raise ConfigError(f"import {system!r}: no such system{suggestion(system, readers)}")
    return readers[system](config, weights)


def run_of(system: System, settings: Mapping[str, Any], overrides: Sequence[str] = ()) -> Run:
    """The system's experiment with what the settings change in it, and the overrides behind them.

    Where an override exchanges an option (`eval=plain`), the settings of the one it replaces go
    with it.
    """
    exchanged = {override.partition("=")[0].replace("/", ".") for override in overrides}
    exchanged &= _OF_TRAINING
    said = []
    for key, value in system.overrides(settings).items():
        name = key.replace("/", ".")
        goes = name in exchanged or name.startswith(tuple(f"{group}." for group in exchanged))
        if not goes or name in _OF_ALL_OPTIONS:
            said.append(f"{key}={quoted(value)}")
    return compose([f"experiment={system.experiment}", *said, *overrides])


def _load_system(
    system: System, config: Mapping[str, Any], weights: Weights, overrides: Sequence[str]
) -> Imported:
    settings = read_settings(system, config)
    tensors = read_weights(weights)
    if "mtp_num_heads" in settings and not any(n.startswith("mtp_heads.") for n in tensors):
        # The extra heads exist in training only; finished checkpoints are saved without them.
        settings["mtp_num_heads"] = 0
    run = run_of(system, settings, overrides)
    transformer = run.build_model()
    places = system.places(transformer, settings, tensors)
    lay(transformer, places, tensors)
    passed_over = without_bearing(system, config)
    return Imported(run, ImportedModel(run, transformer), places, passed_over)


def _load_layer(config: Mapping[str, Any], weights: Weights) -> Imported:
    layer = ImportedLayer(config, read_weights(weights))
    unread = [key for key in layer.config if key not in gated_delta_layer.SETTINGS]
    return Imported(None, layer, passed_over=unread)


__all__ = ["SYSTEMS", "Imported", "ImportedLayer", "ImportedModel", "load", "run_of"]
