"""Data options end to end: the recorded folder, the exporter's bytes, the cache, the checks."""

import hashlib
import json
import multiprocessing
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from sentencepiece import sentencepiece_model_pb2

from recurgolf.config import REGISTRY, ConfigError, from_dict, to_dict
from recurgolf.data import Data, DataError, Embedded, Shards, Text
from recurgolf.data.corpus import embedded_corpus
from recurgolf.data.export import ExportSettings, export
from recurgolf.data.loader import RankShardsShuffledConfig, ShuffledConfig
from recurgolf.data.shard_fingerprints import check_unchanged
from recurgolf.data.shards import DataChanged, read_shard, write_shard


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def silent(what: str, done: int, total: int) -> None:
    pass


@pytest.fixture(scope="module")
def exported(tmp_path_factory, recorded_export):
    """Our export of the embedded text with the recorded exporter's settings, both tokenizers."""
    root = tmp_path_factory.mktemp("exported")
    byte260 = recorded_export / "tokenizers" / "fineweb_pure_byte_260.json"
    settings = {
        "sp1024": ExportSettings(1024, None, all_documents=True, shard_tokens=500_000),
        "byte260": ExportSettings(260, byte260, shard_tokens=500_000),
    }
    return {n: export(embedded_corpus(), s, root / n, silent) for n, s in settings.items()}


@pytest.mark.parametrize("variant", ["sp1024", "byte260"])
def test_shards_are_those_of_the_challenges_exporter(recorded_export, exported, variant):
    hashes = json.loads((recorded_export / "shards.sha256.json").read_text())
    expected = {Path(p).name: h for p, h in hashes.items() if Path(p).parent.name.endswith(variant)}
    assert len(expected) in (5, 10)
    assert {p.name: sha256(p) for p in exported[variant].glob("*.bin")} == expected


def test_tokenizer_is_that_of_the_challenges_exporter(recorded_export, exported):
    ours = exported["sp1024"].parent.parent / "tokenizers" / "fineweb_1024_bpe.model"
    recorded = recorded_export / "tokenizers" / ours.name
    # The recorded file differs in one field: the name of the folder that it was written to.
    model = sentencepiece_model_pb2.ModelProto.FromString(recorded.read_bytes())
    assert model.trainer_spec.model_prefix.endswith("tokenizers/fineweb_1024_bpe")
    model.trainer_spec.ClearField("model_prefix")
    assert model.SerializeToString(deterministic=True) == ours.read_bytes()
    vocab = ours.with_suffix(".vocab")
    assert vocab.read_bytes() == (recorded.with_suffix(".vocab")).read_bytes()


def test_manifest_says_what_the_recorded_one_says(recorded_export, exported):
    recorded = json.loads((recorded_export / "manifest.json").read_text())
    for variant, theirs in zip(("sp1024", "byte260"), recorded["datasets"], strict=True):
        ours = json.loads((exported[variant].parent.parent / "manifest.json").read_text())
        dataset = ours["datasets"][0]
        for key, value in theirs["stats"].items():
            assert dataset["stats"][key] == value, key
        for key in ("vocab_size", "bos_id", "recommended_bigram_vocab_size", "tokenizer_kind"):
            assert dataset[key] == theirs[key], key
        for key in ("num_docs", "num_val_docs", "shard_size", "append_eos"):
            assert ours[key] == recorded[key], key


@pytest.fixture
def recorded_folder(recorded_export, exported, tmp_path, own_cache):
    """The recorded folder, with the shards that are too large to keep made anew (proven above)."""
    root = tmp_path / "data"
    shutil.copytree(recorded_export, root)
    for shard in exported["sp1024"].glob("fineweb_train_*.bin"):
        shutil.copy(shard, root / "datasets" / "fineweb10B_sp1024")
    shutil.copytree(exported["byte260"], root / "datasets" / "fineweb10B_byte260")
    return root


@pytest.mark.parametrize(
    ("variant", "vocab_size", "val_bytes", "val_tokens"),
    [("sp1024", 1024, 483_477, 191_253), ("byte260", 260, 483_735, 484_735)],
)
def test_recorded_folder_reads_as_it_is(
    recorded_folder, variant, vocab_size, val_bytes, val_tokens
):
    path = recorded_folder / "datasets" / f"fineweb10B_{variant}"
    dataset = Shards(path=str(path), vocab_size=vocab_size).prepare()
    assert dataset.name == f"fineweb10B_{variant}"
    assert dataset.tokenizer.path.parent == recorded_folder / "tokenizers"
    assert dataset.val_documents == 1000
    assert dataset.val_bytes == val_bytes
    assert len(dataset.validation_tokens()) == val_tokens
    stats = json.loads((recorded_folder / "manifest.json").read_text())["datasets"]
    assert dataset.train_tokens == stats[variant == "byte260"]["stats"]["tokens_train"]
    assert dataset.val_raw_bytes is None


def test_raw_bytes_are_found_beside_the_manifest(recorded_folder):
    documents = embedded_corpus().read()
    lines = (json.dumps({"text": text}) + "\n" for text in documents.validation)
    (recorded_folder / "docs_selected.jsonl").write_text("".join(lines))
    path = recorded_folder / "datasets" / "fineweb10B_sp1024"
    dataset = Shards(path=str(path)).prepare()
    assert (dataset.val_bytes, dataset.val_raw_bytes) == (483_477, 483_735)


def test_folder_without_manifest_needs_a_tokenizer(recorded, own_cache):
    path = str(recorded / "shards")
    with pytest.raises(DataError, match=r"names no tokenizer for it; say data\.tokenizer=FILE"):
        Shards(path=path).prepare()
    dataset = Shards(path=path, tokenizer=str(recorded / "tokenizer.model")).prepare()
    facts = json.loads((recorded / "data.json").read_text())
    assert dataset.val_bytes == facts["val_true_utf8_bytes_total"]
    assert dataset.val_documents == facts["val_documents"]
    assert dataset.validation_tokens().tolist()[:1] == [1]
    assert len(dataset.validation_tokens()) == facts["val_total_tokens"]
    assert dataset.manifest == {}


@pytest.mark.parametrize("content", ["{}", "[]", '{"datasets": [{"name": "shards"}, 3, null]}'])
def test_manifest_may_lack_any_key(recorded, tmp_path, own_cache, content):
    folder = tmp_path / "root" / "datasets" / "shards"
    shutil.copytree(recorded / "shards", folder)
    (tmp_path / "root" / "manifest.json").write_text(content)
    tokenizer = str(recorded / "tokenizer.model")
    assert Shards(path=str(folder), tokenizer=tokenizer).prepare().name == "shards"


@pytest.fixture
def own_shards(recorded, tmp_path, own_cache):
    """A copy of the recorded shards to damage."""
    folder = tmp_path / "shards"
    shutil.copytree(recorded / "shards", folder)
    return Shards(path=str(folder), tokenizer=str(recorded / "tokenizer.model"))


def change(shards: Shards, name: str, position: int, token: int) -> None:
    path = Path(shards.path) / name
    tokens = np.array(read_shard(path))
    tokens[position] = token
    write_shard(path, tokens)


def test_wrong_vocabulary_is_refused_with_both_sizes(own_shards):
    own_shards.vocab_size = 8192
    with pytest.raises(DataError, match=r"data\.vocab_size=8192, .* has 1024 pieces; set"):
        own_shards.prepare()


@pytest.mark.parametrize(
    "name", ["fineweb_val_000001.bin", "fineweb_train_000000.bin", "fineweb_train_000002.bin"]
)
@pytest.mark.parametrize("position", [5, -1])
def test_token_outside_the_vocabulary_is_refused(own_shards, name, position):
    own_shards.prepare()  # what is remembered of a shard is forgotten with its contents
    change(own_shards, name, position, 1024)
    with pytest.raises(DataError, match=r"token 1024, but the tokenizer .* only 1024 pieces"):
        own_shards.prepare()


def test_validation_must_begin_with_bos(own_shards):
    change(own_shards, "fineweb_val_000000.bin", 0, 500)
    with pytest.raises(DataError, match="begins with token 500, expected the BOS 1"):
        own_shards.prepare()


def test_shards_of_another_tokenizer_are_refused(own_shards, recorded_export):
    own_shards.tokenizer = str(recorded_export / "tokenizers" / "fineweb_pure_byte_260.json")
    own_shards.vocab_size = 260
    with pytest.raises(DataError, match="wrong vocabulary"):
        own_shards.prepare()


def test_unknown_pieces_make_the_byte_table_wrong_and_are_refused(own_shards):
    change(own_shards, "fineweb_val_000000.bin", 700, 3)
    with pytest.raises(DataError, match=r"byte table counts \d+ bytes .* decoded text has \d+"):
        own_shards.prepare()


def test_changed_tokens_are_checked_although_the_old_ones_were_noted(own_shards):
    before = own_shards.prepare()
    assert own_shards.prepare().fingerprint == before.fingerprint
    change(own_shards, "fineweb_val_000000.bin", 700, 3)
    with pytest.raises(DataError, match="byte table counts"):
        own_shards.prepare()


def test_byte_sidecars_are_handed_over_and_must_fit(own_shards):
    folder = Path(own_shards.path)
    counts = np.arange(6601, dtype=np.uint16)
    write_shard(folder / "fineweb_val_bytes_000000.bin", counts[:4001])
    with pytest.raises(DataError, match="4001 tokens, but there are 6601 validation tokens"):
        own_shards.prepare()
    write_shard(folder / "fineweb_val_bytes_000001.bin", counts[4001:])
    dataset = own_shards.prepare()
    assert dataset.val_byte_sidecar is not None
    assert dataset.val_byte_sidecar.tolist() == counts.tolist()
    assert len(dataset.val_shards) == 2


@pytest.mark.parametrize(
    ("path", "message"),
    [("gone", "no such folder"), (".", r"no fineweb_val_\*.bin in it; .*shards")],
)
def test_wrong_path_is_refused(own_shards, path, message):
    own_shards.path = str(Path(own_shards.path).parent / path)
    with pytest.raises(DataError, match=message):
        own_shards.prepare()


def test_truncated_training_shard_is_refused_before_training(own_shards):
    path = Path(own_shards.path) / "fineweb_train_000002.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"fineweb_train_000002\.bin: truncated"):
        own_shards.prepare()


def test_embedded_data_is_what_its_measurements_say_and_the_second_start_is_quick():
    said: list[str] = []
    dataset = Embedded().prepare(said.append)
    assert len(dataset.validation_tokens()) == 191_366
    assert dataset.train_tokens == 1_749_134
    assert (dataset.val_bytes, dataset.val_raw_bytes) == (483_477, 483_735)
    assert dataset.licence == "CC BY-SA 4.0 (Wikipedia contributors)"
    assert dataset.anchors["PPMd order 16"] == 1.636
    start = time.process_time()
    again = Embedded().prepare(said.append)
    assert time.process_time() - start < 0.7
    assert again.fingerprint == dataset.fingerprint
    assert pickle.loads(pickle.dumps(again)).tokenizer.encode(["a"])[0].tolist()[0] == 1


@pytest.mark.parametrize("tokens", [[1] * 200, [1, 2, 2, 1]], ids=["BOS alone", "specials alone"])
def test_validation_without_any_text_is_refused(own_shards, tokens):
    for path in Path(own_shards.path).glob("fineweb_val_*.bin"):
        write_shard(path, np.array(tokens, dtype=np.uint16))
    with pytest.raises(DataError, match="none stands for any text"):
        own_shards.prepare()


def test_the_fingerprint_covers_the_byte_sidecar(own_shards):
    before, path = own_shards.prepare(), Path(own_shards.path) / "fineweb_val_bytes_000000.bin"
    found = {before.fingerprint}
    for count in (2, 3):
        write_shard(path, np.full(6601, count, dtype=np.uint16))
        found.add(own_shards.prepare().fingerprint)
    assert len(found) == 3


def test_validation_tokens_stay_what_was_checked(own_shards):
    dataset = own_shards.prepare()
    before = dataset.validation_tokens().copy()
    change(own_shards, "fineweb_val_000000.bin", 700, 5)
    assert np.array_equal(dataset.validation_tokens(), before)
    with pytest.raises(DataChanged, match=r"fineweb_val_000000\.bin was written again"):
        check_unchanged(dataset.files)


def test_raw_text_that_is_not_that_of_the_tokens_is_refused(recorded_folder):
    documents = embedded_corpus().read().validation
    lines = [json.dumps({"text": text}) + "\n" for text in [documents[0] + "!", *documents[1:]]]
    (recorded_folder / "docs_selected.jsonl").write_text("".join(lines))
    with pytest.raises(DataError, match="validation document 0 does not come back"):
        Shards(path=str(recorded_folder / "datasets" / "fineweb10B_sp1024")).prepare()


def own_text(stories: Path) -> Text:
    return Text(files=str(stories / "*.txt"), vocab_size=320, val_documents=4)


def test_own_text_becomes_a_dataset_and_is_found_again(stories, own_cache):
    said: list[str] = []
    dataset = own_text(stories).prepare(said.append)
    assert any("tokenizing" in line for line in said)
    assert dataset.name == "text_sp320"
    assert dataset.val_documents == 4
    assert dataset.val_raw_bytes == dataset.manifest["datasets"][0]["stats"]["raw_bytes_val"]
    said.clear()
    again = own_text(stories).prepare(said.append)
    assert (again.folder, again.fingerprint) == (dataset.folder, dataset.fingerprint)
    assert said == []
    (stories / "new.txt").write_text("Another story about foxes.")
    own_text(stories).prepare(said.append)
    assert said != []


def test_given_tokenizer_is_used_and_kept_with_the_shards(stories, own_cache, recorded):
    option = own_text(stories)
    option.tokenizer, option.vocab_size = str(recorded / "tokenizer.model"), 1024
    dataset = option.prepare()
    assert sha256(dataset.tokenizer.path) == sha256(recorded / "tokenizer.model")
    assert own_cache in dataset.tokenizer.path.parents


def test_vocabulary_larger_than_the_text_carries_is_refused_and_leaves_nothing(stories, own_cache):
    option = own_text(stories)
    option.vocab_size = 5000
    with pytest.raises(DataError, match=r"data\.vocab_size=5000, .* pieces; set data\.vocab_size="):
        option.prepare()
    assert list(own_cache.iterdir()) == []


def test_unwritable_cache_is_refused(stories, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RECURGOLF_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="cannot write the data cache"):
        own_text(stories).prepare()


@pytest.mark.parametrize(
    "name",
    [
        "manifest.json",
        "fineweb_train_000000.bin",
        "fineweb_val_000000.bin",
        "fineweb_320_bpe.model",
    ],
)
@pytest.mark.parametrize("damage", ["gone", "overwritten", "emptied"])
def test_a_damaged_cache_is_made_again(stories, own_cache, name, damage):
    whole = own_text(stories).prepare()
    (path,) = own_cache.glob(f"text-*/**/{name}")
    content = path.read_bytes()
    if damage == "gone":
        path.unlink()
    elif damage == "emptied":
        path.write_bytes(b"")
    else:
        path.write_bytes(content[:-20] + bytes([content[-20] ^ 1]) + content[-19:])
    again = own_text(stories).prepare()
    assert (again.folder, again.fingerprint) == (whole.folder, whole.fingerprint)
    assert path.read_bytes() == content


def test_a_changed_number_in_an_exported_manifest_is_refused(stories, tmp_path, own_cache):
    settings = own_text(stories).export_settings()
    folder = export(own_text(stories).corpus(), settings, tmp_path / "out", silent)
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["datasets"][0]["stats"]["raw_bytes_val"] *= 2
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="does not have the checksum that it states"):
        Shards(path=str(folder), vocab_size=320).prepare()


def fingerprint_of(option: Text) -> str:
    return option.prepare().fingerprint


def test_two_processes_may_prepare_at_once(stories, own_cache):
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        fingerprints = pool.map(fingerprint_of, [own_text(stories)] * 2, chunksize=1)
    assert len(set(fingerprints)) == 1
    assert sorted(path.name.split("-")[0] for path in own_cache.iterdir()) == ["checked", "text"]


def test_fingerprint_follows_text_and_tokenizer(stories, own_cache):
    first = own_text(stories).prepare().fingerprint
    option = own_text(stories)
    option.vocab_size = 330
    assert option.prepare().fingerprint != first


@pytest.mark.parametrize("kind", sorted(REGISTRY["data"]))
def test_options_survive_the_way_to_run_json(kind):
    option = REGISTRY["data"][kind](loader=RankShardsShuffledConfig(False))
    again = from_dict(Data, json.loads(json.dumps(to_dict(option))))
    assert again == option
    assert type(again) is type(option)
    assert REGISTRY["data"][kind]().loader == ShuffledConfig()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (Shards(), r"data=shards needs data\.path"),
        (Text(), r"data=text needs data\.files"),
    ],
)
def test_impossible_settings_are_refused_without_reading(option, message):
    with pytest.raises(ConfigError, match=message):
        option.check()
    with pytest.raises(ConfigError, match=message):
        option.prepare()
