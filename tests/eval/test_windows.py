"""Every protocol scores every target once, and its sums are those of a plain loop."""

import math

import numpy as np
import pytest
import torch

from recurgolf.config import ConfigError
from recurgolf.eval import PlainEval, SlidingEval, score

VOCAB = 17
PROTOCOLS = [
    PlainEval(keep_tail=True),
    SlidingEval(),
    SlidingEval(stride=1),
    SlidingEval(stride=3),
    SlidingEval(stride=8),
]
names = [f"{type(p).__name__}-{getattr(p, 'stride', '')}" for p in PROTOCOLS]


class FixedBytes:
    """A byte table for the tests: token t counts t % 4 bytes."""

    def count(self, targets, previous):
        return targets % 4


def bigram_logits(ids: torch.Tensor, first: int) -> torch.Tensor:
    """A causal toy model whose scores depend on position in the window and the last two tokens."""
    before = torch.nn.functional.pad(ids[:, :-1], (1, 0), value=0)
    code = (ids * 7 + before * 3)[..., None] + torch.arange(VOCAB)
    return torch.sin(code.double())[:, first:] * 2


def stream(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, VOCAB, length).astype(np.uint16)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=names)
@pytest.mark.parametrize("num_targets", [8, 9, 15, 16, 17, 40, 41])
def test_every_target_is_scored_exactly_once(protocol, num_targets):
    counts = np.zeros(num_targets, dtype=int)
    for window in protocol.windows(num_targets, 8):
        assert 0 <= window.start <= window.first < window.stop <= num_targets
        assert window.stop - window.start <= 8
        counts[window.first : window.stop] += 1
    assert (counts == 1).all()


@pytest.mark.parametrize("stride", [1, 3, 8])
def test_sliding_gives_every_later_target_enough_context(stride):
    for window in list(SlidingEval(stride=stride).windows(50, 8))[1:]:
        assert window.first - window.start >= 8 - stride


def test_plain_drops_the_ragged_tail_as_the_challenge_does():
    windows = list(PlainEval().windows(21, 8))
    assert [(w.start, w.stop) for w in windows] == [(0, 8), (8, 16)]


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=names)
@pytest.mark.parametrize("batch_tokens", [1, 24, 1000])
def test_sums_equal_those_of_one_window_at_a_time(protocol, batch_tokens):
    tokens = stream(42)
    protocol.batch_tokens = batch_tokens
    found = score(bigram_logits, protocol, tokens, FixedBytes(), seq_len=8)
    nats, num_bytes = 0.0, 0
    for window in protocol.windows(41, 8):
        ids = torch.from_numpy(tokens[window.start : window.stop].astype(np.int64))[None]
        logits = bigram_logits(ids, 0)[0]
        for place in range(window.first, window.stop):
            target = int(tokens[place + 1])
            row = logits[place - window.start].float()
            nats += float(torch.logsumexp(row, 0) - row[target])
            num_bytes += target % 4
    assert found.tokens == 41
    assert found.bytes == num_bytes
    assert found.nats == pytest.approx(nats, rel=1e-6)
    assert found.val_bpb == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-6)


@pytest.mark.parametrize("protocol", PROTOCOLS, ids=names)
@pytest.mark.parametrize("world", [2, 3])
def test_shares_of_the_ranks_add_up_to_the_whole(protocol, world):
    tokens = stream(60)
    whole = score(bigram_logits, protocol, tokens, FixedBytes(), seq_len=8)
    parts = [
        score(bigram_logits, protocol, tokens, FixedBytes(), seq_len=8, rank=r, world_size=world)
        for r in range(world)
    ]
    assert sum(p.tokens for p in parts) == whole.tokens
    assert sum(p.bytes for p in parts) == whole.bytes
    assert sum(p.nats for p in parts) == pytest.approx(whole.nats, rel=1e-9)


def test_a_sidecar_of_bytes_replaces_the_table():
    tokens = stream(30)
    sidecar = np.arange(30, dtype=np.uint16)
    found = score(
        bigram_logits, SlidingEval(stride=4), tokens, FixedBytes(), seq_len=8, sidecar=sidecar
    )
    assert found.bytes == sum(range(1, 30))


def test_text_shorter_than_a_window_is_refused():
    with pytest.raises(ConfigError, match=r"7 tokens, less than one window of eval\.seq_len=8"):
        score(bigram_logits, PlainEval(), stream(7), FixedBytes(), seq_len=8)


def test_a_stride_beyond_the_window_is_refused():
    with pytest.raises(ConfigError, match=r"eval\.stride=9 is larger than the window"):
        SlidingEval(stride=9).check(100, 8)
