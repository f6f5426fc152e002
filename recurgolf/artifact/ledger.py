"""Where the bytes go: the plan before training, and the table of the file that exists."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from recurgolf.artifact.codecs import BrotliCodec, Codec
from recurgolf.artifact.decode import library
from recurgolf.artifact.reader import DIGEST_BYTES, PREFIX
from recurgolf.config import to_dict
from recurgolf.quant import TensorRule, predicted_bits
from recurgolf.quant.quantized_tensor import scale_shape

if TYPE_CHECKING:
    from recurgolf.artifact.container import PackTable

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

FLOAT16_BITS = 12.9
"""Coded bits of a stored float16: mantissas do not shrink, signs and exponents do."""
MATRIX_BITS = 14.0
"""The same in a matrix of which neither side is short: its entries are the least alike."""
SCALE_BITS = 10.0
"""The same for the scales of a matrix, which are much alike."""


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


def predict(
    shapes: Mapping[str, Sequence[int]],
    rules: Mapping[str, TensorRule],
    codec: Codec | None = None,
    header: Mapping[str, Any] | None = None,
) -> list[Line]:
    """Predicted bytes per component, by the entropy of the codes (not bits x parameters).

    Weights are taken as Gaussian inside their rows, which those of trained networks are to a
    percent or two of their entropy. Where a rule floors its steps (`scale_floor`), the bytes depend
    on how large the weights will be, and the prediction is an upper bound.

    Args:
        shapes: tensors of the artifact.
        rules: what `Quant.assign` gave for them.
        codec: that shortens the codes; brotli where not given.
        header: the metadata of the file; without it its size is a guess.
    """
    lines: dict[str, Line] = {}
    coded = (codec or BrotliCodec()).expected_bits
    known: dict[tuple[tuple[int, ...], str], float] = {}
    for name, shape in shapes.items():
        line = lines.setdefault(component(name), Line(component(name), 0, 0.0))
        line.params += math.prod(shape)
        alike = (tuple(shape), repr(rules[name]))
        if alike not in known:
            known[alike] = tensor_bytes(tuple(shape), rules[name], coded)
        line.predicted += known[alike]
    lines["header"] = Line("header", 0, header_bytes(shapes, rules, header or {}))
    return sorted(lines.values(), key=lambda line: -line.predicted)


def tensor_bytes(
    shape: tuple[int, ...], rule: TensorRule, coded: Callable[[float], float]
) -> float:
    """Expected bytes of a tensor in the file.

    Args:
        coded: entropy in bits -> bits that the codec takes.
    """
    count, grid = math.prod(shape), rule.grid
    if grid is None or len(shape) != 2:
        bits = MATRIX_BITS if len(shape) == 2 and min(shape) > 16 else FLOAT16_BITS
        return count * (bits + (16 if rule.keep_dtype == "float32" else 0)) / 8
    num_scales = math.prod(scale_shape(shape, grid.group_size, grid.symmetric))
    size = (count * coded(predicted_bits(grid, shape[1])) + num_scales * SCALE_BITS) / 8
    if rule.correction is not None:
        size += rule.correction.predicted_bytes((shape[0], shape[1]))
    return size


def header_bytes(
    shapes: Mapping[str, Sequence[int]],
    rules: Mapping[str, TensorRule],
    metadata: Mapping[str, Any],
) -> float:
    """Expected bytes of the header: the metadata and the list of tensors, compressed."""
    kinds = sorted({_kind(rules[name], len(shape)) for name, shape in shapes.items()})
    sections = [["brotli", "none", 100_000 + i, 2**31 + i] for i in range(2 + len(kinds))]
    entries = [
        [name, kinds.index(_kind(rules[name], len(shape))), list(shape)]
        for name, shape in sorted(shapes.items())
    ]
    content = {"kinds": kinds, "metadata": metadata, "sections": sections, "tensors": entries}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    stored = library("brotli", "brotli").compress(text.encode(), quality=11, lgwin=24)
    # Of a section the checksum and the size are noise; so are the hashes in the metadata.
    return len(stored) + PREFIX.size + DIGEST_BYTES + 5 * len(sections)


def _kind(rule: TensorRule, dims: int) -> str:
    grid = rule.grid if dims == 2 else None
    return rule.keep_dtype if grid is None else f"{rule.method} {grid.bits} {to_dict(grid.clip)}"


def add_actual(lines: list[Line], tensors: Mapping[str, float], header_bytes: int) -> None:
    """Put the stored bytes of the file beside the predicted ones."""
    for line in lines:
        line.actual = sum(
            (size for name, size in tensors.items() if component(name) == line.component),
            start=float(header_bytes if line.component == "header" else 0),
        )


def to_json(
    lines: Sequence[Line],
    code: Mapping[str, Any],
    budget_bytes: int,
    table: PackTable | None = None,
) -> dict[str, Any]:
    """The content of ledger.json.

    Args:
        code: `Codes.to_json`; `packed` is what counts.
        table: of the file, with what every codec and transform would have made of each section.
    """
    actual = [line.actual for line in lines]
    return {
        "components": [vars(line) for line in lines],
        "sections": [] if table is None else [vars(section) for section in table.sections],
        "code": dict(code),
        "budget_bytes": budget_bytes,
        "predicted_bytes": round(sum(line.predicted for line in lines)) + code["packed"],
        "actual_bytes": None
        if None in actual
        else round(sum(size for size in actual if size is not None)) + code["packed"],
    }
