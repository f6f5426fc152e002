"""The record of a run: what a tracker is, and the ones that need nothing but a disk.

tracker.py adds W&B, and the options that choose between them.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from recurgolf.disk import writing

AXES = ("step", "tokens", "train_seconds")
"""Counters that any curve can be drawn over; an event without them takes the latest."""


@dataclass(frozen=True)
class RunIdentity:
    """Who a run is, for those who look for it later.

    Attributes:
        name: shown for the run, such as `demo/seed1`.
        group: the experiment; all its seeds share it.
        job_type: `train` or `eval`.
        tags: kinds of the components, such as `looping:cycle`.
        config: the whole Run as plain JSON values.
        run_id: of the run to continue; None starts a new one.
        resumed: whether the events follow those already in the folder.
    """

    name: str
    group: str
    job_type: str = "train"
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    resumed: bool = False


class Tracker:
    """Takes the numbers of one run. As a context manager it is always finished.

    This one records nothing: that of every rank but the first.

    Attributes:
        run_id: to keep in checkpoints, so that a resumed run is the same run.
        location: an address or a folder where the run can be looked at, once it is known.
    """

    run_id: str | None = None
    location: str | None = None

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Record metrics of a step; include `tokens` and `train_seconds` where they are known."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """Record results of the whole run, by name; nested mappings are kept."""

    def log_artifact(
        self, path: Path, name: str, metadata: Mapping[str, Any], *, beside: Sequence[Path] = ()
    ) -> None:
        """Record a file that the run made, with the files that explain it (`run.json`)."""

    def finish(self, exit_code: int = 0, *, within_seconds: float | None = None) -> None:
        """Close the record; a second call does nothing.

        Args:
            exit_code: of the run; anything but 0 marks it as failed.
            within_seconds: return by then, whatever the configured time is.
        """

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        self.finish(_exit_code(error))


class JsonlTracker(Tracker):
    """Appends one JSON object per event to a file, on disk when the call returns.

    Every line has `event` (start, metrics, summary, artifact, finish), `time` (Unix seconds) and
    the latest of `AXES`; metrics stand beside them, other events keep theirs under `values`.
    Non-finite numbers are the strings NaN, Infinity and -Infinity. A line that a crash left
    unfinished is cut off before the first new one.
    """

    def __init__(self, path: Path, *, run_id: str | None = None, resumed: bool = False) -> None:
        self.run_id = run_id
        self.location = str(path)
        self._folder = path.parent
        self._axes: dict[str, float] = {}
        _cut_partial_line(path)
        # One write call a line, in append mode: no half line unless the machine itself stops.
        self._file: IO[bytes] | None = path.open("ab", buffering=0)
        self._write("start", {"values": {"run_id": run_id, "resumed": resumed}})

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        given = {key: plain(value) for key, value in metrics.items()}
        if self._axes.get("step") != step:
            self._axes = {}  # tokens and seconds of another step would be wrong
        self._axes |= {"step": step, **{key: given[key] for key in AXES[1:] if key in given}}
        self._write("metrics", given)

    def summary(self, values: Mapping[str, Any]) -> None:
        self._write("summary", {"values": plain(values)})

    def log_artifact(
        self, path: Path, name: str, metadata: Mapping[str, Any], *, beside: Sequence[Path] = ()
    ) -> None:
        inside = path.is_relative_to(self._folder)  # so that a run's folder can move
        shown = path.relative_to(self._folder) if inside else path
        values = {"path": str(shown), "name": name, "metadata": plain(metadata)}
        self._write("artifact", {"values": values})

    def finish(self, exit_code: int = 0, *, within_seconds: float | None = None) -> None:
        if self._file is not None:
            self._write("finish", {"values": {"exit_code": exit_code}})
            self._file.close()
            self._file = None

    def _write(self, event: str, content: Mapping[str, Any]) -> None:
        assert self._file is not None, "the tracker is finished"
        line = {"event": event, "time": round(time.time(), 3), **self._axes}
        clash = ({"event", "time"} | line.keys() - {*AXES}) & content.keys()
        assert not clash, f"metrics named {sorted(clash)}"
        text = json.dumps({**line, **_finite(content)}, allow_nan=False).encode() + b"\n"
        with writing(Path(self._file.name), len(text)):
            try:
                # A disk with room for a part of it takes that part, and says so at the next call.
                written = self._file.write(text)
                while written < len(text):
                    written += self._file.write(text[written:])
            except OSError:
                # Nothing more can be told, not even the end; who resumes cuts the half line off.
                self._file.close()
                self._file = None
                raise


class SeveralTrackers(Tracker):
    """Hands everything to several trackers, in order; the first names the run."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)
        self.run_id = self.trackers[0].run_id if self.trackers else None

    @property
    def location(self) -> str | None:  # type: ignore[override]
        """Of the last that has one: W&B comes after the local record."""
        return next((t.location for t in reversed(self.trackers) if t.location), None)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        for tracker in self.trackers:
            tracker.log(metrics, step=step)

    def summary(self, values: Mapping[str, Any]) -> None:
        for tracker in self.trackers:
            tracker.summary(values)

    def log_artifact(
        self, path: Path, name: str, metadata: Mapping[str, Any], *, beside: Sequence[Path] = ()
    ) -> None:
        for tracker in self.trackers:
            tracker.log_artifact(path, name, metadata, beside=beside)

    def finish(self, exit_code: int = 0, *, within_seconds: float | None = None) -> None:
        with contextlib.ExitStack() as stack:  # all are finished, even where one of them fails
            for tracker in reversed(self.trackers):
                stack.callback(tracker.finish, exit_code, within_seconds=within_seconds)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The events of a metrics.jsonl, in the order in which they were written.

    A last line without its end, left by a crash, is passed over; NaN and the infinities are floats
    again.

    Raises:
        ValueError: a complete line that is no event, named by file and number.
    """
    events = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                event = _restored(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None
            if not _is_event(event):
                shown = line.decode(errors="replace").strip()
                raise ValueError(f"{path}, line {number}: an event was expected, not {shown:.80}")
            events.append(event)
    return events


def _is_event(event: Any) -> bool:
    """Whether a line has what `history` and those who look at the end of a run ask for."""
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return False
    if event["event"] == "metrics":
        return isinstance(event.get("step"), int)
    needed = {"start": "resumed", "finish": "exit_code"}.get(event["event"])
    values = event.get("values")
    return isinstance(values, dict) and (needed is None or needed in values)


def history(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per step, ascending: the curves, from the events of `read_jsonl`.

    What a resumed run does again replaces what it did before; a run that starts anew in the same
    folder drops what was there.
    """
    rows: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] == "start" and not event["values"]["resumed"]:
            rows = {}
        elif event["event"] == "metrics":
            row = {key: value for key, value in event.items() if key not in ("event", "time")}
            rows.setdefault(event["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


def plain(value: Any) -> Any:
    """A copy made of JSON's types alone: scalars of numpy and torch become Python's."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value.item() if hasattr(value, "item") else str(value)


_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _restored(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _restored(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_restored(item) for item in value]
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def _cut_partial_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        whole = file.read().rfind(b"\n") + 1
        file.truncate(whole)


def _exit_code(error: BaseException | None) -> int:
    """The exit code that Python, or a shell, would give to what ended the run."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    return int(error is not None)
