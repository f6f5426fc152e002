"""Packing trained weights again: the same options give the same file, others need no training."""

import json

import pytest
from command_line import recurgolf
from smoke_runs import train

from recurgolf.artifact import load
from recurgolf.quant import QuantizedTensor
from recurgolf.run import Run

TRAINED = ("trainer.steps=16", "averaging=ema", "averaging.decay=0.8")


@pytest.fixture(scope="module")
def trained():
    return train(*TRAINED)


def figures(folder):
    return json.loads((folder / "summary.json").read_text())


def test_equal_options_give_the_runs_own_file_and_score(trained, tmp_path):
    """Averaged weights included: the file is the run's, byte for byte."""
    recurgolf("pack", trained.path, "again", cwd=tmp_path).finished()
    again = tmp_path / "again"
    assert (again / "artifact.bin").read_bytes() == (trained.path / "artifact.bin").read_bytes()
    assert (again / "score.py").read_bytes() == (trained.path / "score.py").read_bytes()
    ours, theirs = figures(again), trained.summary
    same = ("val_bpb", "val_loss", "artifact_bytes", "fingerprint", "params", "steps", "tokens")
    for key in (*same, "pre_quant_val_bpb", "trajectory", "quantization", "val_bpb_raw"):
        assert ours[key] == theirs[key], key
    assert {p.name for p in again.iterdir()} >= {"run.json", "ledger.json", "train.log"}


def test_other_quantizers_and_codecs_start_from_the_same_weights(trained, tmp_path):
    overrides = ["quant=gptq_int6_tiny", "quant.calibration.sequences=4", "artifact/codec=zlib"]
    recurgolf("pack", trained.path, "other", *overrides, cwd=tmp_path).finished()
    ours = figures(tmp_path / "other")
    assert ours["pre_quant_val_bpb"] == trained.summary["pre_quant_val_bpb"]
    assert ours["val_bpb"] != trained.summary["val_bpb"]
    assert ours["quantization"]["weights"] == {"gptq": 13}
    run, before = Run.read(tmp_path / "other"), Run.read(trained.path)
    assert run.fingerprint == ours["fingerprint"] != before.fingerprint
    assert run.model == before.model and run.trainer == before.trainer
    assert run.quant.calibration.sequences == 4
    tensors = load(tmp_path / "other/artifact.bin").tensors.values()
    assert {t.method for t in tensors if isinstance(t, QuantizedTensor)} == {"gptq"}


def test_a_key_changes_the_runs_own_option_and_a_group_its_part_of_it(trained, tmp_path):
    overrides = ["quant.rules.3.bits=4", "quant.rules.3.lqer_rank=2"]
    overrides += ["quant/calibration=self_generated", "--no-score"]
    recurgolf("pack", trained.path, "keyed", *overrides, cwd=tmp_path).finished()
    run, before = Run.read(tmp_path / "keyed"), Run.read(trained.path)
    assert [r.pattern for r in run.quant.rules] == [r.pattern for r in before.quant.rules]
    assert (run.quant.rules[3].bits, before.quant.rules[3].bits) == (4, 6)
    assert type(run.quant.calibration).__name__ == "SelfGenerated"
    assert not (tmp_path / "keyed/summary.json").exists()
    names = load(tmp_path / "keyed/artifact.bin").tensors
    assert "blocks.0.mlp.up_proj.weight:lqer_in" in names


def test_a_file_over_the_budget_is_kept_and_the_exit_code_says_so(trained, tmp_path):
    bytes_code = trained.summary["bytes_code"]
    overrides = [f"budget.artifact_bytes={bytes_code + 5000}", "--no-score"]
    assert recurgolf("pack", trained.path, "over", *overrides, cwd=tmp_path).code == 3
    assert (tmp_path / "over/artifact.bin").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["model.dim=8"], "not of 'model.dim'"),
        (["quant=int9"], "did you mean"),
        (["budget.artifact_bytes=500"], "smaller than the code"),
        (["quant=gptq_int6_tiny", "quant.calibration.sequences=1_000_000"], "sequences=1000000"),
    ],
)
def test_what_cannot_be_packed_is_refused_and_leaves_nothing(arguments, words, trained, tmp_path):
    ended = recurgolf("pack", trained.path, "made", *arguments, cwd=tmp_path)
    assert words in ended.refused()
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_and_one_without_weights_are_refused(trained, tmp_path):
    used = recurgolf("pack", trained.path, trained.path, cwd=tmp_path)
    assert "not empty" in used.refused()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare/run.json").write_text((trained.path / "run.json").read_text())
    bare = recurgolf("pack", "bare", "made", cwd=tmp_path)
    assert "no checkpoint" in bare.refused()
