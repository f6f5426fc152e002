"""Every codec and transform gives back what it got; entropy coding is as short as it should be."""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import recurgolf
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from recurgolf.artifact.ans import ans_payload
from recurgolf.artifact.codecs import (
    TRANSFORMS,
    AnsCodec,
    BestCodec,
    BrotliCodec,
    Codec,
    ZstdCodec,
    shuffle,
)
from recurgolf.artifact.decode import (
    DECODERS,
    decode_ans,
    frequencies,
    read_tables,
    segments_of,
    transformed_size,
    undo_transform,
    unshuffle,
)
from recurgolf.config import REGISTRY, ConfigError, from_dict, to_dict
from recurgolf.quant import SigmaClip, code_entropy, rtn_quantize

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"
KINDS = sorted(kind for kind in REGISTRY["artifact/codec"] if kind != "best")
OPTIONAL = {"zstd": "zstandard"}


def codec_of(kind, **fields):
    pytest.importorskip(OPTIONAL.get(kind, "zlib"))
    return REGISTRY["artifact/codec"][kind](**fields)


def decoded(encoded, shapes, itemsize):
    size = transformed_size(
        encoded.transform, itemsize * sum(int(np.prod(shape)) for shape in shapes)
    )
    segments = segments_of(encoded.transform, shapes, itemsize)
    data = DECODERS[encoded.codec](encoded.payload, size, segments)
    assert len(data) == size
    return undo_transform(encoded.transform, data, shapes, itemsize)


shape = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 40)),
    st.tuples(st.integers(0, 9), st.integers(0, 9)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)


@st.composite
def streams(draw):
    """Arrays of one type: empty, of one value, constant, random, of few values."""
    itemsize = draw(st.sampled_from([1, 2, 4, 8]))
    shapes = draw(st.lists(shape, max_size=4))
    size = itemsize * sum(int(np.prod(s)) for s in shapes)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0, 0.6, 3, 40, 1000]))
    values = np.round(rng.normal(draw(st.sampled_from([0, -128, 127])), spread, size))
    return values.astype(np.int64).astype(np.uint8).tobytes(), shapes, itemsize


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transform", sorted(TRANSFORMS))
def test_every_codec_and_transform_round_trips(kind, transform):
    codec = codec_of(kind, transform=transform)

    @settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @given(streams())
    def round_trips(stream):
        encoded = codec.encode(*stream)
        assert (encoded.codec, encoded.transform) == (kind, transform)
        assert decoded(encoded, *stream[1:]) == stream[0]

    round_trips()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8, torch.int64])
def test_same_tensors_give_same_bytes(kind, dtype):
    torch.manual_seed(0)
    raw = (torch.randn(30, 20) * 9).to(dtype).numpy().tobytes()
    stream = raw, [(30, 20)], dtype.itemsize
    codec = codec_of(kind)
    encoded = codec.encode(*stream)
    assert encoded == codec_of(kind).encode(*stream)
    assert decoded(encoded, *stream[1:]) == raw


def test_shuffle_equals_the_recorded_one():
    folder = GOLDEN / "per_iteration_lora/quantization"
    tensors = load_file(folder / "byte_shuffle.safetensors")
    for case in json.loads((folder / "byte_shuffle.json").read_text())["cases"]:
        before = tensors[f"{case['case']}.input"].numpy().tobytes()
        after = tensors[f"{case['case']}.output"].numpy().tobytes()
        if case["length"] >= case["stride"]:
            assert after[:5] == b"BSHF" + bytes([case["stride"]])
            assert shuffle(before, [], case["stride"]) == after[5:]
        assert unshuffle(shuffle(before, [], case["stride"]), case["stride"]) == before


def heavy_codes(rows, cols, k=6.0, seed=0):
    torch.manual_seed(seed)
    weight = torch.distributions.StudentT(6.0).sample((rows, cols))
    return rtn_quantize(weight, bits=6, clip=SigmaClip(k))[0]


def rans_decoded(payload, count):
    """Plain rANS with one table for all, a coder after the other, in Python's whole numbers."""
    info_size = int.from_bytes(payload[1:5], "little")
    assert payload[0] == 0, "one table for all"
    _, [(lowest, levels)] = read_tables(
        0, zlib.decompress(payload[5:][:info_size], -15), [(1, count)]
    )
    counts = [int(n) for n in frequencies(levels)]
    total, rest = sum(counts), payload[5 + info_size :]
    lanes = max(count // 8192, 1)
    states = [int.from_bytes(rest[4 * i : 4 * i + 4], "little") for i in range(lanes)]
    words = [int.from_bytes(rest[i : i + 2], "little") for i in range(4 * lanes, len(rest), 2)]
    found = []
    for place in range(count):
        state = states[place % lanes]
        slot, start = state % total, 0
        symbol = 0
        while slot >= start + counts[symbol]:
            start, symbol = start + counts[symbol], symbol + 1
        n = counts[symbol]
        found.append(lowest + symbol - 128)
        state = n * (state // total) + slot - start
        states[place % lanes] = state << 16 | words.pop(0) if state < 2**16 else state
    assert not words and states == [2**16] * lanes
    return found


@pytest.mark.parametrize(("count", "spread"), [(1, 3.0), (40, 0.4), (1000, 9.0), (30_000, 1.5)])
def test_ans_is_the_rans_of_the_paper(count, spread):
    codes = np.random.default_rng(count).normal(0, spread, count).round().astype(np.int8)
    payload = ans_payload(codes.view(np.uint8) + np.uint8(128), [(1, count)])
    assert rans_decoded(payload, count) == codes.tolist()


def test_ans_codes_rows_whose_sizes_leave_classes_empty():
    codes = (
        np.random.default_rng(0).normal(0, 1, (64, 400)) * np.tile([[0.4], [30.0]], (32, 1))
    ).round()
    raw = codes.clip(-127, 127).astype(np.int8).tobytes()
    encoded = AnsCodec().encode(raw, [(64, 400)], 1)
    assert encoded.payload[0] >= 2, "classes by row"
    assert decoded(encoded, [(64, 400)], 1) == raw


@pytest.mark.parametrize("damage", ["cut", "longer", "state"])
def test_a_damaged_stream_is_refused_and_not_decoded(damage):
    codes = np.random.default_rng(0).normal(0, 2, 5000).round().astype(np.int8)
    payload = AnsCodec().compress(codes.tobytes(), [(1, 5000)])
    info = int.from_bytes(payload[1:5], "little")
    changed = bytearray(payload)
    changed[7 + info] ^= 1
    broken = {"cut": payload[:-2], "longer": payload + b"ab", "state": bytes(changed)}[damage]
    with pytest.raises(ValueError):
        decode_ans(broken, 5000, [(1, 5000)])


def test_ans_is_within_a_third_of_a_percent_of_entropy_and_below_brotli():
    tensors = [heavy_codes(512, 256, seed=1), heavy_codes(256, 512, 12.85, seed=2)]
    shapes = [tuple(codes.shape) for codes in tensors]
    raw = b"".join(codes.numpy().tobytes() for codes in tensors)
    bound = sum(code_entropy(codes) * codes.numel() / 8 for codes in tensors)
    ours = len(AnsCodec().encode(raw, shapes, 1).payload)
    assert bound < ours < 1.003 * bound
    assert ours < len(BrotliCodec(transform="best").encode(raw, shapes, 1).payload)


def test_ans_profits_from_rows_and_columns_of_different_size():
    torch.manual_seed(0)
    by_row, by_column = torch.rand(400, 1).mul(3).exp(), torch.rand(1, 300).mul(2).exp()
    spreads = [by_row, by_row * by_column]
    lengths = []
    for spread in spreads:
        codes = (torch.randn(400, 300) * spread / 2).round().clamp(-127, 127).to(torch.int8)
        encoded = AnsCodec().encode(codes.numpy().tobytes(), [(400, 300)], 1)
        assert decoded(encoded, [(400, 300)], 1) == codes.numpy().tobytes()
        # What entries would take if the size of each were known: h(N(0, s)) = log2(4.133 s).
        known = float((4.133 * (spread / 2).expand(400, 300)).log2().sum()) / 8
        assert len(encoded.payload) < 0.95 * code_entropy(codes) * codes.numel() / 8
        lengths.append(len(encoded.payload) / known)
    assert max(lengths) < 1.03


def test_best_keeps_the_smallest_of_all_it_tried():
    codec = BestCodec(codecs=["zlib", "lzma", "none"])
    codes = heavy_codes(64, 64)
    encoded = codec.encode(codes.numpy().tobytes(), [(64, 64)], 1)
    sizes = {attempt[:2]: attempt[2] for attempt in encoded.tried}
    assert len(sizes) == 3 * len(TRANSFORMS)
    assert len(encoded.payload) == min(sizes.values())
    assert sizes[encoded.codec, encoded.transform] == len(encoded.payload)
    assert decoded(encoded, [(64, 64)], 1) == codes.numpy().tobytes()


@pytest.mark.parametrize("kind", sorted(REGISTRY["artifact/codec"]))
def test_options_round_trip(kind):
    codec = REGISTRY["artifact/codec"][kind]()
    assert from_dict(Codec, to_dict(codec)) == codec


def test_a_missing_library_is_said_at_the_choice(monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for codec in (ZstdCodec(), BestCodec(codecs=["zlib", "zstd"])):
        with pytest.raises(ConfigError, match="pip install zstandard"):
            codec.check()


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        (lambda: BrotliCodec(transform="shufle"), "'shufle'.* .did you mean 'shuffle'"),
        (lambda: BestCodec(codecs=["brotly"]), "'brotly' .did you mean 'brotli'"),
    ],
)
def test_impossible_choices_are_named(codec, words):
    with pytest.raises(ConfigError, match=words):
        codec().check()


def test_a_group_written_with_dots_is_told_its_name(tmp_path):
    why = recurgolf("artifact.codec=best", cwd=tmp_path).refused()
    assert "write artifact/codec=best" in why
