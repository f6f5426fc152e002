"""Averages of weights against their closed forms."""

import pytest
import torch
from torch import nn

from recurgolf.config import ConfigError
from recurgolf.optim import EMA, LAWA, SWA, NoAveraging


def walk(averaging, steps, lr_scale=lambda step: 1.0, dtype=torch.float32, break_at=None):
    """The averager and the weights after every step of a random walk, the initial ones first."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = nn.Linear(6, 4).to(dtype)
    averager = averaging.build(model)
    weights = [model.weight.detach().double()]
    for step in range(1, steps + 1):
        with torch.no_grad():
            for param in model.parameters():
                param.add_(torch.randn(param.shape, generator=generator).to(dtype) * 0.1)
        averager.update(step, step / steps, lr_scale(step))
        weights.append(model.weight.detach().double())
        if step == break_at:
            saved = {key: value.clone() for key, value in averager.state_dict().items()}
            averager = averaging.build(model)
            averager.load_state_dict(saved)
    return averager, weights


def test_ema_is_the_closed_form():
    averager, weights = walk(EMA(decay=0.9), 40)
    expected = 0.9**40 * weights[0]
    for step, weight in enumerate(weights[1:], 1):
        expected = expected + 0.1 * 0.9 ** (40 - step) * weight
    found = averager.averaged_state()["weight"].double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_ema_that_starts_late_starts_with_a_copy():
    averager, weights = walk(EMA(decay=0.5, start_fraction=0.8), 10)
    expected = 0.25 * weights[8] + 0.25 * weights[9] + 0.5 * weights[10]
    found = averager.averaged_state()["weight"].double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert averager.status() == "ema over 3 steps"


def test_an_ema_that_never_began_is_no_result_but_under_compat():
    averager, _ = walk(EMA(start_fraction=1.0), 0)
    assert averager.averaged_state() is None
    assert "never began" in averager.status()
    compat, weights = walk(EMA(start_fraction=1.0, require_started=False), 0)
    assert torch.equal(compat.averaged_state()["weight"].double(), weights[0])


def test_bfloat16_ema_repeats_the_published_arithmetic():
    config = EMA(decay=0.999, dtype="param", start_fraction=0.4, require_started=False)
    averager, weights = walk(config, 20, dtype=torch.bfloat16)
    shadow = weights[0].bfloat16()
    for weight in weights[8:]:
        shadow = shadow.mul(0.999).add(weight.bfloat16(), alpha=1 - 0.999)
    assert torch.equal(averager.averaged_state()["weight"], shadow)


def test_lawa_is_the_plain_mean_of_the_snapshots_of_the_warmdown():
    averager, weights = walk(LAWA(interval_steps=3), 20, lambda step: 1.0 if step < 10 else 0.5)
    expected = torch.stack([weights[step] for step in (12, 15, 18)]).mean(0)
    found = averager.averaged_state()["weight"].double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_lawa_of_one_snapshot_is_no_result():
    averager, _ = walk(LAWA(interval_steps=15), 20, lambda step: 0.5)
    assert averager.averaged_state() is None
    assert "1 of at least 2" in averager.status()


def test_swa_takes_the_snapshots_below_its_threshold():
    averager, weights = walk(SWA(interval_steps=1), 10, lambda step: (10 - step) / 10)
    expected = torch.stack(weights[9:]).mean(0)
    found = averager.averaged_state()["weight"].double()
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "averaging",
    [NoAveraging(), EMA(decay=0.9), EMA(decay=0.9, start_fraction=0.7), LAWA(interval_steps=2)],
    ids=["none", "ema", "late_ema", "lawa"],
)
def test_a_loaded_average_continues_bit_for_bit(averaging):
    through, _ = walk(averaging, 12, lambda step: 0.5)
    resumed, _ = walk(averaging, 12, lambda step: 0.5, break_at=6)
    one, other = through.averaged_state(), resumed.averaged_state()
    assert (one is None) == (other is None)
    for name in one or {}:
        assert torch.equal(one[name], other[name])


def test_the_averaged_state_loads_strictly_and_leaves_the_model_alone():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(5, 3)
            self.head = nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("count", torch.tensor(3))

    model = Tied()
    averager = EMA(decay=0.5).build(model)
    before = model.embed.weight.detach().clone()
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    averager.update(1, 0.5, 1.0)
    state = averager.averaged_state()
    torch.testing.assert_close(model.embed.weight.detach(), before + 1.0)
    model.load_state_dict(state, strict=True)
    torch.testing.assert_close(model.embed.weight.detach(), before + 0.5)
    assert model.count == 3


def test_an_average_of_another_model_is_refused():
    saved = EMA().build(nn.Linear(2, 2)).state_dict()
    with pytest.raises(ConfigError, match="another model"):
        EMA().build(nn.Linear(2, 2, bias=False)).load_state_dict(saved)


@pytest.mark.parametrize("wrong", [{"decay": 1.0}, {"dtype": "half"}, {"start_fraction": 2.0}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(ConfigError):
        EMA(**wrong)
