"""The Gated DeltaNet layer against its recordings, its formulae and its own derivatives."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gated_delta_layer import layer_state_from
from safetensors.torch import load_file
from torch.func import functional_call

from recurgolf.config import ConfigError, from_dict, to_dict
from recurgolf.model.mixers.attention import AttentionConfig
from recurgolf.model.mixers.gated_deltanet import (
    PROJECTIONS,
    GatedDeltaNetConfig,
)
from recurgolf.model.visit import VisitInputs

GOLDEN = Path(__file__).parents[1] / "fixtures/golden/gated_delta"
LAYOUTS = sorted(path.parent.name for path in GOLDEN.glob("layer/*/config.json"))
PLAIN = [
    (layout, path.stem)
    for layout in LAYOUTS
    for path in sorted((GOLDEN / "layer" / layout).glob("io_*.safetensors"))
    if "masked" not in path.stem and "incremental" not in path.stem
]
HEADS = {"one head": (1, 1), "several heads": (2, 2), "more value heads": (2, 4)}


def close(actual, expected, atol, rtol=0.0):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def gradient_close(actual, expected):
    """The recordings' tolerance for gradients."""
    close(actual, expected, atol=1e-5 + 1e-4 * expected.abs().max().item())


def layer_by_loops(x, weights, config):
    """The layer as written on paper: numpy, float64, one token and one head at a time."""
    w = {name: tensor.detach().double().numpy() for name, tensor in weights.items()}
    hk, hv = config.num_key_heads, config.num_value_heads
    dk, dv = config.key_head_dim, config.value_head_dim
    taps = w["conv1d.weight"][:, 0]
    y = np.zeros(x.shape)

    def sigmoid(a):
        return 1 / (1 + np.exp(-a))

    for row, tokens in enumerate(x.detach().double().numpy()):
        memory = np.zeros((hv, dk, dv))
        window = np.zeros((config.conv_size, taps.shape[0]))
        for t, token in enumerate(tokens):
            window = np.concatenate([window[1:], [w["in_proj_qkv.weight"] @ token]])
            mixed = (window * taps.T).sum(0)
            mixed = mixed * sigmoid(mixed)
            z = (w["in_proj_z.weight"] @ token).reshape(hv, dv)
            beta = sigmoid(w["in_proj_b.weight"] @ token)
            rate = np.exp(w["A_log"]) * np.log1p(
                np.exp(w["in_proj_a.weight"] @ token + w["dt_bias"])
            )
            heads = []
            for h in range(hv):
                kappa = h // (hv // hk)
                q = mixed[kappa * dk : (kappa + 1) * dk]
                k = mixed[(hk + kappa) * dk : (hk + kappa + 1) * dk]
                v = mixed[2 * hk * dk + h * dv : 2 * hk * dk + (h + 1) * dv]
                q, k = q / np.sqrt(q @ q + 1e-6), k / np.sqrt(k @ k + 1e-6)
                memory[h] *= np.exp(-rate[h])
                memory[h] += np.outer(k, beta[h] * (v - memory[h].T @ k))
                o = memory[h].T @ q / np.sqrt(dk)
                o = o / np.sqrt((o * o).mean() + config.norm_eps) * w["norm.weight"]
                heads.append(o * z[h] * sigmoid(z[h]))
            y[row, t] = w["out_proj.weight"] @ np.concatenate(heads)
    return torch.from_numpy(y)


def small_layer(heads=(2, 4), dim=5, dtype=torch.float64, **sizes):
    """A layer with every parameter away from zero and one, gates included."""
    torch.manual_seed(7)
    sizes = {"key_head_dim": 3, "value_head_dim": 2, "conv_size": 3, "chunk_size": 4, **sizes}
    layer = GatedDeltaNetConfig(num_key_heads=heads[0], num_value_heads=heads[1], **sizes)
    layer = layer.build(dim).to(dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            low, high = {"A_log": (-0.3, 2), "norm.weight": (0.9, 1.1)}.get(name, (-0.7, 0.7))
            parameter.uniform_(low, high)
    return layer


def small_factors(layer, rank=2):
    """Non-zero `lora.<projection>.A` and `.B` for all five projections."""
    factors = {}
    for name in PROJECTIONS:
        out_dim, in_dim = layer.get_submodule(name).weight.shape
        dtype = layer.A_log.dtype
        factors[f"lora.{name}.A"] = torch.empty(rank, in_dim, dtype=dtype).uniform_(-0.5, 0.5)
        factors[f"lora.{name}.B"] = torch.empty(out_dim, rank, dtype=dtype).uniform_(-0.5, 0.5)
    return factors


def adapters_of(tensors, scale):
    """Adapters from `lora.*` factors; y += scale B (A x)."""

    def adapter(a, b):
        return lambda x: scale * (x @ a.T @ b.T)

    names = {name.split(".")[1] for name in tensors if name.startswith("lora.")}
    return {n: adapter(tensors[f"lora.{n}.A"], tensors[f"lora.{n}.B"]) for n in names}


def call(layer, tensors, *args):
    """`layer(*args)` with the given base tensors, differentiable in them."""
    base = {name: t for name, t in tensors.items() if not name.startswith("lora.")}
    return functional_call(layer, base, args, strict=True)


def recorded_layer(layout):
    """(layer, source weights, config) of one recorded layer."""
    config = json.loads((GOLDEN / "layer" / layout / "config.json").read_text())
    weights = load_file(GOLDEN / "layer" / layout / "weights.safetensors")
    ours, state = layer_state_from(config, weights)
    layer = ours.build(config["hyperparameters"]["hidden_size"])
    layer.load_state_dict(state)
    return layer, weights, config


@pytest.mark.parametrize(("layout", "case"), PLAIN, ids=map("-".join, PLAIN))
def test_layer_and_every_gradient_equal_recordings(layout, case):
    layer, weights, config = recorded_layer(layout)
    r = load_file(GOLDEN / "layer" / layout / f"{case}.safetensors")
    weights |= {name: tensor for name, tensor in r.items() if name.startswith("lora.")}
    for tensor in weights.values():
        tensor.requires_grad_()
    _, state = layer_state_from(config, weights)
    adapters = adapters_of(state, config["cases"][case].get("scale", 1.0))
    x = r["hidden_states"].requires_grad_()
    y = call(layer, state, x, adapters)
    close(y, r["output"], atol=1e-4, rtol=1e-5)
    y.backward(r["grad_output"])
    gradient_close(x.grad, r["grad_input"])
    recorded = [name for name in r if name.startswith("grad.")]
    assert recorded
    for name in recorded:
        gradient_close(weights[name.removeprefix("grad.")].grad, r[name])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_mask_equals_recording(layout):
    layer, _, _ = recorded_layer(layout)
    r = load_file(GOLDEN / "layer" / layout / "io_masked.safetensors")
    y, _ = layer.segment(r["hidden_states"], mask=r["attention_mask"])
    close(y, r["output"], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_token_by_token_decoding_equals_recording(layout):
    layer, _, config = recorded_layer(layout)
    r = load_file(GOLDEN / "layer" / layout / "io_incremental.safetensors")
    x, prefill = r["hidden_states"], config["cases"]["io_incremental"]["prefill"]
    y, state = layer.segment(x[:, :prefill])
    outputs = [y]
    for t in range(prefill, x.shape[1]):
        y, state = layer.segment(x[:, t : t + 1], state=state)
        outputs.append(y)
    close(torch.cat(outputs, 1), r["output_incremental"], atol=1e-4, rtol=1e-5)
    close(layer(x), r["output_full"], atol=1e-4, rtol=1e-5)
    close(state.recurrent, r["recurrent_state"], atol=1e-4, rtol=1e-5)
    # The recording keeps one more input of the convolution than the next token can see.
    close(state.conv.mT, r["conv_state"][..., 1:], atol=1e-4, rtol=1e-5)


def test_foreign_layer_with_a_wrong_tensor_is_refused_by_name():
    _, weights, config = recorded_layer("fused_projections")
    without = {name: t for name, t in weights.items() if name != "dt_bias"}
    (heads,), (outputs, dim) = weights["A_log"].shape, weights["in_proj_ba.weight"].shape
    a, b = {"lora.in_proj_ba.A": torch.ones(3, dim)}, {"lora.in_proj_ba.B": torch.ones(outputs, 3)}
    narrow = {"lora.in_proj_ba.A": torch.ones(2, dim)}
    bad = {
        "no use for the tensor 'in_proj_z.weight'": weights | {"in_proj_z.weight": torch.ones(dim)},
        "'dt_bias' is missing": without,
        rf"A_log is \({heads + 1},\).*\({heads},\)": weights | {"A_log": torch.ones(heads + 1)},
        "'lora.in_proj_ba.A' without": weights | a,
        r"no use for the tensor 'lora.in_proj_b.A'": weights | {"lora.in_proj_b.A": torch.ones(1)},
        rf"lora.in_proj_ba has A \(2, {dim}\)": weights | b | narrow,
    }
    for message, source in bad.items():
        with pytest.raises(ConfigError, match=message):
            layer_state_from(config, source)
    with pytest.raises(ConfigError, match="lacks 'linear_num_key_heads'"):
        layer_state_from({"hidden_size": dim}, weights)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_layer_equals_the_formulae_token_by_token(heads):
    layer = small_layer(heads)
    x = torch.rand(2, 11, 5, dtype=torch.float64) - 0.5
    close(layer(x), layer_by_loops(x, layer.state_dict(), layer.config), 1e-12)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_gradcheck_of_every_parameter_and_factor(heads):
    layer = small_layer(heads, dim=4)
    tensors = dict(layer.named_parameters()) | small_factors(layer)
    names = list(tensors)
    assert len(names) == 9 + 10
    leaves = [tensors[name].detach().clone().requires_grad_() for name in names]
    x = torch.rand(1, 6, 4, dtype=torch.float64) - 0.5

    def output(x, *values):
        by_name = dict(zip(names, values, strict=True))
        return call(layer, by_name, x, adapters_of(by_name, 1.5))

    assert torch.autograd.gradcheck(output, (x.requires_grad_(), *leaves))

    y = output(x, *leaves)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    for name, grad in zip(names, torch.autograd.grad((y * weights).sum(), leaves), strict=True):
        assert grad.abs().max() > 1e-4, f"the gradient of {name} is zero: nothing was checked"


def test_absent_and_empty_adapters_change_no_bit():
    layer = small_layer(dtype=torch.float32)
    x = torch.randn(2, 9, 5)
    plain = layer(x)
    assert torch.equal(layer(x, {}), plain)
    assert torch.equal(layer(x, adapters_of(small_factors(layer, rank=0), 1.0)), plain)
    assert not torch.equal(layer(x, adapters_of(small_factors(layer), 1.0)), plain)


@pytest.mark.parametrize("name", PROJECTIONS)
def test_each_adapter_is_that_projection_with_merged_weights(name):
    layer = small_layer()
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    factors = small_factors(layer)
    only = {key: tensor for key, tensor in factors.items() if f".{name}." in key}
    adapted = layer(x, adapters_of(only, 1.5))
    with torch.no_grad():
        layer.get_submodule(name).weight += 1.5 * only[f"lora.{name}.B"] @ only[f"lora.{name}.A"]
    close(adapted, layer(x), 1e-12)


def test_adapter_for_an_unknown_projection_is_refused():
    with pytest.raises(ConfigError, match="did you mean 'in_proj_qkv'"):
        small_layer()(torch.ones(1, 2, 5).double(), {"in_proj_qkvz": torch.nn.Identity()})


@pytest.mark.parametrize("position", [0, 3, 7, 12])
def test_no_token_sees_a_later_one(position):
    layer = small_layer()
    x = torch.randn(1, 13, 5, dtype=torch.float64)
    other = x.clone()
    other[:, position] += 1
    before, after = layer(x), layer(other)
    assert torch.equal(before[:, :position], after[:, :position])
    assert (before[:, position:] != after[:, position:]).any(-1).all()


@pytest.mark.parametrize("cuts", [[5], [1, 2, 3], [4, 9, 10]])
def test_segments_with_carried_state_equal_one_sequence(cuts):
    layer = small_layer(conv_size=4)
    x = torch.randn(2, 13, 5, dtype=torch.float64)
    state, outputs = None, []
    for segment in x.tensor_split(cuts, 1):
        y, state = layer.segment(segment, state=state)
        outputs.append(y)
    whole, last = layer.segment(x)
    close(torch.cat(outputs, 1), whole, 1e-12)
    for carried, expected in zip(state, last, strict=True):
        close(carried, expected, 1e-12)


@pytest.mark.parametrize("cut", [2, 3, 5, 6, 7, 12])
def test_documents_restart_the_layer_also_in_a_later_segment(cut):
    layer = small_layer(conv_size=4)
    x = torch.randn(2, 13, 5, dtype=torch.float64)
    lengths = [3, 1, 2, 7]
    documents = torch.repeat_interleave(torch.tensor([4, 1, 2, 9]), torch.tensor(lengths))
    documents = documents.expand(2, 13)
    alone = torch.cat([layer(part) for part in x.split(lengths, 1)], 1)
    y, state = layer.segment(x[:, :cut], documents=documents[:, :cut])
    # A document that begins with a segment begins with no state.
    state = None if documents[0, cut] != documents[0, cut - 1] else state
    rest, _ = layer.segment(x[:, cut:], state=state, documents=documents[:, cut:])
    close(torch.cat([y, rest], 1), alone, 1e-12)


@torch.no_grad()
def test_visit_of_a_model_is_the_layer_with_the_adapters_that_are_its_own():
    layer = small_layer(dtype=torch.float32)
    x = torch.randn(2, 9, 5)
    adapters = adapters_of(small_factors(layer), 1.5)
    empty = torch.empty(9, 0)
    inputs = VisitInputs(x, (empty, empty), adapters | {"up_proj": torch.nn.Identity()})
    assert torch.equal(layer(x, inputs), layer(x, adapters))


def test_weights_in_bfloat16_and_quantization_in_training_reach_every_projection():
    layer = small_layer(dtype=torch.float32)
    x = torch.randn(2, 9, 5)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    plain = layer(x)
    for name in PROJECTIONS:
        layer.get_submodule(name).fake_quantize = lambda weight: weight * 1.25
        assert not torch.equal(layer(x), plain), name
        assert torch.equal(layer.eval()(x), plain)
        layer.train().get_submodule(name).fake_quantize = None


@pytest.mark.parametrize("dim", [192, 384, 512, 768])
def test_default_widths_cost_what_attention_costs(dim):
    sizes = [
        sum(a * b for a, b in kind().projections(dim).values())
        for kind in (GatedDeltaNetConfig, AttentionConfig)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_bf16_autocast_stays_within_three_percent():
    """Of the root mean square of the output; the projections round, the rule does not."""
    torch.manual_seed(0)
    layer = GatedDeltaNetConfig(2, 4, key_head_dim=16, value_head_dim=16).build(64)
    x = torch.randn(2, 150, 64)
    exact = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        rough = layer(x)
    assert rough.dtype == torch.bfloat16
    error = (rough.float() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < error < 0.03


def test_fresh_gates_have_the_stated_range():
    layer = GatedDeltaNetConfig(num_key_heads=8, num_value_heads=64).build(16)
    rate, step = layer.A_log.exp(), F.softplus(layer.dt_bias)
    assert rate.min() >= 1 and rate.max() <= 16
    assert step.min() >= 0.99e-3 and step.max() <= 0.101


def test_config_refuses_heads_that_do_not_divide_and_survives_run_json():
    with pytest.raises(ConfigError, match=r"value_heads=3 is not a multiple of .*=2"):
        GatedDeltaNetConfig(num_key_heads=2, num_value_heads=3)
    config = GatedDeltaNetConfig(num_key_heads=2, chunk_size=16)
    assert from_dict(GatedDeltaNetConfig, to_dict(config)) == config
