"""trainer.trainable=lora: the base stays bit for bit, the adapters learn, and both part again."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command_line import recurgolf
from safetensors.torch import load_file
from smoke_runs import composed, small, train

from recurgolf import adapters
from recurgolf.artifact import load
from recurgolf.artifact.score import rebuild
from recurgolf.config import ConfigError
from recurgolf.run import Run
from recurgolf.training.base import check_base, read_finished, start_from_base

BASE = ("lora=none", "averaging=ema")
EXACT = ("quant=none", "quant.keep_dtype=float32")
"""The artifact keeps the weights as they are."""


def alone(*overrides, base=BASE):
    """Overrides that train adapters alone on the base run."""
    folder = train(*base).path
    return ("lora=rank1", "trainer.trainable=lora", f"trainer.base='{folder}'", *overrides)


def weights(folder):
    """(base, adapters) as training left them, from the newest checkpoint."""
    tensors = load_file(max((folder / "checkpoints").glob("step_*")) / "tensors.safetensors")
    model = {n.removeprefix("model/"): t for n, t in tensors.items() if n.startswith("model/")}
    of_adapters = {n: model.pop(n) for n in list(model) if n.startswith("adapters.")}
    return model, of_adapters


@pytest.mark.parametrize(
    "devices",
    [pytest.param(1, id="one rank"), pytest.param(2, id="two ranks", marks=pytest.mark.slow)],
)
def test_frozen_weights_are_the_bases_bit_for_bit_and_adapters_have_moved(devices):
    run = train(*alone("averaging=ema", *EXACT, f"trainer.devices={devices}"))
    base = read_finished(train(*BASE).path).state
    frozen, trained = weights(run.path)
    assert frozen.keys() == base.keys()
    assert all(torch.equal(frozen[name], base[name]) for name in base)
    # B starts at zero and A does not: both have learned.
    assert all(t.abs().max() > 0 for n, t in trained.items() if n.endswith("lora_b"))
    fresh = read_finished(run.path).run.build_model().state_dict()
    assert not any(torch.equal(t, fresh[n]) for n, t in trained.items())
    # In the file too, which holds the average of the adapters and the base as it was.
    packed = rebuild(load(run.path / "artifact.bin")).model.state_dict()
    assert all(torch.equal(packed[name], base[name]) for name in base)
    log = (run.path / "train.log").read_text()
    assert "adapter parameters on" in log and "other text" not in log


def test_a_base_of_other_text_is_told_before_training():
    run = composed(*small(*alone()))
    data, told = run.data.prepare(), []
    for shards in (data.train_shards, []):
        job: Any = SimpleNamespace(
            run=run,
            dataset=dataclasses.replace(data, train_shards=shards),
            log=SimpleNamespace(line=told.append),
        )
        start_from_base(job, run.build_model())
    (line,) = told
    assert f"{run.trainer.base} was trained on other text" in line


def test_two_ranks_train_the_same_adapters_as_one():
    runs = [train(*alone("averaging=ema", *EXACT, f"trainer.devices={n}")) for n in (1, 2)]
    one, two = (weights(run.path)[1] for run in runs)
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_saved_adapters_on_the_base_give_the_logits_of_the_run(tmp_path):
    run = train(*alone("averaging=ema", *EXACT, "trainer.devices=1"))
    recurgolf("adapters", "save", run.path, tmp_path / "adapter", cwd=tmp_path).finished()
    base = read_finished(train(*BASE).path)
    model = base.model()
    changed, adapter = adapters.load(base.run, model, tmp_path / "adapter", base.tokenizer)
    assert adapter.base.tokenizer == base.tokenizer
    trained = rebuild(load(run.path / "artifact.bin"))
    tokens = torch.randint(0, 512, (2, 40), generator=torch.Generator().manual_seed(1))
    plan = changed.eval_plan
    assert torch.equal(model(tokens, plan), trained.model(tokens, plan))


def test_an_artifact_is_base_enough_where_no_checkpoint_was_kept(tmp_path):
    folder = train(*BASE).path
    for name in ("run.json", "artifact.bin"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    found = read_finished(tmp_path)
    assert found.source.endswith("artifact.bin")
    packed = rebuild(load(folder / "artifact.bin")).model.state_dict()
    assert all(torch.equal(found.state[name], packed[name]) for name in packed)
    kept = read_finished(folder)
    assert found.tokenizer == kept.tokenizer
    prints = [adapters.fingerprint(run.state) for run in (found, kept)]
    assert prints[0] != prints[1], "quantized weights are others"


REFUSALS = {
    "lora.rank=0: there is nothing to train": {"lora.rank": 0},
    "model.dim is 32 there, 48 here": {"model.dim": 48},
    "model.mixer.kind is 'attention' there, 'gated_deltanet' here$": {
        "model.mixer": {"kind": "gated_deltanet"},
        "lora.targets": ["out_proj"],
    },
    r"under the plan \(0 1\)x1, which training meets, no visit has an adapter": {
        "lora.visits": "repeats",
        "looping.start_fraction": 0.5,
    },
    "model.mixer_pattern is .*'num_heads': 1": {
        "model.mixer_pattern": ["mixer", {"kind": "attention", "num_heads": 1}],
    },
    "trainable='adapters': all or lora": {"trainer.trainable": "adapters"},
    "trainable=lora, trainer.base=null": {"trainer.base": None},
    "no_such is not a run folder": {"trainer.base": "no_such"},
    "snap.strength=0.1: snapping moves weights": {"quant.qat.snap.strength": 0.1},
}


@pytest.mark.parametrize(("message", "own"), REFUSALS.items(), ids=range(len(REFUSALS)))
def test_another_base_or_nothing_to_train_is_refused_before_training(message, own):
    data = composed(*small(*alone())).to_dict()
    for key, value in own.items():
        *parents, name = key.split(".")
        node = data
        for parent in parents:
            node = node[parent]
        node[name] = value
    with pytest.raises(ConfigError, match=message):
        check_base(Run.from_dict(data))


def test_a_hybrid_is_the_same_base_however_its_blocks_are_named(tmp_path):
    hybrid = ("experiment=smoke", "model/mixer=gated_deltanet")
    base = composed(*hybrid, "model.mixer_pattern=[mixer,{kind:attention}]", "lora=none")
    base.write(tmp_path)
    own = ("trainer.trainable=lora", f"trainer.base='{tmp_path}'", "lora=gated_delta")
    check_base(composed(*hybrid, "model.mixer_pattern=[gated_deltanet,attention]", *own))
    with pytest.raises(ConfigError, match=r"model.mixer_pattern is .* there, .* here"):
        check_base(composed(*hybrid, "model.mixer_pattern=[attention,mixer]", *own))


def test_the_command_refuses_without_training(tmp_path):
    ended = recurgolf(*small(*alone("model.dim=48")), cwd=tmp_path)
    assert "model.dim is 32 there, 48 here" in ended.refused()


def test_another_tokenizer_is_refused(tmp_path):
    # The same number of pieces, learned from another text.
    text = tmp_path / "other.jsonl"
    signs = "".join(3 * chr(33 + n) + " " + chr(97 + n % 26) for n in range(90))
    texts = [f"{['alpha', 'bravo', 'charlie', 'delta'][n % 4]} {signs} {n}" for n in range(400)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in texts))
    own = alone(f"data.files={text}", "data.vocab_size=512", "data.tokenizer=null")
    ended = recurgolf(*small(*own), cwd=tmp_path)
    assert "another tokenizer" in ended.refused()


def test_adapters_of_the_base_go_on_only_under_the_same_lora_options(tmp_path):
    own = alone("lora.rank=2", base=())
    message = recurgolf(*small(*own), cwd=tmp_path).refused()
    assert "has adapters of its own" in message and "lora.rank is 1 there, 2 here" in message
