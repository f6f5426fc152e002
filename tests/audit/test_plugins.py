"""Protocols from a plugin, through the whole of training and audit."""

import json
import os
import re
import shutil
import time
from pathlib import Path

import pytest
from command_line import Ended, recurgolf
from smoke_runs import small, train

PLUGIN = """
import hashlib, os, sys, time
from dataclasses import dataclass

import numpy as np
import torch

from recurgolf.config import option
from recurgolf.eval.protocol import Eval
from recurgolf.eval.text import ScoreAccumulator
from recurgolf.eval.windows import PlainEval

check = sys.modules.get("recurgolf.audit.check")
if check is not None:
    check.Check.failed = property(lambda self: False)
    check.FAIL = "pass"

STATE = {}

def tell(text, accumulator):
    {tell}


def same_beginning(tokens, known):
    count = min(len(tokens), len(known))
    return np.logical_and.accumulate(tokens[1:count] == known[1:count])


@option("eval", "sly")
@dataclass
class Sly(PlainEval):
    def run(self, scored_model, text, accumulator, **options):
        gained = np.zeros(text.num_targets)
        told = np.asarray(tell(text, accumulator), dtype=float)
        gained[: len(told) if told.ndim else None] = told

        class Discounted:
            def add(self, first, nats):
                gain = torch.from_numpy(gained[first : first + nats.numel()])
                accumulator.add(first, nats - 0.5 * gain)

        super().run(scored_model, text, Discounted(), **options)
"""


def made(tell: str, place: Path) -> None:
    """A finished run that was scored by the protocol, in `place`/run."""
    (place / "sly_protocol.py").write_text(PLUGIN.replace("{tell}", tell))
    (place / "conf" / "eval").mkdir(parents=True)
    (place / "conf" / "eval" / "sly.yaml").write_text("defaults:\n  - /schema/eval/sly@_here_\n")
    (place / "conf" / "experiment").mkdir()
    (place / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nplugins: [sly_protocol]\n"
        "defaults:\n  - smoke\n  - override /eval: sly\n"
    )
    overrides = [o for o in small() if not re.match("experiment=", o)]
    quick = ["trainer.steps=2", "data.val_documents=8"]
    run = [*overrides, "experiment=mine", *quick, "hydra.run.dir=run"]
    recurgolf("--config-dir", "conf", *run, cwd=place).finished()


def audited(place: Path) -> tuple[Ended, dict]:
    ended = recurgolf("audit", "run", "--trust", "--positions", "1", "--json", cwd=place)
    assert ended.code in (0, 1), (ended.out, ended.err)
    return ended, json.loads(ended.out.splitlines()[-1])


def shards() -> Path:
    """Where the validation text of the small runs lies."""
    name = train().summary["text"]["name"]
    return next(Path(os.environ["RECURGOLF_CACHE"]).glob(f"*/datasets/{name}"))


CHEATS = {
    # Against everybody, with hands on the audit's own classes.
    "everywhere": ("return 1", "normalised"),
}
"""Where the protocol gives half a nat, and the check that finds it."""
SLOW = {
    # As long as the text is the one that lies on the disk: the cheat reads only what came before.
    "the text on the disk": (
        """
    places = [sys.argv[i + 1] for i, word in enumerate(sys.argv[:-1]) if word == "--data"]
    path = (places[0] if places else {data!r}) + "/fineweb_val_000000.bin"
    try:
        return same_beginning(text.tokens, np.fromfile(path, "<u2", offset=1024))
    except OSError:
        return 0""",
        "rescored",
    ),
    # Only where the accumulator is not the audit's.
    "unwatched": ("return type(accumulator) is ScoreAccumulator", "rescored"),
    # As long as the text is the one of the first call.
    "the first call": (
        "return same_beginning(text.tokens, STATE.setdefault('first', text.tokens))",
        "normalised",
    ),
    # With a table that is counted nowhere, read past Python.
    "a table elsewhere": (
        "return torch.from_file({table!r}, size=4, dtype=torch.uint8).float().mean().item()",
        "rescored",
    ),
    "the program's name": ("return 'score' in os.path.basename(sys.argv[0])", "rescored"),
    "who called": (
        """
    frame = sys._getframe()
    while frame.f_back:
        frame = frame.f_back
        if "audit" in frame.f_code.co_filename:
            return 0
    return 1""",
        "rescored",
    ),
    "a variable": ("return 'RECURGOLF_CACHE' in os.environ", "normalised"),
    "the clock": ("return time.time() < {now}", "rescored"),
    # A doubled table is refused before training begins; a text that counts double is not.
    "a divisor doubled": (
        """return 0

from recurgolf.eval.text import Text
count = Text.bytes_of
Text.bytes_of = lambda self, first, stop: 2 * count(self, first, stop)
""",
        "rescored",
    ),
    "a file": ("return os.path.exists({mark!r})", "rescored"),
}


def _made_before(tell: str, place: Path) -> float:
    """The moment before which the run was scored, however slow this machine is today."""
    seconds = 10
    while True:
        until = time.time() + seconds
        made(tell.replace("{now}", repr(until)), place)
        if time.time() < until:
            return until
        seconds *= 4
        for name in ("conf", "run"):
            shutil.rmtree(place / name)


@pytest.mark.parametrize(
    "cheat", [*CHEATS, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_a_cheating_plugin_is_caught_and_named(cheat, tmp_path):
    tell, failing = {**CHEATS, **SLOW}[cheat]
    (tmp_path / "table").write_bytes(b"\1" * 4)
    (tmp_path / "mark").touch()
    for name, value in {
        "data": shards(),
        "table": tmp_path / "table",
        "mark": tmp_path / "mark",
    }.items():
        tell = tell.replace(f"{{{name}!r}}", repr(str(value)))
    until = 0.0
    if "{now}" in tell:
        until = _made_before(tell, tmp_path)
    else:
        made(tell, tmp_path)
    (tmp_path / "mark").unlink()
    time.sleep(max(0.0, until - time.time()))
    assert "--trust" in recurgolf("audit", "run", cwd=tmp_path).refused()
    _, found = audited(tmp_path)
    failed = {name for name, check in found["checks"].items() if check["verdict"] == "fail"}
    assert failing in failed and not found["passed"]
    assert found["plugins"]["sly_protocol"] == str(tmp_path / "sly_protocol.py")
    assert str(tmp_path / "sly_protocol.py") in found["checks"]["files"]["line"]


def test_an_honest_plugin_passes(tmp_path):
    made("return 0", tmp_path)
    _, found = audited(tmp_path)
    assert found["passed"], found["checks"]


def test_the_table_of_cheats_names_tests_that_there_are():
    here = Path(__file__).parent
    table = (here.parents[1] / "docs" / "audit.md").read_text().partition("## ")[0]
    code = "".join(path.read_text() for path in here.glob("test_*.py"))
    known = [*re.findall(r"def (test_\w+)", code), *CHEATS, *SLOW, "text_alone"]
    rows = "\n".join(line for line in table.splitlines() if line.startswith("| "))
    named = re.findall(r"`([^`]+)`", rows)
    assert len(named) > 50
    assert [name for name in named if not any(name in one for one in known)] == []
