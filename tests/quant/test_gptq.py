"""GPTQ against recordings and against the column-by-column loop of the paper."""

import io
import lzma
import time
from pathlib import Path

import brotli
import pytest
import torch

from recurgolf.quant import (
    MaxClip,
    PercentileSearchClip,
    QuantizerGrid,
    SigmaClip,
    dequantize,
    gptq_quantize,
    gptq_quantize_many,
    rtn_quantize,
)

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def assert_within_tolerance(result, codes, scales):
    """The recordings' rule: scales exact, at most 0.5 % of the codes off, by one step."""
    assert torch.equal(result[1], scales)
    off = (result[0].int() - codes.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() <= 0.005


def naive_gptq(weight, gram, steps, bits, damping=0.01, offsets=None):
    """One column after the other, the whole rest updated each time; steps are [rows, cols]."""
    weight, gram = weight.clone(), gram.clone()
    dead = gram.diagonal() == 0
    gram.diagonal()[dead] = 1
    weight[:, dead] = 0
    gram.diagonal().add_(damping * gram.diagonal().mean())
    order = torch.argsort(gram.diagonal(), descending=True)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram[order][:, order]))
    upper = torch.linalg.cholesky(inverse, upper=True)
    low = -(2 ** (bits - 1)) + (offsets is None)
    high = 2 ** (bits - 1) - 1
    codes = torch.zeros_like(weight)
    for j, column in enumerate(order.tolist()):
        step, w = steps[:, column], weight[:, column]
        offset = torch.zeros_like(w) if offsets is None else offsets[:, column]
        code = ((w - offset) / step).round().clamp(low, high)
        codes[:, column] = code
        error = (w - code * step - offset) / upper[j, j]
        rest = order[j:]
        weight[:, rest] -= error[:, None] * upper[j, j:]
    return codes.to(torch.int8)


def layer(rows, cols, seed, decay=2.0):
    """A weight and the Gram matrix of correlated inputs whose spectrum falls by 10^(2·decay)."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=generator) / cols**0.5
    x = torch.randn(4 * cols, cols, generator=generator) * torch.logspace(0, -decay, cols) @ mix
    return torch.randn(rows, cols, generator=generator) * 0.1, x.T @ x


def hessian_error(weight, gram, codes, scales):
    change = (weight - dequantize(codes, scales)).double()
    return float(((change @ gram.double()) * change).sum())


def test_recorded_weights_of_per_iteration_lora_come_out(golden):
    tensors = golden("per_iteration_lora/quantization/gptq_weight.safetensors")
    for case in golden("per_iteration_lora/quantization/gptq_weight.json"):
        result = gptq_quantize(
            tensors[case["weight"]],
            tensors[case["hessian"]],
            bits=case["bits"],
            clip=SigmaClip(case["clip_sigmas"]),
            block_size=case["block_size"],
        )
        name = case["case"]
        assert_within_tolerance(result, tensors[f"{name}.q"], tensors[f"{name}.scale"])


def test_recorded_layers_of_universal_rank1_come_out(golden, formula_tensor):
    tensors = golden("universal_rank1/quantization/gptq_layer.safetensors")
    search = {"clip": PercentileSearchClip(), "scale_floor": "inv_qmax"}
    for case in golden("universal_rank1/quantization/gptq_layer.json")["cases"]:
        name, index = case["case"], case["case"].split(".")[0]
        result = gptq_quantize(
            tensors[f"{index}.weight"],
            tensors[f"{index}.hessian"],
            bits=case["clip_range"].bit_length() + 1,
            block_size=case["block_size"],
            **search,
        )
        assert_within_tolerance(result, tensors[f"{name}.q"], tensors[f"{name}.scale"])
    without = [name.removesuffix(".no_hessian.q") for name in tensors if "no_hessian.q" in name]
    for index in without:
        codes, scales = rtn_quantize(tensors[f"{index}.weight"], bits=6, **search)
        assert torch.equal(codes, tensors[f"{index}.no_hessian.q"])
        assert torch.equal(scales, tensors[f"{index}.no_hessian.scale"])

    facts = golden("universal_rank1/quantization/mixed.json")
    recorded = golden("universal_rank1/quantization/mixed.quantized.safetensors")
    for key, gram in golden("universal_rank1/quantization/mixed.input.safetensors").items():
        name = key.removeprefix("hessian.")
        if name != key:
            weight = formula_tensor(**facts["formula_inputs"][name])
            bits = int(facts["meta"][name]["type"].removeprefix("int"))
            result = gptq_quantize(weight, gram, bits=bits, **search)
            assert_within_tolerance(result, recorded[f"{name}.q"], recorded[f"{name}.scale"])


def test_recorded_artifact_of_per_iteration_lora_holds_our_codes(golden):
    folder = GOLDEN / "per_iteration_lora/quantization"
    asked = golden("per_iteration_lora/quantization/mixed.json")["hyperparameters"]
    decompress = {"brotli": brotli, "lzma": lzma}[asked.get("compressor", "brotli")].decompress
    data = decompress((folder / "artifact.int6.ptz").read_bytes())
    assert data[:4] == b"BSHF"
    stride, body = data[4], memoryview(data)[5:]
    plain = bytearray(len(body))
    for first in range(stride):  # the bytes of one place in their words lie together
        count = len(plain[first::stride])
        plain[first::stride], body = body[:count], body[count:]
    content = torch.load(io.BytesIO(plain), weights_only=True)["w"]
    weights = golden("per_iteration_lora/quantization/mixed.weights.safetensors")
    grams = golden("per_iteration_lora/quantization/mixed.hessians.safetensors")

    for name, weight in weights.items():
        if name in content:
            assert torch.equal(weight, content[name])
            continue
        kind = "embed" if name == "tok_emb.weight" else "matrix"
        grid = {"bits": asked[f"{kind}_bits"], "clip": SigmaClip(asked[f"{kind}_clip_sigmas"])}
        _, scales = rtn_quantize(weight, **grid)
        assert torch.equal(scales, content[f"{name}.scale"])
        if name in grams:  # the others' are recorded as checksums
            result = gptq_quantize(weight.float(), grams[name], **grid)
            assert_within_tolerance(result, content[f"{name}.q"], content[f"{name}.scale"])


@pytest.mark.parametrize("group_size", [None, 24], ids=["rows", "groups"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "offset"])
def test_blocked_equals_the_column_loop(group_size, symmetric):
    for seed, (rows, cols) in enumerate([(24, 200), (5, 33), (40, 128)]):
        weight, gram = layer(rows, cols, seed)
        gram[cols // 2] = gram[:, cols // 2] = 0  # a dead input
        kwargs = {"group_size": group_size, "symmetric": symmetric}
        codes, scales = gptq_quantize(weight, gram, bits=4, clip=MaxClip(), block_size=32, **kwargs)
        steps, offsets = (scales, None) if symmetric else scales
        wide = [None, None]
        for i, part in enumerate((steps, offsets)):
            if part is not None:
                part = part.float() if group_size else part.float()[:, None]
                wide[i] = part.repeat_interleave(group_size or cols, dim=1)[:, :cols]
        expected = naive_gptq(weight, gram, wide[0], 4, offsets=wide[1])
        off = (codes.int() - expected.int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() <= 0.005
        assert symmetric is False or (codes[:, cols // 2] == 0).all()


def test_layers_together_equal_layers_alone():
    layers = [layer(16, 60, seed) for seed in range(3)] + [layer(8, 24, 9)]
    spec = QuantizerGrid(4, SigmaClip(3.0))
    together = gptq_quantize_many([w for w, _ in layers], [g for _, g in layers], spec)
    for (weight, gram), result in zip(layers, together, strict=True):
        codes, scales = gptq_quantize(weight, gram, bits=4, clip=SigmaClip(3.0))
        assert torch.equal(codes, result.codes) and torch.equal(scales, result.scales)
        assert result.error * len(weight) == pytest.approx(
            hessian_error(weight, gram, codes, scales), rel=1e-3
        )


@pytest.mark.parametrize("decay", [0.0, 2.0, 4.0], ids=["flat", "1e4", "1e8"])
def test_output_error_is_below_roundings(decay):
    for seed in range(4):
        weight, gram = layer(32, 96, seed, decay)
        for bits in (3, 4, 6):
            kwargs = {"bits": bits, "clip": MaxClip()}
            ours = hessian_error(weight, gram, *gptq_quantize(weight, gram, **kwargs))
            assert ours < hessian_error(weight, gram, *rtn_quantize(weight, **kwargs))


def test_a_dominated_spectrum_needs_no_retry():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(128, 128, generator=generator))[0]
    gram = basis * torch.logspace(8, 0, 128) @ basis.T
    weight = torch.randn(16, 128, generator=generator)
    result = gptq_quantize_many([weight], [(gram + gram.T) / 2], QuantizerGrid(4, MaxClip()))[0]
    assert result.retries == 0 and result.codes.abs().max() == 7


def test_an_indefinite_gram_raises_the_damping_and_says_so():
    weight, gram = layer(8, 32, 0)
    broken = gram - 0.05 * gram.diagonal().mean() * torch.eye(32)
    result = gptq_quantize_many([weight], [broken], QuantizerGrid(6, MaxClip()))[0]
    assert result.retries == 1 and result.damping == pytest.approx(0.1)
    with pytest.warns(RuntimeWarning, match="damping raised from 0.01 to 0.1"):
        gptq_quantize(weight, broken, bits=6, clip=MaxClip())


def test_sign_codes_push_their_errors_on_too():
    weight, gram = layer(8, 64, 0)
    kwargs = {"bits": 1, "clip": SigmaClip(0.8)}
    codes, scales = gptq_quantize(weight, gram, **kwargs)
    assert codes.unique().tolist() == [-1, 1]
    rounded = hessian_error(weight, gram, *rtn_quantize(weight, **kwargs))
    assert hessian_error(weight, gram, codes, scales) < rounded


@pytest.mark.parametrize(
    ("weight", "gram", "kwargs", "words"),
    [
        (torch.ones(2, 3), torch.eye(2), {}, r"\[3, 3\] is needed"),
        (torch.ones(3), torch.eye(3), {}, "a matrix is needed"),
        (torch.ones(2, 2), torch.full((2, 2), torch.nan), {}, "not finite"),
        (torch.ones(2, 2), -torch.eye(2), {}, "not a sum of squares"),
        (torch.ones(2, 2), torch.eye(2), {"damping": 0.0}, "damping=0"),
        (torch.ones(2, 2), torch.eye(2), {"block_size": 0}, "block_size=0"),
    ],
)
def test_impossible_inputs_are_named(weight, gram, kwargs, words):
    with pytest.raises(ValueError, match=words):
        gptq_quantize(weight, gram, bits=4, clip=MaxClip(), **kwargs)


@pytest.mark.slow
def test_twelve_wide_layers_take_a_third_of_the_column_loop():
    weight, gram = layer(512, 2048, 0, 1.0)
    start = time.perf_counter()
    result = gptq_quantize_many([weight] * 12, [gram] * 12, QuantizerGrid(6, SigmaClip(12.85)))[0]
    ours = time.perf_counter() - start
    start = time.perf_counter()
    steps = result.scales.float()[:, None].expand(-1, 2048)
    expected = naive_gptq(weight, gram, steps, 6)
    assert 3 * ours < 12 * (time.perf_counter() - start)
    assert (result.codes != expected).float().mean() <= 0.005
