"""An honest run passes the audit, whatever protocol it is scored by."""

import dataclasses
import json

import numpy as np
import pytest
from command_line import recurgolf
from smoke_runs import train

from recurgolf import seal
from recurgolf.artifact import load
from recurgolf.artifact.score import rebuild, text_of
from recurgolf.audit.prediction import prediction_checks
from recurgolf.audit.scorer import LocalScorer
from recurgolf.config import REGISTRY
from recurgolf.eval import ScoredModel
from recurgolf.looping import CycleLooping
from recurgolf.model.transformer import Model
from recurgolf.run import Run

CHECKS = {
    *("causality", "normalised", "score_before_update", "single_pass"),
    *("bytes", "separation", "limits", "rescored", "files"),
}
KINDS = sorted(REGISTRY["eval"])
MIXERS = sorted(REGISTRY["model/mixer"])


@pytest.fixture(scope="module")
def scored_model():
    return rebuild(load(train().path / "artifact.bin"))


@pytest.fixture(scope="module")
def text():
    """Some documents of the real text."""
    whole = text_of(Run.read(train().path).data.prepare())
    return dataclasses.replace(whole, tokens=np.array(whole.tokens[:1500]))


def honest(kind, scored_model, text):
    protocol = REGISTRY["eval"][kind]()
    if hasattr(protocol, "adapter"):
        # Mixers name their projections differently; adapters sit where this one has some.
        known = set(scored_model.model.config.projections(0))
        protocol.adapter.targets = sorted(known & {"q_proj", "v_proj", "in_proj_qkv", "out_proj"})
    protocol.check_model(scored_model.model.config, scored_model.looping)
    if hasattr(protocol, "chunk_tokens"):
        # Several trainings, also in a text as short as this one.
        protocol.chunk_tokens = min(protocol.chunk_tokens, 256)
    checks, _ = prediction_checks(LocalScorer(protocol, scored_model, text), text, positions=2)
    assert [c.verdict for c in checks] == ["pass"] * 4, checks


@pytest.mark.parametrize("kind", KINDS)
def test_every_protocol_passes(kind, scored_model, text):
    honest(kind, scored_model, text)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_protocol_passes_with_every_mixer(kind, mixer, text):
    config = Model(vocab_size=512, dim=32, num_blocks=2, mixer=REGISTRY["model/mixer"][mixer]())
    looping = CycleLooping(passes=2)
    network = config.build(looping.largest_plan(2))
    honest(kind, ScoredModel(network, looping, 64), text)


def test_a_finished_run_passes_every_check():
    """On everything that it was scored by."""
    folder = train("eval.also=[ttt_reconstruct]", "eval.audit=true", "data.val_documents=6").path
    written = json.loads((folder / "audit.json").read_text())
    assert set(written["checks"]) == CHECKS
    assert all(c["verdict"] == "pass" and c["line"] for c in written["checks"].values()), written
    assert written["passed"] and written["protocols"] == ["plain", "ttt_reconstruct"]
    assert seal.audit_state(folder) == "passed"


@pytest.mark.slow
def test_the_command_finds_what_the_run_found_at_its_end(tmp_path):
    folder = train("eval.also=[ttt_reconstruct]", "eval.audit=true", "data.val_documents=6").path
    written = json.loads((folder / "audit.json").read_text())
    same = ["--positions", written["positions"], "--chance", written["chance"]]
    ended = recurgolf("audit", folder, "--json", *same, cwd=tmp_path).finished()
    again = json.loads(ended.out.splitlines()[-1])
    del again["seconds"], written["seconds"]
    assert again == written


@pytest.mark.slow
def test_a_run_whose_training_program_counts_is_no_false_alarm(tmp_path):
    """train_gpt.py is then the counted file, and the one that scores again."""
    run = train("artifact.code=train")
    ended = recurgolf("audit", run.path, "--positions", "1", "--json", cwd=tmp_path).finished()
    found = json.loads(ended.out.splitlines()[-1])
    assert (
        found["passed"] and "train_gpt.py and artifact.bin" in found["checks"]["rescored"]["line"]
    )


def test_being_audited_is_no_part_of_the_result():
    run = Run.read(train().path)
    audited = dataclasses.replace(run, eval=dataclasses.replace(run.eval, audit=True))
    assert audited.fingerprint == run.fingerprint
    assert audited.eval.alone == run.eval.alone


def test_a_folder_without_a_run_is_refused(tmp_path):
    assert "no run.json" in recurgolf("audit", tmp_path, cwd=tmp_path).refused()
