"""The local record of a run: what is written can be read, also after a crash."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from recurgolf.record import (
    JsonlTracker,
    SeveralTrackers,
    Tracker,
    history,
    read_jsonl,
)


def test_metrics_come_back_as_they_were_logged(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlTracker(path, run_id="abc") as tracker:
        tracker.log({"train/loss": 3.25, "tokens": 2048, "train_seconds": 0.5}, step=1)
        tracker.log({"val/bpb": np.float32(1.5)}, step=1)  # type: ignore[dict-item]
        tracker.log({"train/loss": 3.0}, step=2)
        tracker.summary({"val_bpb": 1.4, "evals": {"plain": {"val_bpb": 1.4}}})
        tracker.log_artifact(tmp_path / "artifact.bin", "demo", {"bytes": 7})
    start, first, val, second, summary, artifact, finish = read_jsonl(path)
    assert start["values"] == {"run_id": "abc", "resumed": False}
    assert (first["train/loss"], first["step"], first["tokens"]) == (3.25, 1, 2048)
    assert (val["val/bpb"], val["tokens"], val["train_seconds"]) == (1.5, 2048, 0.5)
    assert "tokens" not in second, "the tokens of another step"
    assert summary["step"] == 2 and summary["values"]["evals"]["plain"]["val_bpb"] == 1.4
    assert artifact["values"] == {
        "path": "artifact.bin",
        "name": "demo",
        "metadata": {"bytes": 7},
    }
    assert (finish["event"], finish["values"]["exit_code"]) == ("finish", 0)


def test_every_line_is_strict_json_also_with_infinite_losses(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlTracker(path) as tracker:
        tracker.log({"a": math.nan, "b": math.inf, "c": -math.inf}, step=1)
        tracker.summary({"evals": [{"val_bpb": math.nan}]})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    row = read_jsonl(path)[1]
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == -math.inf


def test_a_killed_process_loses_no_logged_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    program = (
        "import sys, pathlib, itertools\n"
        "from recurgolf.record import JsonlTracker\n"
        "tracker = JsonlTracker(pathlib.Path(sys.argv[1]))\n"
        "for step in itertools.count():\n"
        "    tracker.log({'loss': step / 3}, step=step)\n"
        "    print(step, flush=True)\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(200)]
        process.kill()
        said += [int(line) for line in process.stdout.read().splitlines()]
    rows = history(read_jsonl(path))
    assert [row["step"] for row in rows[: len(said)]] == said
    assert all(row["loss"] == row["step"] / 3 for row in rows)


@pytest.mark.parametrize("keep", range(1, 40, 6))
def test_a_line_cut_by_a_crash_is_passed_over_and_then_cut_off(tmp_path, keep):
    path = tmp_path / "metrics.jsonl"
    with JsonlTracker(path) as tracker:
        tracker.log({"loss": 1.0}, step=1)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1][:keep])
    assert [e["event"] for e in read_jsonl(path)] == ["start", "metrics", "finish"]
    with JsonlTracker(path, resumed=True) as tracker:
        tracker.log({"loss": 2.0}, step=2)
    assert path.read_bytes().startswith(whole), "what was complete is never touched"
    assert [row["loss"] for row in history(read_jsonl(path))] == [1.0, 2.0]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "summary", "values": {}}\n{"event": \n{}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_jsonl(path)


def test_history_takes_the_repeated_steps_of_a_resumed_run_and_forgets_an_older_run(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for resumed, steps in ((False, (1, 2, 9)), (False, (1, 2, 3)), (True, (3, 4))):
        with JsonlTracker(path, resumed=resumed) as tracker:
            for step in steps:
                tracker.log({"loss": float(step + 10 * resumed)}, step=step)
    rows = [(row["step"], row["loss"]) for row in history(read_jsonl(path))]
    assert rows == [(1, 1.0), (2, 2.0), (3, 13.0), (4, 14.0)]


def test_a_failing_block_finishes_all_trackers_with_its_exit_code(tmp_path):
    first, second = (JsonlTracker(tmp_path / name) for name in ("first", "second"))
    with pytest.raises(KeyboardInterrupt), SeveralTrackers([first, Tracker(), second]) as both:
        both.log({"loss": 1.0}, step=3)
        both.summary({"val_bpb": 1.2})
        raise KeyboardInterrupt
    for tracker in (first, second):
        _, row, summary, end = read_jsonl(Path(str(tracker.location)))
        assert (row["step"], row["loss"], summary["values"]) == (3, 1.0, {"val_bpb": 1.2})
        assert end["values"] == {"exit_code": 130}
