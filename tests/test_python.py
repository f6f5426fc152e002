"""recurgolf from Python: what a notebook shows, and what assigning cannot break."""

import json
import os
import subprocess
import sys

import pytest
from smoke_runs import small

import recurgolf
from recurgolf.conf import options
from recurgolf.config import ConfigError, check_types


def test_one_string_is_the_command_line():
    line = "experiment=smoke lora.rank=2 name='two words'"
    parts = ["experiment=smoke", "lora.rank=2", "name=two words"]
    assert recurgolf.compose(line) == recurgolf.compose(parts)


@pytest.mark.parametrize(
    ("asked", "said"),
    [("smoke", "'smoke' is no override"), (3, "3 is no override"), ("name='x", "no closing")],
    ids=["a word", "a number", "an open quote"],
)
def test_what_is_no_override_is_refused_in_plain_words(asked, said):
    with pytest.raises(ConfigError, match=said):
        recurgolf.compose(asked)


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("trainer", "steps", "ten", "trainer.steps='ten': expected int"),
        ("trainer", "stepps", 10, "trainer.stepps was assigned, but a run has no such field"),
        ("trainer", "steps", True, "trainer.steps=True: expected int"),
        ("model", "mixer", "attention", "model.mixer='attention': expected an object of the class"),
        ("lora", "targets", "mlp", "lora.targets='mlp': expected list"),
        ("", "optimizer", {"kind": "adamw"}, "expected an object of the class OptimizerConfig"),
        ("looping", "passes", 0, "looping.passes=0: at least 1"),
        ("data", "vocab_size", 4096, "smaller than"),
    ],
    ids=lambda value: str(value),
)
def test_a_wrong_value_that_was_assigned_is_refused_before_anything_is_made(
    part, name, value, said, tmp_path
):
    run = recurgolf.compose(["experiment=smoke", "looping=cycle"])
    setattr(getattr(run, part) if part else run, name, value)
    with pytest.raises(ConfigError, match=said):
        recurgolf.train(run, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("experiment", options()["experiment"])
def test_what_composes_has_the_right_types(experiment):
    check_types(recurgolf.compose([f"experiment={experiment}"]))


QUIET = """
import json, sys, recurgolf
run = recurgolf.compose(json.loads(sys.argv[1]))
recurgolf.train(run, "run", quiet=True)
"""


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_quiet_prints_nothing_where_colours_are_forced(tmp_path, ranks):
    overrides = json.dumps(small("trainer.steps=2", f"trainer.devices={ranks}"))
    done = subprocess.run(
        [sys.executable, "-c", QUIET, overrides],
        cwd=tmp_path,
        # As the kernel of a notebook sets them for its own colours.
        env={**os.environ, "FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TERM": "xterm-color"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == done.stderr == ""
    assert "val_bpb" in (tmp_path / "run" / "train.log").read_text()
