"""depth_recurrent_qat, of which only a report is public: what it states, in both readings."""

import math

import pytest
import torch

import recurgolf
from recurgolf.config import kind_of
from recurgolf.model.rope import rope_base
from recurgolf.optim import build
from recurgolf.optim.numuon import NuMuon
from recurgolf.quant import dequantize, rtn_quantize

READINGS = {"residual": [], "per projection": ["lora=attention", "lora.visits=all"]}


def composed(*overrides):
    return recurgolf.compose(["experiment=depth_recurrent_qat_cpu", *overrides])


@pytest.fixture(params=READINGS)
def run(request):
    return composed(*READINGS[request.param], "data.vocab_size=64", "model.dim=64")


def test_nine_visits_run_three_blocks_loop_by_loop(run):
    assert run.plan(0.0).blocks == (0, 1, 2) * 3 == run.eval_plan.blocks


def test_every_one_of_the_nine_visits_has_a_correction_that_starts_as_nothing(run):
    model = run.build_model()
    slots = {(v.block, model.adapters.slot(v)) for v in run.plan(1.0).visits}
    assert slots == {(block, slot) for block in range(3) for slot in range(3)}
    ids = torch.arange(20).view(2, 10)
    adapted = model(ids, run.eval_plan)
    model.adapters = None
    assert torch.equal(model(ids, run.eval_plan), adapted)


def test_muons_rate_is_divided_by_the_square_root_of_the_loops_and_no_other(run):
    model = run.build_model()
    passes = run.looping.passes_of(run.model.num_blocks)
    groups = build(run.optimizer, model, passes, run.largest_plan.looped_blocks).groups
    rates = {group.role: group.lr for group in groups}
    assert passes == 3
    assert rates["matrix"] == pytest.approx(0.04 / math.sqrt(3))
    assert (rates["embed"], rates["scalar"], rates["lora"]) == (0.05, 0.04, 0.01)
    assert not [group for group in groups if group.role == "lora" and group.muon]


def test_numuon_takes_the_place_of_muon_by_one_override(run):
    config = composed("optimizer.matrix_optimizer=numuon").optimizer
    assert isinstance(build(config, run.build_model()).muon, NuMuon)


def test_the_rotary_base_grows_at_the_longer_scoring_length():
    run = recurgolf.compose(["experiment=depth_recurrent_qat"])
    rope, dims = run.model.rope, run.model.head_dims[0]
    length = run.eval.seq_len
    assert (length, run.trainer.seq_len, dims) == (2 * 1024, 1024, 96)
    grown = rope_base(rope.base, dims, length, rope.train_len)
    assert grown == pytest.approx(20_297, abs=1)  # at twice the length: 10,000 x 2 ** (96 / 94)
    assert rope_base(rope.base, dims, 1024, rope.train_len) == 10_000


def test_training_sees_the_exported_int8_weights_from_the_first_step(run):
    assert kind_of(run.quant.qat) == "straight_through"
    assert (run.quant.qat.start_fraction, run.quant.qat.blocks) == (0.0, "all")
    model = run.build_model()
    rules = run.quant.assign({n: tuple(p.shape) for n, p in model.state_dict().items()})
    grids = {name: rule.grid for name, rule in rules.items() if rule.grid is not None}
    aware = run.quant.qat.build(model, grids, [name for name in grids if "blocks." in name])
    aware.update(0.0)
    layer, name = model.blocks[1].mlp.up_proj, "blocks.1.mlp.up_proj.weight"
    grid = grids[name]
    codes, scales = rtn_quantize(
        layer.weight, bits=8, clip=grid.clip, scale_floor="inv_qmax", code_scale="float32"
    )
    x = torch.randn(3, layer.in_dim, generator=torch.Generator().manual_seed(0))
    layer.train()
    torch.testing.assert_close(layer(x), x @ dequantize(codes, scales).T)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand_as(layer.weight))
    layer.eval()
    assert torch.equal(layer(x), x @ layer.weight.T)
