"""Recorded weights score on the recorded validation text as their own scripts say."""

import json

import numpy as np
import pytest
import torch
from recordings import GOLDEN

from recurgolf import importers
from recurgolf.data import ByteCount
from recurgolf.data.shards import read_shard
from recurgolf.data.tokenizer import read_tokenizer
from recurgolf.eval import PlainEval, SlidingEval, score

PROTOCOLS = {
    ("baseline", "eval_val"): lambda how: (PlainEval(), how["train_seq_len"]),
    ("per_iteration_lora", "eval_val"): lambda how: (PlainEval(), how["eval_seq_len"]),
    ("per_iteration_lora", "eval_val_sliding"): lambda how: (
        SlidingEval(stride=how["eval_stride"], whole_windows=True),
        how["eval_seq_len"],
    ),
    ("universal_rank1", "eval_val"): lambda how: (PlainEval(), how["seq_len"]),
}
"""What the systems score without rules of their own; the recorded figure does not depend on the
number of processes."""

RECORDED = [
    (path.parents[1].name, number, result)
    for path in sorted(GOLDEN.glob("*/eval/eval.json"))
    for number, result in enumerate(json.loads(path.read_text())["results"])
    if (path.parents[1].name, result["fn"]) in PROTOCOLS and result["world_size"] == 1
]


@pytest.mark.parametrize(
    ("system", "number", "how"), RECORDED, ids=[f"{s}-{h['fn']}-{n}" for s, n, h in RECORDED]
)
@torch.no_grad()
def test_recorded_weights_have_the_recorded_score(system, number, how):
    folder = GOLDEN / system / "eval"
    settings = json.loads((folder / "eval.json").read_text())["hyperparameters"]
    model = importers.load(system, settings, folder / "weights.safetensors").model.eval()
    model.set_looping(how.get("looping_active", True))
    tokens = np.concatenate(
        [read_shard(path) for path in sorted((GOLDEN / "data/shards").glob("*_val_*.bin"))]
    )
    protocol, seq_len = PROTOCOLS[system, how["fn"]](how)
    result = score(
        lambda ids, first: model(ids)[:, first:],
        protocol,
        tokens,
        ByteCount.of(read_tokenizer(GOLDEN / "data" / "tokenizer.model")),
        seq_len=seq_len,
    )
    atol = 2e-5 if system == "universal_rank1" else 2e-6
    assert result.val_loss == pytest.approx(how["val_loss"], abs=atol)
    assert result.val_bpb == pytest.approx(how["val_bpb"], abs=atol)
    assert (result.tokens, result.bytes) == (how["token_count"], how["byte_count"])
