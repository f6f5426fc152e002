"""Runs are told apart by what was varied: in W&B, and on the board."""

import dataclasses
import json

import pytest
from smoke_runs import small

from recurgolf import compose
from recurgolf.compare.board import board_data
from recurgolf.compare.runs import FoundRun
from recurgolf.multirun import of_sweep, sweep_jobs, varied_keys
from recurgolf.tracker import _id_from_environment, _short
from recurgolf.training.report import result_lines
from recurgolf.training.summary import Summary


def test_a_sweep_of_three_ranks_and_three_seeds_has_three_groups():
    line = ["experiment=smoke", "tracker=offline", "lora.rank=1,2,3", "seed=1,2,3"]
    varied = varied_keys(line)
    runs = [of_sweep(compose(job), job, varied) for job in sweep_jobs(line)]
    groups = [run.tracker.group_of(run.name) for run in runs]
    assert sorted(set(groups)) == [f"smoke lora.rank={rank}" for rank in (1, 2, 3)]
    assert {groups.count(group) for group in groups} == {3}
    assert len({run.setting for run in runs}) == 3
    assert len({(group, run.chance) for group, run in zip(groups, runs, strict=True)}) == 9
    # The group is said to those who watch, and no part of the result.
    plain = [compose(job).fingerprint for job in sweep_jobs(line)]
    assert [run.fingerprint for run in runs] == plain


def test_a_group_of_ones_own_is_kept():
    line = ["experiment=smoke", "tracker=offline", "tracker.group=mine", "lora.rank=1"]
    run = of_sweep(compose(line), line, ["lora.rank"])
    assert run.tracker.group_of(run.name) == "mine"


def test_the_id_of_the_environment_is_given_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RECURGOLF_CACHE", str(tmp_path))
    monkeypatch.setenv("WANDB_RUN_ID", "agent7")
    assert [_id_from_environment() for _ in range(3)] == ["agent7", None, None]
    monkeypatch.setenv("WANDB_RUN_ID", "agent8")
    assert _id_from_environment() == "agent8"


def test_long_names_stay_different():
    long = [_short("x" * 200 + end) for end in "ab"]
    assert len(set(long)) == 2 and max(map(len, long)) == 128


def found(folder, config, seed, val_bpb, text="t1", ended=0.0):
    summary = {"val_bpb": val_bpb, "text": {"fingerprint": text}, "status": "finished"}
    summary |= {"val_tokens": 40, "val_bytes": 100}
    folder.mkdir()
    return FoundRun(folder, {**config, "seed": seed}, summary, ended)


def test_the_board_counts_a_seed_once_and_keeps_texts_apart(tmp_path):
    config = compose(small()).to_dict()
    runs = [
        found(tmp_path / "a", config, 1, 2.0, ended=1),
        found(tmp_path / "b", config, 1, 2.1, ended=2),
        found(tmp_path / "c", config, 2, 2.2),
        found(tmp_path / "d", config, 1, 9.0, text="other"),
    ]
    data = board_data(runs, tmp_path, "x")
    assert json.dumps(data)
    groups = {
        run["folder"]: (data["groups"][run["group"]], run["repeated"]) for run in data["runs"]
    }
    assert groups == {
        "a": ("validation text=t1", True),
        "b": ("validation text=t1", False),
        "c": ("validation text=t1", False),
        "d": ("validation text=other", False),
    }
    alone = board_data(runs[:3], tmp_path, "x")
    assert len(alone["groups"]) == 1 and "text" not in alone["groups"][0]


@pytest.mark.parametrize("normalizer", ["", "'e' becomes 'eeee'"])
def test_the_line_of_the_score_says_that_a_normalizer_rewrites_the_text(normalizer):
    run = compose(small())
    values = {field.name: 1 for field in dataclasses.fields(Summary)}
    summary = Summary(**{**values, "normalizer": normalizer, "folder": "x"})
    first = result_lines(run, summary)[0]
    assert first.startswith("val_bpb") and ("normalizer" in first) == bool(normalizer)
    assert normalizer in first
