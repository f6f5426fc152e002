"""recurgolf pack: quantize the weights of a finished or imported run again, without training it.

Quantizers and codecs compare on equal weights: those of the newest checkpoint, averaged as the run
averaged them. The new folder holds what a finished run's does, but for metrics and checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from recurgolf.config import EXIT_OVER_BUDGET, ConfigError, kind_of
from recurgolf.disk import read_json, write_json
from recurgolf.folders import check_new
from recurgolf.overrides import group_of
from recurgolf.plan import check_ending
from recurgolf.run import Run
from recurgolf.training import checkpoint
from recurgolf.training.base import weights_of
from recurgolf.training.calibration import check_calibration
from recurgolf.training.job import Job
from recurgolf.training.launch import launch
from recurgolf.training.new_folder import new_folder, pack, pack_and_score, val_bpb_of
from recurgolf.training.own_data import check_own_data
from recurgolf.training.packing import LEDGER
from recurgolf.training.quantize import (
    as_packed,
    prepare_quantization,
    rules_of,
    weights_under,
)
from recurgolf.training.resume import CHECKPOINTS
from recurgolf.training.summary import Summary, Trained
from recurgolf.verbs import add_trust, parser_of

PARTS = ("quant", "artifact", "budget", "eval")
"""Parts of a Run that can change without training again."""
TRAINED = (*PARTS, "optimizer", "averaging")
"""Those that can change with --steps."""


def main(arguments: Sequence[str]) -> int:
    """Quantize and pack a run's weights again with other options, and score the new file."""
    parser = parser_of("pack", main.__doc__)
    parser.add_argument("source", type=Path, help="folder of a finished or imported run")
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("overrides", nargs="*", help="as in quant=gptq_int6 artifact/codec=best")
    parser.add_argument("--no-score", action="store_true", help="leave out the scoring")
    parser.add_argument(
        "--steps", type=int, default=0, help="train so long first, as for quant/qat=rate"
    )
    add_trust(parser)
    asked = parser.parse_intermixed_args(arguments)
    own = Run.read(asked.source, asked.trust)
    run = reconfigured(own, asked.overrides, TRAINED if asked.steps else PARTS)
    check_new(asked.folder)
    if asked.steps:
        run = finishing(run, asked)
        check_own_data(asked.source, run.data.prepare())
        asked.folder.mkdir(parents=True, exist_ok=True)
        summary = launch(run, asked.folder.resolve())
        return 0 if summary.within_budget else EXIT_OVER_BUDGET
    if run.quant.qat.learns_steps and not own.quant.qat.learns_steps:
        raise ConfigError(
            f"quant/qat={kind_of(run.quant.qat)} learns the steps of the file by training: say for "
            "how many steps, as in --steps 400"
        )
    check_ending(run)
    path = checkpoint.newest(asked.source / CHECKPOINTS)
    if path is None:
        raise ConfigError(f"{asked.source} has no checkpoint: there are no weights to pack")
    with new_folder(run, asked.folder) as job:
        repack(job, own, path, score=not asked.no_score)
        total = read_json(job.folder / LEDGER)["actual_bytes"]
    return 0 if total <= run.budget.artifact_bytes else EXIT_OVER_BUDGET


def finishing(run: Run, asked: argparse.Namespace) -> Run:
    """The Run that trains on from the source's weights and ends in the file asked for.

    It trains at full depth and by steps, whatever it took to get there, and a QAT begins at once
    unless it is told otherwise.
    """
    trainer = dataclasses.replace(
        run.trainer,
        steps=asked.steps,
        base=str(asked.source.resolve()),
        trainable="all",
        progress="steps",
        resume="never",
    )
    quant, looping = run.quant, run.looping
    began = any(text.startswith("quant.qat.start_fraction=") for text in asked.overrides)
    if not began and hasattr(quant.qat, "start_fraction"):
        quant = dataclasses.replace(quant, qat=dataclasses.replace(quant.qat, start_fraction=0.0))
    if hasattr(looping, "start_fraction"):
        looping = dataclasses.replace(looping, start_fraction=0.0, ramp_fraction=0.0)
    return dataclasses.replace(run, trainer=trainer, quant=quant, looping=looping)


def reconfigured(run: Run, overrides: Sequence[str], allowed: Sequence[str] = PARTS) -> Run:
    """A Run with other options in the parts that packing reads, the rest as it was trained."""
    from recurgolf.composing import compose_parts

    for override in overrides:
        if (part := group_of(override)) not in allowed:
            more = " (--steps lets it train)" if part in TRAINED else ""
            key = override.partition("=")[0]
            raise ConfigError(f"pack takes overrides of {', '.join(allowed)}, not of {key!r}{more}")
    return compose_parts(run, overrides)


def repack(job: Job, own: Run, path: Path, score: bool) -> None:
    """Quantize and pack a checkpoint, and score the file."""
    run, log = job.run, job.log
    check_own_data(path.parent.parent, job.dataset)
    model, state, averaged = weights_of(own, path)
    if run.quant.qat.learns_steps:
        # Its codes are the file; another budget is met by one factor on all steps.
        prepare_quantization(job, model).settle()
    else:
        model = as_packed(own, model)
    if "data" in state:  # a run that was stopped has no result yet that tells
        job.dataset.check_contents(state["data"])
    check_calibration(run, model, job.dataset, weights_under("gptq", rules_of(run, model)))
    log.line(f"{path}: {averaged}")
    origin = {"checkpoint": str(path.resolve()), "step": state["step"]}
    write_json(job.folder / "packed_from.json", origin)
    # The clocks go on from where training stopped them, so that its caps are told as well.
    job.clock.add(state.get("clock", {}))
    job.precision = state.get("precision", job.precision)
    model.to(job.device).eval()
    if not score:
        pack(job, model)
        return
    before = _known_before(run, path.parent.parent)
    if before is None:
        before = val_bpb_of(job, as_packed(run, model))
    skipped = state.get("skipped_steps", 0)
    pack_and_score(job, model, Trained(state["step"], state.get("tokens", 0), skipped, before))


def _known_before(run: Run, trained: Path) -> float | None:
    """The score of the same weights before packing, where the run was scored in the same way."""
    try:
        summary, own = Summary.read(trained), Run.read(trained)
        if summary.fingerprint != own.fingerprint:
            return None
    except (OSError, ConfigError, TypeError):
        return None
    return summary.pre_quant_val_bpb if own.eval == run.eval else None
