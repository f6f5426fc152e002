"""The container: what goes in comes out, in the same bytes, and no damage goes unnoticed."""

import hashlib
import itertools
import json
import random
import tracemalloc
import zlib

import brotli
import pytest
import torch

from recurgolf.artifact import (
    ArtifactError,
    BestCodec,
    BrotliCodec,
    StoreCodec,
    ZlibCodec,
    load,
    pack,
    pack_bytes,
)
from recurgolf.artifact.reader import PREFIX
from recurgolf.config import REGISTRY
from recurgolf.quant import Int6, NoQuant, Quant, QuantizedTensor, Rule, quantize_state

METADATA = {"model": {"dim": 64, "lr": 0.1, "name": "größer"}, "tokenizer": "ab12", "seeds": [1, 2]}


def build_state(rules=None):
    generator = torch.Generator().manual_seed(0)
    state = {
        f"blocks.{i}.{name}.weight": torch.randn(shape, generator=generator) * 0.1
        for i in range(2)
        for name, shape in (("up_proj", (256, 64)), ("down_proj", (64, 256)), ("q", (64, 64)))
    }
    state |= {
        "embed.weight": torch.randn(300, 64, generator=generator),
        "blocks.0.resid_mix": torch.rand(2, 64, generator=generator),
        "gain": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "steps": torch.tensor([2**40, -1]),
        "mask": torch.tensor([True, False, True]),
    }
    quant = Int6(keep_float_max_numel=0) if rules is None else Quant(rules, 0)
    assigned = quant.assign({name: tuple(tensor.shape) for name, tensor in state.items()})
    return quantize_state(state, assigned)


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        other = theirs[name]
        if isinstance(value, QuantizedTensor):
            assert torch.equal(value.codes, other.codes) and value.codes.dtype == other.codes.dtype
            assert torch.equal(value.scales, other.scales)
            assert torch.equal(value.dequantize(), other.dequantize())
            assert (value.bits, value.method, value.clip) == (other.bits, other.method, other.clip)
        else:
            assert value.dtype == other.dtype and torch.equal(value, other)


@pytest.mark.parametrize("kind", sorted(REGISTRY["artifact/codec"]))
def test_what_goes_in_comes_out(kind, tmp_path):
    pytest.importorskip({"zstd": "zstandard"}.get(kind, "zlib"))
    state = build_state()
    table = pack(tmp_path / "a.bin", METADATA, state, REGISTRY["artifact/codec"][kind]())
    artifact = load(tmp_path / "a.bin")
    assert artifact.metadata == METADATA
    assert_same(state, artifact.tensors)
    assert table.total_bytes == (tmp_path / "a.bin").stat().st_size


@pytest.mark.parametrize(
    "rules",
    [
        [Rule(bits=4, group_size=48, clip={"kind": "sigma", "k": 3.0})],
        [Rule(bits=5, symmetric=False)],
        [Rule(bits=3, symmetric=False, group_size=100)],
        [Rule(bits=1, clip={"kind": "mean_abs"})],
        [
            Rule("embed*", bits=2, clip={"kind": "mean_abs"}),
            Rule("*", "none", keep_dtype="bfloat16"),
        ],
        NoQuant().rules,
    ],
    ids=["groups", "offset", "offset-groups", "sign", "ternary", "floats"],
)
def test_every_way_of_storing_comes_back(rules, tmp_path):
    state = build_state(rules)
    pack(tmp_path / "a.bin", {}, state)
    assert_same(state, load(tmp_path / "a.bin").tensors)


def test_same_weights_give_same_bytes_in_any_order():
    state = build_state()
    data, _ = pack_bytes(METADATA, state)
    assert data == pack_bytes(METADATA, build_state())[0]
    backwards = dict(reversed(list(state.items())))
    assert data == pack_bytes(dict(reversed(list(METADATA.items()))), backwards)[0]


def test_table_adds_up_to_the_file():
    state = build_state()
    data, table = pack_bytes(METADATA, state, BestCodec(codecs=["brotli", "zlib"]))
    assert len(data) == table.header_bytes + sum(row.stored_bytes for row in table.sections)
    assert sum(table.tensors.values()) == pytest.approx(len(data) - table.header_bytes)
    assert set(table.tensors) == set(state)
    codes = [row for row in table.sections if row.entropy_bytes is not None]
    assert [row.title for row in codes] == ["codes 6", "codes 8"]
    for row in codes:
        assert 0.99 * row.entropy_bytes < row.stored_bytes < row.raw_bytes == row.num_entries
    assert f"{len(data):,}" in table.render()


def test_header_of_a_small_model_is_small():
    data, table = pack_bytes({}, build_state())
    # 12 tensors with names and shapes, four kinds of storage, seven sections, a checksum.
    assert table.header_bytes < 500
    assert len(data) < 150_000


def test_nothing_but_json_and_tensors_is_taken(tmp_path):
    with pytest.raises(ValueError, match="not JSON"):
        pack(tmp_path / "a.bin", {"x": object()}, {})
    with pytest.raises(ValueError, match="not JSON"):
        pack(tmp_path / "a.bin", {"x": float("nan")}, {})
    with pytest.raises(ValueError, match="complex64"):
        pack(tmp_path / "a.bin", {}, {"x": torch.zeros(2, dtype=torch.complex64)})
    assert not list(tmp_path.iterdir())
    pack(tmp_path / "a.bin", {"long": "x" * 100_000}, {})
    assert load(tmp_path / "a.bin").metadata["long"] == "x" * 100_000


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    """A file and the memory that reading it takes at its highest."""
    data, table = pack_bytes(METADATA, build_state())
    path = tmp_path_factory.mktemp("honest") / "a.bin"
    path.write_bytes(data)
    load(path)  # imports done
    _, peak = measured(path)
    return data, table, peak


def measured(path):
    tracemalloc.start()
    try:
        try:
            error = load(path) and None
        except ArtifactError as raised:
            error = raised
        return error, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def damage(data, table, rng):
    """One damaged copy: flipped bits, cut, grown, swapped or repeated pieces, lying lengths."""
    bad, kind = bytearray(data), rng.randrange(7)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 1, 8])):
            bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del bad[rng.randrange(len(bad)) :]
    elif kind == 2:
        bad += rng.randbytes(rng.randrange(1, 50))
    elif kind == 3:
        start = table.header_bytes - 8
        cuts = [start]
        for row in table.sections:
            cuts.append(cuts[-1] + row.stored_bytes)
        pieces = [bad[a:b] for a, b in itertools.pairwise(cuts)]
        i, j = rng.sample(range(len(pieces)), 2)
        pieces[i], pieces[j] = pieces[j], pieces[i]
        bad[start : cuts[-1]] = b"".join(pieces)
    elif kind == 4:
        at = rng.choice([6, 10, 14])
        bad[at : at + 4] = rng.choice([0, 1, 2**31, 2**32 - 1, rng.randrange(2**32)]).to_bytes(
            4, "little"
        )
    elif kind == 5:
        at, width = rng.randrange(len(bad)), rng.randrange(1, 400)
        bad[at : at + width] = rng.randbytes(len(bad[at : at + width]))
    else:
        at, width = rng.randrange(len(bad)), rng.randrange(1, 400)
        del bad[at : at + width]
    return bytes(bad)


def fuzz(honest, tmp_path, rounds):
    data, table, peak = honest
    rng = random.Random(0)
    path = tmp_path / "bad.bin"
    tried = 0
    while tried < rounds:
        bad = damage(data, table, rng)
        if bad == data:
            continue
        tried += 1
        path.write_bytes(bad)
        error, memory = measured(path)
        assert error is not None and str(error)
        assert memory <= 2 * peak


def test_300_damages_are_all_named(honest, tmp_path):
    fuzz(honest, tmp_path, 300)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_10000_damages_are_all_named(honest, tmp_path):
    fuzz(honest, tmp_path, 10_000)


def sealed(text, payloads=b""):
    """A file with this header and the right checksum."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = deflate.compress(text) + deflate.flush()
    size = PREFIX.size + len(packed) + len(payloads) + 8
    prefix = PREFIX.pack(b"RGLF", 1, 0, len(packed), len(text), size)
    body = prefix + packed + payloads
    return body + hashlib.blake2b(body, digest_size=8).digest()


def forge(change):
    """A file whose checksum is right and whose header lies: `change` edits it before sealing."""
    data, _ = pack_bytes({}, build_state(), ZlibCodec())
    codec, stored = PREFIX.unpack_from(data)[2:4]
    text = data[PREFIX.size : PREFIX.size + stored]
    header = json.loads(brotli.decompress(text) if codec == 1 else zlib.decompress(text, -15))
    payloads = data[PREFIX.size + stored : -8]
    payloads = change(header, payloads) or payloads
    return sealed(json.dumps(header).encode(), payloads)


def set_in(*path, value):
    def change(header, _):
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


def grow_codes(header, payloads):
    """Valid JSON, right sizes, codes beyond their bits."""
    for kind in header["kinds"]:
        if kind.get("bits") == 6:
            kind["bits"] = 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in("tensors", 0, 2, value=[2**40, 2**40]), "at most"),
        (set_in("tensors", 0, 2, value=[2**11, 2**11]), "were announced"),
        (set_in("tensors", 0, 2, value=[-1]), "shape .* not possible"),
        (set_in("tensors", 0, 2, value=[1.5]), "shape .* not possible"),
        (set_in("tensors", 0, 2, value=[1] * 99), "shape .* not possible"),
        (set_in("tensors", 0, 1, value=77), "kind 77"),
        (set_in("tensors", 0, value="x"), "is no tensor"),
        (set_in("tensors", value={}), "tensors is not a list"),
        (set_in("sections", value=[]), "0 sections for"),
        (set_in("sections", 0, 0, value="pickle"), "unknown codec 'pickle'"),
        (set_in("sections", 0, 1, value="reverse"), "unknown transform 'reverse'"),
        (set_in("sections", 0, 2, value=2**33), "more than the file has left"),
        (set_in("sections", 0, 2, value=5), "section 0"),
        (set_in("sections", 0, 3, value=5), "fail their checksum"),
        (set_in("kinds", 0, value={"dtype": "object"}), "no kind of storage"),
        (set_in("metadata", value=[]), "metadata is not an object"),
        (lambda header, _: header["tensors"].append(header["tensors"][0]), "same name"),
        (lambda _, payloads: payloads + b"more", "4 bytes that no section claims"),
        (lambda header, _: header.clear(), "kinds is not a list"),
        (grow_codes, "codes outside -1 to 1"),
    ],
)
def test_a_lying_header_is_named_without_believing_it(change, words, honest, tmp_path):
    path = tmp_path / "forged.bin"
    path.write_bytes(forge(change))
    error, memory = measured(path)
    assert error is not None
    with pytest.raises(ArtifactError, match=words):
        load(path)
    assert memory <= 2 * honest[2]


def test_the_forged_file_is_sound_but_for_its_lie(tmp_path):
    (tmp_path / "a.bin").write_bytes(forge(lambda header, payloads: None))
    assert_same(build_state(), load(tmp_path / "a.bin").tensors)


@pytest.mark.parametrize("codec", [ZlibCodec(), BrotliCodec()], ids=["zlib", "brotli"])
def test_a_bomb_stops_at_the_announced_size(codec, honest, tmp_path):
    bomb = codec.compress(bytes(2**24), [])

    def change(header, payloads):
        first = header["sections"][0]
        rest = payloads[first[2] :]
        first[0], first[2] = type(codec).kind, len(bomb)
        return bomb + rest

    path = tmp_path / "bomb.bin"
    path.write_bytes(forge(change))
    error, memory = measured(path)
    assert "the payload gives more" in str(error)
    assert memory <= 2 * honest[2]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "too few"),
        (b"\x80\x04." * 20, "no artifact"),
        (PREFIX.pack(b"RGLF", 9, 0, 0, 0, 0) + bytes(8), "format version 9"),
        (PREFIX.pack(b"RGLF", 1, 0, 0, 0, 99) + bytes(8), "says 99 bytes and has 26"),
    ],
)
def test_other_files_are_told_apart(data, words, tmp_path):
    (tmp_path / "a.bin").write_bytes(data)
    with pytest.raises(ArtifactError, match=words):
        load(tmp_path / "a.bin")


def test_a_deep_or_inflated_header_is_refused(tmp_path):
    noise = "".join(random.Random(0).choices("0123456789", k=200_000)).encode()
    (tmp_path / "deep.bin").write_bytes(sealed(b"[" * 90_000 + noise))
    with pytest.raises(ArtifactError, match="not JSON"):
        load(tmp_path / "deep.bin")
    (tmp_path / "bomb.bin").write_bytes(sealed(bytes(2**24)))
    with pytest.raises(ArtifactError, match="not possible"):
        load(tmp_path / "bomb.bin")


def test_a_codec_of_a_plugin_reads_and_writes(tmp_path):
    from recurgolf.artifact.decode import DECODERS
    from recurgolf.config import option

    @option("artifact/codec", "backwards")
    class Backwards(StoreCodec):
        def compress(self, data, segments):
            return data[::-1]

    DECODERS["backwards"] = lambda data, size, segments: data[::-1]
    try:
        state = build_state()
        pack(tmp_path / "a.bin", {}, state, Backwards())
        assert_same(state, load(tmp_path / "a.bin").tensors)
    finally:
        del REGISTRY["artifact/codec"]["backwards"], DECODERS["backwards"]
