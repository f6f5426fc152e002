"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

import contextlib
import dataclasses
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from command_line import recurgolf
from rich.console import Console
from smoke_runs import composed, small, train

from recurgolf.log import Log, time_left
from recurgolf.terminal import TerminalBar, terminal_bar
from recurgolf.training.report import packing_advice
from recurgolf.training.summary import Summary


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ((10, 40, 20.0, None), "1:00 left"),
        ((10, 40, 20.0, 600.0), "1:00 left"),
        ((10, 40, 20.0, 45.0), "0:25 left of the cap of 45 s"),
        ((10, 40, 50.0, 45.0), "0:00 left of the cap of 45 s"),
        ((40, 40, 80.0, None), "0:00 left"),
    ],
)
def test_time_left_is_to_the_last_step_or_to_the_cap(asked, said):
    assert time_left(*asked) == said


def test_a_line_of_training_tells_loss_bpb_visits_speed_and_time_left():
    run = train("looping=cycle", "looping.passes=2", "lora.rank=2", "trainer.log_every=5")
    lines = [line for line in run.ended.out.splitlines() if line.startswith("step ")]
    shown = [
        re.fullmatch(
            r"step +(\d+)/\d+ \| loss ([\d.]+) \| ~([\d.]+) bpb \| lr x[\d.]+ \| (\d+) visits \| "
            r"[\d,]+ tok/s \| \d+ s, \d+:\d\d left( of the cap of \d+ s)?",
            line,
        )
        for line in lines
        if "val_loss" not in line
    ]
    assert len(shown) >= 4 and all(shown)
    losses = run.losses
    summary = run.summary
    for match in filter(None, shown):
        loss = losses[int(match[1])]
        assert float(match[2]) == pytest.approx(loss, abs=1e-4)
        # Tokens per byte are those of the validation text, as in the final score.
        ratio = summary["val_bpb"] / summary["val_loss"]
        assert float(match[3]) == pytest.approx(loss * ratio, rel=0.01)
    assert "\x1b" not in run.ended.out, "a bar was drawn into a file"


def a_log(tmp_path, monkeypatch, width: int, term: str = "xterm-256color"):
    monkeypatch.setenv("TERM", term)
    seen = io.StringIO()
    log = Log(tmp_path / "train.log", bar=terminal_bar)
    log.console = Console(
        file=seen, force_terminal=True, width=width, highlight=False, soft_wrap=True
    )
    return log, seen


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path, monkeypatch):
    log, seen = a_log(tmp_path, monkeypatch, 120, "dumb")
    with log.bar("training", 10) as bar:
        bar.at(1, "loss 3.2 | 0:09 left", line=True)
    log.close()
    assert seen.getvalue() == "loss 3.2 | 0:09 left\n"


def test_the_bar_of_a_terminal_keeps_its_text_between_the_lines(tmp_path, monkeypatch):
    log, seen = a_log(tmp_path, monkeypatch, 120)
    with log.bar("training", 10) as bar:
        bar.at(1, "loss 3.2 | 0:09 left", line=True)
        for step in range(2, 5):
            bar.at(step)
        assert isinstance(bar, TerminalBar)
        bar.live.refresh()
        last = seen.getvalue().rsplit("training", 1)[1]
        assert "4/10" in last and "loss 3.2 | 0:09 left" in last
    log.close()
    assert (tmp_path / "train.log").read_text() == "loss 3.2 | 0:09 left\n"


def on_a_terminal(command: list[str], cwd: Path, signal_after: str = "") -> tuple[int, str]:
    """Run a command on a terminal of 80 x 24; its exit code and all that it wrote.

    Args:
        signal_after: when this is seen, Ctrl-C is pressed.
    """
    own, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "OMP_NUM_THREADS": "1"}
    environment.pop("COLUMNS", None)
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen(
        command, stdin=its, stdout=its, stderr=its, cwd=cwd, env=environment, start_new_session=True
    )
    os.close(its)
    seen = b""
    with contextlib.suppress(OSError):  # the terminal's end
        while piece := os.read(own, 65536):
            seen += piece
            if signal_after and signal_after.encode() in seen:
                process.send_signal(signal.SIGINT)
                signal_after = ""
    os.close(own)
    return process.wait(), seen.decode().replace("\r\n", "\n")


def test_on_80_columns_the_bar_keeps_score_and_time_and_a_line_per_tenth_stays(tmp_path):
    own = small("trainer.steps=40", "trainer.log_every=1", "hydra.run.dir=run")
    code, seen = on_a_terminal([sys.executable, "-m", "recurgolf", *own], tmp_path)
    assert code == 0, seen
    bars = [part for part in re.split(r"\x1b\[2K|\r", seen) if part.startswith("training")]
    plain = [re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", bar).split("\n")[0] for bar in bars]
    with_text = [bar for bar in plain if "bpb" in bar]
    assert with_text and all("left" in bar and len(bar) <= 80 for bar in with_text)
    stripped = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", seen)
    lines = [line for line in re.split(r"[\r\n]+", stripped) if re.match(r"step +\d+/40 ", line)]
    steps = [int(line.split("/")[0].split()[-1]) for line in lines if "val_loss" not in line]
    assert steps == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    assert all("bpb" in line and "left" in line and len(line) < 80 for line in lines[:10])
    # The end leads with score, bytes and folder, in this order.
    at = [stripped.index(word) for word in ("val_bpb  ", "bytes  ", "everything in", "training  ")]
    assert at == sorted(at)


def test_the_last_line_after_a_signal_is_the_command_that_goes_on(tmp_path):
    own = small("trainer.steps=4000", "trainer.log_every=1", "hydra.run.dir=a run")
    command = [sys.executable, "-m", "recurgolf", *own]
    code, seen = on_a_terminal(command, tmp_path, signal_after="400/4000")
    assert code == 130
    last = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", seen).strip().splitlines()[-1]
    assert last == f"recurgolf resume '{tmp_path / 'a run'}'"
    assert list((tmp_path / "a run" / "checkpoints").iterdir())


def test_a_validation_at_the_last_step_is_made_once():
    run = train("trainer.steps=10", "trainer.val_every=5")
    scored = [event["step"] for event in run.events if "val/bpb" in event]
    assert scored == [5, 10]
    (last,) = (
        event["val/bpb"] for event in run.events if event.get("step") == 10 and "val/bpb" in event
    )
    assert run.summary["pre_quant_val_bpb"] == last


def test_refused_data_leave_no_folder(tmp_path):
    ended = recurgolf(*small("data=text", "data.files=nothing.txt"), cwd=tmp_path)
    assert ended.code == 2 and "nothing.txt" in ended.err
    assert not list(tmp_path.rglob("train.log")) and not list(tmp_path.rglob(".hydra"))


@pytest.mark.parametrize(
    ("overrides", "bytes_model", "said"),
    [
        ((), 20_000, "quant.fill_budget=true"),
        ((), 970_000, "quant/qat=rate"),
        (("quant.fill_budget=true",), 20_000, "quant/qat=rate"),
    ],
    ids=["room left", "full", "filled"],
)
def test_what_packing_costs_is_told_with_what_would_help(overrides, bytes_model, said):
    run = train()
    summary = Summary.read(run.path)
    composed_run = composed(*small(*overrides))
    cheap = dataclasses.replace(summary, pre_quant_val_bpb=summary.val_bpb - 0.009)
    assert packing_advice(composed_run, cheap) == []
    dear = dataclasses.replace(
        summary,
        pre_quant_val_bpb=summary.val_bpb - 0.02,
        bytes_model=bytes_model,
        artifact_bytes=bytes_model + 22_000,
        budget_bytes=1_000_000,
    )
    (line,) = packing_advice(composed_run, dear)
    assert "0.0200 bits per byte" in line and said in line
