"""A run folder belongs to one Run, and its name is nobody else's."""

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import yaml
from command_line import recurgolf
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from run_folders import write_run
from smoke_runs import small

from recurgolf.cli import _interrupts, main
from recurgolf.compare.board import write_board
from recurgolf.compare.runs import find_runs, read_run
from recurgolf.compare.sweep import job_folders, note_failure, note_overrides
from recurgolf.config import ConfigError
from recurgolf.folders import InUse, claimed, made_whole, only_one, plain_name
from recurgolf.run import Run
from recurgolf.verbs.sweep import jobs_of

SHORT = ("trainer.steps=2",)


def test_a_name_is_given_once_however_many_ask_at_the_same_moment(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        given = list(pool.map(lambda _: claimed(tmp_path / "a/run"), range(40)))
    assert len(set(given)) == 40
    assert {path.name for path in given} == {"run", *(f"run_{n}" for n in range(2, 41))}


def test_a_folder_under_a_given_name_is_made_by_one_of_those_who_ask(tmp_path):
    """Whole, or not at all; the others are refused before they work."""
    everybody = Barrier(8)

    def ask(number):
        everybody.wait()
        try:
            with made_whole(tmp_path / "packed") as draft:
                (draft / "mine").write_text(str(number))
                time.sleep(0.2)
        except ConfigError as error:
            assert "another process" in str(error) or "not empty" in str(error)
            return None
        return number

    with ThreadPoolExecutor(8) as pool:
        (winner,) = [n for n in pool.map(ask, range(8)) if n is not None]
    assert (tmp_path / "packed/mine").read_text() == str(winner)
    with pytest.raises(ZeroDivisionError), made_whole(tmp_path / "failed") as draft:
        (draft / "half").touch()
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_what_ends_a_command_leaves_no_half_made_folder(tmp_path):
    with (
        pytest.raises(SystemExit) as end,
        _interrupts() as heard,
        made_whole(tmp_path / "packed") as draft,
    ):
        (draft / "half").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert (end.value.code, heard) == (143, [signal.SIGTERM])
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_two_processes_never_work_in_one_folder(tmp_path):
    with (
        only_one(tmp_path, "trains"),
        pytest.raises(InUse, match="another process trains") as refused,
        only_one(tmp_path, "trains", wait=0.2),
    ):
        pass
    with only_one(tmp_path, "trains"):
        pass
    # It may end well: that it was in the way is no failure of its own.
    note_failure(tmp_path, refused.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "name"), [("a b='c'#1", "a-b-c-1"), ("../x", "x"), ("é", "run"), ("a_1.b", "a_1.b")]
)
def test_names_need_no_quotes(text, name):
    assert plain_name(text) == name


def test_a_single_run_is_composed_once_and_hydra_keeps_what_it_composed(tmp_path, monkeypatch):
    load, loaded = ConfigLoaderImpl.load_configuration, []

    def counted(self, config_name, overrides, *rest, **more):
        loaded.append(overrides)
        return load(self, config_name, overrides, *rest, **more)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", counted)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(small(*SHORT, "hydra.run.dir=o_${seed}_${now:%Y}"))
    assert end.value.code == 0
    assert len(loaded) == 1
    (folder,) = tmp_path.glob("o_1337_2*")
    kept = {
        n: yaml.safe_load((folder / f".hydra/{n}.yaml").read_text()) for n in ("hydra", "config")
    }
    assert kept["hydra"]["hydra"]["run"]["dir"] == folder.name
    assert kept["hydra"]["hydra"]["runtime"]["output_dir"] == str(folder)
    assert kept["hydra"]["hydra"]["overrides"]["task"] == small(*SHORT)
    ran = Run.read(folder)
    assert (ran.trainer.steps, ran.seed) == (2, kept["config"]["seed"]) == (2, 1337)


def test_another_run_in_a_used_folder_is_refused_and_the_same_one_keeps_the_old_result(tmp_path):
    base = small(*SHORT, "hydra.run.dir=o")
    recurgolf(*base, cwd=tmp_path).finished()
    before = {p: p.read_bytes() for p in tmp_path.glob("o/**/*") if p.is_file()}
    why = recurgolf(*base, "lora.rank=4", cwd=tmp_path).refused()
    assert "o belongs to another run, a finished run" in why
    assert "lora.rank=4 (was" in why and "recurgolf resume" in why
    assert before == {p: p.read_bytes() for p in tmp_path.glob("o/**/*") if p.is_file()}
    recurgolf(*base, cwd=tmp_path).finished()
    kept = tmp_path / "o/result_before_1/summary.json"
    assert kept.read_bytes() == before[tmp_path / "o/summary.json"]


def test_the_folder_of_a_run_with_an_odd_name_is_plain(tmp_path):
    recurgolf(*small(*SHORT, "name='a=b c'"), cwd=tmp_path).finished()
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert folder.parent.name == "a-b-c"
    assert plain_name(folder.name) == folder.name and folder.name.endswith("_seed1337")


def test_a_second_sweep_in_a_used_folder_is_refused_before_it_writes(tmp_path):
    asked = ["-m", *small(*SHORT), "hydra.sweep.dir=s"]
    recurgolf(*asked, "seed=1", cwd=tmp_path).finished()
    before = {p: p.read_bytes() for p in tmp_path.glob("s/**/*") if p.is_file()}
    assert "sweep resume" in recurgolf(*asked, "lora.rank=1,2", cwd=tmp_path).refused()
    assert before == {p: p.read_bytes() for p in tmp_path.glob("s/**/*") if p.is_file()}


def test_two_jobs_in_one_folder_are_refused(tmp_path):
    asked = ["-m", *small(*SHORT), "seed=1,2", "hydra.sweep.dir=s", "hydra.sweep.subdir='${seed}0'"]
    both = [*asked[:-1], "hydra.sweep.subdir='${lora.rank}'"]
    assert "jobs 0 and 1 into one folder" in recurgolf(*both, cwd=tmp_path).refused()
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("subdir", "folders"),
    [
        pytest.param("x_${seed}", {"x_1", "x_2"}, marks=pytest.mark.slow),
        ("${hydra:job.num}_${seed}", {"0_1", "1_2"}),
    ],
)
def test_folders_of_jobs_may_be_named_after_what_varies(tmp_path, subdir, folders):
    asked = ["-m", *small(*SHORT), "seed=1,2", "hydra.sweep.dir=s", f"hydra.sweep.subdir={subdir}"]
    recurgolf(*asked, cwd=tmp_path).finished()
    assert {path.parent.name for path in tmp_path.glob("s/*/summary.json")} == folders


def test_a_summary_of_another_run_is_as_good_as_absent(tmp_path, capsys):
    folder = write_run(tmp_path / "run", 1, 2.0)
    assert read_run(folder).summary is not None
    told = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**told, "fingerprint": "0" * 16}))
    assert read_run(folder).summary is None
    assert "of another run" in capsys.readouterr().err


def test_a_sweep_in_yaml_with_folders_of_its_own_is_resumed_by_what_was_recorded(tmp_path):
    own = tmp_path / "conf/experiment"
    own.mkdir(parents=True)
    (own / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [smoke]\nhydra:\n  output_subdir: null\n"
        "  mode: MULTIRUN\n  sweep: {subdir: 'job_${seed}/x'}\n"
        "  sweeper: {params: {seed: '1,2'}}\n"
    )
    rest = [item for item in small(*SHORT) if item != "experiment=smoke"]
    asked = ["--config-dir", "conf", "experiment=mine", *rest, "hydra.sweep.dir=s"]
    recurgolf(*asked, cwd=tmp_path).finished()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("s/*/x/artifact.bin")}
    assert {path.parts[-3] for path in before} == {"job_1", "job_2"}
    ended = recurgolf("sweep", "resume", "s", cwd=tmp_path).finished()
    assert "2 of 2 jobs are finished" in ended.out
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("s/*/x/artifact.bin")}
    # One job is lost and composes no more, the artifact of the other is gone: the other is run.
    (tmp_path / "s/job_2/x/artifact.bin").unlink()
    os.rename(tmp_path / "s/job_1", tmp_path / "gone")
    text = (tmp_path / "s/multirun.yaml").read_text().replace("seed: 1,2", "seed: 2,wrong")
    (tmp_path / "s/multirun.yaml").write_text(text)
    ended = recurgolf("sweep", "resume", "s", cwd=tmp_path)
    assert ended.code == 1
    assert "its artifact.bin is gone" in ended.out and "does not compose" in ended.out
    assert (tmp_path / "s/job_2/x/artifact.bin").exists()


def test_the_table_of_an_empty_folder_is_refused(tmp_path):
    assert "no job of a sweep" in recurgolf("sweep", "show", ".", cwd=tmp_path).refused()


@pytest.mark.parametrize(
    "content",
    [
        *(b"\xff\xfe", b"{", b"[1, 2]", b"null", b"hydra: {overrides: 3}", b"[" * 100_000),
        *(b"hydra: {overrides: {task: [3]}}", b"hydra: {overrides: {task: null}}"),
    ],
)
def test_a_damaged_list_of_jobs_is_named(content, tmp_path):
    (tmp_path / "multirun.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"multirun\.yaml is damaged: it (is no|does not)"):
        jobs_of(tmp_path)


def test_links_to_runs_are_followed_and_no_run_comes_twice(tmp_path):
    run = write_run(tmp_path / "elsewhere/1", 1, 1.0)
    note_overrides(run, ["seed=1"])
    gone = tmp_path / "runs/gone"
    gone.mkdir(parents=True)
    links = {"all": "elsewhere", "one": "elsewhere/1", "circle": "runs", "none": "nothing"}
    for name, target in links.items():
        (tmp_path / "runs" / name).symlink_to(tmp_path / target)
    (gone / "run.json").symlink_to(tmp_path / "nothing")
    told: list[str] = []
    assert [r.folder for r in find_runs([tmp_path / "runs", run], told)] == [run]
    assert told == [f"left out: {gone}/run.json: a link to what is not there"]
    assert [path.resolve() for path in job_folders(tmp_path / "runs")] == [run]
    with pytest.raises(ConfigError, match=r"board\.html: .*; --out FILE writes the page elsewhere"):
        write_board([run], Path("/proc/nobody/board.html"))
