"""An honest run passes the audit, whatever protocol it is scored by."""

import dataclasses
import json

import pytest
from command_line import recurgolf
from smoke_runs import train

from recurgolf.artifact import load
from recurgolf.artifact.score import rebuild, text_of
from recurgolf.audit import prediction_checks
from recurgolf.audit.reduced_text import trial
from recurgolf.config import REGISTRY
from recurgolf.run import Run

CHECKS = {
    *("causality", "normalised", "score_before_update", "single_pass"),
    *("bytes", "separation", "limits"),
}
KINDS = sorted(REGISTRY["eval"])


@pytest.fixture(scope="module")
def scored_model():
    return rebuild(load(train().path / "artifact.bin"))


@pytest.fixture(scope="module")
def text():
    return text_of(Run.read(train().path).data.prepare())


@pytest.mark.parametrize("kind", KINDS)
def test_every_protocol_passes(kind, scored_model, text):
    protocol = REGISTRY["eval"][kind]()
    protocol.check_model(scored_model.model.config, scored_model.looping)
    checks = prediction_checks([protocol], scored_model, text)
    assert [c.verdict for c in checks] == ["pass"] * 4, checks


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("ttt_")])
def test_the_stretch_is_long_enough_to_learn_on(kind, scored_model, text):
    """Otherwise the audit of a learning protocol would look at one that does not learn."""
    tried = trial(REGISTRY["eval"][kind](), scored_model, text)
    assert len(tried.edges()) >= 4
    assert tried.text.num_documents >= 3


def test_a_finished_run_passes_every_check(tmp_path):
    """At its end and again by the command, on everything that it was scored by."""
    folder = train("eval.also=[ttt_reconstruct]", "eval.audit=true").path
    written = json.loads((folder / "audit.json").read_text())
    assert written["passed"] and set(written["checks"]) == CHECKS
    assert all(c["verdict"] == "pass" and c["line"] for c in written["checks"].values())
    assert written["protocols"] == ["plain", "ttt_reconstruct"]
    ended = recurgolf("audit", folder, "--json", cwd=tmp_path).finished()
    again = json.loads(ended.out.splitlines()[-1])
    del again["seconds"], written["seconds"]
    assert again == written


def test_being_audited_is_no_part_of_the_result():
    run = Run.read(train().path)
    audited = dataclasses.replace(run, eval=dataclasses.replace(run.eval, audit=True))
    assert audited.fingerprint == run.fingerprint
    assert audited.eval.alone == run.eval.alone


def test_a_folder_without_a_run_is_refused(tmp_path):
    assert "no run.json" in recurgolf("audit", tmp_path, cwd=tmp_path).refused()
