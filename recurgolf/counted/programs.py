"""Definitions that are stubbed out in the exported training program (see `standalone/main.py`).

Everything that touches a weight, a batch or a score is the run's own code. Stubbed out is what
this particular run never uses, and what only improves messages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recurgolf.counted.tree_shaking import Target

if TYPE_CHECKING:
    from recurgolf.run import Run

LIBRARIES = {"rich": "recurgolf.standalone.console"}
"""Libraries that only format console output, and the small modules that replace them."""

LOADED = {
    Target("recurgolf.model.transformer", "Transformer.init_weights"): Target(
        "recurgolf.standalone.nothing", "as_it_is"
    )
}
"""What a program that only scores has no use for: the network's weights come from the file."""


def replaced(run: Run) -> dict[Target, Target]:
    """Definition -> the stub packed in its place; methods are named `Class.method`."""
    gone = {
        "data.byte_count:check_texts",
        "data.dataset:_check_tokens",
        "data.shard_fingerprints:check_checksums",
        "data.shard_fingerprints:checksums",
        "data.shard_fingerprints:fingerprints",
        "record:JsonlTracker",
        "training.summary:Summary.read",
        "trust:check_trusted",
    }
    if run.trainer.base is None:
        gone |= {"run:Run.read", "training.base:start_from_base"}
    if all(rule.method != "gptq" for rule in run.quant.rules):
        gone |= {
            f"training.calibration:{name}"
            for name in ("check_calibration", "collect_grams", "broadcast_weights")
        }
    if all(rule.lqer_rank == 0 for rule in run.quant.rules):
        gone.add("quant.lqer:correct")
    if run.trainer.warmup_steps == 0:
        gone.add("training.trainer:Trainer.warm_up")
    if not run.quant.fill_budget:
        gone.add("training.filling:fill_rules")
    if not run.quant.qat.learns_steps:
        gone.add("training.averages:is_worse")
    if run.quant.tolerated is None:
        gone.add("training.tolerance:step_share")
    if run.quant.tolerated is None and not run.quant.fill_budget:
        gone.add("training.probe:Probe")
    pairs = {name: "Nothing" for name in sorted(gone)}
    pairs |= {
        "config:suggestion": "no_words",
        "data.cache:remembered": "found",
        "older:modern": "as_it_is",
    }
    return {
        _target(f"recurgolf.{old}"): Target("recurgolf.standalone.nothing", new)
        for old, new in pairs.items()
    }


def _target(text: str) -> Target:
    module, _, name = text.partition(":")
    return Target(module, name)
