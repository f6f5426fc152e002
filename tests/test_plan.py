"""The plan says before training what the run will be."""

import time

import pytest
import torch
from command_line import recurgolf, recurgolf_process
from smoke_runs import composed, small, train
from torch.utils._python_dispatch import TorchDispatchMode

from recurgolf.artifact import load, pack
from recurgolf.conf import options
from recurgolf.config import REGISTRY
from recurgolf.plan import make_plan, plan_table, shapes_of
from recurgolf.quant import (
    QuantizedTensor,
    SigmaClip,
    code_entropy,
    dequantize_state,
    predicted_bits,
    quantize_state,
    rtn_quantize,
)
from recurgolf.run import Run

EXPERIMENTS = options()["experiment"]


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


def test_the_plan_names_the_code_that_counts_and_both_sizes(tmp_path):
    plan = make_plan(composed(*small()))
    out = recurgolf("plan", *small(), cwd=tmp_path).finished().out
    for name, size in plan.code.to_json()["files"].items():
        line = next(line for line in out.splitlines() if line.split()[:1] == [name])
        assert f"{size['packed']:,}" in line and f"{size['raw']:,}" in line
        assert ("counts" in line) == (name == "score.py")
    other = make_plan(composed(*small("artifact.code=train")))
    assert other.code_bytes == other.code.train.packed_bytes > 2 * plan.code_bytes
    # The header holds the fingerprint, which is another one.
    assert other.model_bytes == pytest.approx(plan.model_bytes, abs=8)
    assert other.total_bytes == other.model_bytes + other.code_bytes


def test_a_filled_budget_is_planned_as_full():
    run = composed("experiment=demo", "quant.fill_budget=true", "budget.artifact_bytes=800000")
    plan = make_plan(run)
    assert 0.998 * 800_000 < plan.total_bytes <= 800_000


def test_floored_steps_are_said_to_give_an_upper_bound(tmp_path):
    ended = recurgolf("plan", "experiment=parameter_golf_baseline_cpu", cwd=tmp_path).finished()
    assert "upper bound" in ended.out
    assert "upper bound" not in recurgolf("plan", *small(), cwd=tmp_path).finished().out


@pytest.mark.parametrize("codec", ["brotli", "lzma", "zlib", "zstd", "ans", "none"])
def test_a_codec_takes_the_bits_that_the_plan_expects(codec):
    """On Gaussian codes, at four steps; the plan adds a codec's excess to the entropy."""
    kind = REGISTRY["artifact/codec"][codec]()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 512, generator=generator)
    for bits, k in ((6, 17.0), (6, 7.0), (6, 5.0), (8, 8.0)):
        codes, _ = rtn_quantize(weight, bits=bits, clip=SigmaClip(k))
        stored = kind.encode(codes.numpy().tobytes(), [(512, 512)], 1).payload
        taken = 8 * len(stored) / codes.numel()
        assert kind.expected_bits(code_entropy(codes)) == pytest.approx(taken, rel=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ("model.dim=96", "artifact/codec=ans", "trainer.steps=500", "trainer.batch_tokens=1024"),
        ("quant=int6", "model.dim=128", "model.num_blocks=4", "trainer.steps=400", "lora=none"),
    ],
    ids=["ans", "int6"],
)
def test_the_prediction_is_within_three_percent_of_a_trained_file(tmp_path, overrides):
    """On the whole text, so that every piece of the vocabulary is seen often."""
    quiet = ["tracker=none", "trainer.precision=float32", "hydra.run.dir=run"]
    recurgolf("experiment=smoke", *overrides, *quiet, cwd=tmp_path).finished()
    predicted = make_plan(Run.read(tmp_path / "run")).model_bytes
    assert predicted == pytest.approx((tmp_path / "run/artifact.bin").stat().st_size, rel=0.03)


def test_the_plan_of_a_large_model_takes_seconds(tmp_path):
    began = time.process_time()
    plan_table(composed("experiment=universal_rank1"))
    assert time.process_time() - began < 5
    assert "headroom" in recurgolf_process("plan", cwd=tmp_path).finished().out


class Drawn(TorchDispatchMode):
    """The operations of which torch's versions without storage load its compiler."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= {name for name in ("normal_", "stack") if name in str(func)}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("experiment", ["universal_rank1_cpu", "gated_delta_lora_cpu"])
def test_a_model_without_storage_draws_nothing(experiment):
    """That would take a plan, and every start of score.py, a second."""
    run = composed(f"experiment={experiment}")
    with Drawn() as drawn:
        shapes = shapes_of(run)
    assert not drawn.found
    model = run.build_model()
    assert shapes == {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    with Drawn() as drawn:
        run.build_model()
    assert "normal_" in drawn.found
