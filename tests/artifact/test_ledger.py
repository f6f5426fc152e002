"""The ledger's lines add up: every tensor in one of them, predicted and actual."""

import math

import pytest
from smoke_runs import composed, train

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


def test_every_attempt_of_the_best_codec_is_printed_and_kept():
    run = train("artifact/codec=best", "artifact.codec.codecs=[zlib,none]")
    sections = run.json("ledger.json")["sections"]
    assert {section["title"] for section in sections} >= {"codes 6", "scales float16"}
    for section in sections:
        sizes = {(codec, transform): size for codec, transform, size in section["tried"]}
        assert len(sizes) == 2 * 4
        assert min(sizes.values()) == section["stored_bytes"]
        assert sizes[section["codec"], section["transform"]] == section["stored_bytes"]
        for (codec, transform), size in sizes.items():
            assert f"{size:,}" in run.ended.out and f"{codec} {transform}" in run.ended.out
    codes = next(section for section in sections if section["title"] == "codes 6")
    assert f"{codes['entropy_bytes']:,.0f}" in run.ended.out


def test_both_programs_are_in_the_ledger_and_one_counts():
    run = train()
    code = run.json("ledger.json")["code"]
    assert code["counted"] == "score.py, packed"
    assert code["packed"] == (run.path / "score.py").stat().st_size == run.summary["bytes_code"]
    assert code["files"]["score.py"] == {"packed": code["packed"], "raw": code["raw"]}
    assert code["files"]["train_gpt.py"]["raw"] > code["raw"] > code["packed"]


def test_a_header_is_predicted_from_its_content():
    run = train()
    ledger = run.json("ledger.json")
    line = next(line for line in ledger["components"] if line["component"] == "header")
    assert line["predicted"] == pytest.approx(line["actual"], rel=0.06)
