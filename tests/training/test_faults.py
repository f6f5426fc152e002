"""Every fault ends in a message that helps, with its exit code, and leaves nothing running."""

import contextlib
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import Running
from safetensors.torch import load_file
from smoke_runs import small

import recurgolf
from recurgolf.data.shards import write_shard
from recurgolf.log import Log
from recurgolf.record import read_jsonl
from recurgolf.training import checkpoint
from recurgolf.training.faults import RunFailed, is_out_of_memory, out_of_memory
from recurgolf.training.job import Job
from recurgolf.training.non_finite import first_to_fail
from recurgolf.training.trainer import Trainer
from recurgolf.training.trainer import train as run_training

LONG = ("trainer.steps=100000", "trainer.log_every=1", "trainer.checkpoint_every=50")


def started(folder: Path, *overrides: str, at_step: int = 3) -> Running:
    """A run that has made its first steps."""
    running = Running(*small(*overrides), f"hydra.run.dir='{folder}'", cwd=folder.parent)
    line = f"step {at_step:5d}/"
    assert running.until(lambda: line in running.out), running.wait()
    return running


def ends_within(running: Running, seconds: float):
    began = time.monotonic()
    ended = running.wait()
    assert time.monotonic() - began < seconds
    return ended


def newest_is_whole(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return checkpoint.load(checkpoint.newest(folder / "checkpoints"))[1]["step"]


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
def test_a_signal_saves_and_ends_with_its_code(tmp_path, number, code):
    running = started(tmp_path / "run", *LONG)
    running.send(number)
    ended = ends_within(running, 10)
    assert ended.code == code
    assert "Traceback" not in ended.err
    assert newest_is_whole(tmp_path / "run") >= 3
    events = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "finish"
    assert events[-1]["values"]["exit_code"] == code
    assert events[-2]["step"] == newest_is_whole(tmp_path / "run")


def test_a_signal_ends_two_ranks_with_a_checkpoint(tmp_path):
    running = started(tmp_path / "run", *LONG, "trainer.devices=2")
    running.send(signal.SIGTERM)
    ended = ends_within(running, 10)
    assert ended.code == 143, (ended.out, ended.err)
    assert newest_is_whole(tmp_path / "run") >= 3
    running.ends_alone()


def test_a_signal_ends_a_sweep(tmp_path):
    asked = small(*LONG, "seed=1,2", f"hydra.sweep.dir='{tmp_path}/sweep'")
    running = Running("-m", *asked, cwd=tmp_path)
    log = tmp_path / "sweep" / "0" / "train.log"
    assert running.until(lambda: log.exists() and "step     3/" in log.read_text())
    running.send(signal.SIGTERM)
    assert ends_within(running, 10).code == 143
    assert newest_is_whole(tmp_path / "sweep" / "0") >= 3
    assert not (tmp_path / "sweep" / "1").exists()


def test_a_rank_that_dies_ends_all_and_is_named(tmp_path):
    running = started(tmp_path / "run", *LONG, "trainer.devices=2")
    victim = max(pid for pid in running.left_behind() if "spawn_main" in command_of(pid))
    os.kill(victim, signal.SIGKILL)
    ended = ends_within(running, 20)
    assert ended.code == 1
    assert "was ended by SIGKILL" in ended.err
    assert "Traceback" not in ended.err
    running.ends_alone()


def test_a_rank_that_hangs_ends_all_within_the_timeout_and_says_where_it_was(tmp_path):
    running = started(
        tmp_path / "run", *LONG, "trainer.devices=2", "trainer.rank_timeout_seconds=4"
    )
    victim = max(pid for pid in running.left_behind() if "spawn_main" in command_of(pid))
    os.kill(victim, signal.SIGSTOP)
    ended = ends_within(running, 4 + 16)
    assert ended.code == 1
    assert "hangs: the others waited for it in vain" in ended.err, ended.err
    running.ends_alone()


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


@contextlib.contextmanager
def no_file_larger_than(size: int):
    """A limit of the kernel's, which hits files as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint_and_says_how_much_was_needed(tmp_path, trainer_in):
    trainer = trainer_in(tmp_path / "run", "trainer.steps=2")
    trainer.job.guard.save(trainer.job, trainer.state)
    trainer.fit()
    with no_file_larger_than(100_000), pytest.raises(RunFailed) as failure:
        trainer.job.guard.save(trainer.job, trainer.state)
    message = str(failure.value)
    assert str(tmp_path / "run" / "checkpoints" / "step_000002") in message
    parts, _ = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_000000")
    needed = int(message.partition("it needs ")[2].split()[0].replace(",", ""))
    # Momentum has come since, at most as much as two copies of the weights.
    assert sum(t.nbytes for p in parts.values() for t in p.values()) < needed < 3_000_000
    assert "step_000000 is kept and whole" in message
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["step_000000"]


def test_a_record_that_no_longer_fits_ends_the_run_and_what_it_holds_is_whole(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    run = recurgolf.compose(small("trainer.steps=500", "trainer.log_every=1"))
    with no_file_larger_than(9_000), pytest.raises(RunFailed) as failure:
        run_training(Job.watched(run, folder))
    assert f"cannot write {folder / 'metrics.jsonl'}: File too large (it needs" in str(
        failure.value
    )
    assert "No checkpoint was written yet" in str(failure.value)
    steps = [event["step"] for event in read_jsonl(folder / "metrics.jsonl") if "step" in event]
    assert len(steps) > 5 and steps == list(range(1, len(steps) + 1))


def test_a_log_that_no_longer_fits_is_told_and_nothing_more(tmp_path, capsys):
    log = Log(tmp_path / "train.log")
    log.line("before")
    with no_file_larger_than(20):
        for text in ("twenty characters and more", "behind"):
            log.line(text)
        log.close()
    assert (tmp_path / "train.log").read_bytes().startswith(b"before\n")
    out = capsys.readouterr().out
    assert out.count("what follows is on the console alone") == 1
    assert "behind\n" in out


def poisoned(trainer: Trainer, step: int, name: str) -> None:
    """Spoil one entry of one parameter's gradient in one step."""

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.step + 1 != step:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[5] = float("nan")
        return gradient

    dict(trainer.state.model.named_parameters())[name].register_hook(spoil)


def test_a_non_finite_state_stops_the_run_with_the_batch_and_a_report(tmp_path, trainer_in):
    trainer = trainer_in(tmp_path / "run", "trainer.steps=6", "trainer.grad_accum=2")
    healthy = trainer.state.optimizers.step

    def break_a_weight(*asked):
        healthy(*asked)
        if trainer.step == 2:
            trainer.state.model.blocks[1].mlp.up_proj.weight.data[3, 4] = float("inf")

    trainer.state.optimizers.step = break_a_weight
    with pytest.raises(RunFailed, match=r"step 4: .* visit 1 \(block 1, time 1\)") as failure:
        trainer.fit()
    kept = tmp_path / "run" / "non_finite"
    report = json.loads((kept / "report_rank0.json").read_text())
    assert report["forward"] == {"position": 1, "block": 1, "nth": 0}
    assert report["parameters"]["blocks.1.mlp.up_proj.weight"]["weights"] == 1
    assert str(kept) in str(failure.value)
    batch = load_file(kept / "batch_rank0.safetensors")
    assert batch["x0"].shape == batch["x1"].shape == (4, 64)
    assert torch.equal(batch["x1"][:, 1:], batch["y1"][:, :-1])
    assert trainer.step == 3


def test_a_non_finite_gradient_is_traced_to_its_parameter(tmp_path, trainer_in):
    trainer = trainer_in(tmp_path / "run", "trainer.steps=6")
    poisoned(trainer, 3, "blocks.0.mlp.up_proj.weight")
    with pytest.raises(RunFailed, match=r"step 3: .*fault was in the gradients alone"):
        trainer.fit()


def test_the_rank_whose_loss_was_not_finite_is_named():
    quiet, loud, told = (
        {"rank": rank, "loss": loss, "parameters": parameters}
        for rank, loss, parameters in ((0, 5.0, {}), (1, math.inf, {}), (2, 5.0, {"w": 1}))
    )
    assert first_to_fail([quiet, loud])["rank"] == 1
    assert first_to_fail([quiet, loud, told])["rank"] == 2
    assert first_to_fail([quiet, quiet]) == quiet


def test_skipping_leaves_the_weights_alone_counts_and_has_a_limit(tmp_path, trainer_in):
    trainer = trainer_in(
        tmp_path / "run", "trainer.non_finite=skip", "trainer.max_skipped=1", "trainer.steps=5"
    )
    name = "blocks.0.mlp.up_proj.weight"
    poisoned(trainer, 3, name)
    seen = {}

    def remember(optimizers, *asked, before=trainer.state.optimizers.step):
        seen[trainer.step + 1] = True
        before(*asked)

    trainer.state.optimizers.step = remember.__get__(trainer.state.optimizers)
    trainer.fit()
    assert sorted(seen) == [1, 2, 4, 5]
    assert trainer.state.skipped == 1
    assert all(torch.isfinite(p).all() for p in trainer.state.model.parameters())
    assert "skipped (1 of at most 1)" in (tmp_path / "run" / "train.log").read_text()
    trainer.job.guard.save(trainer.job, trainer.state)
    state = checkpoint.load(tmp_path / "run" / "checkpoints" / "step_000005")[1]
    assert state["skipped_steps"] == 1
    trainer.state.step, trainer.job.guard.saved_at = 2, -1
    with pytest.raises(RunFailed, match="skip number 2 of at most"):
        trainer.fit()


def shard_folder(tmp_path: Path) -> list[str]:
    golden = Path(__file__).parents[1] / "fixtures" / "golden" / "data"
    shards = tmp_path / "shards"
    shards.mkdir()
    for path in (golden / "shards").glob("*.bin"):
        (shards / path.name).write_bytes(path.read_bytes())
    data = ["data=shards", f"data.path={shards}", f"data.tokenizer={golden / 'tokenizer.model'}"]
    return ["experiment=smoke", *data, "data.vocab_size=1024", "tracker=none", "trainer.steps=4"]


@pytest.mark.parametrize("change", ["cut", "emptied", "gone", "rewritten"])
def test_a_shard_that_changes_during_the_run_ends_it_by_name(tmp_path, change, trainer_in):
    run = recurgolf.compose([*shard_folder(tmp_path), "trainer.log_every=1"])
    trainer = trainer_in(tmp_path / "run", run=run)
    shard = trainer.job.dataset.train_shards[0]
    content = shard.read_bytes()
    if change == "gone":
        shard.unlink()
    elif change == "cut":
        os.truncate(shard, len(content) - 2)
    elif change == "emptied":  # reading on would be a SIGBUS
        os.truncate(shard, 1024)
    else:
        shard.write_bytes(content[:-2] + b"\0\0")
        os.utime(shard, ns=(1, 1))
    words = {"gone": "is gone", "rewritten": "was written again"}
    words |= dict.fromkeys(("cut", "emptied"), "bytes instead of")
    with pytest.raises(RunFailed, match=words[change]) as failure:
        trainer.fit()
    assert str(shard) in str(failure.value)


def test_contents_tell_data_apart_and_do_not_mind_a_copy(tmp_path):
    run = recurgolf.compose(shard_folder(tmp_path))
    dataset = run.data.prepare()
    before = dataset.contents
    shard = dataset.train_shards[0]
    os.utime(shard, ns=(1, 1))
    run.data.prepare().check_contents(before)
    tokens = np.fromfile(shard, dtype="<u2", offset=1024)
    tokens[0] ^= 1
    write_shard(shard, tokens)
    with pytest.raises(ValueError, match=shard.name):
        run.data.prepare().check_contents(before)


def test_memory_that_is_not_there_ends_in_advice(tmp_path, trainer_in):
    """A real allocation that fails: 2^50 bytes."""
    trainer = trainer_in(tmp_path / "run")
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 50, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    message = str(trainer.job.guard.explained(trainer.job, 0, error.value))
    for words in ("in step 1", "trainer.grad_accum=1", "activation_checkpointing", "backprop"):
        assert words in message
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    config = recurgolf.compose(small("trainer.batch_tokens=64")).trainer
    assert "raise trainer.grad_accum" not in str(out_of_memory(error.value, "", config))


@pytest.mark.slow
def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 900 kB, mounted where only this command sees it."""
    alone = ["unshare", "-rm", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=900k tmpfs '{tmp_path}' || exit 77"
    run = [sys.executable, "-m", "recurgolf", *small("trainer.checkpoint_every=4")]
    run += ["trainer.keep_last=3", f"hydra.run.dir={tmp_path}/run"]
    look = f"code=$?; ls '{tmp_path}/run/checkpoints'; exit $code"
    command = f"{mount}; {shlex.join(map(str, run))}; {look}"
    done = subprocess.run([*alone, command], capture_output=True, text=True, check=False)
    if done.returncode == 77 or "unshare" in done.stderr:
        pytest.skip("no right to mount")
    assert done.returncode == 1, done.stderr
    assert "No space left on device" in done.stderr
    assert "step_000008 is kept and whole" in done.stderr
    assert done.stdout.splitlines()[-2:] == ["step_000004", "step_000008"]


def test_wandb_that_dies_mid_run_costs_nothing_but_one_line(tmp_path):
    asked = ("trainer.steps=80", "trainer.log_every=1", "tracker.finish_timeout_seconds=10")
    offline = ["tracker=offline" if w == "tracker=none" else w for w in small(*asked)]
    folder = tmp_path / "run"
    running = Running(*offline, f"hydra.run.dir='{folder}'", cwd=tmp_path)
    assert running.until(lambda: "step     3/" in running.out), running.wait()
    for keeper in children_of(running.pid):
        os.kill(keeper, signal.SIGKILL)
    ended = running.wait()
    assert ended.code == 0, ended.err
    assert ended.err.count("W&B:") == 1
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in events if "train/loss" in event]
    assert steps == list(range(1, 81))


def children_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                if int(fields[1]) == parent:
                    found.append(int(entry.name))
    return found


def test_a_process_that_cannot_stop_is_ended_in_time():
    program = (
        "from recurgolf.training.signals import Signals\n"
        "with Signals().listening(0.5) as signals, signals.deferred():\n"
        "    print('ready', flush=True)\n"
        "    while True: pass\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    _, err = process.communicate(timeout=20)
    assert process.returncode == 143
    assert "not done after" in err
