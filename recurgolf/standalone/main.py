"""The exported program: trains one Run, or scores the artifact beside it.

    python train_gpt.py                      the exact Run, into ./retrained_seedN
    torchrun --nproc_per_node=8 train_gpt.py the same on eight ranks
    python train_gpt.py --evaluate           the score of artifact.bin, one JSON object

Where the data are: --data and --tokenizer, else DATA_PATH and TOKENIZER_PATH, else what the Run
says. SEED or --seed changes the seed of the Run.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from recurgolf.artifact import score
from recurgolf.artifact.reader import ArtifactError
from recurgolf.config import ConfigError
from recurgolf.data import DataError, Shards
from recurgolf.log import Log
from recurgolf.run import Run
from recurgolf.standalone.code import known_plan
from recurgolf.standalone.nothing import Nothing
from recurgolf.training.clock import Clock
from recurgolf.training.distributed import Ranks, started_by_torchrun, torchrun_ranks
from recurgolf.training.job import Job
from recurgolf.training.launch import check_device, threads_of
from recurgolf.training.report import detail_lines, result_lines
from recurgolf.training.trainer import train

if TYPE_CHECKING:
    from recurgolf.training.finish import Outcome
    from recurgolf.training.summary import Summary


def main(data: dict[str, Any], code: dict[str, Any]) -> None:
    """Do what the command line says with the Run that the program carries.

    Args:
        data: the Run, as `Run.from_dict` takes it.
        code: the program whose bytes the run counts; `standalone.code` reads it.
    """
    here = Path(sys.argv[0]).resolve().parent
    parser = argparse.ArgumentParser(
        description="Train the run that this file carries, or score an artifact of it.",
        epilog="defaults of --data, --tokenizer and --seed: DATA_PATH, TOKENIZER_PATH, SEED",
    )
    parser.add_argument("--evaluate", action="store_true", help="score an artifact, train nothing")
    parser.add_argument("--artifact", type=Path, default=here / "artifact.bin")
    parser.add_argument("--data", default=os.environ.get("DATA_PATH"), help="folder of the shards")
    parser.add_argument(
        "--tokenizer", default=os.environ.get("TOKENIZER_PATH"), help="where no manifest names it"
    )
    parser.add_argument("--seed", type=int, default=os.environ.get("SEED"))
    parser.add_argument("--folder", type=Path, help="where a new run goes")
    asked = parser.parse_args()
    try:
        run = changed(Run.from_dict(data), asked.data, asked.tokenizer, asked.seed)
        if asked.evaluate:
            evaluate(run, asked.artifact)
            return
        if run.trainer.devices > 1 and not started_by_torchrun():
            become_ranks(run.trainer.devices)
        folder = asked.folder or Path(f"retrained_seed{run.seed}")
        folder.mkdir(parents=True, exist_ok=True)
        summary = trained(run, folder.resolve())
    except (ConfigError, DataError, ArtifactError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
    sys.exit(0 if summary.within_budget else 3)


def trained(run: Run, folder: Path) -> Summary:
    """Train, pack and score the run, with nothing that looks after it."""
    check_device(run)
    group = torchrun_ranks(run.trainer) if started_by_torchrun() else None
    with group or contextlib.nullcontext(Ranks()) as ranks:
        torch.set_num_threads(threads_of(run, ranks))
        log = Log(folder / "train.log" if ranks.is_first else None, ranks.is_first)
        nothing: Any = Nothing()
        plan: Any = known_plan
        return train(
            Job(
                run,
                folder,
                ranks,
                Clock(),
                log,
                signals=nothing,
                caps=nothing,
                guard=nothing,
                telemetry=nothing,
                report=tell,
                planner=plan,
                tracker=nothing,
            )
        )


def tell(job: Job, summary: Summary, outcome: Outcome) -> None:
    """The summary in its file, and its lines without the table."""
    summary.write(job.folder)
    for text in result_lines(job.run, summary) + detail_lines(summary, job.dataset.anchors):
        job.log.line(text)


def become_ranks(count: int) -> NoReturn:
    """Start again as so many ranks, under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    os.execv(sys.executable, [sys.executable, *torchrun, *sys.argv])


def changed(run: Run, data: str | None, tokenizer: str | None, seed: int | None) -> Run:
    """The Run with other shards or another seed; all else stays."""
    if seed is not None:
        run = dataclasses.replace(run, seed=int(seed))
    if data is None:
        return run
    own = run.data
    shards = Shards(own.vocab_size, tokenizer or own.tokenizer, own.loader, data)
    return dataclasses.replace(run, data=shards)


def evaluate(run: Run, artifact: Path) -> None:
    """Score as `score.py` does."""
    dataset = run.data.prepare()
    tokenizer = str(dataset.tokenizer.path)
    arguments = [str(artifact), "--data", str(dataset.folder), "--tokenizer", tokenizer]
    sys.argv[1:] = arguments
    score.main()
