"""From a Run to its ranks: in this process, in spawned ones, or under torchrun.

One process has composed the Run; ranks receive it as plain data and never see Hydra. Spawned ranks
meet through a file in a temporary folder, which proved the most robust under every Hydra launcher.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch.multiprocessing.spawn import ProcessException, start_processes

from recurgolf.config import ConfigError
from recurgolf.plan import check_ending
from recurgolf.run import Run
from recurgolf.training.distributed import Ranks, file_ranks, started_by_torchrun, torchrun_ranks
from recurgolf.training.summary import Summary
from recurgolf.training.trainer import Trainer

RANK_TIMEOUT_SECONDS = 600.0
"""A collective that waits longer than this ends the run: some rank is gone."""


def launch(run: Run, folder: Path) -> Summary:
    """Train, pack and score a Run; everything it leaves is in `folder`.

    Raises:
        ConfigError: what can be known to fail, before any training.
    """
    check_device(run)
    check_ending(run)
    run.tracker.check_account()
    backend = "nccl" if run.trainer.device == "cuda" else "gloo"
    if started_by_torchrun():
        with torchrun_ranks(backend, RANK_TIMEOUT_SECONDS) as ranks:
            # Ranks composed at different moments; the first one's folder is everybody's.
            folder = Path(ranks.decided(str(folder)))
            folder.mkdir(parents=True, exist_ok=True)
            return work(run, folder, ranks)
    if run.trainer.devices == 1:
        return work(run, folder, Ranks())
    _spawn(run, folder, backend)
    return Summary.read(folder)


def _spawn(run: Run, folder: Path, backend: str) -> None:
    """Start the ranks and wait for them; what one of them refuses is raised here in its words."""
    # Plugins such as joblib leave another start method behind, under which spawning fails.
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method("spawn", force=True)
    # It tells of every rank that it ends because another one has failed.
    chatter = logging.getLogger("torch.multiprocessing.spawn")
    level = chatter.level
    chatter.setLevel(logging.ERROR)
    try:
        with tempfile.TemporaryDirectory() as meeting:
            try:
                start_processes(
                    _spawned,
                    args=(run.to_dict(), str(folder), meeting, backend),
                    nprocs=run.trainer.devices,
                    start_method="spawn",
                )
            except ProcessException:
                refusals = sorted(Path(meeting).glob("refused_*"))
                if not refusals:
                    raise
                raise ConfigError(refusals[0].read_text()) from None
    finally:
        multiprocessing.set_start_method(before, force=True)
        chatter.setLevel(level)


def _spawned(rank: int, data: dict, folder: str, meeting: str, backend: str) -> None:
    try:
        run = Run.from_dict(data)
        world_size, rendezvous = run.trainer.devices, f"{meeting}/rendezvous"
        with file_ranks(backend, rendezvous, rank, world_size, RANK_TIMEOUT_SECONDS) as ranks:
            work(run, Path(folder), ranks)
    except ConfigError as error:
        (Path(meeting) / f"refused_{rank}").write_text(str(error))
        sys.exit(1)


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
