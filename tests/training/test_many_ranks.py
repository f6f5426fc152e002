"""One, two and four ranks train one model; they stop, skip and continue together."""

import json
import signal
from pathlib import Path

import pytest
import torch
from processes import on_ranks
from safetensors.torch import load_file, save_file
from smoke_runs import small

import recurgolf
from recurgolf.run import Run
from recurgolf.training import checkpoint
from recurgolf.training.distributed import Ranks, file_ranks
from recurgolf.training.faults import RunFailed
from recurgolf.training.job import Job
from recurgolf.training.signals import Interruption
from recurgolf.training.trainer import Trainer

OVERRIDES = (
    *("optimizer.ns_dtype=float32", "trainer.steps=12", "trainer.log_every=1"),
    *("looping.start_fraction=0.5", "lora.visits=repeats", "averaging=ema", "averaging.decay=0.8"),
)
"""Muon in full precision: bfloat16 products make the order of a sum over ranks visible."""


def trained(
    run: Run, folder: Path, ranks: Ranks, stop_at: int | None = None, spoil_at: int | None = None
) -> Trainer:
    """A run without its end; asked to stop, or with a spoiled gradient, behind some step."""
    if ranks.is_first:
        folder.mkdir(exist_ok=True)
    ranks.barrier()
    job = Job.watched(run, folder, ranks)
    trainer = Trainer(job)
    job.guard.begin(job)
    trainer.setup()
    job.guard.resume(job, trainer.state)

    def disturb(gradient: torch.Tensor) -> torch.Tensor:
        if trainer.step == stop_at and ranks.rank == ranks.world_size - 1:
            job.signals.heard = signal.SIGTERM
        # On one rank alone: the others must hear of it.
        spoiled = trainer.step == spoil_at and ranks.rank == 0
        return gradient * float("nan") if spoiled else gradient

    trainer.state.model.embed.weight.register_hook(disturb)
    try:
        trainer.fit()
    except (Interruption, RunFailed) as end:
        trainer.ended_by = end
    job.tracker.finish()
    job.log.close()
    return trainer


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    averages = {f"average/{k}": v for k, v in trainer.state.averager.state_dict().items()}
    return {**trainer.state.model.state_dict(), **averages}


def on_several_ranks(rank: int, count: int, runs: dict[str, dict], folder: str) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    with file_ranks("gloo", f"{folder}/rendezvous", rank, count, 120) as ranks:

        def work(name: str, run: str, **disturbances: int) -> Trainer:
            done = trained(Run.from_dict(runs[run]), place / name, ranks, **disturbances)
            save_file(weights(done), place / f"{name}_rank{rank}.safetensors")
            return done

        work("whole", "plain")
        if count > 2:
            return
        stopped = work("stopped", "plain", stop_at=6)
        assert isinstance(stopped.ended_by, Interruption)
        assert stopped.step == 7
        work("stopped", "resumed")
        work("from_one", "from_one")
        skipping = work("skipping", "skipping", spoil_at=4)
        failing = work("failing", "plain", spoil_at=4)
        facts = {
            "skipped": skipping.state.skipped,
            "steps": skipping.step,
            "failed_at": failing.step,
            "failure": str(failing.ended_by),
            "remark": (place / "from_one" / "train.log").read_text() if rank == 0 else "",
        }
        (place / f"facts_{rank}.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Trainer:
    """One rank, stopped in the middle and continued."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    run = recurgolf.compose(small(*OVERRIDES, "trainer.checkpoint_every=6"))
    return trained(run, folder, Ranks())


@pytest.fixture(scope="module")
def pair(alone, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    two = ["trainer.devices=2", "trainer.grad_accum=2"]
    start = alone.job.folder / "checkpoints" / "step_000006"
    asked = {
        "plain": [],
        "resumed": ["trainer.resume=auto"],
        "from_one": [f"trainer.resume='{start}'"],
        "skipping": ["trainer.non_finite=skip"],
    }
    runs = {k: recurgolf.compose(small(*OVERRIDES, *two, *v)).to_dict() for k, v in asked.items()}
    on_ranks(2, on_several_ranks, runs, str(folder))
    return folder


def losses(folder: Path) -> dict[int, float]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {e["step"]: e["train/loss"] for e in events if "train/loss" in e}


def assert_close(found: Path, expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in load_file(found).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-5)


def test_two_ranks_with_micro_steps_match_one(pair, alone):
    assert_close(pair / "whole_rank0.safetensors", weights(alone))
    assert_close(pair / "whole_rank1.safetensors", weights(alone))
    assert losses(pair / "whole") == pytest.approx(losses(alone.job.folder), abs=1e-5)


def test_four_ranks_match_one(alone, tmp_path):
    runs = {"plain": recurgolf.compose(small(*OVERRIDES, "trainer.devices=4")).to_dict()}
    on_ranks(4, on_several_ranks, runs, str(tmp_path))
    for rank in range(4):
        assert_close(tmp_path / f"whole_rank{rank}.safetensors", weights(alone))
    assert losses(tmp_path / "whole") == pytest.approx(losses(alone.job.folder), abs=1e-5)


def test_two_ranks_stopped_by_a_signal_to_one_continue_bit_for_bit(pair):
    for rank in (0, 1):
        whole = load_file(pair / f"whole_rank{rank}.safetensors")
        for name, tensor in load_file(pair / f"stopped_rank{rank}.safetensors").items():
            assert torch.equal(tensor, whole[name]), name
    assert losses(pair / "stopped") == losses(pair / "whole")


def test_a_checkpoint_of_one_rank_continues_on_two_and_says_that_it_is_not_exact(pair, alone):
    assert_close(pair / "from_one_rank0.safetensors", weights(alone))
    remark = json.loads((pair / "facts_0.json").read_text())["remark"]
    assert "devices=2 (was 1), grad_accum=2 (was 1)" in remark
    assert "within rounding (1e-5), not bit for bit" in remark


def test_all_ranks_skip_or_stop_on_what_one_of_them_saw(pair):
    facts = [json.loads((pair / f"facts_{rank}.json").read_text()) for rank in (0, 1)]
    for own in facts:
        assert (own["skipped"], own["steps"]) == (1, 12)
        assert own["failed_at"] == 4
    assert facts[0]["failure"] == facts[1]["failure"]
    assert torch.equal(
        load_file(pair / "skipping_rank0.safetensors")["embed.weight"],
        load_file(pair / "skipping_rank1.safetensors")["embed.weight"],
    )
    for rank in (0, 1):
        assert (pair / "failing" / "non_finite" / f"batch_rank{rank}.safetensors").exists()


def test_every_rank_keeps_its_own_random_states(pair):
    newest = checkpoint.newest(pair / "stopped" / "checkpoints")
    parts, state = checkpoint.load(newest)
    assert state["world_size"] == 2
    assert not torch.equal(parts["rng"]["0:torch"], parts["rng"]["1:torch"])
