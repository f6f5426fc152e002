"""recurgolf from Python: what a notebook shows, and what assigning cannot break."""

import json
import os
import subprocess
import sys
import types

import pytest
from smoke_runs import small

import recurgolf
from recurgolf.conf import options
from recurgolf.config import ConfigError, check_types
from recurgolf.log import Log
from recurgolf.terminal import terminal_bar


def test_one_string_is_the_command_line():
    line = "experiment=smoke lora.rank=2 name='two words'"
    parts = ["experiment=smoke", "lora.rank=2", "name=two words"]
    assert recurgolf.compose(line) == recurgolf.compose(parts)


@pytest.mark.parametrize(
    ("asked", "said"),
    [("smoke", "'smoke' is no override"), ([3], "3 is no override"), ("name='x", "no closing")],
    ids=["a word", "a number", "an open quote"],
)
def test_what_is_no_override_is_refused_in_plain_words(asked, said):
    with pytest.raises(ConfigError, match=said):
        recurgolf.compose(asked)


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("trainer", "steps", "ten", "trainer.steps='ten': expected int"),
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
recurgolf.train(run, "run", quiet=json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize(("devices", "quiet"), [(1, True), (2, True), (2, False)])
def test_quiet_prints_nothing_and_ranks_in_a_notebook_no_control_codes(devices, quiet, tmp_path):
    overrides = json.dumps(small("trainer.steps=2", f"trainer.devices={devices}"))
    done = subprocess.run(
        [sys.executable, "-c", QUIET, overrides, json.dumps(quiet)],
        cwd=tmp_path,
        # As the kernel of a notebook sets them for its own colours.
        env={**os.environ, "FORCE_COLOR": "1", "CLICOLOR_FORCE": "1", "TERM": "xterm-color"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stdout + done.stderr
    assert (done.stdout == "") == quiet
    assert "val_bpb" in (tmp_path / "run" / "train.log").read_text()


class Display:
    """IPython's, as far as it is used here: keeps what stands at each place."""

    def __init__(self) -> None:
        self.places: list[list[str]] = []

    def __call__(self, content, *, raw, display_id):
        assert raw and display_id
        self.places.append([content["text/plain"]])
        place = self.places[-1]
        shown = lambda content, raw: place.append(content["text/plain"])  # noqa: E731
        return types.SimpleNamespace(update=shown)


def test_a_notebook_has_one_bar_that_is_updated(monkeypatch, capsys):
    ipython, display = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    shell = types.SimpleNamespace(kernel=object())
    ipython.get_ipython = lambda: shell  # type: ignore[attr-defined]
    display.display = shown = Display()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    monkeypatch.setattr("recurgolf.notebook.SECONDS_BETWEEN_UPDATES", 0.0)
    with Log(None, bar=terminal_bar).bar("training", 4) as bar:
        for step in range(1, 5):
            bar.at(step, f"loss {1 / step:.2f}", line=step == 2)
    assert len(shown.places) == 1, "one place, however many steps"
    assert [text.split()[-1] for text in shown.places[0][1:5]] == ["1.00", "0.50", "0.33", "0.25"]
    assert "4/4" in shown.places[0][-1]
    assert capsys.readouterr().out == "", "no line besides"
