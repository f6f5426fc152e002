"""A multirun: a folder and a W&B run per job, a table over seeds, and failures that stop nobody."""

import json
import shutil
import statistics
from pathlib import Path

import pytest
from command_line import Ended, recurgolf
from smoke_runs import small
from wandb_file import read_wandb


def sweep(folder: Path, *overrides: str) -> Ended:
    return recurgolf("-m", *small(*overrides), "hydra.sweep.dir=sweep", cwd=folder)


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> tuple[Path, Ended]:
    folder = tmp_path_factory.mktemp("swept")
    # Of two values for one key, the later one counts.
    own = ["tracker=offline", "lora.rank=1,2", "seed=1,2"]
    return folder / "sweep", sweep(folder, *own).finished()


def jobs_of(folder: Path) -> list[Path]:
    return sorted((p for p in folder.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))


def summaries(folder: Path) -> list[dict]:
    return [json.loads((job / "summary.json").read_text()) for job in jobs_of(folder)]


def test_every_combination_has_a_folder(swept):
    folder, _ = swept
    assert [job.name for job in jobs_of(folder)] == ["0", "1", "2", "3"]
    runs = [json.loads((job / "run.json").read_text()) for job in jobs_of(folder)]
    assert [(r["lora"]["rank"], r["seed"]) for r in runs] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert len({s["fingerprint"] for s in summaries(folder)}) == 4


def test_jobs_are_offline_wandb_runs_of_one_group_with_figures_and_config(swept):
    folder, _ = swept
    ids, groups = set(), set()
    for job, summary in zip(jobs_of(folder), summaries(folder), strict=True):
        (path,) = job.glob("wandb/offline-run-*/run-*.wandb")
        found = read_wandb(path)
        ids.add(found.run.run_id)
        groups.add(found.run.run_group)
        assert found.summary["val_bpb"] == summary["val_bpb"]
        assert found.summary["artifact_bytes"] == summary["artifact_bytes"]
        assert found.config["fingerprint"] == summary["fingerprint"]
        assert found.config["lora"]["rank"] == (1 if int(job.name) < 2 else 2)
        assert found.config["seed"] == summary["seed"]
        assert found.exit_code == 0
    assert len(ids) == 4
    assert groups == {"smoke lora.rank=1", "smoke lora.rank=2"}


def test_the_groups_have_mean_and_deviation_over_seeds(swept):
    folder, _ = swept
    groups = json.loads((folder / "sweep.json").read_text())["groups"]
    assert [group["setting"] for group in groups] == ["lora.rank=1", "lora.rank=2"]
    for group, own in zip(groups, (summaries(folder)[:2], summaries(folder)[2:]), strict=True):
        assert (group["n"], group["failed"], group["seeds"]) == (2, 0, [1, 2])
        for figure in ("val_bpb", "artifact_bytes"):
            values = [summary[figure] for summary in own]
            assert group[figure]["mean"] == pytest.approx(statistics.mean(values), rel=1e-12)
            assert group[figure]["deviation"] == pytest.approx(statistics.stdev(values), rel=1e-9)


def test_the_table_is_printed_at_the_end(swept):
    folder, ended = swept
    end = ended.out[ended.out.rindex("setting") :]
    for group in json.loads((folder / "sweep.json").read_text())["groups"]:
        bpb = group["val_bpb"]
        assert f"{bpb['mean']:.4f} ± {bpb['deviation']:.4f}" in end
        assert group["setting"] in end
    assert "sweep/sweep.json" in end


def test_resume_runs_what_is_missing_or_failed_and_nothing_else(swept, tmp_path):
    whole = summaries(swept[0])
    folder = tmp_path / "sweep"
    shutil.copytree(swept[0], folder)
    (folder / "1" / "summary.json").unlink()
    shutil.rmtree(folder / "2")
    (folder / "3" / "failure.txt").write_text("the machine went away\n")
    kept = (folder / "0" / "artifact.bin").stat().st_mtime_ns
    ended = recurgolf("sweep", "resume", str(folder), cwd=tmp_path).finished()
    assert "1 of 4 jobs are finished" in ended.out
    assert "interrupted" in ended.out and "never started" in ended.out
    assert "the machine went away" in ended.out
    assert (folder / "0" / "artifact.bin").stat().st_mtime_ns == kept
    for key in ("val_bpb", "artifact_bytes", "fingerprint", "seed", "status"):
        assert [s[key] for s in summaries(folder)] == [s[key] for s in whole]
    again = recurgolf("sweep", "resume", str(folder), cwd=tmp_path).finished()
    assert "4 of 4 jobs are finished" in again.out


@pytest.mark.slow
def test_two_jobs_at_once_by_joblib_end_in_the_same_figures(swept, tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    own = ["tracker=offline", "lora.rank=1,2", "seed=1,2", "hydra/launcher=joblib"]
    sweep(tmp_path, *own, "hydra.launcher.n_jobs=2").finished()
    found = summaries(tmp_path / "sweep")
    assert [s["val_bpb"] for s in found] == [s["val_bpb"] for s in summaries(swept[0])]


def test_a_failing_job_stops_nobody_and_is_listed_with_its_cause(tmp_path):
    ended = sweep(tmp_path, "lora.rank=1,99,2", "trainer.steps=2")
    assert ended.code == 1
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [job["status"] for job in found["jobs"]] == ["finished", "failed", "finished"]
    cause = "lora.rank=99 exceeds the smaller side"
    assert cause in found["jobs"][1]["error"]
    assert "Traceback" not in found["jobs"][1]["error"]
    (line,) = (line for line in ended.out.splitlines() if line.startswith("failed: "))
    assert "lora.rank=99" in line
    assert cause in line
    assert "Traceback" in (tmp_path / "sweep" / "1" / "failure.txt").read_text()
    assert len(list((tmp_path / "sweep").glob("*/summary.json"))) == 2


def test_a_job_over_its_budget_is_counted_and_told_by_the_exit_code(tmp_path):
    own = ["budget.artifact_bytes=30_000", "seed=1,2", "trainer.steps=2"]
    ended = sweep(tmp_path, *own)
    assert ended.code == 3
    (group,) = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["groups"]
    assert group["over_budget"] == 2
    assert group["setting"] == "all jobs"
