"""The code that counts: all that scoring needs, nothing that training needs, and the same bytes."""

import ast
import functools

import pytest
from smoke_runs import composed

import recurgolf.counted.code as counted_code
from recurgolf.counted.code import Codes, PackedCode, code_of, training_code_of
from recurgolf.counted.minify import stripped

CHOICES = ("score", "train")


@functools.cache
def packed(name: str) -> PackedCode:
    return code_of(composed(f"experiment={name}"))


@pytest.mark.parametrize("name", ["smoke", "demo", "universal_rank1", "gated_delta_lora"])
def test_training_code_is_left_out_and_the_model_is_in(name):
    modules = set(packed(name).modules)
    assert {"recurgolf.artifact.score", "recurgolf.model.transformer"} <= modules
    for part in ("training.trainer", "optim.muon", "cli", "tracker", "quant.gptq", "compare.sweep"):
        assert f"recurgolf.{part}" not in modules


def test_the_size_is_that_of_a_readable_program():
    code = packed("smoke")
    assert code.packed_bytes == len(code.source.encode())
    assert code.packed_bytes < code.raw_bytes / 5
    assert code.packed_bytes < 30_000
    ast.parse(code.source)


@functools.cache
def training(name: str, *overrides: str) -> PackedCode:
    return training_code_of(composed(f"experiment={name}", *overrides))


def test_the_program_that_retrains_the_looped_record_is_within_60_kilobytes_and_its_gptq():
    code = training("per_iteration_lora")
    # Calibration runs the network over training text: GPTQ brings more code than rounding.
    rounding = training("per_iteration_lora", "quant=int6")
    assert rounding.packed_bytes <= 60_000
    assert code.packed_bytes <= rounding.packed_bytes + 3_500
    ast.parse(code.source)
    # As many bytes to whoever counts: in the file, as UTF-8, as characters.
    assert code.source.isascii()


def test_it_needs_neither_the_command_line_nor_what_only_watches():
    code = training("per_iteration_lora")
    known = {"brotli", "numpy", "safetensors", "sentencepiece", "torch"}
    assert {"torch", "sentencepiece"} <= set(code.libraries) <= known
    modules = set(code.modules)
    assert {"recurgolf.training.trainer", "recurgolf.optim.muon"} <= modules
    assert not modules & {
        "recurgolf.cli",
        "recurgolf.composing",
        "recurgolf.overrides",
        "recurgolf.counted.tree_shaking",
    }


def test_what_counts_is_the_run_s_choice_and_both_sizes_are_told():
    score, train = (Codes(composed("experiment=smoke", f"artifact.code={c}")) for c in CHOICES)
    assert score.counted is score.score and train.counted is train.train
    told = train.to_json()
    assert told["counted"] == "train_gpt.py, packed"
    assert told["packed"] == train.train.packed_bytes > told["files"]["score.py"]["packed"]
    assert told["raw"] == train.train.raw_bytes > train.train.packed_bytes


def test_a_program_reads_only_the_codecs_that_its_artifact_can_have():
    usual = packed("smoke")
    ans = code_of(composed("experiment=smoke", "artifact/codec=ans"))
    assert ans.packed_bytes > usual.packed_bytes
    assert ans.packed_bytes - usual.packed_bytes < 1_500


@pytest.mark.parametrize("name", ["smoke", "gated_delta_lora"])
def test_what_is_packed_is_what_comes_out(name):
    """The blob in the source, decoded by the source's own lines, is the packed modules."""
    code = packed(name)
    scope: dict = {}
    exec(code.source.split("class Packed")[0], scope)
    assert list(scope["CODE"]) == code.modules
    for source in scope["CODE"].values():
        compile(source, "packed", "exec")


def test_the_same_run_gives_the_same_bytes():
    first = packed("smoke").source
    counted_code._shaken.cache_clear()
    assert code_of(composed("experiment=smoke")).source == first


def test_what_a_run_does_not_use_does_not_count():
    assert "recurgolf.looping" in packed("smoke").modules
    without = set(packed("parameter_golf_baseline").modules)
    assert "recurgolf.model.mixers.delta_rule" not in without
    assert "recurgolf.model.mixers.delta_rule" in packed("gated_delta_lora").modules


SOURCE = '''
"""A module."""
from __future__ import annotations
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import nothing_of_that_name

class A:
    """A class."""
    x: int = 3
    """A field that keeps its type, which dataclasses read."""

    def only_text(self) -> int:
        """Nothing else."""

def double(n: int, *, times: float = 2) -> float:
    # A comment.
    """Doubles."""
    return n * times
'''


def test_stripping_keeps_what_runs_and_drops_what_explains():
    text = stripped(SOURCE)
    scope: dict = {}
    exec(text, scope)
    assert scope["double"](4) == 8
    assert scope["A"]().only_text() is None
    assert scope["A"].__annotations__ == {"x": "int"}
    for gone in ("A module", "A class", "Doubles", "A comment", "nothing_of_that_name", "-> float"):
        assert gone not in text
