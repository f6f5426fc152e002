"""Test-time training scores what the public systems' own scripts recorded."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from per_target import PerTarget
from safetensors.torch import load_file

from recurgolf import importers
from recurgolf.data import ByteCount
from recurgolf.data.shards import read_shard
from recurgolf.data.tokenizer import read_tokenizer
from recurgolf.eval import RankShare, ScoredModel, Text, Window, score
from recurgolf.eval.ttt import ReconstructEval, SgdEval
from recurgolf.eval.ttt.descent import Descent

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden"


def recorded(system: str) -> dict:
    return json.loads((GOLDEN / system / "eval" / "eval.json").read_text())


@cache
def validation_text() -> Text:
    shards = sorted((GOLDEN / "data/shards").glob("*_val_*.bin"))
    tokenizer = read_tokenizer(GOLDEN / "data" / "tokenizer.model")
    tokens = np.concatenate([read_shard(path) for path in shards])
    return Text(tokens, ByteCount.of(tokenizer), bos=tokenizer.bos_id)


@cache
def scored_model_of(system: str) -> ScoredModel:
    weights = GOLDEN / system / "eval" / "weights.safetensors"
    imported = importers.load(system, recorded(system)["hyperparameters"], weights)
    length = imported.run.trainer.seq_len
    return ScoredModel(imported.model.transformer, imported.run.looping, length)


def frozen_by_universal_rank1(blocks: int) -> list[str]:
    """It freezes parameters by the names of their blocks, and finds no matrix: those are banked."""
    names = scored_model_of("universal_rank1").model.state_dict()
    frozen = [
        name for name in names if name.startswith(tuple(f"blocks.{b}." for b in range(blocks)))
    ]
    return [name for name in frozen if not name.endswith("_proj.weight")]


SGD = [
    (system, how)
    for system in ("per_iteration_lora", "universal_rank1")
    for how in recorded(system)["results"]
    # One recording trains its extra heads as well, which is the bug that ours must not have.
    if "ttt" in how["fn"] and not how.get("mtp_num_heads")
]


def sgd_protocol(system: str, how: dict) -> SgdEval:
    banked = system == "universal_rank1"
    return SgdEval(
        seq_len=how.get("eval_seq_len", how.get("train_seq_len")),
        stride=how.get("eval_stride", how.get("stride")),
        whole_windows=True,
        compat_rescore_tail=banked,
        chunk_tokens=how["ttt_chunk_tokens"],
        sgd=Descent(
            lr=how["ttt_lr"],
            momentum=how["ttt_momentum"],
            epochs=how["ttt_epochs"],
            batch_sequences=how.get("ttt_batch_seqs", how.get("batch_seqs", 32)),
            clip=how.get("ttt_grad_clip", 1.0),
            freeze=frozen_by_universal_rank1(how.get("ttt_freeze_blocks", 0)) if banked else [],
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


ONCE = [(system, how) for system, how in SGD if system != "universal_rank1"]


@pytest.mark.parametrize(("system", "how"), ONCE, ids=[str(n) for n in range(len(ONCE))])
def test_every_chunk_costs_what_was_recorded(system, how):
    result = score(
        sgd_protocol(system, how), scored_model_of(system), validation_text(), accumulate=PerTarget
    )
    assert result.accumulator is not None
    sums = result.accumulator.target_nats.cumsum()
    for _, nats, tokens, _ in how["per_chunk_cumulative_loss_sum_tokens_bytes"]:
        assert sums[int(tokens) - 1] == pytest.approx(nats, rel=1e-6)


RECONSTRUCTIONS = [
    (path.parent, case)
    for path in sorted(GOLDEN.glob("parallel_recurrent/models/*/config.json"))
    for case in json.loads(path.read_text()).get("ttt_cases", {})
]


def chosen_blocks(layers) -> list[int] | None:
    return None if layers == "all" else [int(block) for block in str(layers).split(",")]


@pytest.mark.parametrize(
    ("folder", "case"), RECONSTRUCTIONS, ids=[f"{f.name}-{case}" for f, case in RECONSTRUCTIONS]
)
def test_reconstruction_has_the_recorded_loss_of_every_token(folder, case):
    config = json.loads((folder / "config.json").read_text())
    how, losses = config["ttt_cases"][case], load_file(folder / "ttt.safetensors")
    imported = importers.load(
        "parallel_recurrent", config["hyperparameters"], folder / "weights.safetensors"
    )
    ids = torch.cat((losses["input_ids"], losses["target_ids"][:, -1:]), dim=1).long()
    length = ids.shape[1] - 1
    scored_model = ScoredModel(imported.model.transformer.eval(), imported.run.looping, length)
    protocol = ReconstructEval(
        chunk_tokens=how["ttt_chunk_size"],
        lr=how["ttt_lr"],
        blocks=chosen_blocks(how["ttt_layers"]),
    )
    # Side by side with another text, which must not be felt.
    both = torch.cat((ids, ids.flip(1)))
    window = Window(0, 0, length)
    chunks = protocol.scores(scored_model, both, window, scored_model.plan(), None)
    found = torch.cat([nats[: len(ids)] for _, nats in chunks], dim=1)
    torch.testing.assert_close(found, losses[f"per_token_loss.{case}"], atol=1e-5, rtol=1e-5)
    if how["ttt_chunk_size"] < length:
        assert not torch.allclose(found, losses["per_token_loss.no_ttt"], atol=1e-3)


RECONSTRUCTED = [how for how in recorded("parallel_recurrent")["results"] if how["use_ttt"]]


@pytest.mark.parametrize("how", RECONSTRUCTED, ids=[str(n) for n in range(len(RECONSTRUCTED))])
def test_reconstruction_scores_as_recorded(how):
    settings = recorded("parallel_recurrent")["hyperparameters"] | how
    protocol = ReconstructEval(
        stride=settings["sw_stride"],
        seq_len=settings["sw_seq_len"],
        compat_skip_head=True,
        whole_windows=True,
        chunk_tokens=settings["ttt_chunk_size"],
        lr=settings["ttt_lr"],
        blocks=chosen_blocks(settings["ttt_layers"]),
    )
    scored_model, text, world = (
        scored_model_of("parallel_recurrent"),
        validation_text(),
        how["world_size"],
    )
    shares = [score(protocol, scored_model, text, share=RankShare(r, world)) for r in range(world)]
    nats, tokens, num_bytes = (
        sum(getattr(share, name) for share in shares) for name in ("nats", "tokens", "bytes")
    )
    assert (tokens, num_bytes) == (how["token_count"], how["byte_count"])
    assert nats / tokens == pytest.approx(how["val_loss"], rel=1e-5)
    assert nats / np.log(2) / num_bytes == pytest.approx(how["val_bpb"], rel=1e-5)
