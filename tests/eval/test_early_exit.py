"""Early exit chooses among the passes as its rule says, and counts every pass it looked at."""

import numpy as np
import pytest
import torch
from per_target import PerTarget
from scored_models import VOCAB, network, score_on_ranks, stream

from recurgolf.config import ConfigError
from recurgolf.eval import SlidingEval, score
from recurgolf.eval.early_exit import EarlyExitEval
from recurgolf.looping import CycleLooping, NoLooping
from recurgolf.model.transformer import Model

PASSES = 4
TEXT = stream(90, documents=True)


@pytest.fixture(scope="module")
def scored_model():
    config = Model(vocab_size=VOCAB, dim=16, num_blocks=2)
    return network(config, CycleLooping(passes=PASSES), seq_len=16)


def distributions(scored_model, passes):
    """float64 probabilities [targets, v] after so many passes, one target at a time."""
    found = np.zeros((TEXT.num_targets, VOCAB))
    for window in SlidingEval(stride=5).windows(TEXT, 16):
        ids = TEXT.ids(window.start, window.stop)[None]
        with torch.no_grad():
            logits = scored_model.model(ids, scored_model.plan(passes))[0].double()
        found[window.first : window.stop] = logits.softmax(-1).numpy()[
            window.first - window.start :
        ]
    return found


@pytest.fixture(scope="module")
def by_depth(scored_model):
    return np.stack([distributions(scored_model, n) for n in range(1, PASSES + 1)])


def changes(by_depth, measure):
    before, now = by_depth[:-1], by_depth[1:]
    if measure == "kl":
        return (now * (np.log(now) - np.log(before))).sum(-1)
    best = now.argmax(-1)[..., None]
    return np.abs(np.take_along_axis(now, best, -1) - np.take_along_axis(before, best, -1))[..., 0]


@pytest.mark.parametrize("measure", ["kl", "top"])
def test_each_position_stops_where_its_distribution_stopped_changing(
    scored_model, by_depth, measure
):
    change = changes(by_depth, measure)
    thresholds = np.quantile(change, [0.2, 0.5, 0.8]).tolist()
    protocol = EarlyExitEval(
        stride=5, measure=measure, threshold=thresholds[0], thresholds=thresholds[1:]
    )
    result = score(protocol, scored_model, TEXT, accumulate=PerTarget)
    found = [result, *(result.variants[f"threshold={t:g}"] for t in thresholds[1:])]
    targets = TEXT.tokens[1:].astype(int)
    for threshold, got in zip(thresholds, found, strict=True):
        nats, used = [], []
        for place, target in enumerate(targets):
            depth = 0
            while depth < PASSES - 1:
                depth += 1
                if change[depth - 1, place] < threshold:
                    break
            nats.append(-np.log(by_depth[depth, place, target]))
            used.append(depth + 1)
        assert got.means["mean_passes"] == pytest.approx(np.mean(used), abs=1e-12)
        np.testing.assert_allclose(got.accumulator.target_nats, nats, rtol=2e-4, atol=2e-5)
        assert got.to_dict()["mean_passes"] == got.means["mean_passes"]
    passes = [got.means["mean_passes"] for got in found]
    assert PASSES > passes[0] > passes[1] > passes[2] > 1


def test_threshold_zero_is_the_full_depth_and_fixed_depths_are_those_of_sliding(scored_model):
    result = score(EarlyExitEval(stride=5, threshold=0.0, thresholds=[]), scored_model, TEXT)
    assert list(result.variants) == [f"passes={n}" for n in range(1, PASSES + 1)]
    assert result.means == {"mean_passes": PASSES}
    assert result.nats == pytest.approx(result.variants[f"passes={PASSES}"].nats, rel=1e-12)
    for number in range(1, PASSES + 1):
        plain = score(SlidingEval(stride=5, passes=number), scored_model, TEXT)
        fixed = result.variants[f"passes={number}"]
        assert fixed.nats == pytest.approx(plain.nats, rel=1e-6)
        assert fixed.means == {"mean_passes": number}
        assert (fixed.tokens, fixed.bytes) == (plain.tokens, plain.bytes)


def test_ranks_add_up_variants_and_means_too(scored_model):
    protocol = EarlyExitEval(stride=5, threshold=0.5)
    whole = score(protocol, scored_model, TEXT)
    for result in score_on_ranks(protocol, scored_model, TEXT, 3):
        assert result.means == pytest.approx(whole.means)
        assert result.variants.keys() == whole.variants.keys()
        for name, variant in result.variants.items():
            assert variant.nats == pytest.approx(whole.variants[name].nats, rel=1e-6)


def test_what_cannot_exit_is_refused():
    model = Model(vocab_size=VOCAB, dim=16, num_blocks=2)
    with pytest.raises(ConfigError, match="this schedule scores with 1"):
        EarlyExitEval().check_model(model, NoLooping())
    with pytest.raises(ConfigError, match=r"eval\.measure='js': kl or top"):
        EarlyExitEval(measure="js")
    with pytest.raises(ConfigError, match=r"eval\.passes=\[1, 2\]: eval=early_exit"):
        EarlyExitEval(passes=[1, 2])
    with pytest.raises(ConfigError, match=r"eval\.threshold=-1"):
        EarlyExitEval(threshold=-1)
