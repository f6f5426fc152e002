"""Rounding against the recordings of three public systems and against plain arithmetic."""

import io
import re
import zlib
from pathlib import Path

import pytest
import torch

from recurgolf.config import ConfigError
from recurgolf.quant import (
    HessianSigmaClip,
    MaxClip,
    MeanAbsClip,
    MeanSigmaClamp,
    PercentileClip,
    PercentileSearchClip,
    QuantizerGrid,
    SigmaClip,
    dequantize,
    fake_quantize,
    rtn_quantize,
)

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def assert_same(result, codes, scales):
    assert torch.equal(result[0], codes) and result[0].dtype == codes.dtype
    assert torch.equal(result[1], scales) and result[1].dtype == scales.dtype


def baseline_int8(weight):
    matrix = weight.ndim == 2
    return rtn_quantize(
        weight,
        bits=8,
        clip=PercentileClip(99.99984),
        scale_floor="inv_qmax",
        code_scale="float32",
        vector_zero_scale=1.0,
        scale_dtype=torch.float16 if matrix else torch.float32,
    )


def mean_sigma(weight, bits, k):
    return rtn_quantize(
        weight,
        bits=bits,
        # Its 8-bit routine does not clamp vectors, its 6-bit one does.
        clip=MeanSigmaClamp(k, clamp_vectors=bits != 8),
        code_scale="float32",
        vector_zero_scale=1 / (2 ** (bits - 1) - 1),
        scale_dtype=torch.float16 if weight.ndim == 2 else torch.float32,
    )


def searched(weight, bits=6):
    return rtn_quantize(
        weight,
        bits=bits,
        clip=PercentileSearchClip(),
        scale_floor="inv_qmax",
        vector_zero_scale=1.0,
    )


def cases_of(recorded):
    """The part of every recorded name in front of `.q`."""
    return [key.removesuffix(".q") for key in recorded if key.endswith(".q")]


def bits_of(largest):
    """Bits of codes from -largest to largest."""
    bits = int(largest).bit_length() + 1
    assert 2 ** (bits - 1) - 1 == int(largest)
    return bits


def test_int8_equals_the_baseline_code_for_code(golden, quant_inputs):
    recorded = golden("baseline/quantization/int8_tensors.safetensors")
    assert set(cases_of(recorded)) == set(quant_inputs)
    for name, weight in quant_inputs.items():
        assert_same(baseline_int8(weight), recorded[f"{name}.q"], recorded[f"{name}.scale"])


def test_searched_grids_equal_universal_rank1_code_for_code(golden, quant_inputs):
    recorded = golden("universal_rank1/quantization/int6_per_row.safetensors")
    cases = cases_of(recorded)
    assert {case.split(".")[0] for case in cases} == set(quant_inputs)
    for case in cases:
        name, clip = case.split(".clip")
        result = searched(quant_inputs[name], bits_of(clip))
        assert_same(result, recorded[f"{case}.q"], recorded[f"{case}.scale"])


def test_mean_sigma_clamp_equals_parallel_recurrent_code_for_code(golden, quant_inputs):
    recorded = golden("parallel_recurrent/quantization/sdclip.safetensors")
    cases = cases_of(recorded)
    assert cases
    for case in cases:
        name, bits, k = case.split(".", 2)
        result = mean_sigma(
            quant_inputs[name], int(bits.removeprefix("int")), float(k.removeprefix("nstd"))
        )
        assert_same(result, recorded[f"{case}.q"], recorded[f"{case}.scale"])


def test_baseline_state_and_its_recorded_artifact_hold_our_codes(golden, formula_tensor):
    facts = golden("baseline/quantization/int8_state_dict.json")
    state = golden("baseline/quantization/int8_state_dict.input.safetensors")
    packed = (GOLDEN / "baseline/quantization/artifact.int8.ptz").read_bytes()
    content = torch.load(io.BytesIO(zlib.decompress(packed)), weights_only=True)
    for name, formula in facts["formula_inputs"].items():  # written out in words here
        shape, *factors = re.match(
            r"shape \[(.*?)\], .*element i = \(\(i\*(\d+)\) mod (\d+) - \d+\) / (\d+)", formula
        ).groups()
        state[name] = formula_tensor(map(int, shape.split(",")), *map(int, factors))
    assert content["quantized"]
    for name in content["quantized"]:
        codes, scales = baseline_int8(state[name])
        assert_same((codes, scales), content["quantized"][name], content["scales"][name])
        restored = dequantize(codes, scales).double()
        check = facts["roundtrip"][name]
        assert float(restored.norm()) == pytest.approx(check["l2"], rel=1e-6)
    for name, kept in content["passthrough"].items():
        assert torch.equal(state[name].to(kept.dtype), kept)


def test_parallel_recurrent_state_holds_our_codes(golden, formula_tensor):
    facts = golden("parallel_recurrent/quantization/state_dict.json")
    state = golden("parallel_recurrent/quantization/state_dict.input.safetensors")
    recorded = golden("parallel_recurrent/quantization/state_dict.quantized.safetensors")
    for name, formula in facts["formula_inputs"].items():
        state[name] = formula_tensor(**formula)
    for name, meta in facts["qmeta"].items():
        result = mean_sigma(state[name], meta["bits"], facts["sdclip_nstd"])
        assert_same(result, recorded[f"quantized.{name}"], recorded[f"scales.{name}"])


def test_universal_rank1_state_holds_our_codes(golden, formula_tensor):
    facts = golden("universal_rank1/quantization/mixed.json")
    recorded = golden("universal_rank1/quantization/mixed.quantized.safetensors")
    solved = golden("universal_rank1/quantization/mixed.input.safetensors")  # by GPTQ: test_gptq
    inputs = {name: formula_tensor(**f) for name, f in facts["formula_inputs"].items()}
    rounded = [name for name in cases_of(recorded) if f"hessian.{name}" not in solved]
    assert rounded
    routines = {"int6": searched, "int8": baseline_int8}
    for name in rounded:
        result = routines[facts["meta"][name]["type"]](inputs[name])
        assert_same(result, recorded[f"{name}.q"], recorded[f"{name}.scale"])


def test_straight_through_layer_equals_universal_rank1(golden):
    recorded = golden("universal_rank1/quantization/fake_quant_linear.safetensors")
    spec = QuantizerGrid(6, MaxClip(), scale_floor="inv_qmax", scale_dtype=torch.float32)
    layers = [name.removesuffix(".weight") for name in recorded if name.endswith(".weight")]
    for i in layers:
        weight = recorded[f"{i}.weight"].clone().requires_grad_()
        x = recorded[f"{i}.x"].clone().requires_grad_()
        y = x @ fake_quantize(weight, spec).T
        y.backward(recorded[f"{i}.grad_output"])
        for ours, name in ((y, "y"), (weight.grad, "grad_weight"), (x.grad, "grad_x")):
            expected = recorded[f"{i}.qat.{name}"]
            torch.testing.assert_close(ours.detach(), expected, atol=1e-5, rtol=1e-5)


CLIPS = [
    MaxClip(),
    PercentileClip(99.0),
    SigmaClip(4.0),
    PercentileSearchClip(),
    MeanSigmaClamp(3.0),
    HessianSigmaClip(4.0),
    MeanAbsClip(3.0),
]


def plain_rounding(weight, codes, scales, bits, symmetric, group_size):
    """Error of every weight and half its step, by loops in float64."""
    errors, limits = [], []
    for row in range(weight.shape[0]):
        for col in range(weight.shape[1]):
            at = (row,) if group_size is None else (row, col // group_size)
            step = float(scales[at] if symmetric else scales[(0, *at)])
            offset = 0.0 if symmetric else float(scales[(1, *at)])
            value = float(codes[row, col]) * step + offset
            low = -(2 ** (bits - 1)) + symmetric
            reach = (low * step + offset, (2 ** (bits - 1) - 1) * step + offset)
            inside = min(max(float(weight[row, col]), reach[0]), reach[1])
            errors.append(abs(value - inside))
            limits.append(step / 2)
    return torch.tensor(errors), torch.tensor(limits)


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: type(clip).kind)
@pytest.mark.parametrize("group_size", [None, 5], ids=["rows", "groups"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "offset"])
def test_codes_are_the_nearest_within_reach(clip, group_size, symmetric):
    weight = torch.randn(6, 13, generator=torch.Generator().manual_seed(3))
    for bits in (2, 4, 7):
        codes, scales = rtn_quantize(
            weight, bits=bits, clip=clip, group_size=group_size, symmetric=symmetric
        )
        if not isinstance(clip, MeanSigmaClamp):  # that one moves the weights first
            errors, limits = plain_rounding(weight, codes, scales, bits, symmetric, group_size)
            assert (errors <= limits * 1.001 + 1e-7).all()
        restored = dequantize(codes, scales, group_size=group_size, symmetric=symmetric)
        assert restored.shape == weight.shape and codes.dtype == torch.int8


def test_more_bits_and_smaller_groups_lose_less():
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(0))

    def loss(bits, **kwargs):
        codes, scales = rtn_quantize(weight, bits=bits, clip=MaxClip(), **kwargs)
        return float((dequantize(codes, scales, **kwargs) - weight).square().mean())

    losses = [loss(bits) for bits in range(2, 9)]
    assert losses == sorted(losses, reverse=True)
    assert loss(4, group_size=16) < loss(4, group_size=48) < loss(4)
    shifted = weight + 3
    codes, scales = rtn_quantize(shifted, bits=4, clip=MaxClip(), symmetric=False)
    with_offset = (dequantize(codes, scales, symmetric=False) - shifted).square().mean()
    codes, scales = rtn_quantize(shifted, bits=4, clip=MaxClip())
    assert with_offset < 0.5 * (dequantize(codes, scales) - shifted).square().mean()


def test_one_bit_is_the_sign_and_two_are_ternary():
    weight = torch.randn(8, 50, generator=torch.Generator().manual_seed(1))
    codes, scales = rtn_quantize(weight, bits=1, clip=MeanAbsClip())
    assert torch.equal(codes.float(), weight.sign())
    torch.testing.assert_close(scales, weight.abs().mean(dim=1).half())
    codes, _ = rtn_quantize(weight, bits=2, clip=MeanAbsClip())
    assert codes.unique().tolist() == [-1, 0, 1]


@pytest.mark.parametrize("clip", CLIPS, ids=lambda clip: type(clip).kind)
def test_degenerate_rows_survive(clip):
    weight = torch.zeros(4, 8)
    weight[1] = 0.7
    weight[2, 3] = 1e-9  # below float16
    codes, scales = rtn_quantize(weight, bits=6, clip=clip)
    restored = dequantize(codes, scales)
    assert torch.equal(restored[0], weight[0]) and torch.equal(restored[3], weight[3])
    half = max(float(scales[1]) / 2, 1e-3) if isinstance(clip, MeanAbsClip) else 1e-3
    torch.testing.assert_close(restored[1], weight[1], rtol=0, atol=half)
    for shape in ((0, 7), (5, 0), (3, 1), ()):
        codes, scales = rtn_quantize(torch.ones(shape), bits=6, clip=clip)
        assert dequantize(codes, scales).shape == shape


def test_noise_stays_within_half_a_step_and_is_fresh():
    weight = torch.randn(16, 40, generator=torch.Generator().manual_seed(2), requires_grad=True)
    for symmetric in (True, False):
        spec = QuantizerGrid(4, SigmaClip(3.0), group_size=10, symmetric=symmetric)
        codes, scales = rtn_quantize(
            weight, bits=4, clip=SigmaClip(3.0), group_size=10, symmetric=symmetric
        )
        steps = (scales if symmetric else scales[0]).float().repeat_interleave(10, dim=1)
        first, second = (fake_quantize(weight, spec, "noise") for _ in range(2))
        assert ((first - weight).abs() <= steps / 2 + 1e-6).all()
        assert not torch.equal(first, second)
        assert (first - weight).abs().max() > 0.3 * steps.max()
        exported = dequantize(codes, scales, group_size=10, symmetric=symmetric)
        torch.testing.assert_close(fake_quantize(weight, spec), exported, atol=1e-6, rtol=0)
    fake_quantize(weight, QuantizerGrid(4), "noise").sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"bits": 9}, "bits=9"),
        ({"bits": 0}, "bits=0"),
        ({"bits": 6, "group_size": 0}, "group_size=0"),
        ({"bits": 6, "scale_floor": "yes"}, "scale_floor='yes'"),
    ],
)
def test_impossible_grids_are_named(kwargs, words):
    with pytest.raises(ConfigError, match=words):
        rtn_quantize(torch.ones(2, 2), **{"clip": MaxClip(), **kwargs})


def test_weights_that_no_scale_can_hold_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        rtn_quantize(torch.tensor([[1.0, float("nan")]]), bits=6, clip=MaxClip())
    with pytest.raises(ValueError, match="beyond float16"):
        rtn_quantize(torch.tensor([[1e8, 1.0]]), bits=6, clip=MaxClip())


@pytest.mark.parametrize("clip", [12.85, SigmaClip, "max"])
def test_a_clip_that_is_no_clip_object_is_named(clip):
    with pytest.raises(ConfigError, match=r"clip=.*as in SigmaClip\(12.85\)"):
        rtn_quantize(torch.ones(2, 3), bits=6, clip=clip)
