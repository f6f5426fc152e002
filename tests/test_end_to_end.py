"""One command: YAML in, a trained, packed and scored file out, the same figures wherever one looks.

The runs are the smoke experiment's on a small text (smoke_runs.py), and once on the embedded one.
"""

import json
import math
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import recurgolf, recurgolf_process
from smoke_runs import EXACT, RunFolder, small, train

from recurgolf import compose
from recurgolf.artifact import load
from recurgolf.data.shards import count_tokens, find_shards, write_shard
from recurgolf.quant.quantized_tensor import dequantize_state
from recurgolf.run import Run
from recurgolf.training import checkpoint
from recurgolf.training.summary import Summary

FILES = {
    ".hydra",
    "artifact.bin",
    "checkpoints",
    "ledger.json",
    "metrics.jsonl",
    "run.json",
    "score.py",
    "scores",
    "seal.json",
    "summary.json",
    "train.log",
}


@pytest.fixture(scope="module")
def run() -> RunFolder:
    return train()


def test_a_run_folder_holds_everything_and_nothing_else(run):
    assert {path.name for path in run.path.iterdir()} == FILES
    assert [path.name for path in (run.path / "checkpoints").iterdir()] == ["step_000020"]


def test_the_summary_has_the_documented_figures(run):
    summary = Summary.read(run.path)
    assert set(run.summary) == {field.name for field in fields(Summary)}
    assert summary.status == "finished"
    assert summary.within_budget
    assert summary.steps == 20
    assert summary.tokens == 20 * 512
    assert summary.budget_bytes == 1_000_000
    assert summary.val_bpb == pytest.approx(
        summary.val_loss * summary.val_tokens / (math.log(2) * summary.val_bytes), rel=1e-12
    )
    assert summary.evals["plain"]["val_bpb"] == summary.val_bpb
    assert summary.fingerprint == Run.read(run.path).fingerprint
    assert summary.val_bpb < summary.val_bpb_raw * 1.1
    assert abs(summary.val_bpb - summary.pre_quant_val_bpb) < 0.05


def test_the_bytes_that_count_are_those_of_files_that_exist(run):
    summary, ledger = run.summary, run.json("ledger.json")
    model, code = run.path / "artifact.bin", run.path / "score.py"
    assert summary["bytes_model"] == model.stat().st_size
    assert summary["bytes_code"] == code.stat().st_size
    assert summary["artifact_bytes"] == model.stat().st_size + code.stat().st_size
    assert ledger["actual_bytes"] == summary["artifact_bytes"]
    assert sum(line["params"] for line in ledger["components"]) == summary["params"]


def test_every_line_of_the_record_is_json_with_all_counters(run):
    events = run.events
    logged = [event for event in events if "train/loss" in event]
    assert [event["step"] for event in logged] == [1, 5, 10, 15, 20]
    for event in logged:
        assert event["tokens"] == 512 * event["step"]
        assert event["train_seconds"] > 0
    assert any("val/bpb" in event for event in events)


def test_training_lowers_the_loss(run):
    assert run.losses[20] < run.losses[1] - 0.5


def test_the_console_shows_bytes_result_and_anchors_and_the_log_has_the_same(run):
    log = (run.path / "train.log").read_text()
    for text in (run.ended.out, log):
        assert "bytes by component" in text
        assert f"val_bpb         {run.summary['val_bpb']:.4f}" in text
        assert f"{run.summary['artifact_bytes']:,}: " in text
        assert "step    20/20" in text
    assert run.ended.err == ""


def test_evaluate_gives_the_same_digits(run):
    shown = recurgolf("evaluate", run.path, cwd=run.path.parent).finished().out
    assert f"val_bpb {run.summary['val_bpb']:.6f}" in shown
    ended = recurgolf("evaluate", run.path, "--json", cwd=run.path.parent).finished()
    found = json.loads(ended.out)["plain"]
    for key in ("val_bpb", "val_loss"):
        assert found[key] == run.summary[key]
    assert (found["tokens"], found["bytes"]) == (
        run.summary["val_tokens"],
        run.summary["val_bytes"],
    )


def test_evaluate_takes_another_protocol_and_keeps_the_rest(run):
    asked = ["eval=sliding", "eval.stride=16", "--json"]
    found = json.loads(recurgolf("evaluate", run.path, *asked, cwd=run.path).finished().out)
    assert found["sliding"]["tokens"] >= run.summary["val_tokens"]
    assert found["sliding"]["val_bpb"] != run.summary["val_bpb"]
    message = recurgolf("evaluate", run.path, "model.dim=3", cwd=run.path).refused()
    assert "evaluate takes overrides of eval and data" in message


@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_evaluate_refuses_a_damaged_file(run, tmp_path, damage):
    folder = shutil.copytree(run.path, tmp_path / "copy")
    artifact = folder / "artifact.bin"
    content = bytearray(artifact.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 1
        artifact.write_bytes(content)
    elif damage == "cut":
        artifact.write_bytes(content[:-5])
    else:
        artifact.unlink()
    assert "artifact" in recurgolf("evaluate", folder, cwd=tmp_path).refused()


WITHOUT_RECURGOLF = """
import importlib.util, pathlib, runpy, sys
sys.path = [p for p in sys.path if not (pathlib.Path(p) / "recurgolf/__init__.py").exists()]
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
spec = importlib.util.find_spec("recurgolf")  # a folder with nothing but YAML may be left
assert spec is None or spec.origin is None, "recurgolf must not be importable here"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def scored_alone(run: RunFolder, folder) -> dict:
    """What the packed program prints in a folder of its own where recurgolf cannot be imported."""
    for name in ("score.py", "artifact.bin"):
        shutil.copy(run.path / name, folder / name)
    data = compose(small()).data.prepare().folder
    command = [sys.executable, "-I", "-c", WITHOUT_RECURGOLF, "score.py", "artifact.bin"]
    done = subprocess.run(
        [*command, "--data", data], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_packed_code_scores_the_file_alone_and_gives_the_same_digits(run, tmp_path):
    found = scored_alone(run, tmp_path)["plain"]
    assert found["val_bpb"] == run.summary["val_bpb"]
    assert found["val_loss"] == run.summary["val_loss"]
    assert found["tokens"] == run.summary["val_tokens"]


def test_the_same_seed_gives_the_same_numbers_and_the_same_file():
    # Two of its own: other tests score the shared run again, which its summary remembers.
    run, again = train(attempt=1), train(attempt=2)
    assert again.path != run.path
    assert again.figures == run.figures
    assert (again.path / "artifact.bin").read_bytes() == (run.path / "artifact.bin").read_bytes()


def test_another_seed_gives_other_numbers(run):
    other = train("seed=2")
    assert other.losses[1] != run.losses[1]
    assert other.summary["val_bpb"] != run.summary["val_bpb"]
    assert other.summary["fingerprint"] != run.summary["fingerprint"]


def test_warm_up_leaves_no_trace_in_the_result(run):
    warm = train("trainer.warmup_steps=2")
    assert warm.losses == run.losses
    assert warm.summary["val_bpb"] == run.summary["val_bpb"]
    assert warm.summary["seconds"]["warmup"] > 0


def test_micro_steps_add_up_to_the_same_training():
    """In full precision: Muon's bfloat16 products make a last bit of the gradient visible."""
    exact = "optimizer.ns_dtype=float32"
    whole, parts = train(exact), train(exact, "trainer.grad_accum=4")
    assert parts.losses == pytest.approx(whole.losses, abs=1e-5)
    assert parts.summary["val_bpb"] == pytest.approx(whole.summary["val_bpb"], abs=1e-5)


def test_the_checkpoint_at_the_end_holds_the_weights_that_were_packed():
    exact = train("quant=none", "quant.keep_dtype=float32")
    parts, state = checkpoint.load(checkpoint.newest(exact.path / "checkpoints"))
    packed = dequantize_state(load(exact.path / "artifact.bin").tensors)
    assert set(parts["model"]) == set(packed)
    for name, tensor in packed.items():
        assert torch.equal(parts["model"][name], tensor), name
    assert state["fingerprint"] == exact.summary["fingerprint"]
    assert exact.summary["val_bpb"] == exact.summary["pre_quant_val_bpb"]


def test_over_the_budget_is_said_and_nothing_is_deleted():
    over = train("budget.artifact_bytes=30_000")
    assert over.ended.code == 3
    assert over.summary["status"] == "over_budget"
    assert not over.summary["within_budget"]
    assert "OVER THE BUDGET of 30,000 by" in over.ended.out
    assert {path.name for path in over.path.iterdir()} == FILES


def test_the_clock_stops_training_and_says_so():
    capped = train("budget.train_seconds=0.4", "trainer.steps=100000", "trainer.log_every=1000")
    assert 0 < capped.summary["steps"] < 100_000
    assert "the training clock reached its cap" in capped.ended.out
    # One step may begin just before the cap.
    assert 0.4 <= capped.summary["train_seconds"] < 3
    assert capped.summary["status"] == "finished"
    assert capped.summary["tokens"] == 512 * capped.summary["steps"]


@pytest.mark.parametrize("averaging", ["ema", "lawa"])
def test_averaged_weights_are_what_is_scored_and_packed(run, averaging):
    knob = {"ema": "averaging.decay=0.8", "lawa": "averaging.interval_steps=4"}[averaging]
    averaged = train(f"averaging={averaging}", knob, "trainer.steps=20")
    assert averaged.losses == run.losses
    assert averaged.summary["val_bpb"] != run.summary["val_bpb"]
    assert "weights:" in averaged.ended.out


def test_validation_on_the_way_changes_nothing(run):
    watched = train("trainer.val_every=5", "trainer.checkpoint_every=10")
    assert watched.losses == run.losses
    assert watched.summary["val_bpb"] == run.summary["val_bpb"]
    assert sum("val/bpb" in event for event in watched.events) == 4
    names = sorted(path.name for path in (watched.path / "checkpoints").iterdir())
    assert names == ["step_000010", "step_000020"]


def test_byte_counts_of_an_exporter_are_the_divisor_in_training_and_in_evaluate(tmp_path):
    """Its sidecars say 3 bytes for every token."""
    golden = Path(__file__).parent / "fixtures" / "golden" / "data"
    shards = shutil.copytree(golden / "shards", tmp_path / "shards")
    for shard in find_shards(shards, "val"):
        threes = np.full(count_tokens(shard), 3, dtype=np.uint16)
        write_shard(shards / shard.name.replace("_val_", "_val_bytes_"), threes)
    data = ["data=shards", f"data.path={shards}", f"data.tokenizer={golden / 'tokenizer.model'}"]
    own = ["experiment=smoke", *data, "data.vocab_size=1024", "tracker=none", *EXACT]
    recurgolf(*own, "trainer.steps=2", "hydra.run.dir=run", cwd=tmp_path).finished()
    summary = Summary.read(tmp_path / "run")
    assert summary.val_bytes == 3 * summary.val_tokens
    ended = recurgolf("evaluate", "run", "--json", cwd=tmp_path).finished()
    assert json.loads(ended.out)["plain"]["val_bpb"] == summary.val_bpb


def test_the_plain_command_on_the_embedded_text(tmp_path):
    """A fresh interpreter, everything as it comes: tokenizer, W&B, anchors of that text."""
    began = time.monotonic()
    ended = recurgolf_process("experiment=smoke", *EXACT, cwd=tmp_path).finished()
    assert time.monotonic() - began < 120
    (folder,) = (tmp_path / "outputs" / "smoke").iterdir()
    summary = Summary.read(folder)
    assert summary.val_bpb < 4.0
    assert "PPMd order 16 1.636" in ended.out
    assert "Traceback" not in ended.err
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 1
