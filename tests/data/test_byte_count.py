"""Bytes per token: the recorded tables, and equality with the decoded text for any text."""

import io
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2

from recurgolf.data.byte_count import ByteCount, check_texts, split_documents
from recurgolf.data.shards import DataError, find_shards, read_shard
from recurgolf.data.tokenizer import SPACE, Piece, PieceKind, Tokenizer, read_tokenizer

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures" / "golden"
TOKENIZERS = [
    FIXTURES / "data" / "tokenizer.model",
    FIXTURES / "export" / "tokenizers" / "fineweb_1024_bpe.model",
    FIXTURES / "export" / "tokenizers" / "fineweb_pure_byte_260.json",
]


def recorded_validation(recorded) -> np.ndarray:
    return np.concatenate([read_shard(path) for path in find_shards(recorded / "shards", "val")])


@pytest.mark.parametrize("prefix", ["", "padded."])
def test_tables_are_the_recorded_ones(recorded, prefix):
    tables = load_file(recorded / "luts.safetensors")
    model_vocab = len(tables[f"{prefix}base_bytes"]) if prefix else None
    ours = ByteCount.of(read_tokenizer(recorded / "tokenizer.model"), model_vocab)
    for name in ("base_bytes", "has_leading_space", "is_boundary"):
        table, expected = getattr(ours, name), tables[prefix + name]
        assert table.dtype == (torch.int16 if name == "base_bytes" else torch.bool)
        assert torch.equal(table.to(expected.dtype), expected)


def test_recorded_byte_counts_come_out_per_document_and_in_all(recorded):
    facts = json.loads((recorded / "data.json").read_text())
    tokenizer = read_tokenizer(recorded / "tokenizer.model")
    byte_count = ByteCount.of(tokenizer)
    tokens = recorded_validation(recorded)
    documents = split_documents(tokens, tokenizer.bos_id)
    assert [byte_count.total(d) for d in documents] == facts["val_lut_bytes_per_document"]
    assert byte_count.check(tokens, tokenizer) == facts["val_true_utf8_bytes_total"]
    ids = torch.from_numpy(tokens.astype(np.int64))
    counts = byte_count.count(ids[1:], ids[:-1])
    assert counts.dtype == torch.int64
    assert int(counts.sum()) == facts["val_lut_bytes_all_targets"]


def test_counts_keep_the_shape_of_the_targets(recorded):
    byte_count = ByteCount.of(read_tokenizer(recorded / "tokenizer.model"))
    ids = torch.from_numpy(recorded_validation(recorded)[:97].astype(np.int64))
    flat = byte_count.count(ids[1:], ids[:-1])
    assert torch.equal(byte_count.count(ids[1:].view(8, 12), ids[:-1].view(8, 12)).view(-1), flat)


texts = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from(" \n\t\u2581\0\u200b\u00a0éñ漢😀½™19"),
        st.sampled_from("abcde the"),
    ),
    max_size=40,
)


@pytest.mark.parametrize("path", TOKENIZERS, ids=lambda path: path.name)
def test_total_is_the_utf8_length_of_the_decoded_text(path):
    tokenizer = read_tokenizer(path)
    byte_count = ByteCount.of(tokenizer)

    @settings(max_examples=300, deadline=None, database=None)
    @given(st.lists(texts, min_size=1, max_size=4))
    def holds(documents):
        encoded = tokenizer.encode(documents)
        decoded = sum(len(tokenizer.decode([ids])[0].encode()) for ids in encoded)
        assert byte_count.total(np.concatenate(encoded)) == decoded

    holds()


def test_total_does_not_depend_on_how_much_is_counted_at_once(recorded, monkeypatch):
    byte_count = ByteCount.of(read_tokenizer(recorded / "tokenizer.model"))
    tokens = recorded_validation(recorded)
    whole = byte_count.total(tokens)
    for at_once in (1, 7, len(tokens) - 1):
        monkeypatch.setattr("recurgolf.data.byte_count._TOKENS_AT_ONCE", at_once)
        assert byte_count.total(tokens) == whole


def test_tokens_of_another_tokenizer_are_refused(recorded, recorded_export):
    other = read_tokenizer(recorded_export / "tokenizers" / "fineweb_1024_bpe.model")
    path = recorded / "tokenizer.model"
    tokens = np.concatenate(read_tokenizer(path).encode(["Of another tokenizer, café."]))
    wrong = ByteCount.of(read_tokenizer(path))
    with pytest.raises(DataError, match=r"counts \d+ bytes .* decoded text has \d+"):
        wrong.check(tokens, other)


class InnerSpace(Tokenizer):
    """A vocabulary as from training with split_by_whitespace=false."""

    path = TOKENIZERS[0]
    vocab_size = 3

    def pieces(self) -> list[Piece]:
        kinds = (PieceKind.SPECIAL, PieceKind.TEXT, PieceKind.TEXT)
        return [
            Piece(kind, text) for kind, text in zip(kinds, ("<s>", "▁of", "▁of▁the"), strict=True)
        ]


def test_piece_with_an_inner_space_is_refused_by_name():
    with pytest.raises(DataError, match="piece 2 '▁of▁the' has a space"):
        ByteCount.of(InnerSpace())


TRAINED_WITH = {
    "bpe": {},
    "unigram": {"model_type": "unigram"},
    "char": {"model_type": "char"},
    "word": {"model_type": "word"},
    "dummy": {"add_dummy_prefix": True},
    "spaces": {"remove_extra_whitespaces": False},
    "dummy and spaces": {"add_dummy_prefix": True, "remove_extra_whitespaces": False},
    "identity": {"normalization_rule_name": "identity"},
    "symbols": {"user_defined_symbols": ["<sep>", "fox"], "control_symbols": ["<ctl>"]},
}
"""Settings of SentencePiece by which a space may be written in other ways."""


def trained(folder: Path, settings: dict, without_lone_space: bool) -> Tokenizer:
    """A small model; the piece of a lone space may be taken from it, as pruning does."""
    words = ["the", "quick", "fox", "jumps", "12", "a1", "café", "naïve"]
    texts = [" ".join(words[i % 8 :] + words[: i % 8]) for i in range(64)]
    model = io.BytesIO()
    common = {"vocab_size": 330, "model_type": "bpe", "byte_fallback": True, "minloglevel": 2}
    common |= {"add_dummy_prefix": False, "hard_vocab_limit": False, "bos_id": 1, "eos_id": 2}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        **common | {"pad_id": 0, "unk_id": 3, "max_sentencepiece_length": 8} | settings,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for piece in proto.pieces:
        if without_lone_space and piece.piece == SPACE:
            piece.piece = "zzqq"
    path = folder / "t.model"
    path.write_bytes(proto.SerializeToString())
    return read_tokenizer(path)


@pytest.mark.parametrize("without_lone_space", [False, True])
@pytest.mark.parametrize("name", sorted(TRAINED_WITH))
def test_bytes_are_those_of_the_text_however_a_model_writes_spaces(
    tmp_path, name, without_lone_space
):
    """Expected is the text itself: what is encoded here is not changed by normalization, except
    for white space at its ends and in rows, which most of these models drop."""
    tokenizer = trained(tmp_path, TRAINED_WITH[name], without_lone_space)
    byte_count = ByteCount.of(tokenizer)
    keeps = TRAINED_WITH[name].get("remove_extra_whitespaces", True) is False
    texts = [
        "the fox 1 2 3 4",
        "7 a1 ?? café Ωmega",
        " leading",
        "x",
        "",
        "漢 字 <sep>fox",
        "5  6  ",
    ]
    expected = [text if keeps else " ".join(text.split(" ")).strip() for text in texts]
    expected = [text if keeps else re.sub(" +", " ", text) for text in expected]
    encoded = tokenizer.encode(texts)
    stream = np.concatenate(encoded)
    assert tokenizer.decode(encoded) == expected == tokenizer.normalized(texts)
    assert [byte_count.total(ids) for ids in encoded] == [len(t.encode()) for t in expected]
    assert byte_count.check(stream, tokenizer) == sum(len(t.encode()) for t in expected)
    per_token = byte_count.per_token(stream)
    assert per_token.max() <= 30
    if without_lone_space:
        assert len(byte_count.spaces_spelled_in(stream))


def test_a_spelled_space_is_one_byte_at_its_last_token(tmp_path):
    tokenizer = trained(tmp_path, {}, without_lone_space=True)
    byte_count = ByteCount.of(tokenizer)
    (ids,) = tokenizer.encode(["1 2"])
    assert len(ids) == 1 + 1 + 3 + 1
    assert byte_count.per_token(ids).tolist() == [0, 1, 0, 0, 1, 1]


def test_a_tokenizer_that_loses_characters_is_refused_by_the_document(tmp_path):
    lossy = trained(tmp_path, {"byte_fallback": False, "unk_surface": ""}, False)
    texts = ["the fox", "the Ω"]
    encoded = lossy.encode(texts)
    ByteCount.of(lossy).check(np.concatenate(encoded), lossy)  # table and decoding lose it alike
    pairs = list(zip(encoded, lossy.decode(encoded), strict=True))
    check_texts(pairs[:1], texts[:1], lossy)
    with pytest.raises(DataError, match=r"document 1 does not come back .* 'Ω' became ''"):
        check_texts(pairs, texts, lossy)


def test_checking_a_real_validation_set_takes_well_under_a_second(recorded_export):
    tokenizer = read_tokenizer(recorded_export / "tokenizers" / "fineweb_1024_bpe.model")
    folder = recorded_export / "datasets" / "fineweb10B_sp1024"
    tokens = read_shard(folder / "fineweb_val_000000.bin")
    start = time.process_time()
    assert ByteCount.of(tokenizer).check(tokens, tokenizer) == 483_477
    assert time.process_time() - start < 0.7
