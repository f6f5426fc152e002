"""Gram matrices as hooks collect them, against sums by hand; refusals of calibration options."""

import pytest
import torch

from recurgolf.config import ConfigError
from recurgolf.model.linear import Linear
from recurgolf.quant import GramCollector, SelfGenerated, TrainCalibration


def layer(in_dim, out_dim, seed):
    made = Linear(in_dim, out_dim)
    generator = torch.Generator().manual_seed(seed)
    made.weight.data = torch.randn(out_dim, in_dim, generator=generator) / in_dim**0.5
    return made


def by_hand(inputs, weights):
    total = sum(
        w * x.double().flatten(0, -2).T @ x.double().flatten(0, -2)
        for x, w in zip(inputs, weights, strict=True)
    )
    return total.float()


@pytest.mark.parametrize(
    ("given", "meant"), [([], [1, 1, 1]), ([2.0, 0.5], [2, 0.5, 0.5]), ([0.0, 1.0], [0, 1, 1])]
)
def test_visits_are_pooled_with_their_weights(given, meant):
    band, head = layer(12, 12, 0), layer(12, 5, 1)
    batches = torch.randn(4, 2, 6, 12, generator=torch.Generator().manual_seed(2))
    collector = GramCollector({"band": band, "head": head}, visit_weights={"band": given})
    seen, read = [], []
    with collector:
        for x in batches:
            collector.begin(12)
            for _ in range(3):
                seen.append(x)
                x = torch.tanh(band(x))
            read.append(x)
            head(x)
    band(batches[0])  # outside of it nothing is added
    grams = collector.grams()
    expected = by_hand(seen, meant * 4) / 48
    torch.testing.assert_close(grams["band"], expected, rtol=1e-5, atol=1e-6)
    expected = by_hand(read, [1] * 4) / 48
    torch.testing.assert_close(grams["head"], expected, rtol=1e-5, atol=1e-6)


def test_sums_are_float32_under_autocast_and_stay_positive_definite():
    wide = layer(64, 8, 0)
    generator = torch.Generator().manual_seed(3)
    # One direction a thousand times the others: bfloat16 products make such a sum indefinite.
    x = torch.randn(2000, 64, generator=generator) * 1e-2
    x += 10 * torch.randn(2000, 1, generator=generator) * torch.ones(64)
    collector = GramCollector({"wide": wide})
    with collector, torch.autocast("cpu", torch.bfloat16):
        collector.begin(len(x))
        wide(x)
        rounded = (x.T @ x).float() / len(x)
    gram = collector.grams()["wide"]
    assert gram.dtype == torch.float32
    exact = x.double().T @ x.double() / len(x)
    assert (gram - exact).abs().max() / exact.abs().max() < 1e-6
    assert (rounded - exact).abs().max() / exact.abs().max() > 1e-4, "autocast rounds, as assumed"
    damped = gram + 1e-3 * gram.diagonal().mean() * torch.eye(64)
    assert torch.linalg.cholesky_ex(damped)[1] == 0


def test_inputs_may_be_handed_over_and_silence_is_an_error():
    collector = GramCollector({"never": layer(4, 4, 0)}, others={"table": 3})
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with collector:
        collector.begin(5)
        collector.add("table", x)
    with pytest.raises(ValueError, match="never"):
        collector.grams()
    torch.testing.assert_close(collector.sums["table"], x.T @ x)


def test_memory_does_not_grow_with_the_batches():
    wide = layer(16, 16, 0)
    collector = GramCollector({"wide": wide})
    with collector:
        for _ in range(3):
            collector.begin(8)
            wide(torch.ones(8, 16))
    assert [tuple(t.shape) for t in collector.sums.values()] == [(16, 16)]
    assert collector.sums["wide"].untyped_storage().nbytes() == 4 * 16 * 16
    assert collector.tokens == 24


def test_some_visit_has_to_count():
    with pytest.raises(ConfigError, match=r"visit_weights=\[0.0, 0.0\]: at least one above 0"):
        TrainCalibration(visit_weights=[0.0, 0.0])


def test_more_text_than_there_is_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match=r"2,000 tokens.*1,999.*at most 19 sequences"):
        TrainCalibration(sequences=20).check_text(1999, 100)
    TrainCalibration(sequences=20).check_text(2000, 100)
    SelfGenerated(sequences=20).check_text(10, 100)
