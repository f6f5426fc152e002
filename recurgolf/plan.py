"""What a Run will be, before any weight exists: `recurgolf plan`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from recurgolf.artifact.ledger import Line, component, predict
from recurgolf.config import ConfigError, to_dict
from recurgolf.counted.code import Codes
from recurgolf.looping import LoopPlan
from recurgolf.model.transformer import TRAINING_ONLY
from recurgolf.quant import TensorRule
from recurgolf.quant.fill import STEPS, at_step
from recurgolf.run import Run

MOST_BITS, PRICED_BITS = 7.0, 4.0
"""Bits per weight where training learns its steps: at most, and guessed for a fixed price."""


@dataclass
class Plan:
    """The figures of a Run that follow from its configuration alone.

    Attributes:
        params, effective_params: weights that train; the same with every visit counted.
        flops_per_token: forward and backward, per training token, at full depth.
        code: the programs of the run, packed when they are asked for; `code.counted` counts.
        lines: predicted bytes of the model file by component.
    """

    visits: LoopPlan
    eval_visits: LoopPlan
    params: int
    effective_params: int
    flops_per_token: int
    code: Codes
    lines: list[Line]
    budget_bytes: int

    @property
    def code_bytes(self) -> int:
        """The counted code, as shipped."""
        return self.code.counted.packed_bytes

    @property
    def model_bytes(self) -> int:
        return round(sum(line.predicted for line in self.lines))

    @property
    def total_bytes(self) -> int:
        return self.model_bytes + self.code_bytes

    @property
    def headroom(self) -> int:
        return self.budget_bytes - self.total_bytes


def shapes_of(run: Run) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the run's parameters, from a model without storage."""
    plan = run.largest_plan
    with torch.device("meta"):
        model = run.model.build(plan)
        model.adapters = run.lora.build(run.model.projections, plan)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def packed_shapes(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Without what is used in training alone."""
    return {name: shape for name, shape in shapes.items() if not name.startswith(TRAINING_ONLY)}


def effective(shapes: dict[str, tuple[int, ...]], plan: LoopPlan) -> int:
    """Parameters with every visit of a block counted."""
    visits = {str(block): plan.blocks.count(block) for block in set(plan.blocks)}
    total = 0
    for name, shape in shapes.items():
        parts = name.split(".")
        total += math.prod(shape) * (visits.get(parts[1], 0) if parts[0] == "blocks" else 1)
    return total


def flops_per_token(run: Run, plan: LoopPlan) -> int:
    """Forward and backward (three times the forward), matrix products and mixing.

    Visits before `grad_from` have no backward.
    """
    dim, length = run.model.dim, run.trainer.seq_len
    rank = run.lora.rank
    slots = run.lora.slots(run.largest_plan) if rank else {}
    total = 0
    for position, visit in enumerate(plan.visits):
        shapes = run.model.projections(visit.block)
        forward = sum(2 * i * o for name, (i, o) in shapes.items() if name != "residual")
        forward += run.model.mixer_of(visit.block).flops(dim, length)
        if visit.block in slots:
            forward += sum(2 * rank * sum(shapes[t]) for t in run.lora.targets if t in shapes)
        total += forward * (3 if position >= plan.grad_from else 1)
    return total + 3 * 2 * (run.model.embed_dim or dim) * run.model.vocab_size


def make_plan(run: Run) -> Plan:
    """Everything `recurgolf plan` prints.

    Raises:
        ConfigError: a quantizer's rules that do not fit the model's parameters.
    """
    shapes = shapes_of(run)
    kept = packed_shapes(shapes)
    training = run.plan(1.0)
    return Plan(
        visits=training,
        eval_visits=run.eval_plan,
        params=sum(math.prod(shape) for shape in shapes.values()),
        effective_params=effective(kept, training),
        flops_per_token=flops_per_token(run, training),
        code=Codes(run),
        lines=predicted_lines(run, kept),
        budget_bytes=run.budget.artifact_bytes,
    )


def predicted_lines(run: Run, shapes: dict[str, tuple[int, ...]]) -> list[Line]:
    """Predicted bytes of the model file by component."""
    rules = run.quant.assign(shapes)
    header = {
        "model": to_dict(run.model),
        "looping": to_dict(run.looping),
        "lora": to_dict(run.lora),
        "eval": to_dict(run.eval),
        # Hashes do not shrink: any other will do for one.
        "hashes": [hashlib.sha256(bytes([n])).hexdigest() for n in range(2)],
        "fingerprint": run.fingerprint,
    }
    lines = predict(shapes, rules, run.artifact.codec, header)
    if run.quant.learned(shapes):
        return learned_lines(run, shapes, header)
    if not run.quant.fill_budget:
        return lines
    # One step for all layers that fills what the code leaves; the search will vary it by layer.
    left = run.budget.artifact_bytes - Codes(run).counted.packed_bytes
    finest, coarsest = STEPS[0], STEPS[-1]
    for _ in range(12):
        step = math.sqrt(finest * coarsest)
        tried = predict(shapes, at_step(rules, step), run.artifact.codec, header)
        if round(sum(line.predicted for line in tried)) <= left:
            coarsest, lines = step, tried
        else:
            finest = step
    return lines


def learned_lines(
    run: Run, shapes: dict[str, tuple[int, ...]], header: dict[str, Any]
) -> list[Line]:
    """The bytes that training will aim at, spread evenly: it alone knows where they will go."""
    learned, kept = run.quant.learned(shapes), TensorRule("none", keep_dtype=run.quant.keep_dtype)
    rest = {name: kept for name in shapes if name not in learned}
    lines = {
        line.component: line
        for line in predict({n: shapes[n] for n in rest}, rest, run.artifact.codec, header)
    }
    aim = run.quant.qat.aim(run.budget.artifact_bytes)
    count = sum(map(math.prod, learned.values()))
    bits = PRICED_BITS
    if aim is not None:
        code = Codes(run).counted.packed_bytes
        left = aim - code - sum(line.predicted for line in lines.values())
        if left <= 0:
            raise ConfigError(
                f"a budget of {aim:,} bytes is smaller than what a model of zeros costs: "
                f"{code:,} of code and {aim - code - left:,.0f} of header and floats"
            )
        bits = min(8 * left / count, MOST_BITS)
    for name, shape in learned.items():
        line = lines.setdefault(component(name), Line(component(name), 0, 0.0))
        line.params += math.prod(shape)
        line.predicted += bits * math.prod(shape) / 8
    return sorted(lines.values(), key=lambda line: -line.predicted)


def check_ending(run: Run) -> None:
    """Refuse what would fail only after the training.

    Raises:
        ConfigError: a quantizer's rules that do not fit the model's parameters; a budget that the
            code alone exceeds.
    """
    shapes = packed_shapes(shapes_of(run))
    run.quant.assign(shapes)
    check_budget(Codes(run).counted.packed_bytes, run.budget.artifact_bytes)
    if run.quant.learned(shapes):
        predicted_lines(run, shapes)


def check_budget(code_bytes: int, budget_bytes: int) -> None:
    """Refuse a budget that the code alone exceeds."""
    if code_bytes > budget_bytes:
        raise ConfigError(
            f"budget.artifact_bytes={budget_bytes} is smaller than the code needed to load and "
            f"score the model ({code_bytes:,} bytes packed)"
        )


def plan_table(run: Run) -> str:
    """The plan for people."""
    plan = make_plan(run)
    training = run.trainer
    rows = [
        ("parameters", f"{plan.params:,}"),
        ("effective parameters", f"{plan.effective_params:,}"),
        ("visits in training", f"{plan.visits.num_visits}: {plan.visits.describe()}"),
        ("visits when scoring", f"{plan.eval_visits.num_visits}: {plan.eval_visits.describe()}"),
        ("FLOPs per training token", f"{plan.flops_per_token:,}"),
        ("training tokens", f"{training.steps * training.batch_tokens:,}"),
    ]
    text = [f"{run.name} (fingerprint {run.fingerprint})", ""]
    text += [f"  {name:<26}{value}" for name, value in rows]
    text += ["", f"  {'bytes, predicted':<26}{'params':>12}{'bytes':>12}{'bits/param':>12}"]
    text += byte_lines(plan.lines)
    packed = sum(line.params for line in plan.lines)
    text += [
        f"  {'model file':<26}{packed:>12,}{plan.model_bytes:>12,}",
        f"  {plan.code.counted_name + ', packed':<26}{'':>12}{plan.code_bytes:>12,}",
        f"  {'total':<26}{'':>12}{plan.total_bytes:>12,}",
        f"  {'budget':<26}{'':>12}{plan.budget_bytes:>12,}",
        f"  {'headroom':<26}{'':>12}{plan.headroom:>12,}",
    ]
    text += ["", f"  {'code':<26}{'packed':>12}{'raw':>12}"]
    for name, size in plan.code.to_json()["files"].items():
        counts = "  counts (artifact.code)" if name == plan.code.counted_name else ""
        text.append(f"  {name:<26}{size['packed']:>12,}{size['raw']:>12,}{counts}")
    if any(rule.scale_floor for rule in run.quant.rules):
        text += ["", "  steps have a floor (scale_floor): the predicted bytes are an upper bound"]
    check_budget(plan.code_bytes, plan.budget_bytes)
    return "\n".join(text)


def byte_lines(lines: Sequence[Line]) -> list[str]:
    """One line per component."""
    return [
        f"  {line.component:<26}{line.params:>12,}{line.predicted:>12,.0f}"
        + (f"{8 * line.predicted / line.params:>12.2f}" if line.params else "")
        for line in lines
    ]
