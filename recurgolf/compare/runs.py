"""Runs found in folders, and the settings in which they differ.

Everything is read from what runs leave in their folders, as plain data: a run of an older version,
or with components that are not installed here, can still be compared.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from recurgolf.config import ConfigError
from recurgolf.disk import DamagedFile, read_json
from recurgolf.folders import walked
from recurgolf.log import counted
from recurgolf.older import modern
from recurgolf.run import fingerprint_of
from recurgolf.seal import audit_state
from recurgolf.settings import NOT_FINGERPRINTED

ABSENT = "-"
"""Stands for a setting that a group does not have, because another kind is chosen there."""
TEXT = "validation text"
"""What sets groups apart that were scored on different texts."""
SKIPPED_FOLDERS = {"checkpoints", "wandb", "scores", ".hydra", "moved_aside", "__pycache__"}
_NEEDED = ("artifact_bytes", "val_tokens", "val_bytes", "steps", "train_seconds")
"""Figures of a summary that every comparison reads, besides val_bpb."""
_MAPPINGS = ("evals", "by_passes", "text", "environment")
_NO_SETTINGS = ("name", "seed", "seeds", "tracker", "plugins")
_NO_PROTOCOL = {"batch_tokens", "passes", "also", "rope_scale", "audit"}
"""Fields of an evaluation that say how the model is run, not what is scored."""


@dataclass(frozen=True)
class FoundRun:
    """A run's folder.

    Attributes:
        config: content of run.json.
        summary: content of summary.json; None where the run has no figures.
        ended: when summary.json was written, Unix seconds.
        status: finished | over_budget | diverged | unfinished.
    """

    folder: Path
    config: Mapping[str, Any]
    summary: Mapping[str, Any] | None
    ended: float = 0.0
    status: str = "unfinished"

    @property
    def name(self) -> str:
        return str(self.config.get("name", self.folder.name))

    @cached_property
    def seed(self) -> str:
        """All of a run's sources of chance: `3`, or `3 data=7` where one has a seed of its own."""
        own = {k: v for k, v in (self.config.get("seeds") or {}).items() if v is not None}
        return " ".join([str(self.config.get("seed")), *(f"{k}={own[k]}" for k in sorted(own))])

    @cached_property
    def settings(self) -> dict[str, str]:
        """Everything in run.json that can change a result, but for chance: `lora.rank` -> `2`."""
        kept = {key: value for key, value in self.config.items() if key not in _NO_SETTINGS}
        with contextlib.suppress(ConfigError):  # an option that is gone is a setting all the same
            kept = modern(kept)
        found = dict(_flat(kept, ""))
        return {
            k: v for k, v in found.items() if k not in {f"trainer.{n}" for n in NOT_FINGERPRINTED}
        }

    @cached_property
    def chosen(self) -> dict[str, str]:
        """The options that the command line named: `quant` -> `int6_tiny`; {} where it is gone."""
        path = self.folder / ".hydra" / "overrides.yaml"
        try:
            told = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError):
            return {}
        pairs = [str(one).partition("=") for one in (told if isinstance(told, list) else [])]
        return {key: value for key, _, value in pairs if key and "." not in key}

    @property
    def text(self) -> dict[str, str]:
        """What was scored: fingerprint of the text, tokenizer; by sizes where they are not told."""
        assert self.summary is not None
        told = self.summary.get("text") or {}
        sizes = f"{self.summary['val_tokens']:,} tokens, {self.summary['val_bytes']:,} bytes"
        return {
            "validation text": told.get("fingerprint") or sizes,
            "tokenizer": told.get("tokenizer") or f"of {self.settings.get('data.vocab_size')}",
        }

    @property
    def scored_text(self) -> str:
        """Fingerprint of the validation text; empty where it is not told."""
        told = (self.summary or {}).get("text")
        return str(told.get("fingerprint", "")) if isinstance(told, Mapping) else ""

    @property
    def protocol(self) -> str:
        """The settings of the headline evaluation that say what is scored: `sliding seq_len=…`."""
        node = dict(self.config.get("eval") or {})
        kind = node.pop("kind", "?")
        node["seq_len"] = node.get("seq_len") or (self.config.get("trainer") or {}).get("seq_len")
        shown = [f"{k}={v}" for k, v in sorted(node.items()) if k not in _NO_PROTOCOL]
        return " ".join([kind, *shown])

    @property
    def audit(self) -> str:
        """What is known of the score: `passed`, `not audited`, `failed: bytes`."""
        return audit_state(self.folder)

    @property
    def hardware(self) -> str:
        """`NVIDIA H100 x 8, bfloat16`: other machines and precisions give other figures."""
        told = (self.summary or {}).get("environment") or {}
        ranks, threads = told.get("ranks", 1), told.get("threads")
        device = str(told.get("device", "unknown machine"))
        many = f" x {ranks}" if ranks != 1 else ""
        on_cpu = (self.config.get("trainer") or {}).get("device") == "cpu"
        of_cpu = f", {counted(threads, 'thread')}" if on_cpu and threads else ""
        return f"{device}{many}{of_cpu}, {told.get('precision', 'unknown precision')}"


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


def find_runs(folders: Iterable[Path], left_out: list[str] | None = None) -> list[FoundRun]:
    """Every run in or below the folders, in order of their paths.

    Args:
        left_out: takes a line for every run with a damaged file; without it that is an error.

    Raises:
        ConfigError: a folder that is not there or has no run in it; nothing but damaged runs.
    """
    found: dict[Path, FoundRun] = {}
    damaged: list[str] = []
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; give folders of runs or sweeps")
        paths = _run_folders(folder)
        if not paths:
            raise ConfigError(f"{folder}: no run in or below it (a run's folder has a run.json)")
        for path in paths:
            try:
                found[path] = read_run(path)
            except DamagedFile as error:
                damaged.append(str(error))
            except FileNotFoundError as error:
                damaged.append(f"{error.filename}: a link to what is not there")
    if damaged and (left_out is None or not found):
        raise ConfigError("; ".join(damaged))
    if left_out is not None:
        left_out += [f"left out: {line}" for line in dict.fromkeys(damaged)]
    return list(found.values())


def read_run(folder: Path) -> FoundRun:
    """A run's folder, finished or not.

    Raises:
        DamagedFile: run.json or summary.json is not what a run writes.
    """
    config = read_json(folder / "run.json")
    for name in ("seeds", "trainer", "eval"):
        if not isinstance(config.get(name) or {}, Mapping):
            raise DamagedFile(f"{folder / 'run.json'} is damaged: {name} is no object")
    path = folder / "summary.json"
    try:
        summary = read_json(path)
    except FileNotFoundError:
        return FoundRun(folder, config, None)
    if stale := foreign_summary(folder):
        print(f"{folder}: {stale}: left out", file=sys.stderr)
        return FoundRun(folder, config, None)
    if _diverged(summary):
        return FoundRun(folder, config, None, status="diverged")
    if (folder / "failure.txt").exists():  # of a later attempt; the summary is of an earlier one
        return FoundRun(folder, config, None)
    _check_summary(path, summary)
    status = str(summary.get("status", "finished"))
    return FoundRun(folder, config, summary, path.stat().st_mtime, status)


def foreign_summary(folder: Path) -> str:
    """What is wrong where summary.json is not of the run in run.json; empty where it is."""
    try:
        told = read_json(folder / "summary.json")["fingerprint"]
        own = fingerprint_of(read_json(folder / "run.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""  # absent, damaged or of another version: told by who reads it
    return "" if told == own else f"its summary.json is of another run ({told}, run.json: {own})"


def _diverged(summary: Mapping[str, Any]) -> bool:
    """Earlier versions wrote NaN as the score of such a run and called it finished."""
    told = summary.get("status")
    return told == "diverged" or (told is not None and summary.get("val_bpb", 0) is None)


def _check_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Refuse a summary that figures cannot be taken from."""
    for name in ("val_bpb", *_NEEDED):
        if not is_figure(summary.get(name)):
            raise DamagedFile(f"{path} is damaged: {name} is {summary.get(name)!r:.40}")
    for name in _MAPPINGS:
        if not isinstance(summary.get(name) or {}, Mapping):
            raise DamagedFile(f"{path} is damaged: {name} is no object")
    if not all(isinstance(entry, Mapping) for entry in (summary.get("evals") or {}).values()):
        raise DamagedFile(f"{path} is damaged: an entry of evals is no object")
    if not isinstance(summary.get("within_budget"), bool):
        raise DamagedFile(f"{path} is damaged: within_budget is neither true nor false")


def is_figure(value: Any) -> bool:
    """Whether something read from a file is a finite number."""
    return type(value) in (int, float) and math.isfinite(value)


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
    """`1-5` or `1,2,9` as a list of seeds.

    Raises:
        ConfigError: anything else.
    """
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


def _run_folders(folder: Path) -> list[Path]:
    here = walked(folder, SKIPPED_FOLDERS)
    found = [path.resolve() for path, files in here if "run.json" in files]
    return sorted(found, key=lambda path: [numeric(part) for part in path.parts])


def _flat(node: Mapping[str, Any], path: str) -> Iterable[tuple[str, str]]:
    for key, value in node.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, Mapping):
            if "kind" in value:
                yield here, str(value["kind"])
            yield from _flat({k: v for k, v in value.items() if k != "kind"}, here)
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            yield from _flat({str(n): item for n, item in enumerate(value)}, here)
        else:
            yield here, value if isinstance(value, str) else json.dumps(value)


def _without_seed(overrides: Iterable[str]) -> tuple[str, ...]:
    return tuple(o for o in overrides if not o.startswith(("seed=", "seeds.")))


def numeric(text: str) -> tuple[tuple[int, str], ...]:
    """Sorts 9 before 10."""
    return tuple(
        (int(part or -1) if part.isdigit() else -1, part) for part in re.split(r"(\d+)", text)
    )


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
