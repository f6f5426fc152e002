"""Low-rank corrections: the best there is, stored beside the codes, and added by every reader."""

import numpy as np
import pytest
import torch

from recurgolf.artifact import load, pack
from recurgolf.config import ConfigError
from recurgolf.quant import (
    LowRankCorrection,
    Quant,
    QuantizedTensor,
    Rule,
    dequantize_state,
    quantize_state,
)
from recurgolf.quant.lqer import low_rank


def error_and_gram(rows=24, cols=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * cols, cols, generator=generator) * torch.logspace(0, -1.5, cols)
    return torch.randn(rows, cols, generator=generator) * 0.01, x.T @ x / len(x)


@pytest.mark.parametrize("rank", [1, 4, 24])
def test_no_other_factors_of_that_rank_do_better(rank):
    """Eckart and Young in float64: what is left are the singular values behind the rank."""
    error, gram = error_and_gram()
    left, right = low_rank(error, rank, gram)
    assert left.shape == (rank, 24) and right.shape == (rank, 40)
    rest = (error - left.T @ right).double().numpy()
    root = np.linalg.cholesky(gram.double().numpy())
    singular = np.linalg.svd(error.double().numpy() @ root, compute_uv=False)
    weighted = np.sum((rest @ root) ** 2)
    assert weighted == pytest.approx(np.sum(singular[rank:] ** 2), rel=1e-3, abs=1e-9)
    plain_left, plain_right = low_rank(error, rank)
    plain = np.sum(((error - plain_left.T @ plain_right).double().numpy() @ root) ** 2)
    assert weighted <= plain * (1 + 1e-6) + 1e-9


def test_inputs_that_are_always_zero_take_no_rank():
    error, gram = error_and_gram()
    gram[:, 7] = gram[7] = 0
    error[:, 7] = 100.0
    _, right = low_rank(error, 2, gram)
    assert right[:, 7].abs().max() < 1e-3 and torch.isfinite(right).all()


def quant(**fields):
    return Quant(
        rules=[Rule("*", bits=3, clip={"kind": "sigma", "k": 2.5}, **fields)],
        keep_float_max_numel=0,
        keep_float_max_side=4,
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"lqer_rank": 3},
        {"lqer_rank": 3, "lqer_bits": None},
        {"lqer_rank": 3, "lqer_bits": 4, "lqer_symmetric": False},
        {"lqer_rank": 3, "method": "gptq"},
    ],
)
def test_a_file_gives_codes_plus_correction_and_less_error(fields, tmp_path):
    generator = torch.Generator().manual_seed(4)
    # A part of rank 2 that no grid of three bits can follow, and noise.
    weight = torch.randn(32, 2, generator=generator) @ torch.randn(2, 48, generator=generator)
    state = {"a.weight": weight + 0.3 * torch.randn(32, 48, generator=generator)}
    x = torch.randn(200, 48, generator=generator)
    grams = {"a.weight": x.T @ x / 200}
    rules = quant(**fields).assign({"a.weight": (32, 48)})
    stored = quantize_state(state, rules, grams)
    assert set(stored) == {"a.weight", "a.weight:lqer_out", "a.weight:lqer_in"}
    path = tmp_path / "artifact.bin"
    pack(path, {}, stored)
    read = dequantize_state(load(path).tensors)
    assert set(read) == {"a.weight"}
    codes = stored["a.weight"]
    assert isinstance(codes, QuantizedTensor)
    out, into = (
        part.dequantize() if isinstance(part, QuantizedTensor) else part.float()
        for part in (stored["a.weight:lqer_out"], stored["a.weight:lqer_in"])
    )
    torch.testing.assert_close(read["a.weight"], codes.dequantize() + out.T @ into)
    before = (state["a.weight"] - codes.dequantize()).square().mean()
    after = (state["a.weight"] - read["a.weight"]).square().mean()
    assert after < 0.9 * before
    (report,) = stored.reports
    assert report.corrected is not None and report.corrected < report.error


def test_states_without_corrections_are_as_they_were():
    state = {"a.weight": torch.randn(8, 8), "b": torch.ones(3)}
    stored = quantize_state(state, quant().assign({k: tuple(v.shape) for k, v in state.items()}))
    assert set(stored) == set(state)
    assert set(dequantize_state(stored)) == set(state)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"lqer_rank": -1}, "lqer_rank=-1"),
        ({"lqer_rank": 2, "lqer_bits": 1}, "lqer_bits=1"),
        ({"lqer_rank": 9}, "lqer_rank=9 for 'a.weight'"),
    ],
)
def test_corrections_that_cannot_be_are_refused(fields, words):
    with pytest.raises(ConfigError, match=words):
        quant(**fields).assign({"a.weight": (8, 8)})
    if fields["lqer_rank"] < 0:
        with pytest.raises(ConfigError):
            LowRankCorrection(-1)
