"""Where the bytes go: the plan before training, and the table of the file that exists."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from recurgolf.quant import TensorRule, predicted_bytes

COMPONENTS = {
    "embed": "embedding",
    "bigram": "embedding",
    "value_embed": "embedding",
    "lm_head": "head",
    "adapters": "adapters",
    "mixer": "mixer",
    "mlp": "mlp",
}
"""Part of a parameter's name -> line of the table; what has none is `gains and mixes`."""

FLOAT16_BYTES = 2 * 0.93
"""A stored float16 that brotli has looked at: mantissas do not shrink, exponents do."""
HEADER_BYTES = 900
"""Metadata and the list of tensors, compressed; a little more for every ten tensors."""


def component(name: str) -> str:
    """The line of the table that a parameter belongs to."""
    for part in name.split("."):
        if part in COMPONENTS:
            return COMPONENTS[part]
    return "gains and mixes"


@dataclass
class Line:
    """Bytes and parameters of one component."""

    component: str
    params: int
    predicted: float
    actual: float | None = None


def predict(shapes: Mapping[str, Sequence[int]], rules: Mapping[str, TensorRule]) -> list[Line]:
    """Predicted bytes per component, by the entropy of the codes (not bits x parameters).

    Args:
        shapes: tensors of the artifact.
        rules: what `Quant.assign` gave for them.
    """
    lines: dict[str, Line] = {}
    for name, shape in shapes.items():
        count, grid = math.prod(shape), rules[name].grid
        if grid is not None and len(shape) == 2:
            size = predicted_bytes(grid, (shape[0], shape[1]))
        else:
            size = count * FLOAT16_BYTES * (2 if rules[name].keep_dtype == "float32" else 1)
        line = lines.setdefault(component(name), Line(component(name), 0, 0.0))
        line.params += count
        line.predicted += size
    lines["header"] = Line("header", 0, HEADER_BYTES + 9 * len(shapes))
    return sorted(lines.values(), key=lambda line: -line.predicted)


def add_actual(lines: list[Line], tensors: Mapping[str, float], header_bytes: int) -> None:
    """Put the stored bytes of the file beside the predicted ones."""
    for line in lines:
        line.actual = sum(
            (size for name, size in tensors.items() if component(name) == line.component),
            start=float(header_bytes if line.component == "header" else 0),
        )


def to_json(lines: Sequence[Line], code: Mapping[str, Any], budget_bytes: int) -> dict[str, Any]:
    """The content of ledger.json."""
    actual = [line.actual for line in lines]
    return {
        "components": [vars(line) for line in lines],
        "code": dict(code),
        "budget_bytes": budget_bytes,
        "predicted_bytes": round(sum(line.predicted for line in lines)) + code["packed"],
        "actual_bytes": None
        if None in actual
        else round(sum(size for size in actual if size is not None)) + code["packed"],
    }
