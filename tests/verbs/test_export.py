"""An exported folder scores and trains alone, to the digit and to the byte."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import recurgolf
from smoke_runs import composed, train

from recurgolf.conf import options
from recurgolf.config import to_dict
from recurgolf.counted.code import code_of
from recurgolf.standalone import console

# Every finder that is there forgets these names; the program then puts its own in front.
ALONE = """
import runpy, sys
WITHOUT = ("recurgolf", "hydra", "omegaconf", "wandb", "rich", "scipy")
class Finder:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in WITHOUT:
            return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Finder(finder) for finder in sys.meta_path]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(program, arguments):
    """An exported program where recurgolf cannot be imported."""
    return subprocess.run(
        [sys.executable, "-I", "-c", ALONE, program, *arguments],
        cwd=program.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of one seed's export."""
    folder = tmp_path_factory.mktemp("export") / "one"
    recurgolf("export", train().path, folder, "--author", "A. Uthor", cwd=folder.parent).finished()
    return folder


def test_it_scores_alone_digit_for_digit(exported):
    ended = recurgolf("export", "--check", exported, cwd=exported.parent).finished()
    assert f"{train().summary['val_bpb']!r}: summary.json's, digit for digit" in ended.out


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param(("summary.json",), marks=pytest.mark.slow),
        ("summary.json", "submission.json"),
    ],
)
def test_another_score_is_told_with_both_numbers(exported, tmp_path, changed):
    shutil.copytree(exported, tmp_path / "told")
    told = train().summary["val_bpb"] + 1e-12
    for name in changed:
        path = tmp_path / "told" / name
        content = json.loads(path.read_text())
        content["val_bpb"] = told
        path.write_text(json.dumps(content))
    ended = recurgolf("export", "--check", tmp_path / "told", cwd=tmp_path)
    assert ended.code == 1
    assert repr(train().summary["val_bpb"]) in ended.out and repr(told) in ended.out


def test_a_submission_that_says_another_score(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "told")
    path = tmp_path / "told" / "submission.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "val_bpb": 1.0}))
    ended = recurgolf("export", "--check", tmp_path / "told", cwd=tmp_path)
    assert ended.code == 1 and "submission.json says val_bpb 1.0" in ended.out


def test_an_edited_run_is_not_exported_and_the_audit_s_state_is_told(exported, tmp_path):
    entry = json.loads((exported / "submission.json").read_text())
    assert entry["audit"] == {"1337": "not audited"}
    assert "Audit: not audited." in (exported / "README.md").read_text()
    run = tmp_path / "run"
    shutil.copytree(train().path, run)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps({**summary, "val_bpb": 1.0}))
    assert "summary.json was changed" in recurgolf("export", run, "x", cwd=tmp_path).refused()
    (run / "summary.json").write_text(json.dumps({**summary, "fingerprint": "0" * 16}))
    assert "summary.json is of run" in recurgolf("export", run, "x", cwd=tmp_path).refused()
    config = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps({**config, "plugins": ["not_installed_here"]}))
    assert "--trust" in recurgolf("export", run, "x", cwd=tmp_path).refused()


def test_training_again_gives_the_same_artifact(exported, tmp_path):
    done = run_alone(exported / "train_gpt.py", ["--folder", str(tmp_path)])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "artifact.bin").read_bytes() == (train().path / "artifact.bin").read_bytes()
    again = json.loads((tmp_path / "summary.json").read_text())
    for key in ("val_bpb", "pre_quant_val_bpb", "artifact_bytes", "bytes_code", "fingerprint"):
        assert again[key] == train().summary[key], key


@pytest.mark.slow
def test_another_seed_trains_another_model(exported, tmp_path):
    arguments = ["--folder", str(tmp_path), "--seed", "7"]
    done = run_alone(exported / "train_gpt.py", arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "summary.json").read_text())["seed"] == 7
    assert (tmp_path / "artifact.bin").read_bytes() != (train().path / "artifact.bin").read_bytes()


@pytest.mark.slow
def test_two_ranks_under_torchrun_agree_with_one(exported, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    program = [str(exported / "train_gpt.py"), "--folder", str(tmp_path / "ranks")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, *program], cwd=tmp_path, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    ours = json.loads((tmp_path / "ranks" / "summary.json").read_text())
    assert ours["environment"]["ranks"] == 2
    assert ours["pre_quant_val_bpb"] == pytest.approx(train().summary["pre_quant_val_bpb"], 1e-4)


@pytest.mark.slow
def test_a_run_of_several_ranks_starts_them_itself(tmp_path):
    run = train("trainer.devices=2")
    recurgolf("export", run.path, "out", cwd=tmp_path).finished()
    folder = tmp_path / "again"
    done = run_alone(tmp_path / "out" / "train_gpt.py", ["--folder", str(folder)])
    # torchrun starts the program by its path: the ranks are ordinary interpreters.
    assert done.returncode == 0, done.stderr
    assert (folder / "artifact.bin").read_bytes() == (run.path / "artifact.bin").read_bytes()
    recurgolf("export", "--check", "out", cwd=tmp_path).finished()


def test_the_folder_has_what_the_challenge_asks_for(exported):
    entry = json.loads((exported / "submission.json").read_text())
    summary, code = train().summary, (exported / "train_gpt.py").stat().st_size
    assert entry["author"] == "A. Uthor"
    assert entry["val_bpb"] == summary["val_bpb"] and entry["val_bpb_std"] is None
    assert entry["bytes_code"] == code
    assert entry["bytes_total"] == (exported / "artifact.bin").stat().st_size + code
    assert entry["seeds"] == [1337] and entry["seed_results"]["1337"]["steps"] == summary["steps"]
    assert entry["compliance"]["artifact_under_16000000_bytes"] is True
    needed = {"github_id", "name", "blurb", "date", "track", "val_loss", "hardware"}
    assert needed <= entry.keys()
    readme = (exported / "README.md").read_text()
    assert f"{summary['val_bpb']:.6f}" in readme and "--evaluate" in readme and "--data" in readme
    assert (exported / "train_seed1337.log").read_text() == (train().path / "train.log").read_text()
    assert (exported / "artifact.bin").read_bytes() == (train().path / "artifact.bin").read_bytes()


def test_the_requirements_are_what_the_program_imports(exported):
    lines = (exported / "requirements.txt").read_text().splitlines()
    named = {line.partition("==")[0] for line in lines}
    assert {"torch", "numpy", "sentencepiece", "brotli"} <= named
    assert not named & {"hydra-core", "omegaconf", "wandb", "rich", "scipy"}
    assert all("==" in line and "+" not in line for line in lines)


def test_the_readable_source_is_that_of_the_package(exported):
    ours = exported / "source" / "recurgolf" / "model" / "transformer.py"
    package = Path(__file__).parents[2] / "recurgolf"
    assert ours.read_text() == (package / "model" / "transformer.py").read_text()
    assert not (exported / "source" / "recurgolf" / "cli.py").exists()


def test_several_seeds_give_mean_and_deviation(tmp_path):
    other = train("seed=2")
    recurgolf("export", train().path, other.path, "both", cwd=tmp_path).finished()
    entry = json.loads((tmp_path / "both" / "submission.json").read_text())
    both = [train().summary["val_bpb"], other.summary["val_bpb"]]
    assert entry["seeds"] == [1337, 2]
    assert entry["val_bpb"] == statistics.mean(both)
    assert entry["val_bpb_std"] == statistics.stdev(both) > 0
    assert entry["seed_results"]["2"]["val_bpb"] == both[1]
    assert (tmp_path / "both" / "train_seed2.log").exists()


def test_what_is_no_experiment_over_seeds_is_refused(exported, tmp_path):
    other = train("seed=2", "lora.rank=2")
    why = recurgolf("export", train().path, other.path, "x", cwd=tmp_path).refused()
    assert "lora.rank is 2, not 1" in why
    why = recurgolf("export", train().path, train().path, "x", cwd=tmp_path).refused()
    assert "seed 1337 comes twice" in why
    why = recurgolf("export", train().path, exported, cwd=tmp_path).refused()
    assert "not empty" in why
    (tmp_path / "unfinished").mkdir()
    shutil.copy(train().path / "run.json", tmp_path / "unfinished")
    why = recurgolf("export", "unfinished", "x", cwd=tmp_path).refused()
    assert "did not finish" in why
    assert not (tmp_path / "x").exists()


def test_the_run_can_count_the_program_that_trains(tmp_path):
    run = train("artifact.code=train", "budget.artifact_bytes=65000")
    ledger = run.json("ledger.json")
    size = (run.path / "train_gpt.py").stat().st_size
    assert ledger["code"]["counted"] == "train_gpt.py, packed"
    assert ledger["code"]["packed"] == size == run.summary["bytes_code"]
    assert run.ended.code == 3 and run.summary["status"] == "over_budget"
    ended = recurgolf("export", run.path, "out", cwd=tmp_path)
    assert ended.code == 3 and "ABOVE" in ended.out
    assert (tmp_path / "out" / "train_gpt.py").stat().st_size == size


@pytest.mark.slow
@pytest.mark.parametrize("experiment", options()["experiment"])
def test_every_experiment_s_program_starts_alone(experiment, tmp_path):
    from recurgolf.counted.code import training_code_of

    run = composed(f"experiment={experiment}")
    for name, code in (("score.py", code_of(run)), ("train_gpt.py", training_code_of(run))):
        (tmp_path / name).write_text(code.source)
        done = run_alone(tmp_path / name, ["--help"])
        assert done.returncode == 0, done.stderr
        assert "--data" in done.stdout


def test_the_plain_console_has_the_names_it_stands_in_for(capsys):
    table = console.Table(box=console.box.SIMPLE_HEAD)
    for heading in ("bytes", "of"):
        table.add_column(heading, justify="right")
    table.add_row("code", "1,234")
    table.add_section()
    console.Console(highlight=False).print(table)
    assert capsys.readouterr().out.splitlines() == ["bytes     of", "code   1,234"]
    assert to_dict(composed("experiment=smoke"))["artifact"]["code"] == "score"
