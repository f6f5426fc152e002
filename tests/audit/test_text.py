"""What the validation text counts for, and what training may have seen of it."""

import dataclasses
import io
import json

import numpy as np
import pytest
import sentencepiece
from smoke_runs import train

from recurgolf.audit.accounts import byte_check, separation_check
from recurgolf.audit.separation import overlap_with_training
from recurgolf.audit.texts import other_than_raw, raw_texts_of, separation_of
from recurgolf.data import ByteCount
from recurgolf.data.shards import write_shard
from recurgolf.data.tokenizer import normalizer_of, read_tokenizer
from recurgolf.run import Run


def dataset():
    return Run.read(train().path).data.prepare()


def raw_bytes():
    config = json.loads((train().path / "run.json").read_text())
    return sum(len(text.encode()) for text in raw_texts_of(config, dataset()))


def test_the_honest_byte_count_passes():
    data = dataset()
    assert raw_bytes() == data.val_raw_bytes
    found = byte_check(data, train().summary["evals"], raw_bytes=raw_bytes())
    assert (found.verdict, found.number) == ("pass", 0)


def test_a_space_that_is_counted_twice():
    data = dataset()
    table = data.byte_count
    double = ByteCount(
        table.base_bytes + table.has_leading_space.to(table.base_bytes.dtype),
        table.has_leading_space,
        table.is_boundary,
    )
    found = byte_check(dataclasses.replace(data, byte_count=double), {}, raw_bytes=raw_bytes())
    assert found.verdict == "fail" and found.number is not None and found.number > 0


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"tokens": 10**9, "bytes": 10}, "targets of"),
        ({"tokens": 10, "bytes": 10**9}, "divided by"),
    ],
)
def test_totals_that_the_text_does_not_have(entry, message):
    found = byte_check(dataset(), {"sliding": entry}, raw_bytes=raw_bytes())
    assert found.verdict == "fail" and message in found.line


def test_bytes_of_targets_that_were_not_scored():
    text = dataset()
    times = np.ones(len(text.tokens) - 1, dtype=np.int64)
    times[-50:] = 0
    entry = {"tokens": int(times.sum()), "bytes": text.byte_count.total(text.tokens)}
    assert "its targets have" in byte_check(text, {"plain": entry}, {"plain": times}).line


def test_a_manifest_and_public_totals_that_do_not_fit():
    entry = {"name": dataset().name, "stats": {"tokens_val": 3, "docs_val": 30}}
    text = dataclasses.replace(dataset(), manifest={"datasets": [entry]})
    assert "tokens_val=3" in byte_check(text, {}).line
    public = dataclasses.replace(dataset(), name="fineweb10B_sp1024", val_documents=50_000)
    found = byte_check(public, {})
    assert found.verdict == "fail" and "151,080,891" in found.line


@pytest.mark.parametrize("known", [True, False], ids=["raw text here", "raw text elsewhere"])
def test_a_sidecar_and_raw_bytes_that_are_doubled(known):
    text, raw = dataset(), raw_bytes() if known else None
    honest = text.byte_count.total(text.tokens)
    ids = text.tokens.astype(np.int64)
    table = text.byte_count
    sizes = table.base_bytes.numpy()[ids] + table.has_leading_space.numpy()[ids]
    double = dataclasses.replace(text, val_byte_sidecar=(2 * sizes).astype(np.uint16))
    found = byte_check(double, {}, raw_bytes=raw)
    assert found.verdict == "fail" and "sidecar counts" in found.line
    told = dataclasses.replace(text, val_raw_bytes=2 * honest)
    found = byte_check(told, {}, raw_bytes=raw)
    assert found.verdict == "fail" and f"the manifest says {2 * honest:,}" in found.line


@pytest.mark.parametrize("edit", ["another word", "documents exchanged", "a document left out"])
def test_tokens_that_are_not_those_of_the_raw_text(edit):
    """A cache whose checksums were made to fit: the byte counts may even agree."""
    data = dataset()
    config = json.loads((train().path / "run.json").read_text())
    texts = raw_texts_of(config, data)
    assert texts and other_than_raw(data, texts) == ""
    tokens, bos = np.array(data.validation_tokens()), data.tokenizer.bos_id
    documents = np.split(tokens, np.flatnonzero(tokens == bos)[1:])
    if edit == "another word":
        documents[2][5:7] = documents[2][6:4:-1]
    elif edit == "documents exchanged":
        documents[:2] = documents[1::-1]
    else:
        del documents[4]
    changed = np.concatenate(documents)
    edited = dataclasses.replace(data, tokens=changed, val_documents=len(documents))
    assert other_than_raw(edited, texts)
    found = byte_check(dataset(), {}, altered=other_than_raw(edited, texts))
    assert found.verdict == "fail"


@pytest.fixture(scope="module")
def lengthening(tmp_path_factory):
    """A tokenizer that writes every e as eeee before it cuts."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "rule.tsv").write_text("65\t65 65 65 65\n")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the tree sees the green bee"] * 50),
        model_writer=model,
        vocab_size=290,
        model_type="bpe",
        byte_fallback=True,
        pad_id=0,
        bos_id=1,
        eos_id=2,
        unk_id=3,
        hard_vocab_limit=False,
        minloglevel=2,
        add_dummy_prefix=False,
        normalization_rule_tsv=str(folder / "rule.tsv"),
    )
    (folder / "e.model").write_bytes(model.getvalue())
    return folder / "e.model"


def test_a_tokenizer_that_lengthens_the_text(lengthening):
    tokenizer = read_tokenizer(lengthening)
    words = "we see the bee"
    tokens = tokenizer.encode([words])[0]
    table = ByteCount.of(tokenizer)
    text = dataclasses.replace(
        dataset(),
        tokens=tokens,
        tokenizer=tokenizer,
        byte_count=table,
        val_documents=1,
        val_raw_bytes=None,
        manifest={},
    )
    assert table.total(tokens) == len(words) + 3 * words.count("e")
    for raw in (len(words), None):
        found = byte_check(text, {}, raw_bytes=raw)
        assert found.verdict == "fail" and "'e' becomes 'eeee'" in found.line
    assert normalizer_of(dataset().tokenizer.path) == ""


def parts(count):
    """Every document in `count` pieces, each a document of its own."""
    return lambda documents, other, chance: [
        np.concatenate((document[:1], piece))
        for document in documents
        for piece in np.array_split(document[1:], count)
    ]


LEAKS = {
    "whole": lambda documents, other, chance: documents,
    "halves": parts(2),
    "thirds": parts(3),
    "behind others": lambda documents, other, chance: [
        np.concatenate((one, document[1:])) for one, document in zip(other, documents, strict=False)
    ],
    "a tenth left out": lambda documents, other, chance: [
        document[chance.random(len(document)) >= 0.1] for document in documents
    ],
    "one word in forty exchanged": lambda documents, other, chance: [
        np.where(np.arange(len(document)) % 40 == 20, document[5], document)
        for document in documents
    ],
}


@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("count", [3, 1000], ids=["three documents", "all documents"])
def test_validation_text_in_training(leak, count, tmp_path):
    data = dataset()
    tokens, bos = np.array(data.validation_tokens()), data.tokenizer.bos_id
    documents = np.split(tokens, np.flatnonzero(tokens == bos)[1:])
    longest = sorted(documents, key=len, reverse=True)[:count]
    training = np.concatenate([np.fromfile(p, "<u2")[512:] for p in data.train_shards])
    other = np.split(training, np.flatnonzero(training == bos)[1:])
    planted = LEAKS[leak](longest, other, np.random.default_rng(0))
    stream = np.concatenate([*other[:50], *planted, *other[50:]])
    # Cut anywhere: documents straddle shards.
    paths = [tmp_path / "a.bin", tmp_path / "b.bin"]
    for path, part in zip(paths, np.array_split(stream, 2), strict=True):
        write_shard(path, part.astype(np.uint16))
    overlap = overlap_with_training(tokens, paths, bos)
    found = separation_check(overlap, [], tokens, bos)
    assert found.verdict == "fail", found
    leaked = sum(map(len, longest)) / len(tokens)
    assert found.number is not None and found.number > 0.6 * leaked
    assert (overlap.whole > 0) == (leak == "whole")


def test_training_without_it_passes():
    data = dataset()
    tokens, bos = data.validation_tokens(), data.tokenizer.bos_id
    overlap = overlap_with_training(tokens, data.train_shards, bos)
    assert overlap.train_tokens == data.train_tokens
    rows = [np.fromfile(data.train_shards[0], "<u2")[600:700]]
    found = separation_check(overlap, rows, tokens, bos)
    assert found.verdict == "pass" and found.number is not None and found.number < 0.005


def test_calibration_on_validation_text():
    data = dataset()
    tokens, bos = np.array(data.validation_tokens()), data.tokenizer.bos_id
    overlap = overlap_with_training(tokens, data.train_shards, bos)
    found = separation_check(overlap, [tokens[100:164]], tokens, bos)
    assert found.verdict == "fail" and "1 of 1 calibration rows" in found.line


@pytest.mark.parametrize(
    "base", ["trained on validation", "gone", "its data have changed", "honest"]
)
def test_weights_that_come_from_another_run(base, tmp_path):
    """What it has read, this run has read."""
    data = dataset()
    (tmp_path / "base").mkdir()
    place = tmp_path / "base" / "datasets" / "of_base"
    place.mkdir(parents=True)
    tokens = np.array(data.validation_tokens())
    training = np.fromfile(data.train_shards[0], "<u2")[512:2512]
    read = tokens if base == "trained on validation" else training
    write_shard(place / "fineweb_train_000000.bin", read)
    write_shard(place / "fineweb_val_000000.bin", tokens)
    node = {"kind": "shards", "path": str(place), "tokenizer": str(data.tokenizer.path)}
    config = {"trainer": {}, "data": {**node, "vocab_size": 512}}
    if base != "gone":
        (tmp_path / "base" / "run.json").write_text(json.dumps(config))
    if base == "its data have changed":
        step = tmp_path / "base" / "checkpoints" / "step_000008"
        step.mkdir(parents=True)
        (step / "state.json").write_text(json.dumps({"data": {"train": "another text"}}))
    own = json.loads((train().path / "run.json").read_text())
    own["trainer"]["base"] = str(tmp_path / "base")
    found = separation_of(own, data, [])
    assert found.verdict == ("pass" if base == "honest" else "fail"), found
    assert ("could not be compared" in found.line) == (base in ("gone", "its data have changed"))
