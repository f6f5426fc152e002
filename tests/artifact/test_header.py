"""Headers that lie under a right checksum: refused by name, in no time and no memory."""

import copy
import json
import random
import time
import tracemalloc

import pytest
import torch

import recurgolf
from recurgolf.artifact import ArtifactError, StoreCodec, load, pack
from recurgolf.artifact.reader import Artifact
from recurgolf.artifact.score import check_run, rebuild
from recurgolf.config import to_dict
from recurgolf.quant import quantize_state

VALUES = [None, True, "x", "", -1, 0, 1, 7, 1.5, -0.0, 10**6, 10**8, 2**40, 10**30, 1e300]
VALUES += [[], {}, [1, "x"], {"kind": "cycle"}, {"kind": "nothing"}, [[]] * 3]


@pytest.fixture(scope="module")
def run():
    return recurgolf.compose(["experiment=smoke", "tracker=none", "lora=attention", "lora.rank=2"])


@pytest.fixture(scope="module")
def honest(run):
    torch.manual_seed(0)
    state = run.build_model().state_dict()
    rules = run.quant.assign({name: tuple(tensor.shape) for name, tensor in state.items()})
    metadata = {
        "model": to_dict(run.model),
        "looping": to_dict(run.looping),
        "lora": to_dict(run.lora),
        "eval": to_dict(run.eval.alone),
        "seq_len": run.trainer.seq_len,
        "data_vocab_size": run.data.vocab_size,
        "tokenizer": "ab",
        "text": "cd",
    }
    artifact = Artifact(json.loads(json.dumps(metadata)), dict(quantize_state(state, rules)))
    rebuild(artifact)  # imports done
    return artifact


def places(node, path=()):
    """Every place of a JSON tree but its root."""
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from places(value, (*path, key))


def edited(metadata, path, value):
    changed = copy.deepcopy(metadata)
    node = changed
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = copy.deepcopy(value)
    return changed


def refused_or_sound(artifact, folder) -> str:
    """What is wrong with it; empty where it is a model with finite weights."""
    pack(folder / "a.bin", artifact.metadata, artifact.tensors, StoreCodec())
    began = time.process_time()
    tracemalloc.start()
    try:
        scorable = rebuild(load(folder / "a.bin"))
    except ArtifactError as error:
        assert str(error)
        return str(error)
    else:
        assert all(tensor.isfinite().all() for tensor in scorable.model.state_dict().values())
        return ""
    finally:
        assert tracemalloc.get_traced_memory()[1] < 50e6
        tracemalloc.stop()
        assert time.process_time() - began < 10


def fuzz(honest, folder, rounds):
    rng, everywhere, refused = random.Random(0), list(places(honest.metadata)), 0
    for _ in range(rounds):
        metadata = honest.metadata
        for _ in range(rng.choice([1, 1, 2])):
            path, value = rng.choice(everywhere), rng.choice(VALUES)
            try:
                metadata = edited(metadata, path, value)
            except (KeyError, IndexError, TypeError):
                continue  # the first edit took away the place of the second
        refused += bool(refused_or_sound(Artifact(metadata, honest.tensors), folder))
    assert refused > rounds / 4


def test_100_edited_headers_are_refused_or_sound(honest, tmp_path):
    fuzz(honest, tmp_path, 100)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_10000_edited_headers_are_refused_or_sound(honest, tmp_path):
    fuzz(honest, tmp_path, 10_000)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("model", "num_blocks"), 10**6, "1000000 blocks"),
        (("model", "num_blocks"), 1e6, "1000000.0 blocks"),
        (("looping", "passes"), 10**7, "visits"),
        (("looping", "passes"), 10**8, "visits"),
        (("looping", "passes_eval"), 10**7, "visits"),
        (("eval", "passes"), 10**7, "visits"),
        (("eval", "passes"), [1, 10**7], "visits"),
        (("seq_len",), 2**40, "seq_len"),
        (("model",), None, "TypeError"),
        (("looping",), [], "AttributeError"),
        (("model", "dim"), 2**60, "holds no model"),
        (("model", "mtp_heads"), 10**6, "too many"),
    ],
)
def test_what_would_take_minutes_or_gigabytes_is_refused(honest, tmp_path, path, value, words):
    artifact = Artifact(edited(honest.metadata, path, value), honest.tensors)
    assert words in refused_or_sound(artifact, tmp_path)


@pytest.mark.parametrize(
    "value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.slow), 3e38]
)
def test_weights_that_are_not_finite_are_refused(honest, tmp_path, value):
    for name, tensor in honest.tensors.items():
        bad = copy.deepcopy(tensor)
        part = bad.float() if isinstance(bad, torch.Tensor) else bad.scales
        if part.dtype == torch.float16 and value == 3e38:
            continue  # it would be infinite already
        part.view(-1)[0] = value
        if isinstance(bad, torch.Tensor):
            bad = part
        if value == 3e38 and isinstance(bad, torch.Tensor):
            continue  # finite
        artifact = Artifact(honest.metadata, {**honest.tensors, name: bad})
        assert f"{name} is not finite" in refused_or_sound(artifact, tmp_path)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("looping", "passes"), 3, r"looping\.passes=3, run\.json 2"),
        (("seq_len",), 32, "seq_len=32, run.json 64"),
        (("eval", "seq_len"), 16, "another eval"),
        (("lora", "alpha"), 7.0, r"lora\.alpha=7\.0, run\.json None"),
    ],
)
def test_a_header_of_another_run_is_refused_by_name(honest, run, path, value, words):
    check_run(honest.metadata, run)
    with pytest.raises(ArtifactError, match=words):
        check_run(edited(honest.metadata, path, value), run)
