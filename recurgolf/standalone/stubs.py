"""Short doubles of what watches over a run: the exported program repeats one that went well.

It trains, packs and scores exactly as the run did, but keeps no checkpoints and no curves, and asks
nobody whether to go on. `artifact/programs.py` says which definition each of these stands in for.
Those modules import this one, so it imports them only when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recurgolf.artifact.ledger import Line
    from recurgolf.run import Run
    from recurgolf.training.summary import Summary
    from recurgolf.training.trainer import Trainer


def begin(self: Trainer) -> None:
    """Nothing to continue from."""
    if self.ranks.is_first:
        self.run.write(self.folder)


def nothing(*arguments: Any, **named: Any) -> None:
    """Neither checks nor keeps anything."""


def no_figures(*arguments: Any, **named: Any) -> dict[str, Any]:
    """Measures nothing."""
    return {}


def no_words(*arguments: Any, **named: Any) -> str:
    """Guesses nothing."""
    return ""


def found(key: Any, find: Callable[[], Any]) -> Any:
    """Finds out anew, every time."""
    return find()


def as_it_is(node: Any) -> Any:
    """The program's own Run is of this version."""
    return node


def itself(self: Any, error: Exception) -> Exception:
    """An error in its own words."""
    return error


@contextmanager
def anyway(*arguments: Any, **named: Any) -> Iterator[Any]:
    """No lock, no deferral."""
    yield None


class Signals:
    """A signal ends the program where it stands."""

    heard = None
    listening = deferred = at_once = anyway
    stop_if_heard = nothing


class CapWatch:
    """Foresees nothing; the caps themselves are the clock's."""

    __init__ = expect = nothing


class JsonlTracker:
    """train.log is the record."""

    run_id = location = None
    __init__ = log = summary = log_artifact = finish = nothing


def not_finite(trainer: Trainer, *what: Any) -> str:
    """What happened, without the report."""
    return f"step {trainer.step + 1}: loss or gradient is not finite"


def make_plan(run: Run) -> Any:
    """What the end of a run reads of its plan."""
    from recurgolf.artifact.ledger import predict
    from recurgolf.plan import effective, packed_shapes, shapes_of

    kept = packed_shapes(shapes_of(run))
    lines = predict(kept, run.quant.assign(kept))
    return SimpleNamespace(effective_params=effective(kept, run.plan(1.0)), lines=lines)


def show(trainer: Trainer, summary: Summary, lines: list[Line]) -> None:
    """The result, without the table."""
    from recurgolf.training.report import result_lines

    for text in result_lines(trainer.run, summary, trainer.dataset.anchors):
        trainer.log.line(text)
