"""Ordered rules: who matches, what stays float, what is refused; and whole states through them."""

import pytest
import torch
from omegaconf import OmegaConf

from recurgolf.config import REGISTRY, ConfigError, from_dict, to_dict
from recurgolf.quant import (
    Int6,
    Int8,
    MaxClip,
    NoQuant,
    Quant,
    QuantizedTensor,
    QuantizerGrid,
    Rule,
    SigmaClip,
    dequantize_state,
    fake_quantize,
    quantize_state,
)
from recurgolf.quant.clip import Clip

SHAPES = {
    "embed.weight": (256, 96),
    "blocks.0.attn.q_proj.weight": (96, 96),
    "blocks.0.mlp.up_proj.weight": (192, 96),
    "blocks.0.resid_mix": (2, 96),
    "blocks.0.attn.q_gain": (4,),
    "lora.0.q.lora_a": (2, 96),
}


def build_state():
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_first_matching_rule_wins():
    quant = Quant(
        [Rule("embed.*", bits=8), Rule("blocks.0.attn.*", bits=4), Rule("*", bits=3)],
        keep_float_max_numel=0,
    )
    assigned = quant.assign(SHAPES)
    bits = {name: rule.grid and rule.grid.bits for name, rule in assigned.items()}
    assert bits == {
        "embed.weight": 8,
        "blocks.0.attn.q_proj.weight": 4,
        "blocks.0.mlp.up_proj.weight": 3,
        "blocks.0.resid_mix": None,
        "blocks.0.attn.q_gain": None,
        "lora.0.q.lora_a": None,
    }


def test_small_and_thin_matrices_stay_float_and_thresholds_move():
    matrices = {name for name, shape in SHAPES.items() if min(shape) > 16}

    def quantized(quant):
        return {name for name, rule in quant.assign(SHAPES).items() if rule.method != "none"}

    assert quantized(Quant([Rule("*")])) == set()  # the public systems' 65,536 entries
    assert quantized(Quant([Rule("*")], keep_float_max_numel=9216)) == matrices - {
        "blocks.0.attn.q_proj.weight"
    }
    assert quantized(Quant([Rule("*")], 0)) == matrices
    everything = quantized(Quant([Rule("*")], 0, keep_float_max_side=0))
    assert everything == set(SHAPES) - {"blocks.0.attn.q_gain"}
    assert quantized(Int6()) == quantized(Int8()) == matrices
    assert quantized(NoQuant()) == set()


@pytest.mark.parametrize(
    ("quant", "words"),
    [
        (Quant([Rule("embed.*")], 0), "no quant rule matches 'blocks.0.attn.q_proj.weight'"),
        (Quant([Rule("embd.weight"), Rule("*")]), "'embd.weight' matches no.*'embed.weight'"),
        (Quant([Rule(method="gtpq")]), "method='gtpq' .*'gptq'"),
        (Quant([Rule(clip={"kind": "sigm", "k": 3.0})]), "no clip of kind 'sigm' .*'sigma'"),
        (Quant([Rule(clip={"kind": "sigma", "kk": 3.0})]), "no field 'kk' .*'k'"),
        (Quant([Rule(clip={"k": 3.0})]), "clip needs a kind"),
        (Quant([Rule(clip={"kind": "sigma", "k": 0.0})]), r"'\*': quant.clip.k=0.0: above 0"),
    ],
)
def test_contradictions_are_named_before_any_weight(quant, words):
    with pytest.raises(ConfigError, match=words):
        quant.assign(SHAPES)


def test_an_optional_rule_may_match_nothing():
    assert Quant([Rule("head.*", optional=True), Rule("*")]).assign(SHAPES)


@pytest.mark.parametrize("kind", sorted(REGISTRY["quant"]))
def test_every_option_composes_round_trips_and_restores(kind, tmp_path):
    cls = REGISTRY["quant"][kind]
    quant = OmegaConf.to_object(OmegaConf.structured(cls))
    assert quant == cls() == from_dict(Quant, to_dict(quant))
    state = build_state() | {"steps": torch.tensor([3, 4])}
    quantized = quantize_state(state, quant.assign({n: tuple(t.shape) for n, t in state.items()}))
    restored = dequantize_state(quantized)
    assert list(restored) == list(state)
    assert restored["steps"].dtype == torch.int64
    for name, weight in state.items():
        error = (restored[name] - weight).double().norm()
        # int6 with k = 6 σ: step 6/31 σ, error step/√12 = 5.6 %.
        assert error < 0.06 * weight.double().norm()


def test_yaml_rules_replace_the_list_and_name_their_clip():
    base = OmegaConf.structured(Int6)
    text = "rules: [{pattern: '*', bits: 4, clip: {kind: sigma, k: 3}, group_size: 32}]"
    quant = OmegaConf.to_object(OmegaConf.merge(base, OmegaConf.create(text)))
    rule = quant.assign(SHAPES)["embed.weight"]
    assert rule.grid == QuantizerGrid(4, SigmaClip(3.0), 32)


def test_every_clip_is_reachable_by_its_kind():
    for kind, cls in REGISTRY["quant/clip"].items():
        assert issubclass(cls, Clip)
        rule = Rule(clip={"kind": kind}).resolve("float16")
        assert rule.grid is not None and type(rule.grid.clip) is cls


def test_gptq_rules_use_gram_matrices_and_miss_them_loudly():
    state = build_state()
    quant = Quant([Rule("blocks.*", "gptq", bits=3), Rule("*")], 0)
    assigned = quant.assign(SHAPES)
    names = [name for name, rule in assigned.items() if rule.method == "gptq"]
    x = torch.randn(300, 96, generator=torch.Generator().manual_seed(1))
    grams = {name: (x @ torch.diag(torch.logspace(0, -2, 96))) for name in names}
    grams = {name: y.T @ y for name, y in grams.items()}
    ours = quantize_state(state, assigned, grams)
    rounded = quantize_state(state, Quant([Rule("*", bits=3)], 0).assign(SHAPES))
    assert [report.name for report in ours.reports if report.method == "gptq"] == names
    assert len(ours.reports) == 3
    for name in names:
        change, plain = (
            (dequantize_state(q)[name] - state[name]).double() for q in (ours, rounded)
        )
        gram = grams[name].double()
        assert ((change @ gram) * change).sum() < ((plain @ gram) * plain).sum()
    with pytest.raises(ValueError, match=f"gptq is asked for {names[0]}"):
        quantize_state(state, assigned)


def test_training_sees_what_export_writes():
    state = build_state()
    for cls in (Int6, Int8):
        assigned = cls().assign(SHAPES)
        exported = quantize_state(state, assigned)
        for name, rule in assigned.items():
            if rule.grid is not None:
                assert isinstance(exported[name], QuantizedTensor)
                seen = fake_quantize(state[name], rule.grid)
                torch.testing.assert_close(seen, exported[name].dequantize(), atol=1e-6, rtol=0)


def test_kept_tensors_have_the_type_that_was_asked_for():
    rules = [Rule("*mix", "none", keep_dtype="float32"), Rule("*", clip={"kind": "max"})]
    quantized = quantize_state(build_state(), Quant(rules, 0).assign(SHAPES))
    kinds = {n: t.dtype for n, t in quantized.items() if not isinstance(t, QuantizedTensor)}
    assert kinds["blocks.0.resid_mix"] == torch.float32
    assert kinds["blocks.0.attn.q_gain"] == torch.float16
    assert MaxClip() == Rule().resolve("float16").grid.clip
