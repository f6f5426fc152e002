"""Training on the recorded shards follows the recorded runs, step by step."""

import dataclasses
import json

import pytest
import torch
from recordings import GOLDEN
from safetensors.torch import load_file
from source_names import to_source

from recurgolf import importers, optim
from recurgolf.data import ByteCount
from recurgolf.data.shards import read_shard
from recurgolf.data.tokenizer import read_tokenizer
from recurgolf.eval import PlainEval, ScoredModel, Text, score

ACCUMULATE = 8  # as all the sources do on one GPU, where nothing else is said
LOSS_ATOL = {"universal_rank1": 2e-2}
NORM_RTOL = {"universal_rank1": 0.2}
SYSTEMS = sorted(path.parents[1].name for path in GOLDEN.glob("*/trajectory/trajectory.json"))


@pytest.fixture(params=SYSTEMS)
def system(request):
    return request.param


class Training:
    """The recorded run again: its loader, its schedules, one process, no warm-up."""

    def __init__(self, system):
        self.recorded = json.loads((GOLDEN / system / "trajectory/trajectory.json").read_text())
        weights = load_file(GOLDEN / system / "trajectory" / "init_weights.safetensors")
        self.shapes = {name: tensor.shape for name, tensor in weights.items()}
        settings = {"vocab_size": len(weights["tok_emb.weight"])} | self.recorded["hyperparameters"]
        self.every = settings["val_loss_every"]
        self.accumulate = settings.get("grad_accum_steps", ACCUMULATE)
        self.imported = importers.load(system, settings, weights)
        self.run = run = self.imported.run
        self.model = self.imported.model.transformer
        config = run.optimizer
        if getattr(config, "compat_shard_rows", 0):  # as many shards as processes
            config = dataclasses.replace(config, compat_shard_rows=0)
        self.optimizers = optim.build(config, self.model)
        self.averager = run.averaging.build(self.model)
        shards = sorted((GOLDEN / "data" / "shards").glob("fineweb_train_*.bin"))
        self.tokens = run.trainer.batch_tokens
        self.loader = run.data.loader.build(
            shards, seq_len=run.trainer.seq_len, rank=0, world_size=1, seed=run.seed
        )

    def step(self, step):
        """(loss, learning-rate factor, momentum) of one step."""
        run, steps = self.run, self.run.trainer.steps
        fraction = step / steps
        plan, scale = run.plan(fraction), run.optimizer.schedule.lr_scale(step, steps)
        momentum = run.optimizer.momentum_at(step)
        self.model.train()
        total = 0.0
        for _ in range(self.accumulate):
            x, y = self.loader.next_batch(self.tokens, self.accumulate)
            loss = self.model(x, plan, y) / self.accumulate
            loss.backward()
            total += loss.item()
        self.optimizers.clip_gradients()
        self.optimizers.step(scale, momentum, fraction)
        self.optimizers.zero_grad()
        self.averager.update(step + 1, fraction, scale)
        return total, scale, momentum

    @torch.no_grad()
    def validate(self, step):
        """Loss and bits per byte on the recorded validation shards, windows side by side."""
        paths = sorted((GOLDEN / "data" / "shards").glob("fineweb_val_*.bin"))
        tokens = torch.cat([torch.from_numpy(read_shard(p).astype("uint16")) for p in paths])
        counts = ByteCount.of(read_tokenizer(GOLDEN / "data" / "tokenizer.model"))
        plan = self.run.plan(step / self.run.trainer.steps)
        passes = 1 + max(visit.nth for visit in plan.visits)
        scored_model = ScoredModel(self.model, self.run.looping, self.run.trainer.seq_len)
        return score(PlainEval(passes=passes), scored_model, Text(tokens.numpy(), counts))


def norms_agree(training, state, recorded, rtol):
    state = {name: tensor.detach() for name, tensor in state.items()}
    found = to_source(training.imported.places, state, training.shapes)
    assert set(found) == {name for name, entry in recorded.items() if 0 not in entry["shape"]}
    for name, entry in recorded.items():
        low_rank = "lora_adapters" in name and name.endswith("_B")
        allowed = max(rtol, 0.1) if low_rank else rtol
        if name in found:
            assert found[name].norm().item() == pytest.approx(entry["l2"], rel=allowed), name


def test_every_step_follows_the_recorded_run(system):
    training = Training(system)
    recorded = training.recorded
    atol, rtol = LOSS_ATOL.get(system, 5e-3), NORM_RTOL.get(system, 0.02)
    steps, every = training.run.trainer.steps, training.every
    assert [entry["step"] for entry in recorded["steps"]] == list(range(steps))
    validated = [step for step in range(steps) if every > 0 and step % every == 0] + [steps]
    plain = [entry for entry in recorded["evals"] if entry["fn"] == "eval_val"]
    # What follows the last step was scored on other weights. One system never scores plainly.
    expected = dict(zip(validated, plain, strict=False)) if plain else {}

    def compare(step):
        if step in expected:
            result = training.validate(step)
            assert result.val_loss == pytest.approx(expected[step]["val_loss"], abs=atol)
            assert result.val_bpb == pytest.approx(expected[step]["val_bpb"], abs=atol)

    for entry in recorded["steps"]:
        compare(entry["step"])
        loss, scale, momentum = training.step(entry["step"])
        assert loss == pytest.approx(entry["train_loss"], abs=atol), entry["step"]
        assert scale == pytest.approx(entry["lr_scale"], rel=1e-12)
        assert entry["muon_momentum"] in (None, pytest.approx(momentum, rel=1e-12))
    compare(steps)
    weights = dict(training.model.named_parameters())
    norms_agree(training, weights, recorded["final_raw"], rtol)
    if "final_ema" in recorded:
        average = training.averager.averaged_state()
        assert average is not None
        own = {name: tensor for name, tensor in average.items() if "mtp." not in name}
        norms_agree(training, own, recorded["final_ema"], rtol)
