"""Tokenizers: recorded encodings, training, and the traps of both."""

import hashlib
import json

import numpy as np
import pytest
import sentencepiece

from recurgolf.data.shards import DataError, read_shard
from recurgolf.data.tokenizer import (
    PureByteTokenizer,
    SentencePieceTokenizer,
    chunks,
    read_tokenizer,
    train_tokenizer,
    trainer_inputs,
)


def test_recorded_examples_encode_and_decode_as_recorded(recorded):
    facts = json.loads((recorded / "data.json").read_text())
    tokenizer = read_tokenizer(recorded / "tokenizer.model")
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (facts["vocab_size"], facts["bos_id"])
    examples = facts["encode_examples"]
    for example, ids in zip(examples, tokenizer.encode([e["text"] for e in examples]), strict=True):
        assert ids.dtype == np.uint16
        assert ids.tolist() == [facts["bos_id"], *example["ids"]]
        assert tokenizer.decode([ids]) == [example["decoded"]]


def test_hash_is_the_files(recorded):
    path = recorded / "tokenizer.model"
    assert read_tokenizer(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_vocab_file_is_the_recorded_one(recorded_export):
    tokenizer = SentencePieceTokenizer(recorded_export / "tokenizers" / "fineweb_1024_bpe.model")
    expected = (recorded_export / "tokenizers" / "fineweb_1024_bpe.vocab").read_text("utf-8")
    assert tokenizer.vocab_lines() == expected


def test_pure_byte_ids_are_the_utf8_bytes(recorded_export):
    tokenizer = read_tokenizer(recorded_export / "tokenizers" / "fineweb_pure_byte_260.json")
    assert isinstance(tokenizer, PureByteTokenizer)
    texts = ["", "  a\n", "café 😀\0"]
    encoded = tokenizer.encode(texts)
    assert [ids.tolist() for ids in encoded] == [[1, *(b + 4 for b in t.encode())] for t in texts]
    assert tokenizer.decode(encoded) == texts


def test_training_twice_gives_the_same_bytes():
    texts = [f"the quick brown fox number {n} jumps over the lazy dog" for n in range(50)]
    assert train_tokenizer(texts, 320) == train_tokenizer(texts, 320)


def test_trained_tokenizer_has_the_challenges_layout(tmp_path):
    path = tmp_path / "t.model"
    path.write_bytes(train_tokenizer(["some words 123 and some more words"] * 9, 300))
    model = sentencepiece.SentencePieceProcessor(str(path))
    assert [model.id_to_piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert [model.is_byte(i) for i in range(3, 261)] == [False] + [True] * 256 + [False]
    assert read_tokenizer(path).decode(read_tokenizer(path).encode(["Ωmega 17"])) == ["Ωmega 17"]


def test_documents_too_long_for_the_trainer_are_learned_from(tmp_path):
    # One document of 60,000 bytes whose only frequent word the trainer can learn nowhere else.
    long = "zyzzyva " * 7500
    path = tmp_path / "t.model"
    path.write_bytes(train_tokenizer([long, "abc abd"], 280))
    assert any("yzz" in piece.text for piece in read_tokenizer(path).pieces())


def test_documents_within_the_limit_are_fed_whole():
    documents = ["x" * 4192, "  a\0b  ", "é" * 2096]
    assert list(trainer_inputs(documents)) == ["x" * 4192, "a b", "é" * 2096]


@pytest.mark.parametrize(
    "text",
    ["word " * 3000, "é" * 5000, "😀 " + "漢" * 4000, "a" * 4001 + "\n" + "b" * 3999],
    ids=["words", "unbroken", "cjk", "lines"],
)
def test_chunks_are_short_and_lose_only_white_space(text):
    parts = list(chunks(text, 4000))
    assert all(len(part.encode()) <= 4000 for part in parts)
    assert "".join("".join(parts).split()) == "".join(text.split())


def test_words_are_cut_only_where_there_is_no_space():
    assert set(" ".join(chunks("word " * 3000, 4000)).split()) == {"word"}


def test_vocabulary_too_small_for_the_characters_is_refused():
    with pytest.raises(DataError, match=r"no tokenizer of 262 pieces .* 262 vs 27\d"):
        train_tokenizer(["hello world, this is tiny"], 262)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.model", None, "no such tokenizer file"),
        ("bad.model", b"not a model", "not a SentencePiece model"),
        ("empty.model", b"", "or an empty one"),
        ("bad.json", b"{}", "not a pure-byte tokenizer"),
        ("odd.json", b'{"vocab_size":300,"config":{"bos_id":1,"byte_offset":4}}', "do not fit"),
        ("t.txt", b"pieces", "ends in .model or .json"),
    ],
)
def test_unusable_tokenizer_file_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_tokenizer(tmp_path / name)


def test_recorded_shards_decode_to_their_documents(recorded):
    facts = json.loads((recorded / "data.json").read_text())
    tokenizer = read_tokenizer(recorded / "tokenizer.model")
    shards = sorted((recorded / "shards").glob("fineweb_val_*.bin"))
    tokens = np.concatenate([read_shard(path) for path in shards])
    documents = np.split(tokens, np.flatnonzero(tokens == 1))[1:]
    lengths = [len(text.encode()) for text in tokenizer.decode(documents)]
    assert lengths == facts["val_true_utf8_bytes_per_document"]
