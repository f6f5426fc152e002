"""From a run's final weights to stored tensors: calibration, its two phases, and what it took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from recurgolf.data import Dataset
from recurgolf.log import Log
from recurgolf.model.transformer import Transformer
from recurgolf.quant import QuantAware, QuantizedState, TensorRule, dequantize_state, quantize_state
from recurgolf.run import Run
from recurgolf.training.calibration import check_calibration, collect_grams, share
from recurgolf.training.clock import Clock
from recurgolf.training.distributed import Ranks
from recurgolf.training.filling import fill_rules


def packed_state(model: Transformer) -> dict[str, Tensor]:
    """The tensors that go into the file: all but what only trains."""
    return {k: v for k, v in model.state_dict().items() if not k.startswith("mtp.")}


def rules_of(run: Run, model: Transformer) -> dict[str, TensorRule]:
    """The rule of every tensor that goes into the file."""
    return run.quant.assign({k: tuple(v.shape) for k, v in packed_state(model).items()})


def prepare_quantization(run: Run, model: Transformer, dataset: Dataset) -> QuantAware:
    """Before training: refuse what could not be quantized after it, and attach its QAT.

    Raises:
        ConfigError: see `check_calibration` and `Qat.build`.
    """
    rules = rules_of(run, model)
    check_calibration(run, model, dataset, weights_under("gptq", rules))
    grids = {name: rule.grid for name, rule in rules.items() if rule.grid is not None}
    looped = _looped(run, rules)
    return run.quant.qat.build(model, grids, looped, ahead=run.trainer.compile)


def quantize_model(
    run: Run, model: Transformer, dataset: Dataset, ranks: Ranks, clock: Clock, log: Log
) -> QuantizedState | None:
    """Quantize the model's present weights; every rank calibrates, rank 0 alone quantizes.

    The model has its own weights again afterwards.

    Returns:
        The stored tensors on rank 0, None elsewhere.
    """
    rules = rules_of(run, model)
    if not run.quant.fill_budget:
        return _by_rules(run, model, rules, dataset, ranks, clock, log)
    grams = _calibrated(run, model, dataset, weights_under("gptq", rules), ranks, clock, log)
    filled = fill_rules(run, packed_state(model), rules, grams, dataset, ranks, clock, log)
    stored = _by_rules(run, model, filled.rules, dataset, ranks, clock, log)
    if stored is not None:
        stored.filled = filled
    return stored


def _by_rules(
    run: Run,
    model: Transformer,
    rules: Mapping[str, TensorRule],
    dataset: Dataset,
    ranks: Ranks,
    clock: Clock,
    log: Log,
) -> QuantizedState | None:
    wanted = weights_under("gptq", rules)
    state = packed_state(model)
    core = [name for name in _looped(run, rules) if name in state]
    if not (run.quant.calibration.two_phase and set(core) & set(wanted)):
        grams = _calibrated(run, model, dataset, wanted, ranks, clock, log)
        return _quantized(state, rules, grams, ranks, clock, log)
    before = {name: tensor.clone() for name, tensor in state.items()}
    flat = {name: tensor for name, tensor in before.items() if name not in core}
    rest = {name: before[name] for name in core}
    names = [name for name in wanted if name in flat]
    grams = _calibrated(run, model, dataset, names, ranks, clock, log)
    first = _quantized(flat, rules, grams, ranks, clock, log)
    try:
        parameters = {name for name, _ in model.named_parameters()} & flat.keys()
        values = dequantize_state(first) if first is not None else flat
        share(model, {name: values[name] for name in parameters}, ranks)
        names = [name for name in wanted if name in rest]
        grams = _calibrated(run, model, dataset, names, ranks, clock, log)
    finally:
        model.load_state_dict(before, strict=False)
    second = _quantized(rest, rules, grams, ranks, clock, log)
    return None if first is None or second is None else first.joined(second)


def _calibrated(
    run: Run,
    model: Transformer,
    dataset: Dataset,
    names: list[str],
    ranks: Ranks,
    clock: Clock,
    log: Log,
) -> dict[str, Tensor]:
    """Gram matrices for these weights; time with training data counts as calibration."""
    if not names:
        return {}
    calibration = run.quant.calibration
    with clock.phase("calibration" if calibration.reads_training_data else "quantization"):
        log.line(f"calibrating {len(names)} weights on {calibration.sequences} sequences ...")
        return collect_grams(run, model, dataset, names, ranks)


def _quantized(
    state: Mapping[str, Tensor],
    rules: Mapping[str, TensorRule],
    grams: Mapping[str, Tensor],
    ranks: Ranks,
    clock: Clock,
    log: Log,
) -> QuantizedState | None:
    if not ranks.is_first:
        return None
    with clock.phase("quantization"), torch.no_grad():
        stored = quantize_state(state, {name: rules[name] for name in state}, grams)
    for report in stored.reports:
        if report.retries:
            log.line(
                f"gptq: the Gram matrix of {report.name} was not positive definite; its damping "
                f"was raised {report.retries} time(s), to {report.damping:g}"
            )
    return stored


def quantization_summary(stored: QuantizedState) -> dict[str, Any]:
    """What quantizing took, for summary.json.

    `retried` names every weight whose damping had to be raised, with the damping in the end.
    """
    reports = stored.reports
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
    }


def weights_under(method: str, rules: Mapping[str, TensorRule]) -> list[str]:
    """Names of the tensors whose rule says this method."""
    return [name for name, rule in rules.items() if rule.method == method]


def _looped(run: Run, names: Mapping[str, Any]) -> list[str]:
    """Tensors of the blocks that the scored plan or training visits repeatedly."""
    blocks = {*run.eval_plan.looped_blocks, *run.plan(1.0).looped_blocks}
    blocks = {b for b in blocks if run.largest_plan.blocks.count(b) > 1}
    return [name for name in names if name.startswith(tuple(f"blocks.{b}." for b in blocks))]
