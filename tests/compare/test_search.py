"""A search runs real trials, goes on where it was stopped, and tells its Pareto front."""

import itertools
import json
import signal
import subprocess
import threading
import time

import optuna
import pytest
from command_line import PYTHON, Ended, recurgolf
from optuna.trial import TrialState, create_trial
from smoke_runs import small

from recurgolf.compare.search import Search, all_failed, hopeless, search
from recurgolf.config import ConfigError
from recurgolf.multirun import search_space
from recurgolf.overrides import Choice, Interval


def trials(*overrides: str) -> list[str]:
    """A search of short runs."""
    space = ("optimizer.matrix_lr=tag(log,interval(0.001,0.1))", "model.dim=choice(16,32)")
    return ["search", *small(*space, *overrides), "--folder", "found", "--patience", "0"]


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A search that Ctrl-C stops in its second trial, then as long as it takes for two."""
    place = tmp_path_factory.mktemp("search")
    line = trials("trainer.steps=8", "trainer.val_every=4")
    with subprocess.Popen(
        [*PYTHON, *line, "--trials", "2"],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # What a shell starts in the background has Ctrl-C ignored, and its children too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as searching:
        while not (place / "found/1/console.log").exists() and searching.poll() is None:
            time.sleep(0.05)
        searching.send_signal(signal.SIGINT)
        first = Ended(1, *searching.communicate(timeout=60))
        first.code = searching.returncode
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{place / 'found/study.db'}")
    stopped = study.trials[1].params
    second = recurgolf(*line, "--trials", "2", cwd=place).finished()
    return place, first, second, stopped


def test_ctrl_c_ends_a_search_quietly(searched):
    _, first, _, _ = searched
    assert first.code == 130 and first.err == ""
    assert first.out.splitlines()[-1] == "stopped; the same command goes on with this search"
    assert "Traceback" not in first.out


def test_trials_add_up_over_calls(searched):
    place, first, second, _ = searched
    assert "trial 0 (" in first.out and "1 of 2 trials are there" in second.out
    found = json.loads((place / "found/search.json").read_text())["trials"]
    assert [trial["state"] for trial in found] == ["complete", "fail", "complete"]
    for trial in (found[0], found[2]):
        summary = json.loads((place / f"found/{trial['trial']}/summary.json").read_text())
        assert trial["objectives"] == {k: summary[k] for k in ("val_bpb", "artifact_bytes")}
        run = json.loads((place / f"found/{trial['trial']}/run.json").read_text())
        assert run["optimizer"]["matrix_lr"] == trial["settings"]["optimizer.matrix_lr"]


def test_a_trial_that_a_stop_ended_is_run_again_with_its_values(searched):
    place, _, second, params = searched
    found = json.loads((place / "found/search.json").read_text())["trials"]
    assert found[2]["settings"] == found[1]["settings"] == params
    assert found[0]["settings"] != params
    assert "2 finished, 0 given up, 0 failed" in second.out


def test_the_front_is_what_nothing_beats(searched):
    found = json.loads((searched[0] / "found/search.json").read_text())["trials"]
    points = {t["trial"]: tuple(t["objectives"].values()) for t in found if t["objectives"]}
    beaten = {
        a
        for a, b in itertools.permutations(points, 2)
        if points[b] != points[a] and all(y <= x for x, y in zip(points[a], points[b], strict=True))
    }
    assert {t["trial"] for t in found if t["front"]} == set(points) - beaten


def test_another_search_in_the_same_folder_is_refused(searched):
    other = trials("trainer.steps=9", "trainer.val_every=4")
    why = recurgolf(*other, "--trials", "4", cwd=searched[0]).refused()
    assert "holds a search with fixed" in why and "--folder" in why


def test_a_space_is_written_as_hydra_writes_it():
    fixed, space = search_space(
        ["seed=3", "a=1,2", "b=range(1,4)", "c=interval(0.1,2)", "d=int(interval(1,8))"]
    )
    assert fixed == ["seed=3"]
    assert space["a"] == Choice(("1", "2")) and space["b"] == Choice(("1", "2", "3"))
    assert space["c"] == Interval(0.1, 2) and space["d"] == Interval(1, 8, whole=True)
    with pytest.raises(ConfigError, match="above zero"):
        search_space(["a=tag(log,interval(0,1))"])


def test_nothing_to_vary_is_said(tmp_path):
    assert "something to vary" in recurgolf("search", "seed=1", cwd=tmp_path).refused()


def test_trials_at_a_time_are_composed_one_after_another(tmp_path):
    """Hydra holds one config in a process."""
    alone = threading.Lock()

    def compose(overrides):
        assert alone.acquire(blocking=False)
        time.sleep(0.1)
        alone.release()
        raise ConfigError("no such thing")

    space = {"a": Choice(("1", "2", "3", "4"))}
    asked = Search(tmp_path, (), space, compose, trials=4, jobs=2)
    assert all_failed(search(asked, lambda text: None))


def finished(val_bpb, size):
    """A trial with one validation at step 4."""
    return create_trial(
        state=TrialState.COMPLETE,
        values=[val_bpb, size],
        user_attrs={"curve": {"4": val_bpb}, "bytes_expected": size},
    )


def test_only_what_is_beaten_in_everything_is_given_up(tmp_path):
    asked = Search(tmp_path, (), {"a": Choice(("1", "2"))}, lambda _: None)  # type: ignore[arg-type]
    small = [finished(3.0 + 0.1 * i, 1000) for i in range(3)]
    assert hopeless(small, {"4": 3.2}, 1000, asked) is not None
    assert hopeless(small, {"4": 3.05}, 1000, asked) is None
    assert hopeless(small, {"4": 3.2}, 999, asked) is None, "smaller than all: may be on the front"
    assert hopeless(small, {"5": 9.9}, 1000, asked) is None, "nobody to compare with at that step"
    assert hopeless(small[:2], {"4": 9.9}, 1000, asked) is None, "too few to judge by"
    assert hopeless(small, {}, 1000, asked) is None


def test_a_search_in_a_folder_of_any_name_tries_every_setting_once(tmp_path):
    name = "it's f%20a q?1"
    line = ["search", "experiment=smoke", "data.files=/nowhere.txt", "data=text", "lora.rank=1,2"]
    ended = recurgolf(*line, "--trials", "5", "--folder", str(tmp_path / name), cwd=tmp_path)
    assert ended.code == 1, "every trial failed"
    assert "all 2 settings of this space are tried" in ended.out
    assert (tmp_path / name / "study.db").exists()
    found = json.loads((tmp_path / name / "search.json").read_text())["trials"]
    assert sorted(trial["settings"]["lora.rank"] for trial in found) == ["1", "2"]
