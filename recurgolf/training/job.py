"""What a run is done with. Nothing here changes while training goes on; what does is a TrainState.

A job is made in two ways: `Job.watched` has everything that looks after a run, and the exported
program (`standalone/main.py`) gives null objects in those places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from recurgolf.artifact.score import text_of
from recurgolf.data import Dataset
from recurgolf.data.cache import cache_folder
from recurgolf.disk import writing
from recurgolf.eval import ScoredModel, Text
from recurgolf.log import Log
from recurgolf.plan import Plan, make_plan
from recurgolf.record import Tracker
from recurgolf.run import Run
from recurgolf.terminal import terminal_bar
from recurgolf.training.clock import Caps, Clock
from recurgolf.training.distributed import Ranks
from recurgolf.training.guard import Guard
from recurgolf.training.report import full_report
from recurgolf.training.signals import Signals
from recurgolf.training.telemetry import curves

if TYPE_CHECKING:
    from recurgolf.training.report import Outcome
    from recurgolf.training.summary import Summary


class Job:
    """A run, where it happens, and what looks after it.

    Attributes:
        guard: keeps checkpoints, finds what to resume from, explains errors.
        telemetry: the `loop/...` figures of a moment; see `telemetry.curves`.
        report: what a finished run leaves and says beyond its file and its score.
        planner: predicts the bytes of a run and knows the code that counts.
        known_as: the folder's name in the end, where this one is a draft.
        tracker, precision: set once, when it is known what the run continues from.
    """

    # Not a dataclass: the types of its fields would all be packed into the exported program.
    def __init__(
        self,
        run: Run,
        folder: Path,
        ranks: Ranks,
        clock: Clock,
        log: Log,
        *,
        signals: Signals,
        caps: Caps,
        guard: Guard,
        telemetry: Callable[..., Mapping[str, float]],
        report: Callable[[Job, Summary, Outcome], None],
        planner: Callable[[Run], Plan],
        tracker: Tracker,
        known_as: Path | None = None,
    ):
        self.run, self.folder, self.known_as = run, folder, known_as or folder
        self.ranks, self.clock, self.log = ranks, clock, log
        self.signals, self.caps, self.guard = signals, caps, guard
        self.telemetry, self.report, self.planner = telemetry, report, planner
        self.tracker, self.precision = tracker, "float32"

    @classmethod
    def watched(
        cls,
        run: Run,
        folder: Path,
        ranks: Ranks | None = None,
        signals: Signals | None = None,
        log: Log | None = None,
        known_as: Path | None = None,
    ) -> Job:
        """A job with everything that looks after a run; without ranks, one process alone."""
        ranks, clock = ranks or Ranks(), Clock()
        log = log or run_log(folder, ranks.is_first)
        return cls(
            run,
            folder,
            ranks,
            clock,
            log,
            signals=signals or Signals(),
            caps=Caps(run.budget, clock, log.line),
            guard=Guard(),
            telemetry=curves,
            report=full_report,
            planner=make_plan,
            tracker=Tracker(),
            known_as=known_as,
        )

    @cached_property
    def device(self) -> torch.device:
        """This rank's; `launch.check_device` has refused a GPU that is not there."""
        if self.run.trainer.device != "cuda" or not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", self.ranks.local_rank)
        torch.cuda.set_device(device)
        return device

    @cached_property
    def dataset(self) -> Dataset:
        """The data, prepared when first asked for. Collective then."""
        # Rank 0 fills the cache before the others look into it.
        if not self.ranks.is_first:
            self.ranks.barrier()
        with writing(cache_folder()):
            dataset = self.run.data.prepare(self.log.line)
        if self.ranks.is_first:
            self.ranks.barrier()
        return dataset

    @cached_property
    def text(self) -> Text:
        """The validation text."""
        return text_of(self.dataset)

    @cached_property
    def plan(self) -> Plan:
        """Predicted bytes, and the programs of the run; packed when they are asked for."""
        return self.planner(self.run)

    def axes(self, step: int) -> dict[str, float]:
        """The x-axes that stand on every event of the tracker."""
        return {
            "tokens": step * self.run.trainer.batch_tokens,
            "train_seconds": round(self.clock.elapsed("training"), 3),
        }

    def scored(self, model: Any) -> ScoredModel:
        """A model of this run, on its device, as protocols see it."""
        run = self.run
        return ScoredModel(model.to(self.device), run.looping, run.trainer.seq_len, self.device)


def run_log(folder: Path, first: bool, shown: str = "lines") -> Log:
    """The log of a rank.

    Args:
        shown: on the first one's console: `lines`, a `bar` alone (lines only in train.log),
            or `nothing`.
    """
    if not first:
        return Log(None, console=False)
    bar = terminal_bar if shown != "nothing" else None
    return Log(folder / "train.log", console=shown == "lines", bar=bar)


__all__ = ["Job"]
