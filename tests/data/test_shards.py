"""Shards: the format, its checks, and the stream over several."""

import os
import time

import numpy as np
import pytest

from recurgolf.data.cache import remembered
from recurgolf.data.shard_fingerprints import check_unchanged, fingerprints
from recurgolf.data.shards import (
    DataChanged,
    DataError,
    TokenStream,
    count_tokens,
    find_shards,
    find_sidecars,
    read_shard,
    write_shard,
)


def test_recorded_shard_is_written_back_byte_for_byte(recorded, tmp_path):
    for source in sorted((recorded / "shards").glob("*.bin")):
        write_shard(tmp_path / source.name, read_shard(source))
        assert (tmp_path / source.name).read_bytes() == source.read_bytes()


def test_header_is_what_the_challenge_expects(tmp_path):
    write_shard(tmp_path / "x.bin", np.array([1, 65535, 7], dtype=np.uint16))
    data = (tmp_path / "x.bin").read_bytes()
    assert np.frombuffer(data[:1024], "<i4").tolist() == [20240520, 1, 3] + [0] * 253
    assert data[1024:] == b"\x01\x00\xff\xff\x07\x00"


def corrupted(data: bytes, word: int, value: int) -> bytes:
    header = np.frombuffer(data[:1024], "<i4").copy()
    header[word] = value
    return header.tobytes() + data[1024:]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: corrupted(data, 0, 20240521), "magic number 20240521, expected 20240520"),
        (lambda data: corrupted(data, 1, 2), "version 2, expected 1"),
        (lambda data: data[:-1], "truncated: 1223 bytes, expected 1224 for the 100 tokens"),
        (lambda data: data + b"\0", "trailing bytes: 1225 bytes, expected 1224"),
        (lambda data: data[:700], "700 bytes, but a shard begins with a header of 1024"),
        (lambda data: corrupted(data, 2, -1), "expected 1022 for the -1 tokens"),
    ],
    ids=["magic", "version", "truncated", "trailing", "headerless", "negative"],
)
def test_damaged_shard_is_refused_with_path_found_and_expected(tmp_path, damage, message):
    path = tmp_path / "fineweb_val_000000.bin"
    write_shard(path, np.arange(100, dtype=np.uint16))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)


def test_missing_shard_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"gone\.bin: cannot read this shard \(No such file"):
        count_tokens(tmp_path / "gone.bin")


def test_byte_sidecars_are_not_taken_for_tokens(tmp_path):
    names = ["fineweb_val_000001.bin", "fineweb_val_000000.bin", "fineweb_val_bytes_000000.bin"]
    for name in [*names, "fineweb_train_000000.bin"]:
        write_shard(tmp_path / name, np.zeros(3, dtype=np.uint16))
    assert [p.name for p in find_shards(tmp_path, "val")] == sorted(names[:2])
    assert [p.name for p in find_sidecars(tmp_path, "val")] == names[2:]


def test_stream_reads_like_one_array_that_repeats(tmp_path):
    whole = np.arange(41, dtype=np.uint16)
    paths = []
    for n, part in enumerate(np.split(whole, [13, 13, 20])):  # one shard is empty
        paths.append(tmp_path / f"{n}.bin")
        write_shard(paths[-1], part)
    stream = TokenStream(paths)
    endless = np.tile(whole, 4)
    assert stream.num_tokens == 41
    for start in range(41):
        for count in (0, 1, 7, 41, 100):
            assert np.array_equal(stream.read(start, count), endless[start : start + count])


def test_a_shard_that_is_cut_while_it_is_open_is_named(tmp_path):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.arange(5000, dtype=np.uint16))
    stream = TokenStream([path])
    assert stream.read(4000, 10).tolist() == list(range(4000, 4010))
    os.truncate(path, 1024 + 2 * 4005)
    assert stream.read(3990, 10).tolist() == list(range(3990, 4000))
    with pytest.raises(DataChanged, match=r"000000\.bin has 9,034 bytes instead of 11,024"):
        stream.read(4000, 10)


@pytest.mark.parametrize("change", ["overwritten", "cut", "gone", "same size and time"])
def test_a_file_that_changes_is_named(tmp_path, own_cache, change):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.arange(5000, dtype=np.uint16))
    before = fingerprints([path])
    assert before[path].largest == 4999
    time.sleep(0.01)  # a time of its own
    if change == "gone":
        path.unlink()
    elif change == "cut":
        os.truncate(path, 2000)
    else:
        write_shard(path, np.arange(5000, dtype=np.uint16)[::-1])
    if change == "same size and time":
        os.utime(path, ns=(before[path].modified, before[path].modified))
    words = {"gone": "is gone", "cut": "has 2,000 bytes instead of 11,024"}
    with pytest.raises(DataChanged, match=words.get(change, "was written again")):
        check_unchanged(before)


def test_a_file_that_is_only_touched_or_copied_is_the_same(tmp_path, own_cache):
    path = tmp_path / "fineweb_train_000000.bin"
    write_shard(path, np.arange(5000, dtype=np.uint16))
    before = fingerprints([path])
    os.utime(path, ns=(1, 1))
    check_unchanged(before)
    path.write_bytes(path.read_bytes())
    check_unchanged(before)


def test_a_note_in_the_cache_is_believed_only_with_its_checksum(own_cache):
    calls = []
    find = lambda: calls.append(1) or [1, 2]  # noqa: E731
    assert remembered("key", find) == remembered("key", find) == [1, 2]
    assert len(calls) == 1
    (note,) = (own_cache / "checked").iterdir()
    for damage in (
        '{"found": [7, 8]}',
        note.read_text().replace("[1, 2]", "[7, 8]"),
        "",
        "[" * 9**5,
    ):
        note.write_text(damage)
        assert remembered("key", find) == [1, 2]
    assert len(calls) == 5
