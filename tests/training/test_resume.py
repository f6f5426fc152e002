"""A run that is killed and continued is the run that was never killed, bit for bit."""

import json
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import Running
from safetensors.torch import load_file
from smoke_runs import RunFolder, composed, small, train

import recurgolf
from recurgolf.config import ConfigError
from recurgolf.run import Run
from recurgolf.training import checkpoint, resume
from recurgolf.training.launch import launch
from recurgolf.training.signals import Interruption
from recurgolf.verbs.resume import reconfigured

ADVERSE = (
    *("averaging=ema", "averaging.decay=0.8", "looping.start_fraction=0.5", "lora.visits=repeats"),
    *("trainer.val_every=7", "trainer.log_every=1", "trainer.steps=24"),
)
"""Averages, adapters that begin halfway, validations between checkpoints."""
EVERY_STEP = ("trainer.checkpoint_every=1", "trainer.resume=auto")


def tensors(run: RunFolder) -> dict[str, torch.Tensor]:
    """Everything that the last checkpoint holds, random states included."""
    newest = checkpoint.newest(run.path / "checkpoints")
    return load_file(newest / checkpoint.TENSORS)


def record(run: RunFolder) -> list[dict]:
    """The events without what a clock says, and without the starts of continuations."""
    timed = ("time", "train_seconds", "perf/", "duration")
    kept = []
    for event in run.events:
        values = event.get("values", {})
        if event["event"] in ("summary", "artifact") or values.get("resumed"):
            continue
        if event["event"] == "start":
            event = {**event, "values": {}}
        kept.append({k: v for k, v in event.items() if not k.startswith(timed)})
    return kept


def assert_the_same_run(run: RunFolder, undisturbed: RunFolder) -> None:
    ours, theirs = tensors(run), tensors(undisturbed)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
    assert record(run) == record(undisturbed)
    for name in ("artifact.bin", "score.py"):
        assert (run.path / name).read_bytes() == (undisturbed.path / name).read_bytes(), name
    for figure in ("val_bpb", "pre_quant_val_bpb", "artifact_bytes", "steps", "fingerprint"):
        assert run.summary[figure] == undisturbed.summary[figure]


def killed_at_random(
    folder: Path, overrides: list[str], kills: int, chance: random.Random, group: bool = True
) -> int:
    """Start the same command again and again, and kill it; how many kills hit a running one."""
    log, drafts = folder / "train.log", folder / "checkpoints"
    folder.parent.mkdir(exist_ok=True)
    hits = 0
    for number in range(kills):
        before = log.read_text().count("folder: ") if log.exists() else 0
        running = Running(*overrides, f"hydra.run.dir='{folder}'", cwd=folder.parent)
        running.until(lambda b=before: log.exists() and log.read_text().count("folder: ") > b)
        if number % 2 == 1:
            # In the middle of a checkpoint: its draft is there, its name is not.
            running.until(
                lambda: any(drafts.glob(f"{checkpoint.DRAFT}*")) if drafts.exists() else False,
                pause=0.0,
            )
        else:
            time.sleep(chance.uniform(0.0, 0.8))
        hits += running.is_alive
        running.send(signal.SIGKILL, group=group)
        running.wait()
    ended = Running(*overrides, f"hydra.run.dir='{folder}'", cwd=folder.parent).wait()
    assert ended.code == 0, (ended.out, ended.err)
    return hits


def test_a_run_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    folder = tmp_path / "killed" / "run"
    assert killed_at_random(folder, small(*ADVERSE, *EVERY_STEP), 2, random.Random(1)) >= 1
    assert_the_same_run(RunFolder(folder, None), train(*ADVERSE))


def test_a_validation_that_a_signal_ended_is_made_up_for(tmp_path, monkeypatch):
    def interrupted(job, state):
        raise Interruption(signal.SIGTERM)

    folder = tmp_path / "run"
    folder.mkdir()
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as ended:
        patched.setattr("recurgolf.training.trainer.validate", interrupted)
        launch(composed(*small(*ADVERSE)), folder)
    assert ended.value.code == 143
    assert_the_same_run(resumed(folder), train(*ADVERSE))


@pytest.mark.slow
def test_a_run_killed_two_dozen_times_ends_as_if_it_had_not_been(tmp_path):
    folder = tmp_path / "killed" / "run"
    # So long that a fast machine is not done before the last kill.
    longer = [*ADVERSE, "trainer.steps=600"]
    hits = killed_at_random(folder, small(*longer, *EVERY_STEP), 26, random.Random(2))
    assert hits >= 20
    assert_the_same_run(RunFolder(folder, None), train(*longer))


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("group", [True, False], ids=["all at once", "the launcher alone"])
def test_two_ranks_killed_at_random_moments_end_as_if_they_had_not_been(tmp_path, group):
    two = [*ADVERSE, "trainer.devices=2", "trainer.grad_accum=2", "trainer.steps=60"]
    folder = tmp_path / "killed" / "run"
    asked = small(*two, *EVERY_STEP)
    assert killed_at_random(folder, asked, 5, random.Random(3), group) >= 4
    assert_the_same_run(RunFolder(folder, None), train(*two))


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> RunFolder:
    """A run that got a SIGTERM behind its tenth step."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    asked = small(*ADVERSE, "trainer.checkpoint_every=4", f"hydra.run.dir='{folder}'")
    running = Running(*asked, cwd=folder.parent)
    running.until(lambda: (folder / "checkpoints" / "step_000008").exists())
    running.send(signal.SIGTERM)
    ended = running.wait()
    assert ended.code == 143, (ended.out, ended.err)
    return RunFolder(folder, ended)


def copied(run: RunFolder, folder: Path) -> Path:
    return shutil.copytree(run.path, folder / "run")


def resumed(folder: Path, *overrides: str) -> RunFolder:
    ended = Running("resume", str(folder), *overrides, cwd=folder.parent).wait()
    assert ended.code == 0, (ended.out, ended.err)
    return RunFolder(folder, ended)


def test_resume_goes_on_where_the_signal_came(stopped, tmp_path):
    last = checkpoint.newest(stopped.path / "checkpoints")
    again = resumed(copied(stopped, tmp_path))
    assert f"continued from {again.path / 'checkpoints' / last.name}" in again.ended.out
    assert_the_same_run(again, train(*ADVERSE))
    starts = [e["values"] for e in again.events if e["event"] == "start"]
    assert len({start["run_id"] for start in starts}) == 1
    assert [start["resumed"] for start in starts] == [False, True]
    once_more = Running("resume", str(again.path), cwd=tmp_path).wait()
    assert once_more.code == 0
    assert "finished already" in once_more.out


@pytest.mark.parametrize("damage", ["tensors", "state", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_continued(stopped, tmp_path, damage):
    folder = copied(stopped, tmp_path)
    last, before = checkpoint.steps(folder / "checkpoints")[:2]
    if damage == "missing":
        (last / checkpoint.STATE).unlink()
    else:
        path = last / {"tensors": checkpoint.TENSORS, "state": checkpoint.STATE}[damage]
        content = bytearray(path.read_bytes())
        spot = content.index(b'"step":') + 8 if damage == "state" else len(content) // 2
        content[spot] ^= 1
        path.write_bytes(content)
    again = resumed(folder)
    assert f"checkpoint {last} " in again.ended.out
    assert f"continued from {before}" in again.ended.out
    assert_the_same_run(again, train(*ADVERSE))


def test_what_may_change_may_change(stopped, tmp_path):
    changes = [
        "trainer.log_every=3",
        "trainer.keep_last=3",
        "trainer.activation_checkpointing=true",
    ]
    again = resumed(copied(stopped, tmp_path), *changes)
    assert "equal to the undisturbed run within rounding (1e-5), not bit for bit" in again.ended.out
    for name, tensor in tensors(train(*ADVERSE)).items():
        if name.startswith("model/"):
            torch.testing.assert_close(tensors(again)[name], tensor, rtol=0, atol=1e-5)


def test_another_run_is_refused_with_every_field_that_differs(stopped):
    other = recurgolf.compose(
        small(*ADVERSE, "trainer.resume=auto", "lora.rank=2", "optimizer.matrix_lr=0.5", "seed=3")
    )
    before = (stopped.path / "run.json").read_bytes()
    with pytest.raises(ConfigError) as refusal:
        recurgolf.train(other, stopped.path)
    for words in ("lora.rank=2 (was 1)", "optimizer.matrix_lr=0.5 (was", "seed=3 (was 1337)"):
        assert words in str(refusal.value)
    assert "trainer.resume" not in str(refusal.value).split("differ:")[1].split(". Resume")[0]
    assert (stopped.path / "run.json").read_bytes() == before


def test_the_resume_verb_takes_only_what_cannot_change_the_result(stopped):
    run = Run.read(stopped.path)
    assert reconfigured(run, ["trainer.devices=2", "tracker=none"]).trainer.devices == 2
    assert reconfigured(run, []).fingerprint == run.fingerprint
    for wrong in ("trainer.steps=7", "lora.rank=2", "trainer.log_evry=1"):
        with pytest.raises(ConfigError, match=wrong.partition("=")[0]):
            reconfigured(run, [wrong])


def test_a_new_run_in_an_old_folder_keeps_the_old_checkpoints_apart(stopped, tmp_path):
    folder = copied(stopped, tmp_path)
    names = [path.name for path in checkpoint.steps(folder / "checkpoints")]
    fresh = recurgolf.train(recurgolf.compose(small(*ADVERSE)), folder)
    assert fresh.steps == 24
    assert [p.name for p in checkpoint.steps(folder / "checkpoints")] == ["step_000024"]
    assert [p.name for p in checkpoint.steps(folder / "checkpoints_before_1")] == names


def test_a_checkpoint_of_another_folder_starts_a_run_of_its_own(stopped, tmp_path):
    place = stopped.path / "checkpoints" / "step_000008"
    run = recurgolf.compose(small(*ADVERSE, f"trainer.resume='{place}'"))
    recurgolf.train(run, tmp_path / "branch")
    branch = RunFolder(tmp_path / "branch", None)
    for name, tensor in tensors(train(*ADVERSE)).items():
        assert torch.equal(tensors(branch)[name], tensor), name
    assert branch.events[0]["values"]["run_id"] != stopped.events[0]["values"]["run_id"]
    assert branch.losses.keys() == set(range(9, 25))


def test_a_folder_without_checkpoints_is_refused_when_it_was_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for place, words in ((tmp_path / "empty", "no whole checkpoint"), (tmp_path / "no", "no such")):
        run = recurgolf.compose(small(f"trainer.resume='{place}'"))
        with pytest.raises(ConfigError, match=words):
            recurgolf.train(run, tmp_path / "run")


def test_an_order_that_the_ranks_make_is_not_continued_on_others(tmp_path):
    asked = small("data/loader=sequential", "trainer.steps=3")
    recurgolf.train(recurgolf.compose(asked), tmp_path / "run")
    before = checkpoint.newest(tmp_path / "run" / "checkpoints")
    more = recurgolf.compose([*asked, "trainer.grad_accum=2", f"trainer.resume='{before}'"])
    with pytest.raises(ConfigError, match=r"grad_accum = 1, .* cannot be continued .* = 2"):
        recurgolf.train(more, tmp_path / "branch")


def test_a_result_that_the_ranks_make_is_not_called_equal():
    asked = small("optimizer.compat_clip_stage=pre_sync")
    state = {"run": recurgolf.compose(asked).to_dict()}
    two = recurgolf.compose([*asked, "trainer.devices=2"])
    assert "another result" in resume.compare(two, state, Path("step_000001"))
    micro = recurgolf.compose([*asked, "trainer.grad_accum=2"])
    assert "within rounding" in resume.compare(micro, state, Path("step_000001"))


def test_changed_data_is_refused(stopped, tmp_path):
    folder = copied(stopped, tmp_path)
    for path in checkpoint.steps(folder / "checkpoints"):
        parts, state = checkpoint.load(path)
        shard = next(name for name in state["data"] if name != "validation")
        state["data"][shard] = "another"
        checkpoint.save(folder / "checkpoints", state["step"], parts, state)
    ended = Running("resume", str(folder), cwd=tmp_path).wait()
    assert shard in ended.refused()


def test_the_last_and_the_best_are_kept(tmp_path):
    for step, bpb in enumerate([3.0, 1.0, 2.0, None, 5.0, 4.0], start=1):
        weights = {"model": {"w": torch.tensor(float(step))}}
        checkpoint.save(tmp_path, step, weights, {"val_bpb": bpb})
    (tmp_path / f"{checkpoint.DRAFT}000007").mkdir()
    checkpoint.prune(tmp_path, keep_last=2, keep_best=2)
    names = [path.name for path in checkpoint.steps(tmp_path)]
    assert names == ["step_000006", "step_000005", "step_000003", "step_000002"]
    assert len(list(tmp_path.iterdir())) == 4


def test_wandb_goes_on_under_the_same_id(tmp_path):
    folder = tmp_path / "run"
    asked = [*small(*ADVERSE, "tracker=offline"), f"hydra.run.dir='{folder}'"]
    asked = [word for word in asked if word != "tracker=none"]
    running = Running(*asked, "trainer.checkpoint_every=2", cwd=tmp_path)
    running.until(lambda: (folder / "checkpoints" / "step_000004").exists())
    running.send(signal.SIGINT)
    assert running.wait().code == 130
    again = resumed(folder)
    names = [path.name for path in (folder / "wandb").glob("offline-run-*")]
    ids = {name.rpartition("-")[2] for name in names}
    assert ids == {again.events[0]["values"]["run_id"]}
    assert json.loads((folder / "summary.json").read_text())["steps"] == 24
