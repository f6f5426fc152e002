"""From a Run to its ranks: in this process, in spawned ones, or under torchrun.

One process has composed the Run; ranks receive it as plain data and never see Hydra. Spawned ranks
meet through a file in a temporary folder, which proved the most robust under every Hydra launcher.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
from torch.multiprocessing.spawn import start_processes

from recurgolf.config import ConfigError, load_plugins
from recurgolf.plan import check_budget, make_plan
from recurgolf.run import Run
from recurgolf.training.distributed import Ranks, file_ranks, started_by_torchrun, torchrun_ranks
from recurgolf.training.summary import Summary
from recurgolf.training.trainer import Trainer

RANK_TIMEOUT_SECONDS = 600.0
"""A collective that waits longer than this ends the run: some rank is gone."""


def launch(run: Run, folder: Path) -> Summary:
    """Train, pack and score a Run; everything it leaves is in `folder`."""
    check_device(run)
    check_budget(make_plan(run))
    backend = "nccl" if run.trainer.device == "cuda" else "gloo"
    if started_by_torchrun():
        with torchrun_ranks(backend, RANK_TIMEOUT_SECONDS) as ranks:
            # Ranks composed at different moments; the first one's folder is everybody's.
            folder = Path(ranks.decided(str(folder)))
            folder.mkdir(parents=True, exist_ok=True)
            return work(run, folder, ranks)
    if run.trainer.devices == 1:
        return work(run, folder, Ranks())
    # Plugins such as joblib leave another start method behind, under which spawning fails.
    multiprocessing.set_start_method("spawn", force=True)
    with tempfile.TemporaryDirectory() as meeting:
        start_processes(
            _spawned,
            args=(run.to_dict(), str(folder), f"{meeting}/rendezvous", backend),
            nprocs=run.trainer.devices,
            start_method="spawn",
        )
    return Summary.read(folder)


def _spawned(rank: int, data: dict, folder: str, rendezvous: str, backend: str) -> None:
    load_plugins(data.get("plugins", ()))
    run = Run.from_dict(data)
    with file_ranks(backend, rendezvous, rank, run.trainer.devices, RANK_TIMEOUT_SECONDS) as ranks:
        work(run, Path(folder), ranks)


def work(run: Run, folder: Path, ranks: Ranks) -> Summary:
    """The life of one rank."""
    threads = run.trainer.threads or (1 if ranks.world_size > 1 else default_threads())
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng():
            return Trainer(run, folder, ranks).run_all()
    finally:
        torch.set_num_threads(before)


def default_threads() -> int:
    """Cores for a rank that is alone, unless OMP_NUM_THREADS says otherwise."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else os.cpu_count() or 1


def check_device(run: Run) -> None:
    """Refuse a GPU run where there is none, or too few."""
    if run.trainer.device != "cuda":
        return
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if there == 0:
        raise ConfigError(
            "trainer.device=cuda, but this machine has no usable GPU (torch "
            f"{torch.__version__} sees none); use trainer=cpu"
        )
    if run.trainer.devices > there and not started_by_torchrun():
        raise ConfigError(f"trainer.devices={run.trainer.devices}, but there are {there} GPUs")
