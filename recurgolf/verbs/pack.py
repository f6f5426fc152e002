"""recurgolf pack: quantize the weights of a finished or imported run again, without training it.

Quantizers and codecs compare on equal weights: those of the newest checkpoint, averaged as the run
averaged them. The new folder holds what a finished run's does, but for metrics and checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recurgolf.config import EXIT_OVER_BUDGET, ConfigError, kind_of, to_dict
from recurgolf.disk import read_json, write_json
from recurgolf.folders import check_new
from recurgolf.overrides import as_overrides
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
    """A Run with other options in the parts that packing reads, the rest as it was trained.

    A key alone changes the run's own option; a group (`quant=int8`, `quant/calibration=train`)
    starts from that option's YAML.
    """
    from recurgolf.composing import compose
    from recurgolf.conf import options

    keys = [override.partition("=")[0] for override in overrides]
    parts = {key.split(".")[0].split("/")[0]: key for key in keys}
    for part, key in parts.items():
        if part not in allowed:
            more = " (--steps lets it train)" if part in TRAINED else ""
            raise ConfigError(f"pack takes overrides of {', '.join(allowed)}, not of {key!r}{more}")
    if not parts:
        return run
    chosen = {key for key in keys if key in allowed or "/" in key}
    own: list[str] = []
    for part in parts:
        option = getattr(run, part)
        kind = kind_of(option) if hasattr(type(option), "kind") else ""
        # Where no option is named after the kind, all values are given anyway.
        own += [f"{part}={kind}"] if kind in options().get(part, ()) else []
        values = {k: v for k, v in to_dict(option).items() if k not in _mappings(option)}
        own += as_overrides(part, values)
    kept = [o for o in own if not _is_below(o.partition("=")[0], chosen)]
    composed = compose([*kept, *overrides])
    made = {part: getattr(composed, part) for part in parts}
    for part in parts.keys() - chosen:
        kept_as_they_are = _mappings(getattr(run, part))
        made[part] = dataclasses.replace(made[part], **kept_as_they_are)
    return dataclasses.replace(run, **made)


def _mappings(option: Any) -> dict[str, Any]:
    """Fields that map names to options (`budget.caps`): no override can write a new entry."""
    return {key: value for key, value in vars(option).items() if isinstance(value, dict)}


def _is_below(key: str, groups: set[str]) -> bool:
    dotted = key.replace("/", ".")
    return any(f"{dotted}.".startswith(f"{group.replace('/', '.')}.") for group in groups)


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
