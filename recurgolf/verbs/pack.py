"""recurgolf pack: quantize the weights of a finished or imported run again, without training it.

Quantizers and codecs compare on equal weights: those of the newest checkpoint, averaged as the run
averaged them. The new folder holds what a finished run's does, but for metrics and checkpoints.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from recurgolf.artifact import load
from recurgolf.artifact.code import PACKED_NAME
from recurgolf.artifact.score import rebuild, text_of
from recurgolf.config import ConfigError, kind_of, to_dict
from recurgolf.data import Dataset
from recurgolf.eval import ScoredModel
from recurgolf.eval.several import named_protocols, write_scores
from recurgolf.log import Log
from recurgolf.model.transformer import Transformer
from recurgolf.overrides import as_overrides
from recurgolf.plan import Plan, check_ending, make_plan
from recurgolf.quant import QuantizedState
from recurgolf.run import Run
from recurgolf.seal import seal
from recurgolf.training import checkpoint
from recurgolf.training.calibration import check_calibration
from recurgolf.training.clock import Clock
from recurgolf.training.distributed import Ranks
from recurgolf.training.packing import ARTIFACT, LEDGER, write_artifact
from recurgolf.training.quantize import (
    quantization_summary,
    quantize_model,
    rules_of,
    weights_under,
)
from recurgolf.training.report import byte_table, cpu_name, result_lines
from recurgolf.training.scoring import entry_of, score_all
from recurgolf.training.summary import Summary
from recurgolf.training.trajectory import trajectory, trajectory_lines, validation_windows

PARTS = ("quant", "artifact", "budget", "eval")
"""Parts of a Run that can change without training again."""
EXIT_OVER_BUDGET = 3


def main(arguments: Sequence[str]) -> int:
    """Quantize and pack a run's weights again with other options, and score the new file."""
    parser = argparse.ArgumentParser(prog="recurgolf pack", description=main.__doc__)
    parser.add_argument("source", type=Path, help="folder of a finished or imported run")
    parser.add_argument("folder", type=Path, help="to be made")
    parser.add_argument("overrides", nargs="*", help="as in quant=gptq_int6 artifact/codec=best")
    parser.add_argument("--no-score", action="store_true", help="leave out the scoring")
    asked = parser.parse_intermixed_args(arguments)
    run = reconfigured(Run.read(asked.source), asked.overrides)
    if asked.folder.exists() and (not asked.folder.is_dir() or any(asked.folder.iterdir())):
        raise ConfigError(f"{asked.folder} is not empty: name a folder that is new or empty")
    check_ending(run)
    path = checkpoint.newest(asked.source / "checkpoints")
    if path is None:
        raise ConfigError(f"{asked.source} has no checkpoint: there are no weights to pack")
    draft = asked.folder.parent / f".{asked.folder.name}.{os.getpid()}"
    draft.mkdir(parents=True)
    try:
        within = repack(run, path, draft, score=not asked.no_score, final=asked.folder)
        if asked.folder.is_dir():
            asked.folder.rmdir()
        draft.rename(asked.folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return 0 if within else EXIT_OVER_BUDGET


def reconfigured(run: Run, overrides: Sequence[str]) -> Run:
    """A Run with other options in the parts that packing reads, the rest as it was trained.

    A key alone changes the run's own option; a group (`quant=int8`, `quant/calibration=train`)
    starts from that option's YAML.
    """
    from recurgolf.composing import compose
    from recurgolf.conf import options

    keys = [override.partition("=")[0] for override in overrides]
    parts = {key.split(".")[0].split("/")[0]: key for key in keys}
    for part, key in parts.items():
        if part not in PARTS:
            raise ConfigError(f"pack takes overrides of {', '.join(PARTS)}, not of {key!r}")
    if not parts:
        return run
    chosen = {key for key in keys if key in PARTS or "/" in key}
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


def weights_of(run: Run, path: Path) -> tuple[Transformer, dict, str]:
    """The network of a checkpoint with the weights that its run was scored with.

    Returns:
        The network, the checkpoint's state, and how the weights were averaged, for the log.
    """
    try:
        parts, state = checkpoint.load(path)
    except checkpoint.CheckpointError as error:
        raise ConfigError(str(error)) from None
    model = run.build_model()
    model.load_state_dict(parts["model"])
    if not parts.get("averaging"):
        return model, state, "the last weights"
    averager = run.averaging.build(model)
    averager.load_state_dict(parts["averaging"])
    averaged = averager.averaged_state()
    if averaged is not None:
        model.load_state_dict(averaged)
    return model, state, averager.status()


def repack(run: Run, path: Path, folder: Path, score: bool, final: Path) -> bool:
    """Quantize, pack and score a checkpoint; everything goes into `folder`.

    Args:
        final: where the folder will be in the end.

    Returns:
        Whether the file and its code are within the budget.
    """
    log, clock = Log(folder / "train.log"), Clock()
    model, state, averaged = weights_of(run, path)
    dataset = run.data.prepare(log.line)
    check_calibration(run, model, dataset, weights_under("gptq", rules_of(run, model)))
    log.line(f"{path}: {averaged}")
    on_gpu = run.trainer.device == "cuda" and torch.cuda.is_available()
    model.to("cuda" if on_gpu else "cpu").eval()
    run.write(folder)
    plan = make_plan(run)
    stored = quantize_model(run, model, dataset, Ranks(), clock, log)
    assert stored is not None
    write_artifact(run, folder, stored, dataset, plan, clock, log)
    origin = {"checkpoint": str(path.resolve()), "step": state["step"]}
    (folder / "packed_from.json").write_text(json.dumps(origin, indent=1) + "\n")
    total = (folder / ARTIFACT).stat().st_size + (folder / PACKED_NAME).stat().st_size
    if score:
        trained = path.parent.parent
        summary = scored(run, trained, folder, model, dataset, plan, stored, state, clock, log)
        summary.folder = str(final)
        summary.write(folder)
        seal(folder)
        if log.console is not None:
            log.console.print(byte_table(summary, plan.lines))
        for line in result_lines(run, summary, dataset.anchors):
            log.line(line)
    else:
        log.line(f"{total:,} bytes of {run.budget.artifact_bytes:,}")
    log.close()
    return total <= run.budget.artifact_bytes


def scored(
    run: Run,
    trained: Path,
    folder: Path,
    model: Transformer,
    dataset: Dataset,
    plan: Plan,
    stored: QuantizedState,
    state: dict,
    clock: Clock,
    log: Log,
) -> Summary:
    """The summary of a packed folder; what training took is the trained run's."""
    device = model.embed.weight.device
    text, protocols = text_of(dataset), named_protocols([run.eval], run.trainer.seq_len)
    before = _known_before(run, trained)
    if before is None:
        with clock.phase("validation"):
            scored_model = ScoredModel(model, run.looping, run.trainer.seq_len, device)
            headline = dict([next(iter(protocols.items()))])
            before = next(iter(score_all(headline, scored_model, text, log).values())).val_bpb
    with clock.phase("evaluation"):
        scorable = rebuild(load(folder / ARTIFACT))
        scorable.model.to(device)
        scorable.device = device
        scores = score_all(protocols, scorable, text, log)
    write_scores(folder, scores, protocols, dataset.fingerprint)
    result = next(iter(scores.values()))
    evals = {name: entry_of(one, dataset) for name, one in scores.items()}
    headline_entry = next(iter(evals.values()))
    ids = validation_windows(dataset.validation_tokens(), run.trainer.seq_len)
    path = trajectory(model, scorable.model, run.eval_plan, ids, result.val_bpb - before)
    for line in trajectory_lines(path):
        log.line(line)
    ledger = json.loads((folder / LEDGER).read_text())
    bytes_model, bytes_code = (folder / ARTIFACT).stat().st_size, ledger["code"]["packed"]
    total = bytes_model + bytes_code
    spent = state.get("clock", {}).get("training", 0.0)
    tokens = state.get("tokens", 0)
    return Summary(
        val_bpb=result.val_bpb,
        val_loss=result.val_loss,
        val_bpb_raw=headline_entry.get("val_bpb_raw"),
        pre_quant_val_bpb=before,
        evals=evals,
        artifact_bytes=total,
        bytes_model=bytes_model,
        bytes_code=bytes_code,
        bytes_code_raw=ledger["code"]["raw"],
        budget_bytes=run.budget.artifact_bytes,
        within_budget=total <= run.budget.artifact_bytes,
        params=plan.params,
        effective_params=plan.effective_params,
        steps=state["step"],
        tokens=tokens,
        train_seconds=round(spent, 3),
        tokens_per_second=round(tokens / spent, 1) if spent else 0.0,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        val_tokens=result.tokens,
        val_bytes=result.bytes,
        val_raw_bytes=headline_entry.get("raw_bytes"),
        seed=run.seed,
        fingerprint=run.fingerprint,
        status="finished" if total <= run.budget.artifact_bytes else "over_budget",
        seconds={name: round(value, 3) for name, value in clock.seconds.items()},
        environment={
            "device": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        quantization=quantization_summary(stored),
        trajectory=path,
    )


def _known_before(run: Run, trained: Path) -> float | None:
    """The score of the same weights before packing, where the run was scored in the same way."""
    try:
        summary, own = Summary.read(trained), Run.read(trained)
    except (OSError, ConfigError, TypeError):
        return None
    return summary.pre_quant_val_bpb if own.eval == run.eval else None
