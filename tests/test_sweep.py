"""A multirun: a folder and a W&B run per job, a table over seeds, and failures that stop nobody."""

import dataclasses
import io
import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
from command_line import Ended, recurgolf
from rich.console import Console
from run_folders import write_run
from smoke_runs import composed, small, small_text
from wandb_file import read_wandb

from recurgolf.compare.sweep import grouped, read_jobs, table
from recurgolf.config import ConfigError
from recurgolf.folders import only_one
from recurgolf.run import Run
from recurgolf.training.launch import crowded
from recurgolf.training.own_data import check_comparable


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
    end = ended.out[ended.out.rindex("lora.rank   n") :]
    for group, rank in zip(
        json.loads((folder / "sweep.json").read_text())["groups"], "12", strict=True
    ):
        bpb = group["val_bpb"]
        (row,) = (line for line in end.splitlines() if line.split()[:1] == [rank])
        assert f"{bpb['mean']:.4f} ± {bpb['deviation']:.4f}" in row
    assert "sweep/sweep.json" in end


def test_every_job_has_a_head_and_a_result_and_the_rest_is_in_its_log(swept):
    folder, ended = swept
    assert "4 jobs: 2 settings x 2 seeds (1, 2)" in ended.out
    told = [line.split("  ") for line in ended.out.splitlines() if line.startswith("job ")]
    heads, results = told[::2], told[1::2]
    combinations = [(1, 1), (1, 2), (2, 1), (2, 2)]
    for number, (rank, seed) in enumerate(combinations):
        named = [f"job {number + 1} of 4", f"lora.rank={rank} seed={seed}"]
        assert heads[number][:2] == results[number][:2] == named
        assert re.fullmatch(r"~\d+:\d\d left", heads[number][2])
        summary = summaries(folder)[number]
        assert results[number][2] == f"val_bpb {summary['val_bpb']:.4f}"
        assert results[number][3] == f"{summary['artifact_bytes']:,} bytes"
        assert "before packing" in (folder / str(number) / "train.log").read_text()
    assert "before packing" not in ended.out


def test_a_list_of_jobs_is_printed_without_running_any_of_them(tmp_path):
    asked = small("lora.rank=1,2", "seed=1,2,3")
    ended = recurgolf("plan", "-m", *asked, cwd=tmp_path).finished()
    assert "6 jobs: 2 settings x 3 seeds (1, 2, 3)" in ended.out
    for rank in (1, 2):
        planned = recurgolf("plan", *small(f"lora.rank={rank}"), cwd=tmp_path).finished().out
        (total,) = re.findall(r"^  total +([\d,]+)", planned, re.MULTILINE)
        (line,) = (li for li in ended.out.splitlines() if li.startswith(f"  lora.rank={rank} "))
        sizes = [int(size.replace(",", "")) for size in (total, line.split()[-2])]
        # The fingerprint of the file's header packs a byte or two larger or smaller.
        assert abs(sizes[0] - sizes[1]) < 8
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_in_which_one_job_does_not_compose_trains_nothing(tmp_path):
    ended = sweep(tmp_path, "lora.rank=1,2,100000", "seed=1,2")
    assert ended.code == 2
    assert "lora.rank=100000 exceeds the smaller side" in ended.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [200, 80, 44])
def test_no_cell_of_the_table_is_broken_at_any_width(swept, width):
    seen = io.StringIO()
    groups = grouped(read_jobs(swept[0]))
    for group in groups:
        group.differs["model/mixer"] = "gated_deltanet"
    Console(file=seen, width=width).print(table(groups, width=width))
    lines = seen.getvalue().splitlines()
    assert max(map(len, lines)) <= width or width == 44
    for group in groups:
        mean, deviation = group.spread("val_bpb")
        assert sum(f"{mean:.4f} ± {deviation:.4f}" in line for line in lines) == 1
    assert "…" not in seen.getvalue()


def test_more_threads_than_cores_are_told_once(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    run = composed(*small("trainer.threads=2"))
    assert crowded(run) == "" == crowded(run, at_once=2)
    assert "2 threads x 3 jobs at a time want 6 cores, and there are 4" in crowded(run, 3)
    many = composed(*small("trainer.threads=1", "trainer.devices=5", "trainer.batch_tokens=640"))
    assert "trainer.devices=5 want 5 cores, and there are 4" in crowded(many)


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


def test_a_sweep_goes_on_alone_and_on_its_own_text(swept, tmp_path):
    folder = tmp_path / "sweep"
    shutil.copytree(swept[0], folder)
    shutil.rmtree(folder / "1")
    for job in ("0", "2"):
        shutil.rmtree(folder / job / "checkpoints")
    with only_one(folder, ""):
        told = recurgolf("sweep", "resume", "sweep", cwd=tmp_path).refused()
    assert "another process is running this sweep" in told
    run = Run.read(folder / "0")
    other = tmp_path / "other.jsonl"
    other.write_text("".join(reversed(small_text().read_text().splitlines(keepends=True)[:290])))
    for job in ("0", "2", "3"):
        data = dataclasses.replace(run.data, files=str(other))
        dataclasses.replace(Run.read(folder / job), data=data).write(folder / job)
    with pytest.raises(ConfigError, match=r"0 was made with .*: bring them back"):
        check_comparable([folder / "0"])
    check_comparable([swept[0] / "0", swept[0] / "3"])


def test_figures_of_different_texts_are_never_averaged(tmp_path):
    for seed, text in enumerate("aab"):
        told = {"name": "text", "fingerprint": text * 64, "tokenizer": "t"}
        write_run(tmp_path / str(seed), seed, 1.0 + seed, text=told)
    jobs = [
        {"overrides": [f"seed={n}"], "folder": str(tmp_path / str(n)), "status": "finished"}
        for n in range(3)
    ]
    first, second = grouped(jobs)
    assert [first.values("val_bpb"), second.values("val_bpb")] == [[1.0, 2.0], [3.0]]
    assert "validation text bbbb" in second.label
    assert [group.label for group in grouped(jobs[:2])] == ["all jobs"]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_jobs_in_other_processes_end_in_the_same_figures_and_a_diverged_one_stops_nobody(
    swept, tmp_path, launcher
):
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    rate = json.loads((swept[0] / "0/run.json").read_text())["optimizer"]["matrix_lr"]
    own = ["seed=1", f"optimizer.matrix_lr={rate},1e30", f"hydra/launcher={launcher}"]
    ended = sweep(tmp_path, *own)
    assert ended.code == 1
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["jobs"]
    assert [job["status"] for job in found] == ["finished", "diverged"]
    assert ended.out.count("\ndiverged: ") == 1
    of_its_own = json.loads((tmp_path / "sweep/0/summary.json").read_text())
    assert of_its_own["val_bpb"] == summaries(swept[0])[0]["val_bpb"]


def test_a_failing_job_stops_nobody_and_is_listed_with_its_cause(tmp_path):
    # Composing cannot see that a rate is too large.
    own = ["optimizer.matrix_lr=0.02,1e30,0.03", "quant=none", "trainer.steps=4"]
    ended = sweep(tmp_path, *own)
    assert ended.code == 1
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [job["status"] for job in found["jobs"]] == ["finished", "diverged", "finished"]
    cause = found["jobs"][1]["error"]
    assert "diverged" in cause or "finite" in cause
    assert "Traceback" not in cause
    (line,) = (line for line in ended.out.splitlines() if line.startswith("diverged: "))
    assert "optimizer.matrix_lr=1e30" in line or "optimizer.matrix_lr=1e+30" in line
    assert cause in line
    assert "job 2 of 3" in ended.err
    assert "Traceback" in (tmp_path / "sweep" / "1" / "failure.txt").read_text()
    assert len(list((tmp_path / "sweep").glob("[02]/summary.json"))) == 2
    shutil.rmtree(tmp_path / "sweep" / "2")
    again = recurgolf("sweep", "resume", "sweep", cwd=tmp_path)
    assert again.code == 1 and "1 of 3 jobs are finished" in again.out
    assert (tmp_path / "sweep" / "2" / "summary.json").exists()


def test_a_job_over_its_budget_is_counted_and_told_by_the_exit_code(tmp_path):
    """Under joblib, where a job is a line when it begins and one when it ends."""
    own = ["budget.artifact_bytes=30_000", "seed=1,2", "trainer.steps=2"]
    ended = sweep(tmp_path, *own, "hydra/launcher=joblib", "hydra.launcher.n_jobs=1")
    assert ended.code == 3
    assert "2 jobs: 1 setting x 2 seeds (1, 2) by joblib" in ended.out
    lines = [line for line in ended.out.splitlines() if line.startswith("job ")]
    assert lines[::2] == ["job 1 of 2  seed=1", "job 2 of 2  seed=2"]
    for head, line in zip(lines[::2], lines[1::2], strict=True):
        said = rf"{head}  val_bpb \d\.\d{{4}}  [\d,]+ bytes OVER THE BUDGET  \d+:\d\d"
        assert re.fullmatch(said, line), line
    (group,) = json.loads((tmp_path / "sweep" / "sweep.json").read_text())["groups"]
    assert group["over_budget"] == 2
    assert group["setting"] == "all jobs"
