"""Every protocol scores every target once, and its sums are those of a plain loop."""

import math

import numpy as np
import pytest
import torch
from per_target import PerTarget
from scored_models import FixedBytes, score_on_ranks, stream, toy

from recurgolf.config import ConfigError
from recurgolf.eval import PlainEval, SlidingEval, Text, score
from recurgolf.eval.document import DocumentEval

PROTOCOLS = [
    PlainEval(keep_tail=True),
    SlidingEval(),
    SlidingEval(stride=1),
    SlidingEval(stride=3),
    SlidingEval(stride=8),
    DocumentEval(),
    DocumentEval(stride=3),
]
names = [f"{type(p).__name__}-{getattr(p, 'stride', '')}" for p in PROTOCOLS]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=names)
@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("num_targets", [8, 9, 15, 16, 17, 40, 41, 300])
def test_every_target_is_scored_exactly_once_whatever_the_ranks(protocol, num_targets, world):
    text = stream(num_targets + 1, documents=True)
    for result in score_on_ranks(protocol, toy(), text, world, accumulate=PerTarget):
        assert np.bincount(result.accumulator.scored).tolist() == [0, num_targets]
        assert result.tokens == num_targets
        assert (result.accumulator.target_nats > 0).all()


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=names)
@pytest.mark.parametrize("num_targets", [8, 9, 41, 300])
def test_windows_stay_inside_the_text_and_their_length(protocol, num_targets):
    text = stream(num_targets + 1, documents=True)
    for window in protocol.windows(text, 8):
        assert 0 <= window.start <= window.first < window.stop <= num_targets
        assert window.stop - window.start <= 8 or protocol.within_documents


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_sliding_gives_every_later_target_enough_context(stride):
    for window in list(SlidingEval(stride=stride).windows(stream(51), 8))[1:]:
        assert window.first - window.start >= 8 - stride


def test_plain_drops_the_ragged_tail_as_the_challenge_does():
    windows = list(PlainEval().windows(stream(22), 8))
    assert [(w.start, w.stop) for w in windows] == [(0, 8), (8, 16)]


@pytest.mark.parametrize("protocol", PROTOCOLS[:5], ids=names[:5])
@pytest.mark.parametrize("batch_tokens", [1, 24, 1000])
def test_sums_equal_those_of_one_window_at_a_time(protocol, batch_tokens):
    text, scored_model = stream(42), toy()
    protocol.batch_tokens = batch_tokens
    found = score(protocol, scored_model, text)
    nats, num_bytes = 0.0, 0
    for window in protocol.windows(text, 8):
        ids = torch.from_numpy(text.tokens[window.start : window.stop].astype(np.int64))[None]
        logits = scored_model.model.logits(scored_model.model.hidden(ids, None))[0]
        for place in range(window.first, window.stop):
            target = int(text.tokens[place + 1])
            row = logits[place - window.start].float()
            nats += float(torch.logsumexp(row, 0) - row[target])
            num_bytes += target % 4
    assert found.tokens == 41
    assert found.bytes == num_bytes
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.val_bpb == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=names)
@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_have_the_sums_of_one(protocol, world):
    text = stream(200, documents=True)
    whole = score(protocol, toy(), text)
    for result in score_on_ranks(protocol, toy(), text, world):
        assert (result.tokens, result.bytes) == (whole.tokens, whole.bytes)
        assert result.nats == pytest.approx(whole.nats, rel=1e-9)
        np.testing.assert_allclose(result.accumulator.nats, whole.accumulator.nats, rtol=1e-9)
        assert (result.accumulator.bytes == whole.accumulator.bytes).all()


def test_a_sidecar_of_bytes_replaces_the_table():
    tokens, sidecar = stream(30).tokens, np.arange(30, dtype=np.uint16)
    text = Text(tokens, FixedBytes(), sidecar)
    assert score(SlidingEval(stride=4), toy(), text).bytes == sum(range(1, 30))


def test_what_is_kept_of_a_long_text_does_not_grow_with_it():
    """Windows come one after another, and ranges of targets that touch are one."""
    protocol, held = SlidingEval(stride=1, batch_tokens=8), []
    text = stream(400)
    score(protocol, toy(), text, progress=lambda done, total: held.append((done, total)))
    assert held[-1] == (392, 392)
    accumulator = score(protocol, toy(), text).accumulator
    assert accumulator._starts == [0] and accumulator._stops == [399]


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(ConfigError, match=r"7 tokens, less than one window of eval\.seq_len=8"):
        score(PlainEval(), toy(), stream(7))


@pytest.mark.parametrize("kind", [SlidingEval, DocumentEval])
def test_a_stride_beyond_the_window_is_refused(kind):
    with pytest.raises(ConfigError, match=r"eval\.stride=9 is larger than the window"):
        kind(stride=9).check(100, 8)


def test_a_text_without_bytes_has_no_score():
    nothing = Text(np.full(20, 4, np.uint16), FixedBytes())
    with pytest.raises(ConfigError, match="16 targets scored, 0 bytes"):
        score(PlainEval(), toy(), nothing)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 0}, r"eval\.passes=0"),
        ({"passes": []}, r"eval\.passes=\[\]"),
        ({"passes": [1, "two"]}, r"eval\.passes=\[1, 'two'\]"),
        ({"rope_scale": "yarn"}, r"eval\.rope_scale='yarn': none or ntk"),
        ({"also": ["plane"]}, r"no Eval of kind 'plane' \(did you mean 'plain'\?\)"),
        ({"also": [{"stride": 4}]}, "says no kind"),
        ({"also": [{"kind": "sliding", "strid": 4}]}, r"'strid' \(did you mean 'stride'\?\)"),
        ({"also": [{"kind": "plain", "also": ["plain"]}]}, "neither a protocol's name"),
    ],
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        PlainEval(**options)
