"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

import dataclasses
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from command_line import recurgolf
from rich.console import Console
from smoke_runs import composed, small, train

from recurgolf.log import Log, time_left
from recurgolf.terminal import TerminalBar, terminal_bar
from recurgolf.training.guard import repeats
from recurgolf.training.report import packing_advice
from recurgolf.training.summary import Summary

ROOT = Path(__file__).resolve().parents[2]


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


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((), None),
        (("trainer.steps=5000",), "5.0 times over: weights that decay"),
        (("trainer.steps=5000", "optimizer.matrix_weight_decay=0.1"), "5.0 times over"),
        (("trainer.steps=5000", "trainer.progress=wallclock"), None),
    ],
    ids=["once", "often", "often, with decay", "steps unknown"],
)
def test_a_text_that_is_read_again_and_again_is_told_before_training(overrides, said):
    run = composed("experiment=smoke", "trainer.batch_tokens=1024", *overrides)
    found = repeats(run, 1_024_000)
    assert found is None if said is None else said in found
    assert found is None or ("weight_decay" in found) == ("decay" in said)


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


def test_a_validation_within_training_takes_the_place_of_its_bar(tmp_path, monkeypatch):
    log, _ = a_log(tmp_path, monkeypatch, 80)
    with log.bar("training", 10) as outer:
        assert isinstance(outer, TerminalBar) and outer.live.live.is_started
        with log.bar("scoring", 10) as inner:
            assert isinstance(inner, TerminalBar) and inner.live.live.is_started
            assert not outer.live.live.is_started
        assert outer.live.live.is_started and not inner.live.live.is_started
    log.close()


@dataclasses.dataclass
class Terminal:
    """A command in a real tmux.

    Attributes:
        screens: what was on the screen, looked at again and again until the command had ended.
        history: the last screen, with all that has scrolled out of it.
    """

    code: int
    screens: list[str]
    history: str


def in_tmux(
    command: list[str], cwd: Path, columns: int, rows: int, interrupt_at: str = ""
) -> Terminal:
    """Run a command in a terminal of this size, to its end.

    Args:
        interrupt_at: when this is on the screen, Ctrl-C is pressed.
    """
    if shutil.which("tmux") is None:
        pytest.skip("there is no tmux: what a terminal shows is not looked at")
    code = cwd / "code"
    # The shell outlives a Ctrl-C that its command dies of.
    line = f"trap : INT; {shlex.join(command)}; echo $? > {shlex.quote(str(code))}; exec sleep 300"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("COLUMNS", None)
    with tempfile.TemporaryDirectory() as folder:  # a socket's path may not be long
        tmux = ["tmux", "-f", "/dev/null", "-S", f"{folder}/socket"]
        start = ["new-session", "-d", "-x", str(columns), "-y", str(rows), "sh", "-c", line]
        subprocess.run([*tmux, *start], cwd=cwd, env=environment, check=True)

        def captured(*how: str) -> str:
            shot = [*tmux, "capture-pane", "-p", *how]
            return subprocess.run(shot, capture_output=True, text=True, check=True).stdout

        screens: list[str] = []
        try:
            while not code.exists() or not code.read_text():
                screens.append(captured())
                if interrupt_at and interrupt_at in screens[-1]:
                    subprocess.run([*tmux, "send-keys", "C-c"], check=True)
                    interrupt_at = ""
                time.sleep(0.03)
            return Terminal(int(code.read_text()), screens, captured("-J", "-S", "-"))
        finally:
            subprocess.run([*tmux, "kill-server"], check=False)


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (132, 43)])
def test_the_bar_keeps_score_and_time_left_and_a_line_per_tenth_stays(columns, rows, tmp_path):
    own = small("trainer.steps=120", "trainer.log_every=1", "hydra.run.dir=run")
    seen = in_tmux([sys.executable, "-m", "recurgolf", *own], tmp_path, columns, rows)
    assert seen.code == 0, seen.history
    bars = [
        [line for line in screen.splitlines() if line.startswith("training ") and "/120" in line]
        for screen in seen.screens
    ]
    assert max(map(len, bars)) == 1, "one bar, on a line of its own"
    shown = [line for lines in bars for line in lines if not re.search(r" [01]/120", line)]
    assert shown and all("bpb" in line and "left" in line for line in shown)
    if columns > 100:
        assert any("loss" in line and "tok/s" in line for line in shown)
    lines = [line for line in seen.history.splitlines() if re.match(r"step +\d+/120 ", line)]
    lines = [line for line in lines if "val_loss" not in line]
    steps = [int(line.split("/")[0].split()[-1]) for line in lines]
    assert steps == list(range(12, 121, 12))
    assert all("bpb" in line and "left" in line for line in lines)
    assert "training [" not in seen.history and "━" not in seen.history, "the bar has gone"
    # The end leads with score, bytes and folder, in this order.
    at = [seen.history.index(f"\n{word}") for word in ("val_bpb  ", "bytes  ", "everything in")]
    assert at == sorted(at) and at[-1] < seen.history.index("\ntraining  ")
    assert all(len(line) <= columns for screen in seen.screens for line in screen.splitlines())


def test_the_last_line_after_a_signal_is_the_command_that_goes_on(tmp_path):
    own = small("trainer.steps=4000", "trainer.log_every=1", "hydra.run.dir=a run")
    command = [sys.executable, "-m", "recurgolf", *own]
    seen = in_tmux(command, tmp_path, 80, 24, interrupt_at="bpb")
    assert seen.code == 130
    last = seen.history.strip().splitlines()[-1]
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
