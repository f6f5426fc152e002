"""Where the numbers of a run go: always into metrics.jsonl, and to W&B as one more listener.

W&B lives in a process of its own, fed through a bounded queue and a pipe. Its service can be slow,
unreachable, stopped or killed: training neither waits for it nor ends with it, the local record
stays whole, the fact is said once on stderr, and `finish` returns within a stated time. A training
process that dies without a word closes the pipe, and the W&B run is then marked as failed. This is
the only module that imports wandb.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import re
import secrets
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from recurgolf.config import Checked, ConfigError, option
from recurgolf.limits import at_least
from recurgolf.record import (
    AXES,
    JsonlTracker,
    RunIdentity,
    SeveralTrackers,
    Tracker,
    plain,
)

NAME_LENGTH = 128
"""Characters of a name or group in W&B."""
QUEUE_EVENTS = 10_000
"""Events that wait for W&B before further ones are left out of its copy (some megabytes)."""


class WandbTracker(Tracker):
    """A W&B run, kept by a process of its own (`keep_wandb_run`).

    Attributes:
        trouble: what went wrong with W&B, None while nothing did; printed to stderr once.
    """

    def __init__(
        self, start: Mapping[str, Any], *, log_artifact: bool, finish_timeout_seconds: float
    ) -> None:
        """Start the process; returns at once, whether or not W&B can be reached.

        Args:
            start: `init` (arguments of wandb.init) and `settings` (of wandb.Settings).
            log_artifact: whether artifacts are handed on.
            finish_timeout_seconds: `finish` takes at most so long.
        """
        self.run_id = start["init"]["id"]
        self.trouble: str | None = None
        self._log_artifact = log_artifact
        self._finish_timeout_seconds = finish_timeout_seconds
        self._folder: str | None = None
        self._service_pid: int | None = None
        self._done = False
        self._queue: queue.Queue[str | None] = queue.Queue(QUEUE_EVENTS)
        self._process = _spawn_keeper()
        self._threads = [
            threading.Thread(target=target, name=f"wandb-{target.__name__}", daemon=True)
            for target in (self._feed, self._listen)
        ]
        self._send("start", start)
        for thread in self._threads:
            thread.start()

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        # The counter is logged by name as well: W&B's own `_step` cannot be chosen as an axis.
        self._send("log", {"row": {"step": step, **plain(metrics)}, "step": step})

    def summary(self, values: Mapping[str, Any]) -> None:
        self._send("summary", plain(values))

    def log_artifact(
        self, path: Path, name: str, metadata: Mapping[str, Any], *, beside: Sequence[Path] = ()
    ) -> None:
        if self._log_artifact:
            files = [str(file.resolve()) for file in (path, *beside)]
            self._send("artifact", {"files": files, "name": name, "metadata": plain(metadata)})

    def finish(self, exit_code: int = 0, *, within_seconds: float | None = None) -> None:
        if self._done:
            return
        self._done = True
        allowed = self._finish_timeout_seconds if within_seconds is None else within_seconds
        deadline = time.monotonic() + allowed
        for line in (json.dumps(["finish", exit_code]), None):
            with contextlib.suppress(queue.Full):
                # No use in waiting for room where nobody reads any more.
                alive = self._process.poll() is None
                left = max(0.0, deadline - time.monotonic())
                self._queue.put(line, block=alive, timeout=left)
        try:
            self._process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._report(f"did not finish within {allowed:g} s")
            self._kill()
        for thread in self._threads:
            thread.join(1.0)

    def _send(self, verb: str, content: Any) -> None:
        if self._done or self._process.poll() is not None:
            return
        try:
            self._queue.put_nowait(json.dumps([verb, content]))
        except queue.Full:
            self._report("does not keep up; events are missing from its copy of the record")

    def _feed(self) -> None:
        """Thread: from the queue to the process, which may not be reading."""
        pipe = self._process.stdin
        assert pipe is not None
        with contextlib.suppress(OSError):  # its end is seen, and reported, by _listen
            while (line := self._queue.get()) is not None:
                pipe.write(line + "\n")
                pipe.flush()
        with contextlib.suppress(OSError):
            pipe.close()

    def _listen(self) -> None:
        """Thread: what the process answers, to its end."""
        pipe = self._process.stdout
        assert pipe is not None
        ended_well = False
        with pipe:
            for line in pipe:
                verb, content = json.loads(line)
                if verb == "started":
                    url, self._folder, self._service_pid = content
                    self.location = url or self._folder
                elif verb == "trouble":
                    self._report(content)
                ended_well |= verb == "finished"
        code = self._process.wait()
        if not ended_well:
            self._report(f"process ended early (exit code {code})")

    def _report(self, what: str) -> None:
        if self.trouble is None:
            self.trouble = what
            later = f"; what W&B has: wandb sync {self._folder}" if self._folder else ""
            print(
                f"W&B: {what}. The run goes on, its metrics.jsonl is complete{later}",
                file=sys.stderr,
                flush=True,
            )

    def _kill(self) -> None:
        # The service first, while its parent lives and its number is surely its own: a stopped
        # one would outlast us.
        for pid in (self._service_pid, self._process.pid):
            if pid is not None and self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self._process.wait()


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
            if value and own and own != _from_environment(key):
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
        _check_key("tracker=online")

    def _mode(self) -> str:
        return "online"


@option("tracker", "wandb")
@dataclass
class WandbTracking(_WandbTracking):
    """A W&B run as WANDB_MODE has it: offline (also where it is not set), online or disabled."""

    def check_account(self) -> None:
        super().check_account()
        if self._mode() == "online":
            _check_key("WANDB_MODE=online")

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


@dataclass(frozen=True)
class OfflineRun:
    """A W&B run that waits in a run's folder.

    Attributes:
        file: the .wandb file in `folder`.
        synced: whether it was uploaded before.
    """

    folder: Path
    file: Path
    project: str
    entity: str
    run_id: str
    name: str

    @property
    def synced(self) -> bool:
        return self.file.with_name(f"{self.file.name}.synced").exists()

    @property
    def url(self) -> str:
        """Where it will be seen."""
        host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
        host = host.replace("//api.wandb.ai", "//wandb.ai").rstrip("/")
        return f"{host}/{self.entity or 'YOUR-ACCOUNT'}/{self.project}/runs/{self.run_id}"

    def upload(self) -> tuple[bool, str]:
        """Whether it went well; the address, or what W&B said."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "wandb", "sync", str(self.folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        text = re.sub(r"\x1b\[[\d;]*m", "", done.stdout + done.stderr)
        address = re.search(r"https?://\S+/runs/\w+", text)
        if done.returncode == 0:
            return True, address[0] if address else self.url
        return False, (text.strip().splitlines() or ["wandb sync said nothing"])[-1]


def offline_runs(folder: Path) -> list[OfflineRun]:
    """The W&B runs that wait in or below a folder, in order of their paths."""
    found = []
    for file in sorted(folder.glob("**/wandb/offline-run-*/run-*.wandb")):
        run = _run_record(file)
        if run is not None:
            told = (run.project, run.entity, run.run_id, run.display_name)
            found.append(OfflineRun(file.parent, file, *told))
    return found


def _run_record(path: Path) -> Any:
    """What a .wandb file says of its run, which stands in one of its first records.

    The file is LevelDB's log: pieces in blocks of 32 KiB, each behind seven bytes of checksum,
    length and type (1 whole, 2 first, 3 middle, 4 last); the file's own header takes seven more.
    """
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

    block, header = 32768, struct.Struct("<IHB")
    data, at, whole = path.read_bytes(), 7, b""
    while at + header.size <= len(data):
        if block - at % block < header.size:
            at += block - at % block
            continue
        _, length, kind = header.unpack_from(data, at)
        whole += data[at + header.size : at + header.size + length]
        at += header.size + length
        if kind in (1, 4):
            record = Record.FromString(whole)
            if record.WhichOneof("record_type") == "run":
                return record.run
            whole = b""
    return None


def check_key() -> None:
    """Refuse to upload without an account. Raises ConfigError."""
    _check_key("recurgolf sync")


def _check_key(asked: str) -> None:
    import wandb
    from wandb.errors import AuthenticationError
    from wandb.sdk.lib.wbauth import authenticate_session

    remedy = "run `wandb login` (or set WANDB_API_KEY)"
    if asked != "recurgolf sync":
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
    from recurgolf.data.cache import cache_folder  # which the keeper does not need

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


def _spawn_keeper() -> subprocess.Popen[str]:
    """Start `keep_wandb_run` in a session of its own, which Ctrl-C at a terminal does not reach."""
    # Not the service of a W&B run that the user's own program may hold.
    environment = {key: value for key, value in os.environ.items() if key != "WANDB_SERVICE"}
    # The package may lie where the interpreter does not look by itself.
    program = "import sys; sys.path.append(sys.argv[1]); import recurgolf.tracker as t"
    home = str(Path(__file__).resolve().parents[1])
    return subprocess.Popen(
        [sys.executable, "-P", "-c", f"{program}; t.keep_wandb_run()", home],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,
        text=True,
        encoding="utf-8",
    )


def keep_wandb_run() -> None:
    """Hold one W&B run: the main function of the process behind a WandbTracker.

    Reads one JSON array [verb, content] a line from stdin and answers in the same form: `started`
    with address, folder and service pid, `trouble` with a text, `finished`. Ends the process.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end of the pipe decides, not who else dies
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):  # the service inherits these, and would hold the pipes open
        os.dup2(null, number)

    def reply(verb: str, content: Any = None) -> None:
        with contextlib.suppress(OSError):  # nobody listens any more
            print(json.dumps([verb, content]), file=replies)

    service_pid = None
    try:
        import wandb

        run = _open_wandb_run(json.loads(commands.readline())[1], reply)
        service_pid = _service_pid()
        reply("started", [run.url, run.settings.sync_dir, service_pid])
        exit_code = 1  # unless told: whoever trained is gone
        for line in commands:
            verb, content = json.loads(line)
            if verb == "finish":
                exit_code = content
                break
            _VERBS[verb](run, content)
        run.finish(exit_code=exit_code)
        reply("finished")
        wandb.teardown()
    except BaseException as error:
        reply("trouble", f"stopped ({_first_line(error)})")
        if service_pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(service_pid, signal.SIGKILL)
    os._exit(0)  # W&B's exit hook would wait for its service, however dead


def _open_wandb_run(start: dict[str, Any], reply: Any) -> Any:
    """The run that `start` asks for; an offline one where the service does not answer."""
    import wandb
    from wandb.errors import CommError

    try:
        run = wandb.init(**start["init"], settings=wandb.Settings(**start["settings"]))
    except CommError as error:
        wandb.teardown()  # the id counts as taken until then
        offline = {**start["init"], "mode": "offline", "resume": None}
        run = wandb.init(**offline, settings=wandb.Settings(**start["settings"]))
        reply("started", [run.url, run.settings.sync_dir, _service_pid()])
        reply("trouble", f"cannot be reached, recording offline instead ({_first_line(error)})")
    for name in AXES:
        run.define_metric(name)
    return run


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _service_pid() -> int | None:
    """W&B's own process. There is no public way to it; a test fails where this one ends."""
    from wandb.sdk import wandb_setup

    process = wandb_setup.singleton().ensure_service()._proc
    return None if process is None else process._process.pid


def _log(run: Any, content: dict[str, Any]) -> None:
    run.log(content["row"], step=content["step"])


def _summary(run: Any, content: dict[str, Any]) -> None:
    run.summary.update(content)


def _artifact(run: Any, content: dict[str, Any]) -> None:
    import wandb

    name = re.sub(r"[^\w.-]+", "-", content["name"])  # what W&B allows in a name
    artifact = wandb.Artifact(name, type="model", metadata=content["metadata"])
    for file in content["files"]:
        artifact.add_file(file, policy="immutable")  # read where it lies, not copied first
    run.log_artifact(artifact)


_VERBS = {"log": _log, "summary": _summary, "artifact": _artifact}
