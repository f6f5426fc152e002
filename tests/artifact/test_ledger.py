"""The ledger's lines add up: every tensor in one of them, predicted and actual."""

import math

import pytest
from smoke_runs import composed

from recurgolf.artifact.ledger import add_actual, component, predict, to_json
from recurgolf.plan import packed_shapes, shapes_of

RUN = composed("experiment=universal_rank1_cpu")
SHAPES = packed_shapes(shapes_of(RUN))
LINES = predict(SHAPES, RUN.quant.assign(SHAPES))


def test_every_parameter_is_in_one_line():
    by_line = {line.component: line.params for line in LINES}
    assert sum(by_line.values()) == sum(math.prod(shape) for shape in SHAPES.values())
    for name in by_line:
        own = [math.prod(s) for n, s in SHAPES.items() if component(n) == name]
        assert by_line[name] == sum(own)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("embed.weight", "embedding"),
        ("blocks.0.mixer.q_proj.weight", "mixer"),
        ("blocks.3.mlp.up_proj.weight", "mlp"),
        ("adapters.banks.1.q_proj.lora_a", "adapters"),
        ("blocks.0.attn_scale", "gains and mixes"),
    ],
)
def test_tensors_are_told_by_their_names(name, line):
    assert component(name) == line


def test_actual_bytes_are_those_of_the_file():
    lines = predict(SHAPES, RUN.quant.assign(SHAPES))
    sizes = {name: float(7 + i) for i, name in enumerate(SHAPES)}
    add_actual(lines, sizes, header_bytes=500)
    assert sum(line.actual or 0 for line in lines) == sum(sizes.values()) + 500
    code = {"packed": 1000, "raw": 5000}
    assert to_json(lines, code, 1)["actual_bytes"] == sum(sizes.values()) + 500 + 1000


def test_before_there_is_a_file_no_actual_bytes_are_claimed():
    found = to_json(LINES, {"packed": 1000, "raw": 5000}, 10**6)
    assert found["actual_bytes"] is None
    assert found["predicted_bytes"] == round(sum(line.predicted for line in LINES)) + 1000
