"""Test-time training in a run: as its headline, by `recurgolf evaluate`, and by score.py alone."""

import json
import subprocess
import sys

import pytest
from command_line import recurgolf
from smoke_runs import train

from recurgolf.run import Run

SGD = ("eval=ttt_sgd", "eval.chunk_tokens=512")


def test_the_packed_program_trains_as_the_run_did():
    folder = train(*SGD).path
    data = Run.read(folder).data.prepare().folder
    ended = subprocess.run(
        [sys.executable, "score.py", "artifact.bin", "--data", data],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    (entry,) = json.loads(ended.stdout.splitlines()[-1]).values()
    assert entry["val_bpb"] == pytest.approx(train(*SGD).summary["val_bpb"], rel=1e-6)
    plain = train().summary["evals"]["plain"]
    assert entry["val_bpb"] != pytest.approx(plain["val_bpb"], rel=1e-4)


@pytest.mark.parametrize("kind", ["ttt_document_lora", "ttt_phased", "ttt_reconstruct"])
def test_a_finished_run_is_scored_again_by(kind, tmp_path):
    ended = recurgolf("evaluate", train().path, f"eval={kind}", "--json", cwd=tmp_path).finished()
    (entry,) = json.loads(ended.out.splitlines()[-1]).values()
    plain = train().summary["evals"]["plain"]
    assert entry["tokens"] >= plain["tokens"]
    # A smoke model knows next to nothing; what learns must not be far from it.
    assert entry["val_bpb"] == pytest.approx(plain["val_bpb"], rel=0.2)
