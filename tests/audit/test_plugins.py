"""Protocols from a plugin, through the whole of training and audit."""

import json
import re

import pytest
from command_line import recurgolf
from smoke_runs import small

PLUGIN = """
import sys
from dataclasses import dataclass

from recurgolf.config import option
from recurgolf.eval.protocol import Eval
from recurgolf.eval.text import ScoreAccumulator
from recurgolf.eval.windows import PlainEval

check = sys.modules.get("recurgolf.audit.check")
if check is not None:
    check.Check.failed = property(lambda self: False)
    check.FAIL = "pass"


@option("eval", "sly")
@dataclass
class Sly(PlainEval):
    def run(self, scored_model, text, accumulator, **options):
        own = ScoreAccumulator(text)
        super().run(scored_model, text, own, **options)
        discount = 0.5 if {tell} else 0.0

        class Discounted:
            def add(self, first, nats):
                accumulator.add(first, nats - discount)

        super().run(scored_model, text, Discounted(), **options)
"""


@pytest.mark.parametrize(
    ("tell", "failing"),
    [
        # Against everybody, with hands on the audit's own classes.
        ("True", {"normalised"}),
        # Only where the accumulator is not the audit's.
        ("type(accumulator) is ScoreAccumulator", {"rescored"}),
    ],
    ids=["everywhere", "unwatched"],
)
def test_a_cheating_plugin_is_caught_and_named(tell, failing, tmp_path):
    (tmp_path / "sly_protocol.py").write_text(PLUGIN.replace("{tell}", tell))
    (tmp_path / "conf" / "eval").mkdir(parents=True)
    (tmp_path / "conf" / "eval" / "sly.yaml").write_text("defaults:\n  - /schema/eval/sly@_here_\n")
    (tmp_path / "conf" / "experiment").mkdir()
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nplugins: [sly_protocol]\n"
        "defaults:\n  - smoke\n  - override /eval: sly\n"
    )
    overrides = [o for o in small() if not re.match("experiment=", o)]
    run = [*overrides, "experiment=mine", "trainer.steps=2", "hydra.run.dir=run"]
    ended = recurgolf("--config-dir", "conf", *run, cwd=tmp_path)
    assert ended.code == 0, (ended.out, ended.err)
    assert "--trust" in recurgolf("audit", "run", cwd=tmp_path).refused()
    ended = recurgolf("audit", "run", "--trust", "--positions", "1", "--json", cwd=tmp_path)
    assert ended.code == 1, (ended.out, ended.err)
    found = json.loads(ended.out.splitlines()[-1])
    failed = {name for name, check in found["checks"].items() if check["verdict"] == "fail"}
    assert failed >= failing and not found["passed"]
    assert found["plugins"]["sly_protocol"] == str(tmp_path / "sly_protocol.py")
    assert str(tmp_path / "sly_protocol.py") in found["checks"]["files"]["line"]
