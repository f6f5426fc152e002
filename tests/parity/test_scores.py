"""Recorded weights score on the recorded validation text as their own scripts say."""

import json

import numpy as np
import pytest
from per_target import PerTarget
from recordings import GOLDEN

from recurgolf import importers
from recurgolf.data import ByteCount
from recurgolf.data.shards import read_shard
from recurgolf.data.tokenizer import read_tokenizer
from recurgolf.eval import PlainEval, RankShare, ScoredModel, SlidingEval, Text, score

SLIDING = {
    "per_iteration_lora": {"whole_windows": True},
    "universal_rank1": {"whole_windows": True, "compat_rescore_tail": True},
    "parallel_recurrent": {"whole_windows": True, "compat_skip_head": True},
}
"""What the systems' scripts do at the ends of a text."""


def protocol_of(system, how):
    """Our protocol for a recorded call, and the length of its windows; None: another test's."""
    length = how.get("eval_seq_len") or how.get("sw_seq_len") or how.get("seq_len")
    passes = 1 if how.get("looping_active") is False else None
    if how["fn"] == "eval_val":
        return PlainEval(passes=passes, seq_len=length or how["train_seq_len"])
    if "ttt" in how["fn"] or how.get("use_ttt"):
        return None
    stride = how.get("eval_stride") or how.get("sw_stride") or how.get("stride")
    return SlidingEval(passes=passes, seq_len=length, stride=stride, **SLIDING[system])


RECORDED = [
    (path.parents[1].name, number, result)
    for path in sorted(GOLDEN.glob("*/eval/eval.json"))
    for number, result in enumerate(json.loads(path.read_text())["results"])
    if protocol_of(path.parents[1].name, result) is not None
]


@pytest.fixture(scope="module")
def text() -> Text:
    shards = sorted((GOLDEN / "data/shards").glob("*_val_*.bin"))
    tokenizer = read_tokenizer(GOLDEN / "data" / "tokenizer.model")
    tokens = np.concatenate([read_shard(path) for path in shards])
    return Text(tokens, ByteCount.of(tokenizer), bos=tokenizer.bos_id)


@pytest.fixture(scope="module")
def subjects():
    """System -> its recorded weights."""
    made = {}
    for path in GOLDEN.glob("*/eval/weights.safetensors"):
        system = path.parents[1].name
        settings = json.loads((path.parent / "eval.json").read_text())["hyperparameters"]
        imported = importers.load(system, settings, path)
        length = imported.run.trainer.seq_len
        made[system] = ScoredModel(imported.model.transformer, imported.run.looping, length)
    return made


@pytest.mark.parametrize(
    ("system", "number", "how"), RECORDED, ids=[f"{s}-{h['fn']}-{n}" for s, n, h in RECORDED]
)
def test_recorded_weights_have_the_recorded_score(system, number, how, text, subjects):
    scored_model, protocol = subjects[system], protocol_of(system, how)
    world = how["world_size"]
    shares = [score(protocol, scored_model, text, share=RankShare(r, world)) for r in range(world)]
    nats, tokens, num_bytes = (
        sum(getattr(share, name) for share in shares) for name in ("nats", "tokens", "bytes")
    )
    atol = 2e-5 if system == "universal_rank1" else 2e-6
    assert (tokens, num_bytes) == (how["token_count"], how["byte_count"])
    assert nats / tokens == pytest.approx(how["val_loss"], abs=atol)
    assert nats / np.log(2) / num_bytes == pytest.approx(how["val_bpb"], abs=atol)


@pytest.mark.parametrize(
    "how", [h for s, _, h in RECORDED if s == "universal_rank1" and "stride" in h], ids=repr
)
def test_a_tail_scored_twice_is_told_from_one_scored_once(how, text, subjects):
    scored_model = subjects["universal_rank1"]
    length, stride = how["eval_seq_len"], how["stride"]
    settings = {"stride": stride, "seq_len": length, "whole_windows": True}
    twice, once = (
        score(protocol, scored_model, text, accumulate=PerTarget).accumulator.scored
        for protocol in (SlidingEval(**settings, compat_rescore_tail=True), SlidingEval(**settings))
    )
    end = text.num_targets - text.num_targets % length
    expected = np.zeros(text.num_targets, int)
    for start in range(0, end, stride):  # each scores its last stride, or what there is
        stop = min(start + length, end)
        expected[max(stop - stride, start) if start else 0 : stop] += 1
    assert (twice == expected).all()
    assert (once[:end] == 1).all() and not once[end:].any()
