"""A state dict through its assigned rules: the methods, and everything at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from recurgolf.config import REGISTRY, option, to_dict
from recurgolf.quant.gptq import gptq_quantize_many, hessian_error
from recurgolf.quant.lqer import correct
from recurgolf.quant.quantized_tensor import QuantizedTensor, Stored, dequantize_state
from recurgolf.quant.quantizer_grid import QuantizerGrid
from recurgolf.quant.rtn import checked_scales, round_to_grid
from recurgolf.quant.rules import TensorRule

if TYPE_CHECKING:
    from recurgolf.quant.fill import Filled


@dataclass(frozen=True)
class MethodReport:
    """What quantizing one tensor took; see `GptqResult` for the fields."""

    name: str
    method: str
    error: float
    """Mean squared error of the weight (rtn), Hessian-weighted error (gptq)."""
    dead_columns: int = 0
    damping: float = 0.0
    retries: int = 0
    corrected: float | None = None
    """The error with the low-rank correction, where there is one."""


class QuantizedState(dict[str, Stored]):
    """Tensors by name, quantized or kept, in the order of the state they come from.

    Attributes:
        reports: one for every quantized tensor.
        filled: how bits and clips were chosen, where a search chose them.
        step_share: the share of their rules' steps that tensors have (`quant.tolerance`).
    """

    filled: Filled | None = None
    step_share = 1.0

    def __init__(self, tensors: Mapping[str, Stored], reports: list[MethodReport]):
        super().__init__(tensors)
        self.reports = reports

    def joined(self, other: QuantizedState) -> QuantizedState:
        """Both, of different tensors."""
        return QuantizedState({**self, **other}, self.reports + other.reports)


class Method:
    """How the codes of several tensors are found; registered in the group `quant/method`."""

    def quantize(
        self,
        weights: Mapping[str, Tensor],
        rules: Mapping[str, TensorRule],
        grams: Mapping[str, Tensor],
    ) -> Mapping[str, tuple[Stored, MethodReport | None]]:
        """Stored form and report of every weight; `grams` may lack any of them."""
        raise NotImplementedError


@option("quant/method", "none")
class Keep(Method):
    """Floats in `keep_dtype`, everything else untouched."""

    def quantize(self, weights, rules, grams):
        return {
            name: (
                weight.to(getattr(torch, rules[name].keep_dtype))
                if weight.is_floating_point()
                else weight,
                None,
            )
            for name, weight in weights.items()
        }


@option("quant/method", "rtn")
class RoundToNearest(Method):
    """Every row on its own, no calibration."""

    def quantize(self, weights, rules, grams):
        done = {}
        for name, weight in weights.items():
            spec = _grid(rules[name])
            codes, grid = round_to_grid(weight, spec)
            stored = _stored(codes.to(torch.int8), checked_scales(grid, weight), "rtn", spec)
            error = float((stored.dequantize() - weight.float()).square().mean())
            done[name] = (stored, MethodReport(name, "rtn", error))
        return done


@option("quant/method", "gptq")
class Gptq(Method):
    """Column by column with the Gram matrices; layers of one shape and rule together."""

    def quantize(self, weights, rules, grams):
        missing = [name for name in weights if name not in grams]
        if missing:
            raise ValueError(
                f"quant: gptq is asked for {', '.join(missing)}, but calibration has no Gram "
                "matrix for it; use method rtn there"
            )
        by_rule: dict[str, list[str]] = {}
        for name in weights:
            by_rule.setdefault(repr(rules[name]), []).append(name)
        done = {}
        for names in by_rule.values():
            rule = rules[names[0]]
            results = gptq_quantize_many(
                [weights[name] for name in names],
                [grams[name] for name in names],
                _grid(rule),
                block_size=rule.block_size,
                damping=rule.damping,
                act_order=rule.act_order,
            )
            for name, r in zip(names, results, strict=True):
                stored = _stored(r.codes, r.scales, "gptq", _grid(rule))
                report = MethodReport(name, "gptq", r.error, r.dead_columns, r.damping, r.retries)
                done[name] = (stored, report)
        return done


def quantize_state(
    state: Mapping[str, Tensor],
    assignment: Mapping[str, TensorRule],
    grams: Mapping[str, Tensor] | None = None,
) -> QuantizedState:
    """Quantize a state dict by `Quant.assign`'s rules.

    Args:
        grams: Gram matrix [cols, cols] of the inputs, by weight name, for tensors under gptq.

    Raises:
        ValueError: a tensor without a rule, gptq without a Gram matrix, weights not finite.
    """
    by_method: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        if name not in assignment:
            raise ValueError(f"quant: {name!r} is in the state but not in the assignment")
        method = assignment[name].method if tensor.is_floating_point() else "none"
        by_method.setdefault(method, {})[name] = tensor.detach().cpu()
    done: dict[str, tuple[Stored, MethodReport | None]] = {}
    for method, weights in by_method.items():
        quantizer: Method = REGISTRY["quant/method"][method]()
        done.update(quantizer.quantize(weights, assignment, grams or {}))
    found = QuantizedState(
        {name: done[name][0] for name in state},
        [report for name in state if (report := done[name][1])],
    )
    return _corrected(found, state, assignment, grams or {})


def _corrected(
    found: QuantizedState,
    state: Mapping[str, Tensor],
    assignment: Mapping[str, TensorRule],
    grams: Mapping[str, Tensor],
) -> QuantizedState:
    """With the low-rank corrections that the rules ask for."""
    parts: dict[str, Stored] = {}
    reports = []
    for report in found.reports:
        name, correction = report.name, assignment[report.name].correction
        if correction is not None:
            weight, stored = state[name].detach().cpu().float(), found[name]
            assert isinstance(stored, QuantizedTensor)
            # A correction is judged as the quantizer was: by inputs where it knew them.
            gram = grams.get(name) if report.method == "gptq" else None
            factors = correct(name, weight - stored.dequantize(), correction, gram)
            left = weight - dequantize_state({name: stored, **factors})[name]
            error = left.square().mean() if gram is None else hessian_error(left, gram)
            report = replace(report, corrected=float(error))
            parts.update(factors)
        reports.append(report)
    return QuantizedState({**found, **parts}, reports)


def describe_clip(spec: QuantizerGrid) -> str:
    """`sigma k=12.85`: the clip rule in the artifact's header and in tables."""
    fields = dict(to_dict(spec.clip))
    kind = fields.pop("kind", type(spec.clip).__name__)
    return " ".join([kind, *(f"{key}={value}" for key, value in fields.items())])


def _grid(rule: TensorRule) -> QuantizerGrid:
    assert rule.grid is not None, "only kept tensors have no grid"
    return rule.grid


def _stored(codes: Tensor, scales: Tensor, method: str, spec: QuantizerGrid) -> QuantizedTensor:
    clip = describe_clip(spec)
    return QuantizedTensor(codes, scales, spec.bits, spec.group_size, spec.symmetric, method, clip)
