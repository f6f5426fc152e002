"""From a run's final weights to stored tensors: calibration, its two phases, and what it took."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from recurgolf.artifact.ledger import component
from recurgolf.log import counted
from recurgolf.model.transformer import TRAINING_ONLY, Transformer
from recurgolf.quant import (
    FileSize,
    MethodReport,
    QuantAware,
    QuantizedState,
    QuantizedTensor,
    TensorRule,
    dequantize_state,
    quantize_state,
)
from recurgolf.quant.fill import finer
from recurgolf.run import Run
from recurgolf.training.calibration import (
    broadcast_weights,
    check_calibration,
    collect_grams,
)
from recurgolf.training.filling import fill_rules
from recurgolf.training.probe import Probe, by_the_first, file_bytes
from recurgolf.training.tolerance import step_share

if TYPE_CHECKING:
    from recurgolf.training.job import Job


def packed_state(model: Transformer) -> dict[str, Tensor]:
    """The tensors that go into the file: all but what only trains."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith(TRAINING_ONLY)}


def rules_of(run: Run, model: Transformer) -> dict[str, TensorRule]:
    """The rule of every tensor that goes into the file."""
    return run.quant.assign({k: tuple(v.shape) for k, v in packed_state(model).items()})


def prepare_quantization(job: Job, model: Transformer) -> QuantAware:
    """Before training: refuse what could not be quantized after it, and attach its QAT.

    Raises:
        ConfigError: see `check_calibration` and `Qat.build`.
    """
    run, rules = job.run, rules_of(job.run, model)
    check_calibration(run, model, job.dataset, weights_under("gptq", rules))
    grids = {name: rule.grid for name, rule in rules.items() if rule.grid is not None}
    looped = _looped(run, rules)
    file = partial(file_size, job, model)
    return run.quant.qat.build(model, grids, looped, run.trainer.compile, file)


def file_size(job: Job, model: Transformer) -> FileSize:
    """What training may know of the file that the job will write."""
    run, measure = job.run, partial(measure_file, job, model)
    return FileSize(run.budget.artifact_bytes, job.plan.code_bytes, measure, run.seed_of("noise"))


def measure_file(job: Job, model: Transformer, learned: Mapping[str, QuantizedTensor]) -> int:
    """Bytes of the model file with these tensors, and the rest by its rules. Collective."""
    return by_the_first(job, lambda: file_bytes(job, with_learned(job.run, model, learned)))


def with_learned(
    run: Run, model: Transformer, learned: Mapping[str, QuantizedTensor]
) -> QuantizedState:
    """The whole file: tensors whose steps were learned, and the few others as floats."""
    state, keep = packed_state(model), TensorRule("none", keep_dtype=run.quant.keep_dtype)
    rest = {name: tensor for name, tensor in state.items() if name not in learned}
    others = quantize_state(rest, dict.fromkeys(rest, keep))
    reports = [
        MethodReport(name, one.method, _mean_squared(state[name].cpu() - one.dequantize()))
        for name, one in learned.items()
    ]
    return others.joined(QuantizedState(learned, reports))


def as_packed(run: Run, model: Transformer) -> Transformer:
    """A copy that is free to change, with the weights that the file will hold where training has
    decided these, and else the model's."""
    copied = copy.deepcopy(model)
    copied.quantizers = None
    copied.load_state_dict(dequantize_state(run.quant.qat.learned(model)), strict=False)
    return copied


def _mean_squared(error: Tensor) -> float:
    return float(error.square().mean())


def quantize_model(job: Job, model: Transformer) -> QuantizedState | None:
    """Quantize the model's present weights; every rank calibrates, rank 0 alone quantizes.

    The model has its own weights again afterwards.

    Returns:
        The stored tensors on rank 0, None elsewhere.
    """
    rules = rules_of(job.run, model)
    learned = job.run.quant.qat.learned(model)
    if learned:
        return with_learned(job.run, model, learned) if job.ranks.is_first else None
    tolerance = job.run.quant.tolerated
    if tolerance is None and not job.run.quant.fill_budget:
        return _by_rules(job, model, rules, None)
    grams = _calibrated(job, model, weights_under("gptq", rules))
    probe = Probe(job, model, packed_state(model), grams)
    if tolerance is not None:
        share = step_share(probe, rules, tolerance)
        stored = _by_rules(job, model, finer(rules, share), grams)
        if stored is not None:
            stored.step_share = share
        return stored
    filled = fill_rules(probe, rules)
    stored = _by_rules(job, model, filled.rules, grams)
    if stored is not None:
        stored.filled = filled
    return stored


def _by_rules(
    job: Job,
    model: Transformer,
    rules: Mapping[str, TensorRule],
    grams: Mapping[str, Tensor] | None,
) -> QuantizedState | None:
    """Quantize in one phase or two; `grams` if the whole network was calibrated already."""
    wanted = weights_under("gptq", rules)
    state = packed_state(model)
    core = [name for name in _looped(job.run, rules) if name in state]
    if not (job.run.quant.calibration.two_phase and set(core) & set(wanted)):
        grams = _calibrated(job, model, wanted) if grams is None else grams
        return _quantized(job, state, rules, grams)
    before = {name: tensor.clone() for name, tensor in state.items()}
    flat = {name: tensor for name, tensor in before.items() if name not in core}
    rest = {name: before[name] for name in core}
    grams = _calibrated(job, model, [name for name in wanted if name in flat])
    first = _quantized(job, flat, rules, grams)
    try:
        # The core is calibrated on what the rest makes of its inputs once that is quantized.
        parameters = {name for name, _ in model.named_parameters()} & flat.keys()
        values = dequantize_state(first) if first is not None else flat
        broadcast_weights(model, {name: values[name] for name in parameters}, job.ranks)
        grams = _calibrated(job, model, [name for name in wanted if name in rest])
    finally:
        model.load_state_dict(before, strict=False)
    second = _quantized(job, rest, rules, grams)
    return None if first is None or second is None else first.joined(second)


def _calibrated(job: Job, model: Transformer, names: list[str]) -> dict[str, Tensor]:
    """Gram matrices for these weights; time with training data counts as calibration."""
    if not names:
        return {}
    calibration = job.run.quant.calibration
    with job.clock.phase("calibration" if calibration.reads_training_data else "quantization"):
        job.log.line(f"calibrating {len(names)} weights on {calibration.sequences} sequences ...")
        return collect_grams(job, model, names)


def _quantized(
    job: Job,
    state: Mapping[str, Tensor],
    rules: Mapping[str, TensorRule],
    grams: Mapping[str, Tensor],
) -> QuantizedState | None:
    if not job.ranks.is_first:
        return None
    with job.clock.phase("quantization"), torch.no_grad():
        stored = quantize_state(state, {name: rules[name] for name in state}, grams)
    for report in stored.reports:
        if report.retries:
            job.log.line(
                f"gptq: the Gram matrix of {report.name} was not positive definite; its damping "
                f"was raised {counted(report.retries, 'time')}, to {report.damping:g}"
            )
    return stored


def quantization_summary(stored: QuantizedState) -> dict[str, Any]:
    """What quantizing took, for summary.json.

    `step_share` is the share of their rules' steps that `quant.tolerance` left the tensors;
    `retried` names every weight whose damping had to be raised, with the damping in the end;
    `zero_rows` has, by component, how many rows of its matrices are all zero, and of how many.
    """
    reports = stored.reports
    zeros: dict[str, list[int]] = {}
    for name, tensor in stored.items():
        if isinstance(tensor, QuantizedTensor) and tensor.codes.ndim == 2:
            found = zeros.setdefault(component(name), [0, 0])
            found[0] += int((~tensor.codes.any(dim=1)).sum())
            found[1] += len(tensor.codes)
    methods = sorted({report.method for report in reports})
    corrected = [report for report in reports if report.corrected is not None]
    return {
        "weights": {m: sum(report.method == m for report in reports) for m in methods},
        "mean_error": {
            m: sum(r.error for r in reports if r.method == m)
            / max(sum(r.method == m for r in reports), 1)
            for m in methods
        },
        "dead_columns": sum(report.dead_columns for report in reports),
        "cholesky_retries": sum(report.retries for report in reports),
        "retried": {report.name: report.damping for report in reports if report.retries},
        "corrected": {r.name: [r.error, r.corrected] for r in corrected},
        "step_share": stored.step_share,
        "zero_rows": {part: found for part, found in zeros.items() if found[0]},
    }


def weights_under(method: str, rules: Mapping[str, TensorRule]) -> list[str]:
    """Names of the tensors whose rule says this method."""
    return [name for name, rule in rules.items() if rule.method == method]


def _looped(run: Run, names: Mapping[str, Any]) -> list[str]:
    """Tensors of the blocks that the scored plan or training visits repeatedly."""
    blocks = {*run.eval_plan.looped_blocks, *run.plan(1.0).looped_blocks}
    blocks = {b for b in blocks if run.largest_plan.blocks.count(b) > 1}
    return [name for name in names if name.startswith(tuple(f"blocks.{b}." for b in blocks))]
