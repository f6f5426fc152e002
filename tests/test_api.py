"""From Python as from the command line, and with components of one's own."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import recurgolf
from smoke_runs import RunFolder, small, train
from test_end_to_end import scored_alone

PLUGIN = Path(__file__).parent / "fixtures" / "plugin"

IN_PYTHON = """
import json, os, sys
overrides = json.loads(sys.argv[1])
import recurgolf, torch._dynamo  # which sets a variable of its own
environment, path, folder = dict(os.environ), list(sys.path), os.getcwd()
found = []
for _ in range(2):
    run = recurgolf.compose(overrides)
    assert not os.path.exists("outputs") or found, "composing leaves nothing behind"
    summary = recurgolf.train(run)
    found.append([summary.val_bpb, summary.val_loss, summary.artifact_bytes, summary.folder])
assert (dict(os.environ), sys.path, os.getcwd()) == (environment, path, folder)
print(json.dumps(found))
"""


def test_training_from_python_is_the_command_and_leaves_no_state_behind(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IN_PYTHON, json.dumps(small("trainer.steps=2"))],
        cwd=tmp_path,
        # Another order of Python's sets than in the process that runs the commands.
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = json.loads(done.stdout.splitlines()[-1])
    assert first[:3] == second[:3]
    assert first[3] != second[3]
    expected = train("trainer.steps=2").summary
    assert first[:2] == [expected["val_bpb"], expected["val_loss"]]
    assert first[2] == expected["artifact_bytes"]
    assert (tmp_path / first[3] / "summary.json").exists()


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A user's folder with a YAML folder; its module lies where the command is typed."""
    return shutil.copytree(PLUGIN, tmp_path_factory.mktemp("user") / "home")


def mine(home: Path, folder: str, *overrides: str) -> RunFolder:
    # The experiment is the user's own; the text is the small one.
    asked = [o for o in small(*overrides) if not o.startswith("experiment=")]
    line = ["--config-dir", "conf", "experiment=mine", *asked, f"hydra.run.dir={folder}"]
    ended = recurgolf(*line, cwd=home)
    return RunFolder(home / folder, ended.finished())


@pytest.fixture(scope="module")
def own(home) -> RunFolder:
    return mine(home, "own")


def test_a_config_folder_with_own_components_trains(own):
    assert own.json("run.json")["looping"] == {"kind": "growing", "most": 3}
    visits = [event["loop/visits"] for event in own.events if "loop/visits" in event]
    assert visits == [2, 2, 2, 4, 4, 4, 6, 6, 6]


def test_its_file_is_scored_again_with_the_same_digits(own, home):
    ended = recurgolf("evaluate", own.path, "--json", "--trust", cwd=home).finished()
    assert json.loads(ended.out)["plain"]["val_bpb"] == own.summary["val_bpb"]


def test_the_own_module_goes_into_the_packed_code(own, tmp_path):
    assert "growing_loops" in own.json("ledger.json")["code"]["modules"]
    assert scored_alone(own, tmp_path)["plain"]["val_bpb"] == own.summary["val_bpb"]


@pytest.mark.slow
def test_ranks_know_the_own_component_too(own, home):
    two = mine(home, "two", "trainer.devices=2")
    assert two.json("run.json")["looping"]["kind"] == "growing"
    assert two.summary["val_bpb"] == pytest.approx(own.summary["val_bpb"], abs=0.02)
    assert two.summary["artifact_bytes"] == pytest.approx(own.summary["artifact_bytes"], rel=0.02)


def test_plan_and_python_compose_it_as_the_command_does(own, home):
    program = (
        "import json, sys, recurgolf\n"
        "run = recurgolf.compose(['experiment=mine'], config_dir='conf')\n"
        "print(json.dumps([run.name, run.plan(1.0).num_visits, run.trainer.steps]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=home, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == ["mine", 6, 9]
    line = ["plan", "--config-dir", "conf", "experiment=mine", "looping.most=4"]
    assert "8: (0 1)x4" in recurgolf(*line, cwd=home).finished().out


def test_an_own_option_is_checked_like_any_other(home):
    line = ["--config-dir=conf", "experiment=mine"]
    assert "looping.most=1" in recurgolf(*line, "looping.most=1", cwd=home).refused()
    message = recurgolf(*line, "looping.mots=2", cwd=home).refused()
    assert "looping has no key 'mots'" in message


def test_a_plugin_that_cannot_be_imported_is_named(home, tmp_path):
    shutil.copytree(home / "conf", tmp_path / "conf")
    message = recurgolf("--config-dir", "conf", "experiment=mine", cwd=tmp_path).refused()
    assert "plugins: cannot import 'growing_loops'" in message
