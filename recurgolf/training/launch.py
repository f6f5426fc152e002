"""From a Run to its ranks: in this process, in spawned ones, or under torchrun.

One process has composed the Run; ranks receive it as plain data and never see Hydra. Spawned ranks
meet through a file in a temporary folder, which proved the most robust under every Hydra launcher.
"""

from __future__ import annotations

import faulthandler
import os
import shlex
import shutil
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from recurgolf.config import ConfigError
from recurgolf.log import counted
from recurgolf.plan import check_ending
from recurgolf.run import Run
from recurgolf.training import resume
from recurgolf.training.base import check_base
from recurgolf.training.distributed import (
    Ranks,
    backend_of,
    environment_rank,
    file_ranks,
    started_by_torchrun,
    torchrun_ranks,
)
from recurgolf.training.guard import drop_diverged
from recurgolf.training.job import Job, run_log
from recurgolf.training.resume import CHECKPOINTS
from recurgolf.training.signals import STOP_SECONDS, Interruption, Signals
from recurgolf.training.state import rng_state, set_rng_state
from recurgolf.training.summary import Summary
from recurgolf.training.supervise import run_ranks
from recurgolf.training.trainer import train

SHARED_SECONDS = 5.0
"""A network file system may show a new file so late on other nodes."""


def launch(run: Run, folder: Path, shown: str = "lines") -> Summary:
    """Train, pack and score a Run; everything it leaves is in `folder`.

    Args:
        shown: on the console: `lines`, a `bar` alone, or `nothing`.

    Raises:
        ConfigError: what can be known to fail, before any training.
        RunFailed: what made it impossible to go on; checkpoints stay. Diverged where a number was
            not finite.
        KeyboardInterrupt, SystemExit: SIGINT, SIGTERM, after a checkpoint.
    """
    check_device(run)
    check_base(run)
    check_ending(run)
    run.tracker.check_account()
    if shown == "lines" and (warning := crowded(run)):
        print(f"recurgolf: {warning}", file=sys.stderr)
    try:
        return _launched(run, folder, shown)
    except Interruption as end:
        again = f"recurgolf resume {shlex.quote(str(folder))}"
        print(f"recurgolf: {end}: stopped; continue with\n{again}", file=sys.stderr)
        raise end.for_caller() from None


def _launched(run: Run, folder: Path, shown: str) -> Summary:
    if started_by_torchrun():
        with torchrun_ranks(run.trainer) as ranks:
            # Ranks composed at different moments; the first one's folder is everybody's.
            folder = Path(ranks.broadcast(str(folder)))
            folder.mkdir(parents=True, exist_ok=True)
            check_shared(folder, ranks)
            summary = ranks.broadcast(_finished(run, folder))
            return summary or work(run, folder, ranks, shown)
    summary = _finished(run, folder)
    if summary is not None:
        return summary
    if run.trainer.devices == 1:
        return work(run, folder, Ranks(), shown)
    # The ranks end by themselves; this process is there until they have.
    with Signals().listening(STOP_SECONDS + 0.7) as signals:
        run_ranks(_rank, run.trainer.devices, (run.to_dict(), str(folder), shown), signals)
    return Summary.read(folder)


def check_shared(folder: Path, ranks: Ranks) -> None:
    """Refuse nodes that do not see the same run folder: all read checkpoints and the file there.

    Raises:
        ConfigError: on every rank, with the hosts that do not see what rank 0 wrote.
    """
    mark = folder / f".seen_by_all_{ranks.broadcast(os.getpid())}"
    if ranks.is_first:
        mark.touch()
    ranks.barrier()
    deadline = time.monotonic() + SHARED_SECONDS
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    blind = [
        host for host in ranks.all_gather("" if mark.exists() else socket.gethostname()) if host
    ]
    if ranks.is_first:
        mark.unlink()
    if blind:
        raise ConfigError(
            f"{folder} is another folder on {', '.join(sorted(set(blind)))}: all nodes read "
            "checkpoints and the packed file there; set hydra.run.dir to a folder that they share"
        )


def _finished(run: Run, folder: Path) -> Summary | None:
    """The result of a run that needs no resuming; what an attempt before it failed of goes."""
    summary = resume.finished(run, folder)
    if summary is not None and environment_rank() == 0:
        print(f"{folder}: this run is finished already (trainer.resume=auto)")
    resume.check_unused(run, folder)
    if environment_rank() == 0:
        (folder / "failure.txt").unlink(missing_ok=True)
        drop_diverged(folder)
    return summary


def _rank(rank: int, meeting: str, argument: tuple[dict[str, Any], str, str]) -> None:
    """A spawned rank: the Run comes as plain data."""
    data, folder, shown = argument
    run = Run.from_dict(data)
    world_size, timeout = run.trainer.devices, run.trainer.rank_timeout_seconds
    with file_ranks(
        backend_of(run.trainer), f"{meeting}/rendezvous", rank, world_size, timeout
    ) as ranks:
        work(run, Path(folder), ranks, shown)


def work(run: Run, folder: Path, ranks: Ranks, shown: str = "lines") -> Summary:
    """The life of one rank."""
    # A data file that is cut while it is read ends the process with SIGBUS: say where.
    if not faulthandler.is_enabled():
        faulthandler.enable(file=sys.__stderr__ or 2)
    before, rng = torch.get_num_threads(), rng_state(torch.device("cpu"))
    torch.set_num_threads(threads_of(run, ranks))
    try:
        with torch.random.fork_rng(), Signals().listening() as signals:
            log = run_log(folder, ranks.is_first, shown)
            return train(Job.watched(run, folder, ranks, signals, log))
    finally:
        torch.set_num_threads(before)
        set_rng_state(rng, torch.device("cpu"))


def threads_of(run: Run, ranks: Ranks) -> int:
    """CPU threads of a rank: all cores where it is alone, unless OMP_NUM_THREADS says otherwise."""
    if run.trainer.threads or ranks.world_size > 1:
        return run.trainer.threads or 1
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else os.cpu_count() or 1


def remove_shell(folder: Path) -> None:
    """Take away the folder of a run that was refused before it had done anything."""
    if not (folder / CHECKPOINTS).exists() and not (folder / "artifact.bin").exists():
        shutil.rmtree(folder, ignore_errors=True)


def crowded(run: Run, at_once: int = 1) -> str:
    """What to say where more threads would work than there are cores; empty where they fit.

    Args:
        at_once: so many such runs work at the same time.
    """
    cores = os.cpu_count() or 1
    if run.trainer.device != "cpu" or started_by_torchrun():
        return ""
    threads = threads_of(run, Ranks(world_size=run.trainer.devices))
    wanted = threads * run.trainer.devices * at_once
    # One run alone may be given more threads than cores by OMP_NUM_THREADS: the user's own choice.
    if wanted <= cores or (run.trainer.devices == at_once == 1 and not run.trainer.threads):
        return ""
    parts = [
        counted(threads, "thread"),
        *([f"trainer.devices={run.trainer.devices}"] if run.trainer.devices > 1 else []),
        *([f"{at_once} jobs at a time"] if at_once > 1 else []),
    ]
    return (
        f"{' x '.join(parts)} want {wanted} cores, and there are {cores}: all will be slower; "
        "lower trainer.threads, trainer.devices or the number of jobs at a time"
    )


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
