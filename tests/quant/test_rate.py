"""Bytes in the loss: gradients, rate models, and steps that are those of the file."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from smoke_runs import composed

from recurgolf.config import ConfigError
from recurgolf.quant import Gaussian, Histogram, Laplace, Logistic, Rate
from recurgolf.quant.learned_steps import PER_OCTAVE, StepRounding, TableBits
from recurgolf.quant.rate_models import CODES, LIMIT

ROWS, COLS = 12, 40


@pytest.fixture
def weight():
    generator = torch.Generator().manual_seed(3)
    spread = torch.logspace(-2, 0, ROWS)[:, None]
    return spread * torch.randn(ROWS, COLS, generator=generator)


def steps_of(weight, bits=4.0, **options):
    steps = Rate(**options).quantizers({"a.weight": weight.shape}, 100)
    steps.start_at({"a.weight": weight}, bits * weight.numel())
    steps.fit()
    return steps


def test_rounding_passes_the_gradients_of_learned_step_size_quantization(weight):
    """Against autograd through s * (w / s + constant), in float64."""
    w = weight.double().requires_grad_()
    log_step = torch.linspace(-5, -2, ROWS, dtype=torch.float64)[:, None].requires_grad_()
    upstream = torch.randn(ROWS, COLS, dtype=torch.float64)
    step = torch.exp2(log_step)
    seen = StepRounding.apply(w, log_step, step.detach(), False)
    ours = torch.autograd.grad(seen, (w, log_step), upstream)
    rounding = ((w / step).round().clamp(-127, 127) - w / step).detach()
    theirs = torch.autograd.grad(step * (w / step + rounding), (w, log_step), upstream)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_bits_between_the_entries_of_a_table_have_the_gradient_of_their_slope(weight):
    w = weight.double().requires_grad_()
    log_step = torch.full((ROWS, 1), -4.0, dtype=torch.float64).requires_grad_()
    table = torch.rand(CODES, dtype=torch.float64) * 9
    noise = torch.rand(ROWS, COLS, dtype=torch.float64) - 0.5
    found = TableBits.apply(w, log_step, torch.exp2(log_step).detach(), table, noise.clone())
    ours = torch.autograd.grad(found, (w, log_step), torch.tensor(0.7).double())
    place = w / torch.exp2(log_step) + noise + LIMIT
    low = place.detach().floor().long()
    expected = (table[low] * (low + 1 - place) + table[low + 1] * (place - low)).sum()
    theirs = torch.autograd.grad(0.7 * expected, (w, log_step))
    torch.testing.assert_close(found, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)
    by_scipy = np.interp(place.detach().numpy(), np.arange(CODES), table.numpy()).sum()
    assert float(found.detach()) == pytest.approx(by_scipy)


CURVES = {
    Laplace: lambda scale: stats.laplace(scale=scale),
    Logistic: lambda scale: stats.logistic(scale=scale),
    Gaussian: lambda scale: stats.norm(scale=scale),
}


@pytest.mark.parametrize("kind", CURVES, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("scale", [0.8, 3.0, 11.0])
def test_a_curve_fitted_to_its_own_codes_costs_their_entropy(kind, scale):
    """Against scipy: probabilities of the cells, and no more bits than 1 % above the entropy."""
    codes = np.arange(-LIMIT, LIMIT + 1)
    law = CURVES[kind](scale)
    cells = law.cdf(codes + 0.5) - law.cdf(codes - 0.5)
    cells /= cells.sum()
    table = kind().table(torch.from_numpy(1e6 * cells))
    assert float((torch.from_numpy(cells) * table).sum()) == pytest.approx(
        stats.entropy(cells, base=2), rel=0.01
    )
    assert float(table.neg().exp2().sum()) == pytest.approx(1.0, abs=1e-3)


def test_a_histogram_costs_what_a_coder_with_its_own_table_takes():
    counts = torch.zeros(CODES, dtype=torch.float64)
    counts[LIMIT - 2 : LIMIT + 3] = torch.tensor([10.0, 5.0, 70.0, 5.0, 10.0], dtype=torch.float64)
    share = counts / counts.sum()
    bits = float((share * Histogram().table(counts)).sum())
    assert bits == pytest.approx(stats.entropy(share.numpy(), base=2), abs=0.05)
    # A code that did not come has a price, so that a weight may find its way there.
    assert Histogram().table(counts).isfinite().all()


def test_what_training_sees_is_what_the_file_holds(weight):
    steps = steps_of(weight)
    seen = steps.seen({"a.weight": weight})["a.weight"]
    stored = steps.stored({"a.weight": weight})["a.weight"]
    assert torch.equal(stored.dequantize(), seen)
    assert stored.scales.dtype == torch.float16 and stored.codes.dtype == torch.int8
    levels = PER_OCTAVE * stored.scales.double().log2()
    assert float((levels - levels.round()).abs().max()) < 0.01


@pytest.mark.parametrize("options", [{}, {"per": "tensor"}, {"per": "group", "group_size": 16}])
def test_steps_belong_to_rows_groups_or_a_tensor(weight, options):
    steps = steps_of(weight, **options)
    count = {"tensor": 1, "group": ROWS * math.ceil(COLS / 16)}.get(options.get("per"), ROWS)
    assert sum(p.numel() for p in steps.parameters()) == count
    seen = steps.seen({"a.weight": weight})["a.weight"]
    assert torch.equal(steps.stored({"a.weight": weight})["a.weight"].dequantize(), seen)
    error = (seen - weight).detach().abs()
    assert float(error.max() / weight.abs().max()) < 0.2


@pytest.mark.parametrize("bits", [1.5, 3.0, 6.0])
def test_it_begins_at_the_bits_it_is_given(weight, bits):
    steps = steps_of(weight, bits)
    codes = steps.stored({"a.weight": weight})["a.weight"].codes
    _, counts = np.unique(codes.numpy(), return_counts=True)
    entropy = stats.entropy(counts, base=2)
    assert entropy == pytest.approx(bits, abs=0.25) and entropy <= bits


@pytest.mark.parametrize(
    ("options", "training_steps", "rate"),
    [
        ({}, 2500, 0.02),
        ({"start_fraction": 0.0}, 2500, 0.01),
        ({"start_fraction": 0.8}, 2500, 0.05),
        ({}, 20, 0.15),
        ({"step_lr": 0.3}, 2500, 0.3),
    ],
)
def test_steps_can_move_as_far_in_a_short_training_as_in_a_long_one(options, training_steps, rate):
    steps = Rate(**options).quantizers({"a.weight": (4, 40)}, training_steps)
    assert steps.log_steps["a:weight"].optimizer_lr == pytest.approx(rate)


def test_a_vector_and_a_row_of_zeros(weight):
    weight[3] = 0.0
    shapes = {"a.weight": weight.shape, "gain": (70,)}
    weights = {"a.weight": weight, "gain": torch.linspace(0.9, 1.1, 70)}
    steps = Rate().quantizers(shapes, 100)
    steps.start_at(weights, 4.0 * steps.numel)
    stored = steps.stored(weights)
    assert stored["gain"].scales.shape == ()
    assert stored["a.weight"].scales[3] == 0 and not stored["a.weight"].codes[3].any()
    assert (stored["a.weight"].dequantize() - steps.seen(weights)["a.weight"]).abs().max() == 0


def test_no_row_of_the_token_table_vanishes():
    """Its norm would multiply gradients by 1 / sqrt(norm_eps): 1e9 from one token in a batch."""
    table = torch.randn(50, 16, generator=torch.Generator().manual_seed(0))
    table[7:9] *= 1e-3
    steps = Rate(per="tensor").quantizers({"embed.weight": table.shape}, 100)
    steps.start_at({"embed.weight": table}, 2.0 * table.numel())
    seen = steps.seen({"embed.weight": table})["embed.weight"].detach()
    assert seen.any(dim=1).all()
    largest = table[7].abs().argmax()
    step = float(steps.scales("embed.weight"))
    assert seen[7].count_nonzero() == 1
    assert float(seen[7, largest]) == pytest.approx(math.copysign(step, table[7, largest]))
    assert torch.equal(steps.stored({"embed.weight": table})["embed.weight"].dequantize(), seen)


def test_a_token_without_a_code_would_have_gradients_of_any_size():
    model = composed("experiment=smoke", "lora=none", "quant/qat=rate").build_model()
    steps, weights = model.quantizers, dict(model.named_parameters())
    weights = {name: weights[name] for name in steps.names}
    with torch.no_grad():
        weights["embed.weight"][3] *= 1e-6
    steps.start_at(weights, 3.0 * steps.numel)
    values = steps.seen(weights)
    tokens = torch.arange(33)[None]
    plan = composed("experiment=smoke", "lora=none").plan(1.0)
    loss = torch.func.functional_call(model, values, (tokens[:, :-1], plan, tokens[:, 1:]))
    loss.backward()
    assert float(weights["blocks.0.mixer.q_proj.weight"].grad.norm()) < 1e3


def test_no_weight_outgrows_its_codes(weight):
    steps = steps_of(weight, 7.0)
    grown = 40 * weight
    steps.look({"a.weight": grown})
    seen = steps.seen({"a.weight": grown})["a.weight"]
    _, step = steps.steps_of("a.weight", grown.shape)
    assert ((seen - grown).abs() <= 0.51 * step).all()


def test_a_row_that_went_to_zero_keeps_a_finite_step(weight):
    """Nothing holds its step from growing but the look at its largest entry."""
    steps = steps_of(weight)
    weight[5] *= 1e-4
    with torch.no_grad():
        steps.log_steps["a:weight"][5] = 300.0
    assert steps.seen({"a.weight": weight})["a.weight"].isfinite().all()
    steps.look({"a.weight": weight})
    assert float(steps.log_steps["a:weight"][5].detach()) == -4.0


def test_a_share_of_the_rows_counts_like_all_of_them(weight):
    alike = weight / weight.square().mean(1, keepdim=True).sqrt()
    whole, part = steps_of(alike), steps_of(alike, share=0.5)
    rate = float(whole.rate({"a.weight": alike}, seed=1).detach())
    few = [float(part.rate({"a.weight": alike}, seed=n).detach()) for n in range(40)]
    assert np.mean(few) == pytest.approx(rate, rel=0.05)
    assert float(whole.rate({"a.weight": alike}, seed=1).detach()) == rate


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"price": 0.1, "artifact_bytes": 9}, ["price=0.1", "artifact_bytes=9", "give one"]),
        ({"per": "group"}, ["per=group", "group_size"]),
        ({"group_size": 16}, ["per=row", "group_size=16"]),
        ({"model": "histogramm"}, ["histogramm", "did you mean 'histogram'"]),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, words):
    with pytest.raises(ConfigError) as refused:
        Rate(**options)
    assert all(word in str(refused.value) for word in words)
