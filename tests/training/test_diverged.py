"""A run that diverges ends soon, in a line, with a status of its own and no figures."""

import json
import math
import sys

import pytest
import torch
from command_line import recurgolf as command
from command_line import recurgolf_process as command_process
from processes import Running
from smoke_runs import small

import recurgolf
from recurgolf import disk
from recurgolf.config import Diverged
from recurgolf.training.guard import drop_diverged
from recurgolf.training.summary import Summary

WILD = ("trainer.steps=2", "trainer.threads=1", "trainer.resume=auto")


def strict(text: str):
    """JSON in which NaN and Infinity are no words."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(text, parse_constant=refuse)


def check_folder(folder):
    told = strict((folder / "summary.json").read_text())
    assert (told["status"], told["val_bpb"], told["evals"]) == ("diverged", None, {})
    assert told["diverged"]
    assert Summary.read(folder).status == "diverged"
    events = [strict(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert events[-1]["event"] == "finish"
    assert events[-1]["values"]["exit_code"] == 1
    assert {"event": "summary", "status": "diverged"}.items() <= (
        {"event": events[-2]["event"], **events[-2]["values"]}.items()
    )


def test_weights_too_large_for_the_file_end_the_run_before_it_is_packed(tmp_path):
    wild = recurgolf.compose(small(*WILD, "optimizer.matrix_lr=1e30"))
    folder = tmp_path / "run"
    for _ in range(2):  # the second goes on from the checkpoint of the first, and diverges as well
        with pytest.raises(Diverged, match=r"weights in .* are beyond 65,504, the most"):
            recurgolf.train(wild, folder)
        check_folder(folder)
        assert not (folder / "artifact.bin").exists()
        assert not (folder / "seal.json").exists()


def test_a_loss_that_is_not_finite_ends_it_in_that_step(tmp_path):
    overrides = small(*WILD, "trainer.steps=50", "optimizer.matrix_lr=1e38", "quant=none")
    ended = command(*overrides, "hydra.run.dir=run", cwd=tmp_path)
    assert ended.code == 1, ended.err
    assert "Traceback" not in ended.out + ended.err
    assert len(ended.err.strip().splitlines()) == 1
    check_folder(tmp_path / "run")
    assert strict((tmp_path / "run" / "summary.json").read_text())["steps"] < 50
    for report in (tmp_path / "run" / "non_finite").glob("*.json"):
        strict(report.read_text())
    for verb in ("evaluate", "audit", "export"):
        others = ("run", "out") if verb == "export" else ("run",)
        told = command(verb, *others, cwd=tmp_path)
        assert told.code == 2, (verb, told.err)
        assert "Traceback" not in told.err
        assert "diverged" in told.err or "artifact.bin" in told.err


@pytest.mark.parametrize("start", ["two ranks", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_ranks_that_diverge_end_together(tmp_path, start):
    overrides = small(*WILD, "trainer.steps=50", "optimizer.matrix_lr=1e38", "quant=none")
    if start == "two ranks":
        running = Running(*overrides, "trainer.devices=2", "hydra.run.dir=run", cwd=tmp_path)
        ended = running.wait()
        running.ends_alone()
        assert len(ended.err.strip().splitlines()) == 1
    else:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        launcher += ["--nproc_per_node=2", "-m", "recurgolf"]
        ended = command_process(*overrides, "hydra.run.dir=run", start=launcher, cwd=tmp_path)
        # What torchrun says of its processes is its own; each of ours says one line.
        assert ended.err.count("recurgolf: step") == 2
    assert ended.code == 1, ended.err
    assert "recurgolf: step" in ended.err and "not finite" in ended.err
    check_folder(tmp_path / "run")
    for rank in (0, 1):
        assert (tmp_path / "run" / "non_finite" / f"batch_rank{rank}.safetensors").exists()


def test_weights_that_are_not_finite_are_never_checkpointed(tmp_path, monkeypatch):
    from recurgolf.training import trainer

    real = trainer.Trainer.advance

    def poisoned(self, bar):
        going_on = real(self, bar)
        with torch.no_grad():
            next(self.state.model.parameters()).view(-1)[0] = math.nan
        return going_on

    monkeypatch.setattr(trainer.Trainer, "advance", poisoned)
    run = recurgolf.compose(small(*WILD, "trainer.steps=1"))
    with pytest.raises(Diverged, match=r"1 of .* weights in .* are not finite;"):
        recurgolf.train(run, tmp_path)
    assert not list(tmp_path.glob("checkpoints/step_*"))
    check_folder(tmp_path)


def test_another_attempt_does_not_keep_the_summary_of_one_that_diverged(tmp_path):
    for status, there in (("finished", True), ("diverged", False)):
        (tmp_path / "summary.json").write_text(json.dumps({"status": status}))
        drop_diverged(tmp_path)
        assert (tmp_path / "summary.json").exists() == there


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_every_json_file_is_strict(tmp_path, value):
    data = {"a": value, "b": [1.5, (value, 2)], "c": {"d": value}, "e": "NaN", 1: 1e308}
    disk.write_json(tmp_path / "a.json", data)
    expected = {"a": None, "b": [1.5, [None, 2]], "c": {"d": None}, "e": "NaN", "1": 1e308}
    assert strict((tmp_path / "a.json").read_text()) == expected
    assert disk.read_json(tmp_path / "a.json") == expected
