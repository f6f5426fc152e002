"""Quantization-aware training sees what the export makes, in training alone, from its start on."""

import copy
from pathlib import Path

import pytest
import torch
from smoke_runs import composed

from recurgolf.config import ConfigError
from recurgolf.log import Log
from recurgolf.model.linear import Linear
from recurgolf.quant import (
    MaxClip,
    Noise,
    NoQat,
    PercentileSearchClip,
    QuantizerGrid,
    SigmaClip,
    Snap,
    StraightThrough,
    quantize_state,
)
from recurgolf.training.job import Job
from recurgolf.training.quantize import packed_state, prepare_quantization, rules_of

OVERRIDES = ("experiment=smoke", "quant.keep_float_max_numel=0")


@pytest.fixture
def run():
    return composed(*OVERRIDES)


def network(run):
    model = run.build_model()
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def attached(run, model, qat):
    rules = rules_of(run, model)
    grids = {n: r.grid for n, r in rules.items() if r.grid is not None}
    looped = [n for n in rules if n.startswith("blocks.")]
    return qat.build(model, grids, looped)


def exported_model(run, model, looped_only=False):
    """The network that a reader of the file would have."""
    state = packed_state(model)
    stored = quantize_state(state, rules_of(run, model))
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if hasattr(module, "fake_quantize"):
            module.fake_quantize = None
    for name, value in stored.items():
        if hasattr(value, "codes") and (name.startswith("blocks.") or not looped_only):
            copied.get_parameter(name).data = value.dequantize()
    return copied


def batch(run):
    return torch.randint(
        0, run.model.vocab_size, (2, 16), generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("blocks", ["all", "looped"])
def test_training_sees_the_exported_weights_and_evaluation_its_own(run, blocks):
    model, ids, plan = network(run), batch(run), run.plan(1.0)
    plain = model.train()(ids, plan, ids)
    own = model.eval()(ids, plan, ids)
    aware = attached(run, model, StraightThrough(start_fraction=0.5, blocks=blocks))
    aware.update(0.4)
    assert torch.equal(model.train()(ids, plan, ids), plain)
    aware.update(0.5)
    # Tied table included: it is looked up, and it reads out.
    expected = exported_model(run, model, blocks == "looped").train()(ids, plan, ids)
    torch.testing.assert_close(model.train()(ids, plan, ids), expected, rtol=1e-5, atol=1e-6)
    assert not torch.equal(expected, plain)
    assert torch.equal(model.eval()(ids, plan, ids), own)


def test_gradients_are_those_of_the_exported_network(run):
    model, ids, plan = network(run), batch(run), run.plan(1.0)
    attached(run, model, StraightThrough()).update(0.0)
    model.train()(ids, plan, ids).backward()
    exported = exported_model(run, model).train()
    exported(ids, plan, ids).backward()
    for name, parameter in exported.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name
        )


def test_weights_are_taken_up_anew_at_every_step(run):
    model, ids, plan = network(run).train(), batch(run), run.plan(1.0)
    aware = attached(run, model, StraightThrough())
    aware.update(0.0)
    for parameter in model.parameters():
        parameter.data *= 1.3
    aware.update(0.1)
    expected = exported_model(run, model).train()(ids, plan, ids)
    torch.testing.assert_close(model(ids, plan, ids), expected, rtol=1e-5, atol=1e-6)


def test_noise_is_universal_rank1s_formula_fresh_at_every_visit_and_repeatable():
    """W + (U - 1/2) · max|row| / 31 on the shared weights."""
    from recurgolf.model.linear import Linear

    layer = torch.nn.Module()
    layer.proj = Linear(40, 12)
    layer.proj.weight.data = torch.randn(12, 40, generator=torch.Generator().manual_seed(0))
    grids = {"proj.weight": QuantizerGrid(6, MaxClip())}
    Noise().build(layer, grids, looped=["proj.weight"]).update(0.0)
    weight, eye = layer.proj.weight, torch.eye(40)
    torch.manual_seed(7)
    first, second = layer.proj(eye).T, layer.proj(eye).T
    torch.manual_seed(7)
    noise = (torch.rand(12, 40) - 0.5) * weight.abs().amax(dim=1, keepdim=True) / 31
    # Steps are float16, here as in the file: noise differs by half a unit in their last place.
    off = (first - weight - noise).abs()
    assert (off <= 2**-11 * noise.abs() + 1e-6).all()
    assert not torch.equal(first, second)
    torch.manual_seed(7)
    assert torch.equal(layer.proj(eye).T, first)
    layer.proj(eye).sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert torch.equal(layer.eval().proj(eye).T, weight)


@pytest.mark.parametrize(
    "spec",
    [
        QuantizerGrid(4, SigmaClip(3.0)),
        QuantizerGrid(3, MaxClip(), group_size=8, symmetric=False),
        QuantizerGrid(2, PercentileSearchClip([90.0, 100.0])),
        QuantizerGrid(1, MaxClip()),
    ],
)
def test_snapping_pulls_weights_onto_the_grid_while_training_ends(spec):
    from recurgolf.model.linear import Linear
    from recurgolf.quant.rtn import exported

    layer = torch.nn.Module()
    layer.proj = Linear(20, 6)
    layer.proj.weight.data = torch.randn(6, 20, generator=torch.Generator().manual_seed(1))
    before = layer.proj.weight.detach().clone()
    grid = exported(before, spec)
    aware = NoQat(Snap(0.5, start_fraction=0.6)).build(layer, {"proj.weight": spec}, [])
    aware.snap(0.6)
    assert torch.equal(layer.proj.weight, before)
    aware.snap(0.8)
    torch.testing.assert_close(layer.proj.weight.detach(), 0.75 * before + 0.25 * grid)
    NoQat(Snap(1.0, 0.0)).build(layer, {"proj.weight": spec}, []).snap(1.0)
    torch.testing.assert_close(
        exported(layer.proj.weight, spec), layer.proj.weight.detach(), rtol=0, atol=0.6
    )


@pytest.mark.parametrize("kind", [StraightThrough, Noise])
def test_it_compiles_as_one_graph_and_beginning_changes_nothing_in_it(kind):
    from recurgolf.model.linear import Linear

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = Linear(16, 16)

        def forward(self, x):
            return self.proj(torch.tanh(self.proj(x)))

    net = Net()
    net.proj.weight.data = torch.randn(16, 16, generator=torch.Generator().manual_seed(2))
    aware = kind(blocks="all", start_fraction=0.5).build(
        net, {"proj.weight": QuantizerGrid(4, SigmaClip(3.0))}, [], ahead=True
    )
    graphs = []

    def counted(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(net, backend=counted, fullgraph=True)
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    aware.update(0.1)
    torch.testing.assert_close(compiled(x), net.eval()(x))
    net.train()
    graphs.clear()
    torch._dynamo.reset()
    compiled(x)
    aware.update(0.5)
    torch.manual_seed(0)
    seen = compiled(x)
    aware.update(0.6)
    compiled(x)
    assert len(graphs) == 1
    torch.manual_seed(0)
    torch.testing.assert_close(seen, net(x))
    assert not torch.allclose(seen, net.eval()(x))


def test_what_would_change_nothing_is_refused():
    run = composed(*OVERRIDES[:1], "quant=none", "quant/qat=noise")
    with pytest.raises(ConfigError, match="code no weight"):
        prepare_quantization(Job.watched(run, Path(), log=Log(None, False)), run.build_model())
    with pytest.raises(ConfigError, match="loops no block"):
        composed(*OVERRIDES[:1], "looping=none", "lora=none", "quant/qat=noise")


@pytest.mark.parametrize("kind", [Noise, StraightThrough])
def test_own_steps_are_those_of_the_largest_entry_whatever_the_export_does(kind):
    weight = torch.nn.Parameter(
        0.1 * torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    )
    layer = Linear(64, 3)
    layer.weight = weight
    spec = QuantizerGrid(6, PercentileSearchClip(), scale_floor="inv_qmax")
    step = weight.detach().abs().amax(1, keepdim=True) / 31

    def change(qat):
        holder = torch.nn.ModuleDict({"up": layer})
        qat.build(holder, {"up.weight": spec}, ["up.weight"]).update(0.5)
        return (layer.train().seen_weight - weight).detach().abs()

    assert (change(kind(blocks="all")) > step / 2 + 1e-4).any()  # a floor of 1 / 31, far wider
    own = change(kind(blocks="all", compat_own_steps=True))
    assert (own <= step / 2 + 1e-4).all() and (own > step / 8).any()
