"""Other people's checkpoints: weights with their own names and settings, as a Run and a model.

    imported = load("per_iteration_lora", config, "model.safetensors")
    logits = imported.model(input_ids)
    imported.run.write(folder)

Every tensor of a source is used, or the import fails naming it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from recurgolf.composing import compose
from recurgolf.config import ConfigError, import_modules, suggestion
from recurgolf.importers.settings import read_settings, without_bearing
from recurgolf.importers.source import Place, System, lay, read_weights
from recurgolf.looping import LoopPlan
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
        run: the experiment that the source's settings describe.
        model: the network with the source's weights.
        places: where every tensor of the source lies in `model.transformer`.
        passed_over: names in the source's settings that change neither the model nor its score.
    """

    run: Run
    model: ImportedModel
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

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [b, t, v] after the soft cap for token ids [b, t]."""
        return self.transformer(input_ids, self.plan)

    def loss(self, input_ids: Tensor, target_ids: Tensor) -> Tensor:
        """Mean loss in nats per token; in training mode with the extra heads' share."""
        return self.transformer(input_ids, self.plan, target_ids)

    @property
    def plan(self) -> LoopPlan:
        """The visits of the next forward."""
        return self.run.plan(1.0) if self.training else self.run.eval_plan


def load(
    system: str,
    config: Mapping[str, Any],
    weights: Weights,
    overrides: Sequence[str] = (),
) -> Imported:
    """Read somebody's checkpoint.

    Args:
        system: `baseline`, `per_iteration_lora`, `universal_rank1` or `parallel_recurrent`.
        config: the source's own hyper-parameters, perhaps under `hyperparameters`; the spelling of
            its environment variables, in capitals, works too.
        weights: a state dict with the source's names, or its file, `.safetensors` or `.pt`; code
            in it is not run.
        overrides: of the Run, behind what the settings say.

    Raises:
        ConfigError: an unknown system, a setting that cannot be, a tensor that is missing, of
            another shape or of no use. The message names it.
    """
    if system not in SYSTEMS:
        raise ConfigError(f"import {system!r}: no such system{suggestion(system, SYSTEMS)}")
    found = SYSTEMS[system]
    settings = read_settings(found, config)
    tensors = read_weights(weights)
    if "mtp_num_heads" in settings and not any(n.startswith("mtp_heads.") for n in tensors):
        # The extra heads exist in training only; finished checkpoints are saved without them.
        settings["mtp_num_heads"] = 0
    run = run_of(found, settings, overrides)
    transformer = run.build_model()
    places = found.places(transformer, settings, tensors)
    lay(transformer, places, tensors)
    passed_over = without_bearing(found, config)
    return Imported(run, ImportedModel(run, transformer), places, passed_over)


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
