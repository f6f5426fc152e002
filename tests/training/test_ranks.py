"""Two ranks train the model that one rank trains, whichever way the ranks are started."""

import sys
from pathlib import Path

import pytest
import torch
from command_line import recurgolf_process
from processes import on_ranks
from safetensors.torch import load_file, save_file
from smoke_runs import RunFolder, small, train

import recurgolf
from recurgolf.artifact import load
from recurgolf.quant.quantized_tensor import dequantize_state
from recurgolf.run import Run
from recurgolf.training.distributed import Ranks, file_ranks
from recurgolf.training.job import Job
from recurgolf.training.trainer import Trainer

EXACT = ("optimizer.ns_dtype=float32", "trainer.steps=16", "trainer.log_every=4")
"""Muon's bfloat16 products would make the order of a sum over ranks visible."""
LATE_LOOPS = ("looping.start_fraction=0.5", "lora.visits=repeats")
"""The adapters of the second pass are idle for half of the training."""


def parameters(run: RunFolder) -> dict[str, torch.Tensor]:
    return load_file(next((run.path / "checkpoints").iterdir()) / "tensors.safetensors")


def assert_same_training(one: RunFolder, two: RunFolder) -> None:
    ours, theirs = parameters(one), parameters(two)
    # Every rank has random states of its own, and nothing else.
    assert ours.keys() == {name for name in theirs if not name.startswith("rng/1:")}
    for name, tensor in ours.items():
        if name.startswith("model/"):
            torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5)
    assert two.losses == pytest.approx(one.losses, abs=1e-5)
    for figure in ("val_bpb", "pre_quant_val_bpb"):
        assert two.summary[figure] == pytest.approx(one.summary[figure], abs=1e-4)
    for count in ("val_tokens", "val_bytes", "params", "tokens", "steps"):
        assert two.summary[count] == one.summary[count]
    stored = [dequantize_state(load(r.path / "artifact.bin").tensors) for r in (one, two)]
    for name, tensor in stored[0].items():
        # A weight near the border of two codes may fall to the other side of it.
        step = tensor.abs().max() / 8
        assert (stored[1][name] - tensor).abs().max() <= step, name


def test_spawned_ranks_match_one():
    """Adapters, micro-steps, loops and adapters that begin halfway, all at once."""
    one = train(*EXACT, *LATE_LOOPS)
    two = train(*EXACT, *LATE_LOOPS, "trainer.devices=2", "trainer.grad_accum=2")
    assert_same_training(one, two)
    assert two.summary["environment"]["ranks"] == 2
    assert "Traceback" not in two.ended.err
    assert two.ended.out.count("bytes by component") == 1


def test_ranks_under_torchrun_match_one(tmp_path):
    one = train(*EXACT, "lora.rank=2")
    overrides = small(*EXACT, "lora.rank=2")  # trainer.devices is what torchrun has started
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    ended = recurgolf_process(
        *["-m", "recurgolf", *overrides, "hydra.run.dir=under_torchrun"],
        start=launcher,
        cwd=tmp_path,
    )
    two = RunFolder(tmp_path / "under_torchrun", ended.finished())
    assert two.json("run.json")["trainer"]["devices"] == 2
    assert_same_training(one, two)


def trained(run: Run, folder: Path, ranks: Ranks) -> dict[str, torch.Tensor]:
    trainer = Trainer(Job.watched(run, folder, ranks))
    trainer.setup()
    before = {f"start/{name}": t.clone() for name, t in trainer.state.model.state_dict().items()}
    trainer.warm_up()
    trainer.fit()
    trainer.job.tracker.finish()
    trainer.job.log.close()
    return {**before, **trainer.state.model.state_dict()}


def one_rank_of_two(rank: int, count: int, runs: dict[str, dict], folder: str) -> None:
    torch.set_num_threads(1)
    with file_ranks("gloo", f"{folder}/rendezvous", rank, count, 120) as ranks:
        for name, run in runs.items():
            (Path(folder) / name).mkdir(exist_ok=True)
            state = trained(Run.from_dict(run), Path(folder) / name, ranks)
            save_file(state, f"{folder}/{name}/rank{rank}.safetensors")


CASES = {
    # What only one pass trains is left out of DDP's sight at first, and must not stay there.
    "late loops": LATE_LOOPS,
    "late loops, warmed up": (*LATE_LOOPS, "trainer.warmup_steps=1"),
    # Each rank clips its own gradients (here: not at all) before they are averaged.
    "clipped before averaging": ("optimizer.compat_clip_stage=pre_sync", "trainer.grad_accum=2"),
    "truncated": ("looping.passes=3", "looping.backprop_passes=1"),
}


@pytest.fixture(scope="module")
def both_ranks(tmp_path_factory) -> Path:
    """Every case trained by two processes; each left its own weights."""
    folder = tmp_path_factory.mktemp("ranks")
    runs = {
        name: recurgolf.compose(small(*EXACT, *case, "trainer.devices=2")).to_dict()
        for name, case in CASES.items()
    }
    on_ranks(2, one_rank_of_two, runs, str(folder))
    return folder


@pytest.mark.parametrize("case", CASES)
def test_ranks_start_and_end_with_equal_weights_and_match_one(case, both_ranks, tmp_path):
    first, second = (load_file(both_ranks / case / f"rank{n}.safetensors") for n in (0, 1))
    for name, tensor in first.items():
        assert torch.equal(second[name], tensor), name
    alone = trained(recurgolf.compose(small(*EXACT, *CASES[case])), tmp_path, Ranks())
    for name, tensor in alone.items():
        torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-5)
    adapters = [name for name in alone if name.startswith("adapters.")]
    assert adapters
    for name in adapters:
        assert not torch.equal(alone[name], alone[f"start/{name}"]), f"{name} was never trained"
