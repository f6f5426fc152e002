"""What every block kind, input mix, mixer, kind of skips and looping schedule must keep, mixed."""

import itertools
from dataclasses import replace

import pytest
import torch

from recurgolf.config import REGISTRY, from_dict, to_dict
from recurgolf.looping import CycleLooping, NoLooping, PreludeCoreCoda, SegmentLooping
from recurgolf.lora import LoRA
from recurgolf.model.block import INPUT_MIXES, SequentialConfig
from recurgolf.model.embedding import BigramConfig, ValueEmbedConfig
from recurgolf.model.heads import MultiTokenHeads
from recurgolf.model.mixers.attention import AttentionConfig
from recurgolf.model.mixers.gated_deltanet import PROJECTIONS, GatedDeltaNetConfig
from recurgolf.model.mlp import MLPS
from recurgolf.model.skips import SKIPS
from recurgolf.model.transformer import Model, RopeConfig

VOCAB, DIM, BLOCKS, LENGTH = 31, 16, 4, 9

LOOPINGS = {
    "none": NoLooping(),
    "segment": SegmentLooping(start=1, end=2, passes=2),
    "cycle": CycleLooping(passes=2),
    "prelude_core_coda": PreludeCoreCoda(passes=2),
    "truncated": PreludeCoreCoda(passes=3, backprop_passes=1),
}
PARTS = list(itertools.product(REGISTRY["model/block"], INPUT_MIXES, SKIPS, LOOPINGS))
ALL_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "residual"]
SIZES = {
    "attention": {"num_heads": 2, "num_kv_heads": 1},
    # Chunks shorter than the sequences, so that states go from one to the next.
    "gated_deltanet": {"num_key_heads": 1, "num_value_heads": 2, "chunk_size": 4},
}
MIXERS = [*REGISTRY["model/mixer"], "hybrid"]
MIXER_PARTS = list(itertools.product(MIXERS, REGISTRY["model/block"], LOOPINGS))


def mixers(name):
    """The fields of a Model that give its blocks a registered mixer, or two in turn."""
    if name == "hybrid":
        second = AttentionConfig(**SIZES["attention"])
        return {**mixers("gated_deltanet"), "mixer_pattern": ["mixer", second]}
    return {"mixer": REGISTRY["model/mixer"][name](**SIZES.get(name, {}))}


def model_config(block="sequential", mix="channel", mixer="attention", **changes):
    kind = REGISTRY["model/block"][block]
    return Model(
        vocab_size=VOCAB,
        dim=DIM,
        num_blocks=BLOCKS,
        block=kind(input_mix=mix),
        **mixers(mixer),
        **changes,
    )


def targets_of(config):
    """Every projection that any block has."""
    return sorted({name for block in range(BLOCKS) for name in config.projections(block)})


def everything(block="sequential"):
    """Every optional part at once."""
    return Model(
        vocab_size=VOCAB,
        dim=DIM,
        num_blocks=BLOCKS,
        mlp_activation="swiglu",
        block=REGISTRY["model/block"][block](update_gate=True),
        block_pattern=[SequentialConfig(), *["block"] * (BLOCKS - 1)],
        mixer=AttentionConfig(num_heads=2, num_kv_heads=1, xsa=True),
        skips="unet_gated",
        depth_scaled_norm=True,
        visit_gains=True,
        embed_dim=8,
        smear=True,
        bigram=BigramConfig(rows=13, dim=4),
        value_embed=ValueEmbedConfig(dim=4, visits=[1, 3]),
        tie_embeddings=False,
        mtp_heads=2,
    )


@torch.no_grad()
def randomized(model):
    """Parameters that start at zero or one would hide missing gradients."""
    torch.manual_seed(2)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


def built(config, looping, lora=None):
    plan = looping.largest_plan(BLOCKS)
    torch.manual_seed(1)
    model = config.build(plan)
    if lora is not None:
        model.adapters = lora.build(config.projections, plan)
    return randomized(model)


def tokens(batch=2, length=LENGTH):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def assert_causal(model, plan):
    ids = tokens()
    before = model(ids, plan)
    assert before.shape == (2, LENGTH, VOCAB)
    assert before.isfinite().all()
    changed = ids.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    after = model(changed, plan)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def assert_gradients_reach_all_but_the_idle(model, plan):
    model.train()
    model(tokens(), plan, tokens(length=LENGTH + 1)[:, 1:]).backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    idle = set(model.idle_parameters(plan))
    names = {name for name, p in model.named_parameters()}
    assert reached == names - idle
    for name, parameter in model.named_parameters():
        # At the very first visit both sides of the mix are the same state.
        if name in reached and not name.endswith("input_mix.logit"):
            assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("block", "mix", "skips", "looping"), PARTS, ids=map("-".join, PARTS))
def test_any_parts_together_are_causal_and_train_all_they_have(block, mix, skips, looping):
    schedule = LOOPINGS[looping]
    plan = schedule.plan(BLOCKS)
    model = built(model_config(block, mix, skips=skips), schedule)
    assert_causal(model, plan)
    assert_gradients_reach_all_but_the_idle(model, plan)


@pytest.mark.parametrize(("mixer", "block", "looping"), MIXER_PARTS, ids=map("-".join, MIXER_PARTS))
def test_any_mixer_with_adapters_on_all_it_has_is_causal_and_trains(mixer, block, looping):
    schedule = LOOPINGS[looping]
    config = model_config(block, mixer=mixer)
    lora = LoRA(rank=1, targets=targets_of(config), blocks="all", visits="all", alpha=2.0)
    model, plan = built(config, schedule, lora), schedule.plan(BLOCKS)
    assert_causal(model, plan)
    assert_gradients_reach_all_but_the_idle(model, plan)


@pytest.mark.parametrize("looping", LOOPINGS)
@pytest.mark.parametrize("block", REGISTRY["model/block"])
def test_all_options_at_once_are_causal_and_train_all_they_have(block, looping):
    schedule = LOOPINGS[looping]
    lora = LoRA(rank=2, targets=[*ALL_TARGETS, "gate_proj"], blocks="all", visits="all")
    model = built(everything(block), schedule, lora)
    plan = schedule.plan(BLOCKS)
    assert_causal(model, plan)
    assert_gradients_reach_all_but_the_idle(model, plan)


@pytest.mark.parametrize("activation", MLPS)
def test_every_mlp_is_causal_and_trains(activation):
    model = built(model_config(mlp_activation=activation), LOOPINGS["cycle"])
    assert_causal(model, LOOPINGS["cycle"].plan(BLOCKS))
    assert_gradients_reach_all_but_the_idle(model, LOOPINGS["cycle"].plan(BLOCKS))


def test_nothing_reaches_an_untied_table_through_truncated_visits_without_x0():
    schedule = CycleLooping(passes=3, backprop_passes=1)
    config = model_config(mix="none", tie_embeddings=False, bigram=BigramConfig(rows=5, dim=3))
    model, plan = built(config, schedule), schedule.plan(BLOCKS)
    assert "embed.weight" in model.idle_parameters(plan)
    assert_gradients_reach_all_but_the_idle(model, plan)


def test_adapters_before_a_delayed_loop_are_idle_and_then_are_not():
    schedule = SegmentLooping(start=1, end=2, passes=3, start_fraction=0.5)
    model = built(model_config(), schedule, LoRA(rank=2, targets=ALL_TARGETS))
    early, late = schedule.plan(BLOCKS, 0.1), schedule.plan(BLOCKS, 0.9)
    adapters = {name for name, _ in model.named_parameters() if name.startswith("adapters.")}
    assert set(model.idle_parameters(early)) == adapters
    assert model.idle_parameters(late) == []
    assert_gradients_reach_all_but_the_idle(model, early)
    model.zero_grad(set_to_none=True)
    assert_gradients_reach_all_but_the_idle(model, late)


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("block", REGISTRY["model/block"])
def test_adapters_of_rank_zero_or_with_zero_b_change_no_bit(block, mixer):
    schedule = LOOPINGS["cycle"]
    config, plan = model_config(block, mixer=mixer), schedule.plan(BLOCKS)
    plain = built(config, schedule, LoRA(rank=0))
    assert plain.adapters is None
    expected = plain(tokens(), plan)
    lora = LoRA(rank=1, targets=targets_of(config), visits="all")
    plain.adapters = lora.build(config.projections, plan)
    assert torch.equal(plain(tokens(), plan), expected)
    for name, parameter in plain.adapters.named_parameters():
        if name.endswith("lora_b"):
            parameter.fill_(0.1)
    assert not torch.equal(plain(tokens(), plan), expected)


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_shared_adapters_are_the_model_with_merged_weights_under_any_number_of_visits(mixer):
    schedule = CycleLooping(passes=3)
    config, plan = model_config(mixer=mixer), schedule.plan(BLOCKS)
    targets = [name for name in targets_of(config) if name != "residual"]
    lora = LoRA(rank=2, targets=targets, blocks="all", visits="shared", alpha=3.0)
    model = built(config, schedule, lora).double()
    adapted = model(tokens(), plan)
    adapters, model.adapters = model.adapters, None
    assert not torch.allclose(model(tokens(), plan), adapted)
    for block, layers in enumerate(model.blocks):
        for name, module in layers.named_modules():
            bank = adapters.bank(block)
            if (target := name.rpartition(".")[2]) in bank:
                module.weight += 1.5 * bank[target].lora_b[0] @ bank[target].lora_a[0]
    torch.testing.assert_close(model(tokens(), plan), adapted, atol=1e-10, rtol=1e-10)


@torch.no_grad()
def test_every_visit_uses_its_own_adapter():
    schedule = CycleLooping(passes=3)
    lora = LoRA(rank=1, targets=["down_proj"], visits="all")
    model, plan = built(model_config(), schedule, lora), schedule.plan(BLOCKS)
    states = []
    model.hidden(tokens(), plan, observe=lambda at, x: states.append(x))
    model.adapters.banks["2"]["down_proj"].lora_b[1] += 1.0
    moved = []
    model.hidden(tokens(), plan, observe=lambda at, x: moved.append(x))
    same = [torch.equal(a, b) for a, b in zip(states, moved, strict=True)]
    # Block 2 is visited at positions 2, 6 and 10; its second visit is at 6.
    assert same == [position < 6 for position in range(12)]


def test_the_largest_plan_of_training_or_scoring_sizes_what_there_is_per_visit():
    schedule = CycleLooping(passes=2, passes_eval=5)
    config = model_config(skips="unet", visit_gains=True)
    model = built(config, schedule, LoRA(rank=1, targets=["q_proj"], visits="all"))
    assert model.mixer_visit_gain.shape == model.mlp_visit_gain.shape == (5 * BLOCKS, DIM)
    assert len(model.skips.weight) == 5 * BLOCKS // 2
    assert model.adapters.num_slots == dict.fromkeys(range(BLOCKS), 5)
    # Scoring may be asked for more passes than anything was sized for.
    assert_causal(model, schedule.eval_plan(BLOCKS, 7))


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_packed_documents_score_as_they_would_alone(mixer):
    schedule = LOOPINGS["segment"]
    config = model_config(mixer=mixer, smear=True, bigram=BigramConfig(rows=13, dim=4))
    model, plan = built(config, schedule), schedule.plan(BLOCKS)
    parts = tokens(2, 15).split([5, 7, 1, 2], 1)
    documents = torch.tensor([[0] * 5 + [1] * 7 + [2] + [3] * 2] * 2)
    together = model(torch.cat(parts, 1), plan, documents=documents)
    alone = torch.cat([model(part, plan) for part in parts], 1)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_document_has_no_gradient_from_another(mixer):
    schedule = LOOPINGS["cycle"]
    model, plan = built(model_config(mixer=mixer), schedule), schedule.plan(BLOCKS)
    # Each document has tokens of its own, so that the table's gradient tells them apart.
    ids = torch.tensor([[1, 2, 3, 4, 5, 11, 12, 13, 14]])
    documents = torch.tensor([[0] * 5 + [1] * 4])
    model.hidden(ids, plan, documents)[:, 5:].sum().backward()
    gradient = model.embed.weight.grad.abs().sum(1)
    assert (gradient[1:6] < 1e-20).all() and (gradient[11:15] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
def test_nothing_stays_in_a_model_from_one_call_to_the_next(mixer):
    schedule = LOOPINGS["cycle"]
    model, plan = built(model_config(mixer=mixer), schedule), schedule.plan(BLOCKS)
    first = model(tokens(), plan)
    model(tokens(3, 14).flip(0), plan)
    assert torch.equal(model(tokens(), plan), first)
    torch.testing.assert_close(model(tokens()[1:], plan), first[1:])


def test_a_hybrid_has_its_mixers_in_turn_and_survives_run_json():
    config = model_config(mixer="hybrid")
    kinds = [type(config.mixer_of(block)) for block in range(BLOCKS)]
    assert kinds == [GatedDeltaNetConfig, AttentionConfig] * 2
    assert from_dict(Model, to_dict(config)) == config
    model = built(config, CycleLooping(passes=2), LoRA(rank=1, targets=[*PROJECTIONS, "q_proj"]))
    assert set(model.adapters.bank(0)) == set(PROJECTIONS)
    assert set(model.adapters.bank(1)) == {"q_proj"}


@pytest.mark.parametrize(
    ("pattern", "second"),
    [
        (["gated_deltanet", "attention"], [1, 3]),
        (["gated_deltanet", "gated_deltanet", "attention"], [2]),
        (["attention", "gated_deltanet", "gated_deltanet", "gated_deltanet"], [0]),
        (["gated_deltanet"], []),
    ],
)
def test_a_pattern_names_the_mixers_along_the_depth_and_repeats(pattern, second):
    config = Model(num_blocks=BLOCKS, mixer=GatedDeltaNetConfig(), mixer_pattern=pattern)
    kinds = [type(config.mixer_of(block)) for block in range(BLOCKS)]
    expected = [AttentionConfig if b in second else GatedDeltaNetConfig for b in range(BLOCKS)]
    assert kinds == expected
    assert from_dict(Model, to_dict(config)) == config
    # Of an attention first, the other kind is the one that is added.
    if second:
        other = Model(num_blocks=BLOCKS, mixer=AttentionConfig(), mixer_pattern=pattern)
        assert [type(other.mixer_of(block)) for block in range(BLOCKS)] == expected


def test_a_pattern_takes_its_own_option_by_name_or_kind_and_others_with_theirs():
    wide = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2}
    own = AttentionConfig(num_heads=2)
    sizes = {"dim": 48, "num_blocks": 3, "rope": RopeConfig(dims=8)}
    config = Model(**sizes, mixer=own, mixer_pattern=["attention", "mixer", wide])
    assert [config.mixer_of(block).num_heads for block in range(3)] == [2, 2, 4]
    assert config.mixer_pattern == ["mixer", "mixer", AttentionConfig(num_heads=4, num_kv_heads=2)]
    other = replace(config, mixer=AttentionConfig(num_heads=3))
    assert [other.mixer_of(block).num_heads for block in range(3)] == [3, 3, 4]


@torch.no_grad()
def test_extra_heads_count_in_training_only():
    schedule = LOOPINGS["none"]
    model, plan = built(model_config(mtp_heads=1), schedule), schedule.plan(BLOCKS)
    ids, targets = tokens(), tokens(length=LENGTH + 1)[:, 1:]
    scored, trained = model.eval()(ids, plan, targets), model.train()(ids, plan, targets)
    logits = model(ids, plan)
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    hidden = model.hidden(ids, plan)
    extra = torch.nn.functional.cross_entropy(
        model.mtp.logits(0, hidden, 30.0).flatten(0, 1), targets[:, 1:].flatten()
    )
    torch.testing.assert_close(scored, plain)
    torch.testing.assert_close(trained, plain + 0.2 * extra)


def test_extra_heads_without_a_position_add_nothing():
    heads = MultiTokenHeads(2, 4, 7)
    assert heads.loss(torch.randn(2, 1, 4), torch.zeros(2, 1, dtype=torch.long), 30.0) == 0
