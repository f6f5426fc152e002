"""What a person sees while a run trains: a bar on a terminal, plain lines elsewhere."""

import io
import re

import pytest
from rich.console import Console
from smoke_runs import train

from recurgolf.log import Log, time_left


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


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    seen = io.StringIO()
    log = Log(tmp_path / "train.log")
    log.console = Console(file=seen, force_terminal=True, width=120, highlight=False)
    with log.bar("training", 10) as bar:
        bar.at(1, "loss 3.2 | 0:09 left", line=True)
        assert bar.live is None
    log.close()
    assert seen.getvalue() == "loss 3.2 | 0:09 left\n"


def test_the_bar_of_a_terminal_keeps_its_text_between_the_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    seen = io.StringIO()
    log = Log(tmp_path / "train.log")
    log.console = Console(file=seen, force_terminal=True, width=120, highlight=False)
    with log.bar("training", 10) as bar:
        bar.at(1, "loss 3.2 | 0:09 left", line=True)
        for step in range(2, 5):
            bar.at(step)
        assert bar.live is not None
        bar.live.refresh()
        last = seen.getvalue().rsplit("training", 1)[1]
        assert "4/10" in last and "loss 3.2 | 0:09 left" in last
    log.close()
    assert (tmp_path / "train.log").read_text() == "loss 3.2 | 0:09 left\n"
