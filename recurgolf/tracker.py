"""Where the numbers of a run go: always into metrics.jsonl, and to W&B as one more listener.

W&B lives in a process of its own, fed through a bounded queue and a pipe. Its service can be slow,
unreachable, stopped or killed: training neither waits for it nor ends with it, the local record
stays whole, the fact is said once on stderr, and `finish` returns within a stated time. A training
process that dies without a word closes the pipe, and the W&B run is then marked as failed. Here are
the options; `wandb_tracker.py` has both ends of the pipe. These two and `wandb_offline.py` are the
only importers of wandb.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import secrets
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from recurgolf.config import Checked, ConfigError, option
from recurgolf.data.cache import cache_folder
from recurgolf.limits import at_least
from recurgolf.record import (
    JsonlTracker,
    RunIdentity,
    SeveralTrackers,
    Tracker,
    plain,
)
from recurgolf.wandb_tracker import WandbTracker

NAME_LENGTH = 128
"""Characters of a name or group in W&B."""


@dataclass
class Tracking(Checked):
    """Which trackers a run has, besides metrics.jsonl."""

    def in_sweep(self, group: str, varied: str) -> Tracking:
        """The same for a job of a sweep, whose seeds share a group.

        Args:
            varied: the job's own values of what the sweep varies: `lora.rank=2 seed=1`.
        """
        return self

    def told(self) -> list[str]:
        """Lines that say which variables of the environment are used, and which are not."""
        return []

    def group_of(self, name: str) -> str:
        """The group of a run by its name."""
        return name

    def check_account(self) -> None:
        """Refuse to train where this machine has no account to log to. Raises ConfigError.

        Not when it is built, because a finished run may be read where there is none.
        """

    def build(self, identity: RunIdentity, folder: Path) -> Tracker:
        """Open the record of a run in its folder (which must exist); rank 0 only."""
        self.check_account()
        run_id = identity.run_id or _id_from_environment() or secrets.token_hex(4)
        local = JsonlTracker(folder / "metrics.jsonl", run_id=run_id, resumed=identity.resumed)
        return SeveralTrackers([local, *self._listeners(identity, folder, run_id)])

    def _listeners(self, identity: RunIdentity, folder: Path, run_id: str) -> list[Tracker]:
        return []


@option("tracker", "none")
@dataclass
class NoTracking(Tracking):
    """The local record alone."""


@dataclass
class _WandbTracking(Tracking):
    """What a W&B run needs, with or without a network; subclasses say which."""

    project: str | None = None
    """null: WANDB_PROJECT, else recurgolf."""
    entity: str | None = None
    """User or team; null: the default of the account."""
    name: str | None = None
    """null: WANDB_NAME, else the group and the seed. In a sweep what a job varies follows."""
    group: str | None = None
    """What seeds share; null: WANDB_RUN_GROUP, else the run's name and what a sweep varies."""
    tags: list[str] = field(default_factory=list)
    """Besides the kinds of the parts, such as looping:cycle; []: those of WANDB_TAGS (a,b)."""
    notes: str | None = None
    """null: WANDB_NOTES."""
    job_type: str | None = None
    """null: WANDB_JOB_TYPE, else train."""
    sweep: str | None = None
    """What a sweep varies, as the key `sweep` of W&B's config; a sweep sets it itself."""
    system: bool = False
    """Let W&B measure processor, memory and GPU while the run goes on."""
    log_artifact: bool = False
    """Hand the packed file and run.json to W&B as an artifact."""
    init_timeout_seconds: Annotated[float, at_least(1)] = 60.0
    """After so long without an answer the run is recorded offline. Training does not wait."""
    finish_timeout_seconds: Annotated[float, at_least(1)] = 30.0
    """At the end of a run W&B has so long to write or upload the rest."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.project is not None:
            _check_project("tracker.project", self.project)

    def check_account(self) -> None:
        # Not when it is built: a finished run can be read in any environment.
        if self.project is None and (project := os.environ.get("WANDB_PROJECT")):
            _check_project("WANDB_PROJECT", project)

    def in_sweep(self, group: str, varied: str) -> Tracking:
        name = self._chosen("name")
        return dataclasses.replace(
            self,
            group=self._chosen("group") or group,
            name=f"{name} {varied}" if name else None,
            sweep=self.sweep or varied,
        )

    def group_of(self, name: str) -> str:
        return self._chosen("group") or name

    def _chosen(self, key: str) -> Any:
        """A setting: its own value, else that of the environment, else None."""
        return getattr(self, key) or _from_environment(key) or None

    def told(self) -> list[str]:
        lines = []
        for key, variable in ENVIRONMENT.items():
            value, own = os.environ.get(variable), getattr(self, key)
            # In a sweep what a job varies stands behind the name.
            used = (_from_environment(key), f"{value} {self.sweep}")
            if value and own and own not in used:
                lines.append(f"W&B: {variable}={value} is not used: tracker.{key}={own}")
            elif value:
                lines.append(f"W&B: {variable}={value} is used")
        return lines

    def _mode(self) -> str:
        raise NotImplementedError

    def _listeners(self, identity: RunIdentity, folder: Path, run_id: str) -> list[Tracker]:
        mode = self._mode()
        if mode == "disabled":
            return []
        config = {**identity.config, **({"sweep": self.sweep} if self.sweep else {})}
        git = git_state()
        init = {
            "project": self._chosen("project") or "recurgolf",
            "entity": self.entity,
            "id": run_id,
            "name": _short(self._chosen("name") or identity.name),
            "group": _short(identity.group),
            "job_type": self._chosen("job_type") or identity.job_type,
            "notes": self._chosen("notes"),
            "tags": list(dict.fromkeys([*identity.tags, *(self._chosen("tags") or [])])),
            "config": plain({**config, **({"git": git} if git else {})}),
            "dir": str(folder.resolve()),
            "mode": mode,
            "resume": "allow" if identity.run_id else None,
        }
        settings = {
            "silent": True,
            "console": "off",
            "disable_git": True,
            "save_code": False,
            "x_disable_stats": not self.system,
            "program": sys.argv[0],
            "init_timeout": self.init_timeout_seconds,
            # W&B gives up by itself, in good order, before it is made to.
            "finish_timeout": 0.7 * self.finish_timeout_seconds,
            "finish_timeout_raises": True,
            # So long may the offline file lie behind when everything is killed.
            "x_transaction_log_flush_interval": 2.0,
        }
        return [
            WandbTracker(
                {"init": init, "settings": settings},
                log_artifact=self.log_artifact,
                finish_timeout_seconds=self.finish_timeout_seconds,
            )
        ]


@option("tracker", "offline")
@dataclass
class OfflineTracking(_WandbTracking):
    """A W&B run in the run's own folder: `wandb leet` shows it, `wandb sync` uploads it."""

    def _mode(self) -> str:
        return "offline"


@option("tracker", "online")
@dataclass
class OnlineTracking(_WandbTracking):
    """A W&B run that is uploaded while it trains."""

    def check_account(self) -> None:
        super().check_account()
        check_key("tracker=online")

    def _mode(self) -> str:
        return "online"


@option("tracker", "wandb")
@dataclass
class WandbTracking(_WandbTracking):
    """A W&B run as WANDB_MODE has it: offline (also where it is not set), online or disabled."""

    def check_account(self) -> None:
        super().check_account()
        if self._mode() == "online":
            check_key("WANDB_MODE=online")

    def told(self) -> list[str]:
        mode = os.environ.get("WANDB_MODE")
        return [*([f"W&B: WANDB_MODE={mode} is used"] if mode else []), *super().told()]

    def _mode(self) -> str:
        asked = os.environ.get("WANDB_MODE") or "offline"
        mode = {"dryrun": "offline", "run": "online"}.get(asked, asked)
        if mode not in ("offline", "online", "disabled"):
            raise ConfigError(f"WANDB_MODE={asked}: offline, online or disabled")
        return mode


ENVIRONMENT = {
    "project": "WANDB_PROJECT",
    "name": "WANDB_NAME",
    "group": "WANDB_RUN_GROUP",
    "tags": "WANDB_TAGS",
    "notes": "WANDB_NOTES",
    "job_type": "WANDB_JOB_TYPE",
}
"""Field of the tracker -> the variable that counts where the field is not set."""


def _check_project(whose: str, project: str) -> None:
    """Refuse a name of a project that W&B would refuse later. Raises ConfigError."""
    if not project or set(project) & set('/\\#?%:"'):
        raise ConfigError(f"{whose}={project!r}: a name without any of / \\ # ? % : and quotes")


def _from_environment(key: str) -> Any:
    text = os.environ.get(ENVIRONMENT[key], "").strip()
    if key == "tags":
        return [tag.strip() for tag in text.split(",") if tag.strip()]
    return text


def git_state() -> dict[str, Any]:
    """Commit of the working folder's repository, and whether files differ from it; {}: none."""

    def asked(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], capture_output=True, text=True, timeout=5, check=True
        )
        return done.stdout.strip()

    try:
        dirty = bool(asked("status", "--porcelain", "--untracked-files=no"))
        return {"commit": asked("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.SubprocessError):
        return {}


def check_key(asked: str) -> None:
    """Refuse to upload without an account."""
    import wandb
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import authenticate_session

    remedy = "run `wandb login` (or set WANDB_API_KEY)"
    if asked != "sync":
        remedy += ", or use tracker=offline"
    try:
        host = wandb.setup().settings.base_url
        found = authenticate_session(
            host=host, source="recurgolf", prompt=False, update_session=False
        )
    except AuthenticationError as error:
        raise ConfigError(f"{asked}: {error}; {remedy}") from None
    if found is None:
        raise ConfigError(f"{asked}: there is no API key for {host}; {remedy}")


def _id_from_environment() -> str | None:
    """WANDB_RUN_ID, for the first run that asks for it: others would be merged into that one.

    A W&B sweep agent sets it for the run that it starts; notebooks and job scripts pass it on to
    any number. Who was first is noted among the user's caches, since the others may run anywhere.
    """
    run_id = os.environ.get("WANDB_RUN_ID")
    if not run_id:
        return None
    claims = cache_folder() / "wandb_ids"
    try:
        claims.mkdir(parents=True, exist_ok=True)
        (claims / hashlib.sha256(run_id.encode()).hexdigest()).touch(exist_ok=False)
    except OSError:
        return None
    return run_id


def _short(text: str) -> str:
    """What W&B takes as a name; a long one ends with what tells it from others."""
    if len(text) <= NAME_LENGTH:
        return text
    end = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{text[: NAME_LENGTH - 9]}~{end}"
