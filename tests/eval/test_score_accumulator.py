"""A ScoreAccumulator has the sums of every document, and notices a target that is scored twice."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from per_target import PerTarget
from scored_models import FixedBytes, stream

from recurgolf.config import ConfigError
from recurgolf.eval import Score, ScoreAccumulator, Text

LENGTH = 60


@settings(max_examples=60, deadline=None, database=None)
@given(
    st.lists(st.integers(1, LENGTH - 2), unique=True, max_size=12),
    st.lists(st.integers(1, LENGTH - 1), unique=True, max_size=8),
    st.randoms(use_true_random=False),
)
def test_sums_are_those_of_a_loop_over_targets_in_whatever_order_they_come(starts, cuts, chance):
    tokens = (np.arange(LENGTH) % 7 + 2).astype(np.uint16)
    tokens[[0, *starts]] = 1
    text = Text(tokens, FixedBytes(), bos=1)
    nats = np.random.default_rng(len(starts)).random(LENGTH - 1)
    edges = [0, *sorted(c for c in cuts if c < LENGTH - 1), LENGTH - 1]
    pieces = list(pairwise(edges))
    chance.shuffle(pieces)
    accumulator = PerTarget(text)
    for first, stop in pieces:
        accumulator.add(first, torch.from_numpy(nats[first:stop]))

    expected = {}
    document = -1
    for target in range(LENGTH - 1):
        document += tokens[target] == 1
        entry = expected.setdefault(document, [0.0, 0, 0])
        entry[0] += nats[target]
        entry[1] += 1
        entry[2] += int(tokens[target + 1]) % 4
    assert text.num_documents == len(expected)
    np.testing.assert_allclose(accumulator.nats, [e[0] for e in expected.values()], rtol=1e-12)
    assert accumulator.tokens.tolist() == [e[1] for e in expected.values()]
    assert accumulator.bytes.tolist() == [e[2] for e in expected.values()]
    assert (accumulator.scored == 1).all() and (accumulator.target_nats == nats).all()
    assert Score.of(accumulator, 0.0).nats == pytest.approx(nats.sum(), rel=1e-12)


@settings(max_examples=100, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(1, 6)), max_size=12))
def test_a_target_is_refused_exactly_when_it_was_scored_before(pieces):
    accumulator, seen = ScoreAccumulator(stream(26)), set()
    for first, count in pieces:
        wanted = set(range(first, first + count))
        if wanted & seen:
            with pytest.raises(ConfigError, match="was scored twice"):
                accumulator.add(first, torch.ones(count))
        else:
            accumulator.add(first, torch.ones(count))
            seen |= wanted
    assert accumulator.tokens.sum() == len(seen)


def test_protocols_that_say_so_may_repeat():
    accumulator = PerTarget(stream(10), repeats=True)
    accumulator.add(0, torch.ones(5))
    accumulator.add(3, torch.full((4,), 2.0))
    assert accumulator.scored.tolist() == [1, 1, 1, 2, 2, 1, 1, 0, 0]
    assert accumulator.recorded({}).turn.tolist() == [1, 1, 1, 2, 2, 2, 2, 0, 0]
    assert accumulator.nats.sum() == 13


@pytest.mark.parametrize(("first", "count"), [(-1, 2), (8, 2), (9, 1)])
def test_targets_outside_the_text_are_refused(first, count):
    with pytest.raises(ConfigError, match="there are 9"):
        ScoreAccumulator(stream(10)).add(first, torch.ones(count))


def test_the_bos_behind_a_document_is_its_own_last_target():
    text = Text(np.array([1, 5, 6, 1, 7, 1, 1, 8], np.uint16), FixedBytes(), bos=1)
    assert text.starts.tolist() == [0, 3, 5, 6]
    assert text.document_of(np.arange(7)).tolist() == [0, 0, 0, 1, 1, 2, 3]
    assert text.num_documents == 4


def test_starts_are_found_across_the_pieces_that_a_long_text_is_read_in(monkeypatch):
    text = stream(500, documents=True)
    whole = text.starts
    monkeypatch.setattr("recurgolf.eval.text._TOKENS_AT_ONCE", 7)
    again = Text(text.tokens, text.byte_count, bos=text.bos)
    assert (again.starts == whole).all() and len(whole) > 20
