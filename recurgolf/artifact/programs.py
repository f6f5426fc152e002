"""What the exported program does without, and what stands in its place.

The program repeats a run that went well, on its own: what watches over a run, continues it, draws
it or predicts it is not needed for that. Everything that touches a weight, a batch or a score is
the run's own code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from recurgolf.artifact.shake import Target

if TYPE_CHECKING:
    from recurgolf.run import Run

LIBRARIES = {"rich": "recurgolf.solo.console"}
"""What only makes a terminal pretty has a small double in the program."""


def replaced(run: Run) -> dict[Target, Target]:
    """Definition -> what is packed instead; methods are named `Class.method`."""
    pairs = {
        "artifact.code:codes_of": "code:codes_of",
        "artifact.code:code_of": "code:code_of",
        "audit:audit_and_show": "lean:nothing",
        "artifact.ledger:predict": "code:predict",
        "config:suggestion": "lean:no_words",
        "plan:make_plan": "lean:make_plan",
        "plan:check_ending": "lean:nothing",
        "record:JsonlTracker": "lean:JsonlTracker",
        "training.clock:CapWatch": "lean:CapWatch",
        "training.clock:cap_lines": "lean:no_figures",
        "training.clock:caps_used": "lean:no_figures",
        "training.non_finite:_explained": "lean:not_finite",
        "training.report:show": "lean:show",
        "training.resume:finished": "lean:nothing",
        "training.resume:only_one": "lean:anyway",
        "training.scoring:write_scores": "lean:nothing",
        "training.shard_stamps:check_unchanged": "lean:nothing",
        "training.shard_stamps:stamps": "lean:nothing",
        "training.signals:Signals": "lean:Signals",
        "training.supervise:run_ranks": "lean:nothing",
        "training.telemetry:curves": "lean:no_figures",
        "training.trainer:Trainer.begin": "lean:begin",
        "training.trainer:Trainer.explained": "lean:itself",
        "training.trainer:Trainer.foresee": "lean:nothing",
        "training.trainer:Trainer.save": "lean:nothing",
        "training.trainer:Trainer.take_up": "lean:nothing",
        "training.trajectory:trajectory": "lean:no_figures",
        "training.trajectory:trajectory_lines": "lean:no_figures",
        "training.trajectory:validation_windows": "lean:nothing",
    }
    if run.trainer.base is None:
        pairs["training.base:check_base"] = "lean:nothing"
        pairs["training.base:start_from_base"] = "lean:nothing"
    if all(rule.method != "gptq" for rule in run.quant.rules):
        pairs["training.calibration:check_calibration"] = "lean:nothing"
        pairs["training.calibration:collect_grams"] = "lean:no_figures"
        pairs["training.calibration:share"] = "lean:nothing"
    if all(rule.lqer_rank == 0 for rule in run.quant.rules):
        pairs["quant.lqer:correct"] = "lean:nothing"
    if run.trainer.warmup_steps == 0:
        pairs["training.trainer:Trainer.warm_up"] = "lean:nothing"
    if not run.quant.fill_budget:
        pairs["training.filling:fill_rules"] = "lean:nothing"
    return {
        _target(f"recurgolf.{old}"): _target(f"recurgolf.solo.{new}") for old, new in pairs.items()
    }


def _target(text: str) -> Target:
    module, _, name = text.partition(":")
    return Target(module, name)
