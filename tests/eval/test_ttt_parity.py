"""Test-time training scores what the public systems' own scripts recorded."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recurgolf import importers
from recurgolf.data import ByteCount
from recurgolf.data.shards import read_shard
from recurgolf.data.tokenizer import read_tokenizer
from recurgolf.eval import ScoredModel, Text, Window, score
from recurgolf.eval.ttt import ReconstructEval, SgdEval
from recurgolf.eval.ttt.descent import Descent

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def recorded(system: str) -> dict:
    return json.loads((GOLDEN / system / "eval" / "eval.json").read_text())


@cache
def validation_text() -> Text:
    shards = sorted((GOLDEN / "data/shards").glob("*_val_*.bin"))
    table = ByteCount.of(read_tokenizer(GOLDEN / "data" / "tokenizer.model"))
    return Text(np.concatenate([read_shard(path) for path in shards]), table, bos=1)


@cache
def scored_model_of(system: str, seq_len: int = 64) -> ScoredModel:
    weights = GOLDEN / system / "eval" / "weights.safetensors"
    imported = importers.load(system, recorded(system)["hyperparameters"], weights)
    return ScoredModel(imported.model.transformer, imported.run.looping, seq_len)


FROZEN_BY_SYSTEM_V = ("mixer_scale", "mlp_scale", "input_mix.*", "mixer.q_gain")
"""That system freezes parameters by the names of their blocks, but the matrices are in banks."""

SGD = [
    (system, how)
    for system in ("per_iteration_lora", "universal_rank1")
    for how in recorded(system)["results"]
    # One recording trains its extra heads as well, which is the bug that ours must not have.
    if "ttt" in how["fn"] and not how.get("mtp_num_heads")
]


def sgd_protocol(system: str, how: dict) -> SgdEval:
    tail = system == "universal_rank1"
    blocks = range(how.get("ttt_freeze_blocks", 0))
    return SgdEval(
        stride=how.get("eval_stride", how.get("stride")),
        whole_windows=True,
        compat_rescore_tail=tail,
        chunk_tokens=how["ttt_chunk_tokens"],
        sgd=Descent(
            lr=how["ttt_lr"],
            momentum=how["ttt_momentum"],
            epochs=how["ttt_epochs"],
            freeze=[
                f"blocks.{b}.{name}"
                for b in blocks
                for name in FROZEN_BY_SYSTEM_V
                if name != "mixer_scale" or b == 0
                if name != "mlp_scale" or b == 0
            ],
        ),
    )


@pytest.mark.parametrize(
    ("system", "how"), SGD, ids=[f"{s}-{h['ttt_epochs']}-epochs" for s, h in SGD]
)
def test_sgd_over_chunks_scores_as_recorded(system, how):
    scored_model, text = scored_model_of(system), validation_text()
    before = {name: tensor.clone() for name, tensor in scored_model.model.state_dict().items()}
    result = score(sgd_protocol(system, how), scored_model, text)
    assert result.val_loss == pytest.approx(how["val_loss"], rel=1e-5)
    assert result.val_bpb == pytest.approx(how["val_bpb"], rel=1e-5)
    assert (result.tokens, result.bytes) == (how["token_count"], how["byte_count"])
    after = scored_model.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_every_chunk_costs_what_was_recorded():
    (system, how) = SGD[0]
    result = score(
        sgd_protocol(system, how), scored_model_of(system), validation_text(), per_target=True
    )
    assert result.accumulator is not None
    sums = result.accumulator.target_nats.cumsum()
    for _, nats, tokens, _ in how["per_chunk_cumulative_loss_sum_tokens_bytes"]:
        assert sums[int(tokens) - 1] == pytest.approx(nats, rel=1e-6)


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("name", ["auto_eval", "fixed_eval"])
def test_reconstruction_has_the_recorded_loss_of_every_token(name, case):
    folder = GOLDEN / "parallel_recurrent" / "models" / name
    config = json.loads((folder / "config.json").read_text())
    how, losses = config["ttt_cases"][str(case)], load_file(folder / "ttt.safetensors")
    imported = importers.load(
        "parallel_recurrent", config["hyperparameters"], folder / "weights.safetensors"
    )
    run = imported.run
    scored_model = ScoredModel(imported.model.transformer.eval(), run.looping, 20)
    blocks = None if how["ttt_layers"] == "all" else [int(b) for b in how["ttt_layers"].split(",")]
    protocol = ReconstructEval(chunk_tokens=how["ttt_chunk_size"], lr=how["ttt_lr"], blocks=blocks)
    ids = torch.cat((losses["input_ids"], losses["target_ids"][:, -1:]), dim=1)
    # Side by side with another text, which must not be felt.
    both = torch.cat((ids, ids.flip(1)))
    chunks = protocol.scores(scored_model, both, Window(0, 0, 20), scored_model.plan(), None)
    found = torch.cat([nats[0] for _, nats in chunks])
    torch.testing.assert_close(found, losses[f"per_token_loss.{case}"][0], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, losses["per_token_loss.no_ttt"][0], atol=1e-3)


def test_reconstruction_scores_as_recorded():
    settings = recorded("parallel_recurrent")
    (how,) = (r for r in settings["results"] if r["use_ttt"] and r["world_size"] == 1)
    protocol = ReconstructEval(
        stride=how["sw_stride"],
        seq_len=how["sw_seq_len"],
        compat_skip_head=True,
        whole_windows=True,
        chunk_tokens=settings["hyperparameters"]["ttt_chunk_size"],
        lr=settings["hyperparameters"]["ttt_lr"],
    )
    result = score(protocol, scored_model_of("parallel_recurrent"), validation_text())
    assert result.val_loss == pytest.approx(how["val_loss"], rel=1e-5)
    assert result.val_bpb == pytest.approx(how["val_bpb"], rel=1e-5)
    assert (result.tokens, result.bytes) == (how["token_count"], how["byte_count"])
