"""The plan says before training what the run will be."""

import time

import pytest
import torch
from command_line import recurgolf, recurgolf_process
from smoke_runs import composed, small, train

from recurgolf.artifact import load, pack
from recurgolf.cli import conf_folder
from recurgolf.plan import make_plan, shapes_of
from recurgolf.quant import QuantizedTensor, dequantize_state, predicted_bits, quantize_state
from recurgolf.run import Run

EXPERIMENTS = sorted(path.stem for path in (conf_folder() / "experiment").glob("*.yaml"))


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_a_plan(name):
    plan = make_plan(composed(f"experiment={name}"))
    assert plan.code_bytes < plan.total_bytes
    assert plan.effective_params >= sum(line.params for line in plan.lines)
    # What runs on the CPU fits its budget; the public systems state their own bytes.
    if name in ("smoke", "demo") or name.endswith("_cpu"):
        assert plan.total_bytes <= plan.budget_bytes


@pytest.mark.parametrize("name", ["smoke", "universal_rank1_cpu", "per_iteration_lora_cpu"])
def test_the_parameters_are_those_of_the_built_model(name):
    run = composed(f"experiment={name}")
    assert make_plan(run).params == sum(p.numel() for p in run.build_model().parameters())


def test_flops_and_effective_parameters_match_a_count_by_hand():
    """Width 32, two query heads of 16 on one key head, MLP 64, two blocks run twice, rank 1."""
    heads = ["model.mixer.num_heads=2", "model.mixer.num_kv_heads=1", "model.mlp_mult=2"]
    run = composed("experiment=smoke", "data.vocab_size=512", *heads)
    d, kv, hidden, length = 32, 16, 64, 64
    assert (run.model.dim, run.trainer.seq_len, run.looping.passes) == (d, length, 2)
    attention = 2 * (d * d + d * kv + d * kv + d * d)
    mlp = 2 * (d * hidden + hidden * d)
    # Scores and weighted values over the (length + 1) / 2 positions that a token sees on average.
    mixing = 2 * 2 * d * (length + 1) // 2
    adapters = 2 * ((d + d) + (d + kv) + (d + hidden) + (hidden + d))
    forward = 4 * (attention + mlp + mixing + adapters) + 2 * d * 512
    plan = make_plan(run)
    assert plan.flops_per_token == 3 * forward
    # Everything in the two blocks works twice; adapters, one per visit, and the embedding once.
    blocks = [p for name, p in run.build_model().named_parameters() if name.startswith("blocks.")]
    shared = sum(p.numel() for p in blocks)
    assert shared >= 2 * (2 * d * d + 2 * d * kv + 2 * d * hidden)
    assert plan.effective_params == plan.params + shared


def test_the_prediction_is_near_the_codes_of_the_trained_model():
    """Within 5 % of the entropy of every matrix's codes.

    The file itself is smaller: half of the pieces never occur in the small text, so that their
    rows have all moved alike.
    """
    run = train()
    tensors = load(run.path / "artifact.bin").tensors
    rules = Run.read(run.path).quant.assign(
        {name: tuple(t.shape) for name, t in dequantize_state(tensors).items()}
    )
    matrices = {n: t for n, t in tensors.items() if isinstance(t, QuantizedTensor)}
    assert len(matrices) == 13
    for name, tensor in matrices.items():
        grid = rules[name].grid
        assert grid is not None
        counts = tensor.codes.flatten().to(int).add(64).bincount().double()
        shares = counts[counts > 0] / counts.sum()
        measured = float(-(shares * shares.log2()).sum())
        assert predicted_bits(grid, tensor.codes.shape[1]) == pytest.approx(measured, rel=0.05)
    assert run.json("ledger.json")["predicted_bytes"] > run.summary["artifact_bytes"]


def test_the_prediction_is_near_the_file_of_gaussian_weights(tmp_path):
    run = composed(*small("lora.rank=0", "quant=int6", "quant.keep_float_max_numel=0"))
    generator = torch.Generator().manual_seed(0)
    state = {n: torch.randn(s, generator=generator) for n, s in shapes_of(run).items()}
    stored = quantize_state(state, run.quant.assign(shapes_of(run)))
    pack(tmp_path / "file", {}, stored, run.artifact.codec)
    predicted = [line.predicted for line in make_plan(run).lines if line.component != "header"]
    assert (tmp_path / "file").stat().st_size == pytest.approx(sum(predicted), rel=0.05)


def test_the_command_prints_it_and_trains_nothing(tmp_path):
    ended = recurgolf("plan", *small(), cwd=tmp_path).finished()
    plan = make_plan(composed(*small()))
    for figure in (plan.params, plan.effective_params, plan.flops_per_token, plan.total_bytes):
        assert f"{figure:,}" in ended.out
    assert "4: (0 1)x2" in ended.out
    assert list(tmp_path.iterdir()) == []


def test_the_plan_of_a_large_model_takes_seconds(tmp_path):
    began = time.process_time()
    make_plan(composed("experiment=universal_rank1"))
    assert time.process_time() - began < 5
    assert "headroom" in recurgolf_process("plan", cwd=tmp_path).finished().out
