"""Predicted bits against the entropy of really rounded rows."""

import pytest
import torch

from recurgolf.quant import (
    HessianSigmaClip,
    MaxClip,
    MeanAbsClip,
    MeanSigmaClamp,
    PercentileClip,
    PercentileSearchClip,
    QuantizerGrid,
    SigmaClip,
    code_entropy,
    fit_tail,
    predicted_bits,
    predicted_bytes,
    rtn_quantize,
)

SPECS = [
    QuantizerGrid(6, MaxClip()),
    QuantizerGrid(8, MaxClip()),
    QuantizerGrid(6, MaxClip(), group_size=64),
    QuantizerGrid(5, MaxClip(), symmetric=False),
    QuantizerGrid(6, SigmaClip(12.85)),
    QuantizerGrid(6, SigmaClip(6.0)),
    QuantizerGrid(4, SigmaClip(2.5)),
    QuantizerGrid(6, PercentileClip(99.0)),
    QuantizerGrid(4, PercentileSearchClip([90.0, 95.0, 99.0, 100.0])),
    QuantizerGrid(6, MeanSigmaClamp(2.5)),
    QuantizerGrid(8, HessianSigmaClip(20.0)),
    QuantizerGrid(2, MeanAbsClip()),
    QuantizerGrid(1, MeanAbsClip()),
]


def rows(tail_df):
    """384 rows, Gaussian or Student's t, of sizes that differ threefold as trained rows do."""
    torch.manual_seed(0)
    draw = torch.randn(384, 384)
    if tail_df is not None:
        draw = torch.distributions.StudentT(tail_df).sample(draw.shape)
    return draw * torch.rand(384, 1).mul(1.1).exp() * 0.05


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{type(s.clip).kind}-{s.bits}")
@pytest.mark.parametrize("tail_df", [None, 6.0], ids=["gauss", "t6"])
def test_prediction_is_within_one_percent(spec, tail_df):
    weight = rows(tail_df)
    codes, _ = rtn_quantize(
        weight,
        bits=spec.bits,
        clip=spec.clip,
        group_size=spec.group_size,
        symmetric=spec.symmetric,
    )
    fitted = fit_tail([weight])
    assert (fitted is None) == (tail_df is None)
    assert predicted_bits(spec, 384, fitted) == pytest.approx(code_entropy(codes), rel=0.01)


def test_sigma_clip_follows_the_textbook_entropy():
    # h(N) - log2(step) for a fine grid: 0.5 log2(2πe) = 2.0471 bits at step σ.
    spec = QuantizerGrid(8, SigmaClip(8.0))
    step = torch.tensor(8.0 / 127).log2().item()
    assert predicted_bits(spec, 512) == pytest.approx(2.0471 - step, abs=1e-3)


def test_bytes_count_codes_and_scales():
    spec = QuantizerGrid(6, SigmaClip(6.0))
    codes_only = predicted_bits(spec, 256) * 128 * 256 / 8
    assert predicted_bytes(spec, (128, 256)) == pytest.approx(codes_only + 128 * 11 / 8)


def test_entropy_of_codes_is_shannons():
    assert code_entropy(torch.zeros(10, dtype=torch.int8)) == 0
    assert code_entropy(torch.tensor([], dtype=torch.int8)) == 0
    assert code_entropy(torch.arange(-128, 128).to(torch.int8)) == 8
    assert code_entropy(torch.tensor([0, 0, 1, -1])) == pytest.approx(1.5)


def test_tails_without_variance_are_refused():
    with pytest.raises(ValueError, match="tail_df=2"):
        predicted_bits(QuantizerGrid(6), 10, 2.0)
