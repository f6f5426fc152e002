"""Runs that differ in nothing but their seed, and the settings by which such groups are called."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recurgolf.compare.runs import FoundRun, numeric
from recurgolf.config import ConfigError
from recurgolf.disk import DamagedFile, read_json
from recurgolf.overrides import is_seed

ABSENT = "-"
"""Stands for a setting that a group does not have, because another kind is chosen there."""
TEXT = "validation text"
"""What sets groups apart that were scored on different texts."""


@dataclass
class Group:
    """Runs that differ in nothing but their seed.

    Attributes:
        differs: setting -> value, for what differs between the groups.
        telling: as few of those settings as tell every group from every other.
        runs: finished, one per seed, by seed.
        unfinished: those without figures, also what diverged.
        repeated: finished runs of a seed that a newer run of the same settings replaced.
        left_out: finished runs of seeds that were not declared.
        declared: seeds that were said beforehand, where they are known.
        title: the label, where it does not follow from `differs`.
    """

    differs: dict[str, str]
    runs: list[FoundRun] = field(default_factory=list)
    unfinished: list[FoundRun] = field(default_factory=list)
    repeated: list[FoundRun] = field(default_factory=list)
    left_out: list[FoundRun] = field(default_factory=list)
    declared: list[str] = field(default_factory=list)
    telling: list[str] = field(default_factory=list)
    title: str = ""

    @property
    def shortened(self) -> bool:
        """Whether the label leaves out settings that differ."""
        parts = [f"{key}={value}" for key, value in self.differs.items() if value != ABSENT]
        return len(parts) > 4 or len(" ".join(parts)) > 90

    @property
    def words(self) -> set[str]:
        """What it may be called by: `lora.rank=2`, of every setting that its runs have."""
        own = next(iter([*self.runs, *self.unfinished]), None)
        settings = {**(own.settings if own else {}), **self.differs}
        return {f"{key}={value}" for key, value in settings.items()}

    @property
    def label(self) -> str:
        """What sets the group apart: `lora.rank=2`; where that would be long, its name and as much
        of it as tells the groups apart. No two groups share a label."""
        if self.title:
            return self.title
        parts = [f"{key}={value}" for key, value in self.differs.items() if value != ABSENT]
        some = [*self.runs, *self.unfinished, *self.left_out][0].name
        if not parts:
            return some
        if not self.shortened:
            return " ".join(parts)
        return " ".join([some, *(f"{key}={self.differs[key]}" for key in self.telling)])

    @property
    def seeds(self) -> list[str]:
        return [run.seed for run in self.runs]

    @property
    def diverged(self) -> int:
        """How many of its runs diverged; they are among the unfinished."""
        return sum(run.status == "diverged" for run in self.unfinished)

    @property
    def missing_seeds(self) -> list[str]:
        return [seed for seed in self.declared if seed not in self.seeds]

    @property
    def extra_seeds(self) -> list[str]:
        found = [*self.seeds, *(run.seed for run in self.left_out)]
        return [seed for seed in found if seed not in self.declared] if self.declared else []

    def values(self, name: str) -> list[float]:
        """A figure of the summaries, by seed."""
        return [float(run.summary[name]) for run in self.runs if run.summary is not None]

    def spread(self, name: str) -> tuple[float, float | None]:
        """Mean and deviation over seeds of a figure of the summaries."""
        return spread(self.values(name))

    @property
    def over_budget(self) -> int:
        """How many finished runs made a file larger than the budget."""
        return sum(not run.summary["within_budget"] for run in self.runs if run.summary)

    def told(self, name: str) -> list[str]:
        """The different values of a property such as `hardware`, in order of appearance."""
        return list(dict.fromkeys(str(getattr(run, name)) for run in self.runs))


def spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample deviation; one value has none."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def grouped(runs: Sequence[FoundRun], by_text: bool = False) -> list[Group]:
    """Runs by everything but the seed, in order of appearance.

    A setting that a run does not have, because another kind is chosen there or because it was made
    by an older version, sets no group apart by itself.

    Args:
        by_text: keep apart runs that were scored on different texts.
    """
    texts = {run.scored_text for run in runs if run.summary is not None}
    differing = differing_settings([run.settings for run in runs])
    groups: dict[tuple[str, ...], Group] = {}
    for run in runs:
        key = tuple(run.settings.get(path, ABSENT) for path in differing)
        own = dict(zip(differing, key, strict=True))
        if by_text and len(texts) > 1:
            own[TEXT] = ABSENT if run.summary is None else run.scored_text[:12]
            key = (*key, run.scored_text)
        group = groups.setdefault(key, Group(own))
        (group.unfinished if run.summary is None else group.runs).append(run)
    telling = telling_settings([group.differs for group in groups.values()])
    for group in groups.values():
        group.telling = telling
    _name_by_the_finished(list(groups.values()))
    name_by_options(list(groups.values()))
    for group in groups.values():
        _one_run_a_seed(group)
        group.unfinished = [run for run in group.unfinished if run.seed not in group.seeds]
        group.declared = declared_seeds([*group.runs, *group.unfinished])
    return list(groups.values())


def _name_by_the_finished(groups: Sequence[Group]) -> None:
    """Leave out of labels what sets finished settings apart only from runs that failed."""
    done = [group for group in groups if group.runs]
    if len(done) in (0, 1, len(groups)):
        return
    keys = differing_settings([group.differs for group in done])
    for group in done:
        group.differs = {key: group.differs[key] for key in keys}
    telling = telling_settings([group.differs for group in done])
    for group in done:
        group.telling = telling


def name_by_options(groups: Sequence[Group]) -> None:
    """Say `quant=int6_tiny` for what that option alone makes different, where all were asked for
    by the name of an option."""
    groups = [group for group in groups if group.runs] or groups
    if len(groups) < 2:
        return
    asked = [
        dict(set.intersection(*(set(run.chosen.items()) for run in (*g.runs, *g.unfinished))))
        for g in groups
    ]
    for key in [key for key in asked[0] if all(key in one for one in asked)]:
        names, path = [one[key] for one in asked], key.replace("/", ".")
        below = [k for k in groups[0].differs if f"{k}.".startswith(f"{path}.")]
        follow = [
            k
            for k in below
            if len({(name, g.differs.get(k)) for name, g in zip(names, groups, strict=True)})
            == len(set(names))
        ]
        if not follow or (path in below and path not in follow):
            continue
        for name, group in zip(names, groups, strict=True):
            renamed = {key if k == follow[0] else k: v for k, v in group.differs.items()}
            group.differs = {k: v for k, v in renamed.items() if k == key or k not in follow}
            group.differs[key] = name
    apart = len({tuple(group.differs.items()) for group in groups}) == len(groups)
    telling = telling_settings([group.differs for group in groups]) if apart else []
    for group in groups:
        # A baseline's folder may have the settings of another group.
        group.telling = telling or [key for key in group.telling if key in group.differs]


def telling_settings(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Few keys whose values together are different for all; what splits most comes first."""
    chosen: list[str] = []

    def kinds(keys: Sequence[str]) -> int:
        return len({tuple(one[key] for key in keys) for one in settings})

    while settings and kinds(chosen) < len(settings):
        chosen.append(max(settings[0], key=lambda key: kinds([*chosen, key])))
    return chosen


def differing_settings(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Keys with more than one value among those that have them, in the order of run.json."""
    values: dict[str, set[str]] = {}
    for one in settings:
        for key, value in one.items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def declared_seeds(runs: Sequence[FoundRun]) -> list[str]:
    """Seeds that the sweeps of these runs set out to do, by their sweep.json; [] where unknown."""
    seeds: list[str] = []
    for path in sorted({run.folder.parent / "sweep.json" for run in runs}):
        jobs = _jobs(path)
        own = [job for job in jobs if any(Path(job["folder"]).name == r.folder.name for r in runs)]
        kinds = {_without_seed(job["overrides"]) for job in own}
        seeds += [
            override.partition("=")[2]
            for job in jobs
            if _without_seed(job["overrides"]) in kinds
            for override in job["overrides"]
            if override.startswith("seed=")
        ]
    return sorted(set(seeds), key=numeric)


def seed_list(text: str) -> list[str]:
    """`1-5` or `1,2,9` as a list of seeds."""
    seeds: list[str] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f"--seeds {text!r}: a list such as 1-5 or 1,2,9")
        seeds += map(str, range(int(match[1]), int(match[2] or match[1]) + 1))
    return seeds


def _one_run_a_seed(group: Group) -> None:
    """Keep the newest run of every seed: the same seed twice is no second observation."""
    newest: dict[tuple[str, str], FoundRun] = {}
    for run in sorted(group.runs, key=lambda run: run.ended):
        # On another text it is another observation, and `compare` says that texts differ.
        key = (run.seed, run.scored_text)
        if key in newest:
            group.repeated.append(newest[key])
        newest[key] = run
    group.runs = sorted(newest.values(), key=lambda run: numeric(run.seed))


def _without_seed(overrides: Iterable[str]) -> tuple[str, ...]:
    return tuple(o for o in overrides if not is_seed(o))


def _jobs(path: Path) -> list[dict[str, Any]]:
    """The jobs in a sweep.json; none where it is damaged, for nothing but a remark hangs on it."""
    try:
        jobs = read_json(path).get("jobs")
    except (FileNotFoundError, DamagedFile):
        return []
    return [
        job
        for job in (jobs if isinstance(jobs, list) else [])
        if isinstance(job, dict)
        and isinstance(job.get("folder"), str)
        and isinstance(job.get("overrides"), list)
        and all(isinstance(override, str) for override in job["overrides"])
    ]
