"""The code that counts: all that scoring needs, nothing that training needs, and the same bytes."""

import ast
import functools

import pytest
from smoke_runs import composed

from recurgolf.artifact.code import PackedCode, code_of, stripped


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
    assert code.packed_bytes < code.raw_bytes / 3
    assert code.packed_bytes < 50_000
    ast.parse(code.source)


def test_the_same_run_gives_the_same_bytes():
    again = code_of(composed("experiment=smoke"))
    assert again.source == packed("smoke").source


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
