"""The vocabulary of shards is their tokenizer's, unless one is asked for."""

import json
import shutil

import pytest
from command_line import recurgolf as command

import recurgolf
from recurgolf.config import ConfigError
from recurgolf.data.tokenizer import read_tokenizer


@pytest.fixture(scope="module")
def shards(recorded, tmp_path_factory):
    """A folder as the challenge ships it, with a manifest that names the tokenizer."""
    root = tmp_path_factory.mktemp("my data")
    shutil.copytree(recorded / "shards", root / "datasets" / "sp")
    shutil.copy(recorded / "tokenizer.model", root / "tokenizer.model")
    manifest = {
        "datasets": [{"name": "sp", "tokenizer_name": "t"}],
        "tokenizers": [{"name": "t", "model_path": "tokenizer.model"}],
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root / "datasets" / "sp"


def test_it_is_the_tokenizer_s_and_the_model_follows(shards, recorded):
    pieces = read_tokenizer(recorded / "tokenizer.model").vocab_size
    named = f"data.path='{shards}'"
    for more in ([], [f"data.tokenizer='{recorded / 'tokenizer.model'}'"]):
        run = recurgolf.compose(["data=shards", named, *more])
        assert run.data.vocab_size == run.model.vocab_size == pieces
    assert recurgolf.compose([]).data.vocab_size != pieces


def test_one_that_is_asked_for_is_kept_and_refused_when_it_is_wrong(shards):
    run = recurgolf.compose(["data=shards", f"data.path='{shards}'", "data.vocab_size=300"])
    with pytest.raises(ConfigError, match=r"data\.vocab_size=300"):
        run.data.prepare()


def test_the_command_line_takes_it_too(shards, recorded, tmp_path):
    line = ["plan", "experiment=smoke", "data=shards", f"data.path='{shards}'"]
    pieces = read_tokenizer(recorded / "tokenizer.model").vocab_size
    wide = command(*line, cwd=tmp_path).finished().out
    same = command(*line, f"data.vocab_size={pieces}", cwd=tmp_path).finished().out
    assert wide == same
