"""What the exported program does without, and what stands in its place.

The program repeats a run that went well, on its own: what watches over a run, continues it, draws
it or predicts it is not needed for that. Everything that touches a weight, a batch or a score is
the run's own code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recurgolf.artifact.tree_shaking import Target

if TYPE_CHECKING:
    from recurgolf.run import Run

LIBRARIES = {"rich": "recurgolf.standalone.console"}
"""What only makes a terminal pretty has a small double in the program."""


def replaced(run: Run) -> dict[Target, Target]:
    """Definition -> what is packed instead; methods are named `Class.method`."""
    pairs = {
        "artifact.code:codes_of": "code:codes_of",
        "artifact.code:code_of": "code:code_of",
        "audit:audit_at_the_end": "stubs:nothing",
        "artifact.ledger:predict": "code:predict",
        "config:suggestion": "stubs:no_words",
        "data.byte_count:check_texts": "stubs:nothing",
        "data.cache:remembered": "stubs:found",
        "data.dataset:_check_tokens": "stubs:nothing",
        "data.shard_fingerprints:check_checksums": "stubs:nothing",
        "data.shard_fingerprints:check_unchanged": "stubs:nothing",
        "data.shard_fingerprints:checksums": "stubs:no_figures",
        "data.shard_fingerprints:fingerprints": "stubs:no_figures",
        "older:modern": "stubs:as_it_is",
        "plan:make_plan": "stubs:make_plan",
        "plan:check_ending": "stubs:nothing",
        "record:JsonlTracker": "stubs:JsonlTracker",
        "seal:seal": "stubs:nothing",
        "training.clock:CapWatch": "stubs:CapWatch",
        "training.clock:cap_lines": "stubs:no_figures",
        "training.clock:caps_used": "stubs:no_figures",
        "training.non_finite:_explained": "stubs:not_finite",
        "training.report:show": "stubs:show",
        "training.resume:finished": "stubs:nothing",
        "training.resume:only_one": "stubs:anyway",
        "eval.several:write_scores": "stubs:nothing",
        "training.signals:Signals": "stubs:Signals",
        "training.supervise:run_ranks": "stubs:nothing",
        "training.telemetry:curves": "stubs:no_figures",
        "training.trainer:Trainer.begin": "stubs:begin",
        "training.trainer:Trainer.explained": "stubs:itself",
        "training.trainer:Trainer.foresee": "stubs:nothing",
        "training.trainer:Trainer.save": "stubs:nothing",
        "training.trainer:Trainer.take_up": "stubs:nothing",
        "training.trajectory:trajectory": "stubs:no_figures",
        "training.trajectory:trajectory_lines": "stubs:no_figures",
        "training.trajectory:validation_windows": "stubs:nothing",
    }
    if run.trainer.base is None:
        pairs["training.base:check_base"] = "stubs:nothing"
        pairs["training.base:start_from_base"] = "stubs:nothing"
    if all(rule.method != "gptq" for rule in run.quant.rules):
        pairs["training.calibration:check_calibration"] = "stubs:nothing"
        pairs["training.calibration:collect_grams"] = "stubs:no_figures"
        pairs["training.calibration:share"] = "stubs:nothing"
    if all(rule.lqer_rank == 0 for rule in run.quant.rules):
        pairs["quant.lqer:correct"] = "stubs:nothing"
    if run.trainer.warmup_steps == 0:
        pairs["training.trainer:Trainer.warm_up"] = "stubs:nothing"
    if not run.quant.fill_budget:
        pairs["training.filling:fill_rules"] = "stubs:nothing"
    return {
        _target(f"recurgolf.{old}"): _target(f"recurgolf.standalone.{new}")
        for old, new in pairs.items()
    }


def _target(text: str) -> Target:
    module, _, name = text.partition(":")
    return Target(module, name)
