"""Protocols on real networks: documents by themselves, positions wanted, and beyond training."""

import math

import numpy as np
import pytest
import torch
from scored_models import BOS, VOCAB, FixedBytes, network, score_on_ranks, stream

from recurgolf.config import REGISTRY, ConfigError
from recurgolf.eval import PlainEval, SlidingEval, Text, score
from recurgolf.eval.document import DocumentEval
from recurgolf.looping import CycleLooping, NoLooping, PreludeCoreCoda
from recurgolf.model.embedding import BigramConfig, ValueEmbedConfig
from recurgolf.model.mixers.attention import AttentionConfig
from recurgolf.model.mixers.gated_deltanet import GatedDeltaNetConfig
from recurgolf.model.rope import rope_table
from recurgolf.model.transformer import Model, RopeConfig

MIXERS = {
    "attention": AttentionConfig(num_heads=2, num_kv_heads=1),
    "xsa": AttentionConfig(num_heads=2, num_kv_heads=1, xsa=True),
    "gated_deltanet": GatedDeltaNetConfig(num_key_heads=1, num_value_heads=2, chunk_size=4),
}


def config(mixer="attention", block="sequential", **changes) -> Model:
    kind = REGISTRY["model/block"][block]
    size = {"vocab_size": VOCAB, "dim": 16, "num_blocks": 3}
    own = {"block": kind(update_gate=True), "mixer": MIXERS[mixer]}
    return Model(
        **{**size, **own, "smear": True, "bigram": BigramConfig(rows=13, dim=4), **changes}
    )


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("length", [16, 64])
def test_a_document_scores_the_same_whatever_its_neighbours(mixer, length):
    """Long documents slide through windows, short ones share them."""
    scored_model = network(config(mixer), CycleLooping(passes=2), seq_len=length)
    rng = np.random.default_rng(0)
    documents = [np.r_[BOS, rng.integers(2, VOCAB, n)] for n in (5, 0, 40, 16, 3, 15, 90, 1, 2)]

    def text(parts):
        return Text(np.concatenate([*parts, [BOS]]).astype(np.uint16), FixedBytes(), bos=BOS)

    protocol = DocumentEval(stride=4)
    together = score(protocol, scored_model, text(documents)).accumulator
    # The last BOS only ends the document before it: it begins none.
    assert together.text.num_documents == len(documents)
    for number, document in enumerate(documents[::1]):
        alone = score(protocol, scored_model, text([document])) if len(document) > 1 else None
        if alone is not None:
            assert together.nats[number] == pytest.approx(alone.nats, rel=2e-5)
    backwards = score(protocol, scored_model, text(documents[::-1])).accumulator
    np.testing.assert_allclose(backwards.nats[::-1], together.nats, rtol=2e-5)
    assert (backwards.bytes[::-1] == together.bytes).all()
    # A stream read across the documents does depend on them, so the above can fail.
    stream_of = score(SlidingEval(stride=4), scored_model, text(documents)).accumulator
    assert np.abs(stream_of.nats - together.nats).max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("block", REGISTRY["model/block"])
@pytest.mark.parametrize("documents", [False, True])
def test_positions_that_are_wanted_are_what_they_are_in_the_whole(mixer, block, documents):
    value = {} if mixer == "gated_deltanet" else {"value_embed": ValueEmbedConfig(4, 0.1, [0, 3])}
    made = config(mixer, block, skips="unet_gated", visit_gains=True, **value)
    looping = PreludeCoreCoda(passes=2)
    scored_model = network(made, looping, 16)
    ids = torch.from_numpy(np.random.default_rng(1).integers(2, VOCAB, (2, 11)))
    owner = torch.tensor([[0] * 4 + [1] * 5 + [2] * 2] * 2) if documents else None
    plan = scored_model.plan()
    whole = scored_model.model.hidden(ids, plan, owner)
    for first in (1, 7, 10):
        part = scored_model.model.hidden(ids, plan, owner, read_from=first)
        torch.testing.assert_close(part, whole[:, first:], atol=2e-5, rtol=1e-4)


def test_a_longer_window_stretches_the_slowest_rotation_by_as_much():
    """What NTK is for, in float64: the lowest frequency covers the longer text as the old one did
    the shorter, and the highest stays."""
    dims, base, stretch = 16, 10000.0, 4
    scaled = SlidingEval(seq_len=32 * stretch, rope_scale="ntk").base(
        network(config(mixer="attention", dim=32), NoLooping(), 32)
    )
    assert scaled == pytest.approx(base * stretch ** (dims / (dims - 2)), rel=1e-12)
    slowest = [b ** -((dims - 2) / dims) for b in (base, scaled)]
    assert slowest[0] == pytest.approx(slowest[1] * stretch, rel=1e-12)
    cos, sin = rope_table(32 * stretch, dims, scaled, torch.device("cpu"))
    for place in (1, 31, 127):
        for i in range(dims // 2):
            angle = place * scaled ** (-2 * i / dims)
            assert cos[place, i] == pytest.approx(math.cos(angle), abs=2e-5)
            assert sin[place, i] == pytest.approx(math.sin(angle), abs=2e-5)


def test_rescaling_after_training_is_what_training_for_it_would_have_done():
    long = SlidingEval(seq_len=24, stride=5, rope_scale="ntk")
    automatic = SlidingEval(seq_len=24, stride=5)
    never = score(automatic, network(config(), NoLooping(), 8), stream(99)).nats
    asked = score(long, network(config(), NoLooping(), 8), stream(99)).nats
    own = config(rope=RopeConfig(train_len=8))
    given = score(automatic, network(own, NoLooping(), 8), stream(99)).nats
    fixed = config(rope=RopeConfig(base=10000 * 3 ** (8 / 6)))
    known = score(automatic, network(fixed, NoLooping(), 8), stream(99)).nats
    assert asked == pytest.approx(known, rel=1e-6)
    assert given == pytest.approx(known, rel=1e-6)
    assert abs(never - known) > 1e-3


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (config(rope=RopeConfig(train_len=8)), r"model\.rope\.train_len=8: set one"),
        (config("gated_deltanet"), "no block of it attends"),
    ],
)
def test_rescaling_what_cannot_be_rescaled_is_refused(made, message):
    with pytest.raises(ConfigError, match=message):
        PlainEval(rope_scale="ntk").check_model(made, NoLooping())


def test_other_depths_are_refused_where_the_schedule_cannot_change():
    with pytest.raises(ConfigError, match=r"passes=3 asked for, but looping=none has 1"):
        PlainEval(passes=[1, 3]).check_model(config(), NoLooping())


def test_ranks_agree_on_a_network_too():
    scored_model = network(config(), CycleLooping(passes=2), 16)
    text = stream(333, documents=True)
    whole = score(SlidingEval(stride=4), scored_model, text)
    for result in score_on_ranks(SlidingEval(stride=4), scored_model, text, 3):
        assert result.nats == pytest.approx(whole.nats, rel=1e-6)


def test_a_model_comes_back_in_the_mode_it_was_in():
    scored_model = network(config(), NoLooping(), 16)
    for training in (True, False):
        scored_model.model.train(training)
        score(PlainEval(), scored_model, stream(40))
        assert scored_model.model.training is training
