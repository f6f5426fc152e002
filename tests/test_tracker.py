"""W&B as a listener: its files hold what was logged, and no trouble with it stops a run."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command_line import recurgolf
from wandb_file import read_wandb

from recurgolf import compose
from recurgolf.config import REGISTRY, ConfigError, from_dict, to_dict
from recurgolf.record import history, read_jsonl
from recurgolf.tracker import (
    OfflineTracking,
    OnlineTracking,
    RunIdentity,
    Tracking,
    WandbTracker,
    WandbTracking,
)
from recurgolf.verbs import sync

CONF = Path(__file__).resolve().parents[1] / "conf" / "tracker"


def identity(seed: int = 1, **fields) -> RunIdentity:
    config = {"seed": seed, "looping": {"kind": "cycle", "passes": 3}}
    tags = ["looping:cycle", "quant:int6"]
    return RunIdentity(f"demo/seed{seed}", "demo", tags=tags, config=config, **fields)


def wandb_of(tracker) -> WandbTracker:
    return next(t for t in tracker.trackers if isinstance(t, WandbTracker))


def wandb_file(folder: Path) -> Path:
    return next(folder.glob("wandb/*run-*/run-*.wandb"))


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_every_option_has_a_yaml_and_survives_a_round_trip():
    kinds = REGISTRY["tracker"]
    assert {path.stem for path in CONF.glob("*.yaml")} == set(kinds)
    for kind, cls in kinds.items():
        text = (CONF / f"{kind}.yaml").read_text()
        assert text.startswith("# recurgolf ") and f"/schema/tracker/{kind}@_here_" in text
        assert from_dict(Tracking, to_dict(cls())) == cls()


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory):
    """Two seeds tracked one after the other by one process, as a multirun does."""
    base = tmp_path_factory.mktemp("sweep")
    for seed in (1, 2):
        folder = base / f"seed{seed}"
        folder.mkdir()
        packed = folder / "artifact.bin"
        packed.write_bytes(b"weights")
        (folder / "run.json").write_text("{}")
        with OfflineTracking(log_artifact=True).build(identity(seed), folder) as tracker:
            for step in range(1, 401):
                metrics = {"train/loss": 5.0 / step + seed, "tokens": 2048 * step}
                tracker.log({**metrics, "train_seconds": step / 8}, step=step)
            tracker.log({"val/bpb": 1.5, "val/bad": math.nan}, step=400)
            tracker.summary({"val_bpb": 1.25 + seed, "artifact_bytes": 1000 + seed})
            tracker.summary({"evals": {"plain": {"val_bpb": 1.25}}})
            tracker.log_artifact(packed, "demo/seed1", {"a": 1}, beside=[folder / "run.json"])
        assert wandb_of(tracker).trouble is None
        assert tracker.location and Path(tracker.location).parent == folder / "wandb"
    return base


def test_two_seeds_are_two_runs_of_one_group_with_their_results(two_runs):
    runs = [read_wandb(wandb_file(two_runs / f"seed{seed}")) for seed in (1, 2)]
    assert runs[0].run.run_id != runs[1].run.run_id
    for seed, found in zip((1, 2), runs, strict=True):
        assert (found.run.project, found.run.run_group) == ("recurgolf", "demo")
        assert (found.run.job_type, found.run.display_name) == ("train", f"demo/seed{seed}")
        assert list(found.run.tags) == ["looping:cycle", "quant:int6"]
        assert found.config["seed"] == seed
        assert found.config["looping"] == {"kind": "cycle", "passes": 3}
        assert found.summary["val_bpb"] == 1.25 + seed
        assert found.summary["artifact_bytes"] == 1000 + seed
        assert found.exit_code == 0
        assert found.metrics >= {"step", "tokens", "train_seconds"}
        names = [sorted(e.path for e in a.manifest.contents) for a in found.artifacts]
        assert names == [["artifact.bin", "run.json"]]


def test_wandb_and_the_local_record_hold_the_same_curves(two_runs):
    folder = two_runs / "seed2"
    mine = history(read_jsonl(folder / "metrics.jsonl"))
    theirs = read_wandb(wandb_file(folder)).history
    assert len(mine) == len(theirs) == 400
    for row, other in zip(mine, theirs, strict=True):
        assert {key: other[key] for key in row if key != "val/bad"} == {
            key: value for key, value in row.items() if key != "val/bad"
        }
        assert other["_step"] == row["step"]
    assert math.isnan(mine[-1]["val/bad"]) and math.isnan(float(theirs[-1]["val/bad"]))


@pytest.mark.skipif(
    not (Path(sys.executable).parent / "wandb").exists(), reason="the wandb command is not there"
)
def test_wandbs_own_inspector_sees_what_our_reader_sees(two_runs):
    path = wandb_file(two_runs / "seed1")
    inspect = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json"]
    told = subprocess.run([*inspect, str(path)], capture_output=True, text=True, check=True)
    records = [json.loads(line) for line in told.stdout.splitlines() if line.startswith("{")]
    rows = [r["history"]["item"] for r in records if r["type"] == "history"]
    found = read_wandb(path)
    assert [row["train/loss"] for row in rows] == [row["train/loss"] for row in found.history]
    short = subprocess.run(
        [*inspect, "--summary", str(path)], capture_output=True, text=True, check=True
    )
    summary = json.loads(short.stdout)
    assert summary["summary"]["val_bpb"] == found.summary["val_bpb"]
    assert summary["exit_code"] == found.exit_code


VARIABLES = {
    "WANDB_PROJECT": "golf",
    "WANDB_NAME": "from outside",
    "WANDB_RUN_GROUP": "wide",
    "WANDB_TAGS": "a, b",
}


def test_explicit_settings_win_over_the_environment_and_that_over_the_default(
    tmp_path, monkeypatch
):
    for variable, value in VARIABLES.items():
        monkeypatch.setenv(variable, value)
    explicit = {"project": "mine", "name": "one", "group": "narrow", "tags": ["c"]}
    for case, fields in (("environment", {}), ("explicit", explicit)):
        folder = tmp_path / case
        folder.mkdir()
        options = OfflineTracking(notes="why", job_type="probe", **fields)
        who = dataclasses.replace(identity(), group=options.group_of("demo"))
        options.build(who, folder).finish()
        run = read_wandb(wandb_file(folder)).run
        told = (run.project, run.display_name, run.run_group, list(run.tags)[2:])
        assert (run.notes, run.job_type) == ("why", "probe")
        assert list(run.tags)[:2] == ["looping:cycle", "quant:int6"]
        if fields:
            assert told == ("mine", "one", "narrow", ["c"])
            assert all(" is not used: tracker." in line for line in options.told())
        else:
            assert told == ("golf", "from outside", "wide", ["a", "b"])
            used = [f"W&B: {k}={v} is used" for k, v in VARIABLES.items()]
            assert options.told() == options.in_sweep("demo", "lora.rank=1").told() == used
    for variable in VARIABLES:
        monkeypatch.delenv(variable)
    assert OfflineTracking().group_of("demo") == "demo" and OfflineTracking().told() == []


@pytest.mark.parametrize(
    ("mode", "made"),
    [
        (None, True),
        pytest.param("offline", True, marks=pytest.mark.slow),
        ("disabled", False),
        pytest.param("dryrun", True, marks=pytest.mark.slow),
    ],
)
def test_the_mode_is_the_environments_where_no_tracker_is_chosen(tmp_path, monkeypatch, mode, made):
    if mode is None:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    else:
        monkeypatch.setenv("WANDB_MODE", mode)
    tracker = compose(["experiment=smoke"]).tracker
    tracker.build(identity(), tmp_path).finish()
    assert bool(list(tmp_path.glob("wandb/offline-run-*"))) is made
    explicit = OfflineTracking()._listeners(identity(), tmp_path, "abcd1234")
    assert len(explicit) == 1, "tracker=offline holds whatever the environment says"
    explicit[0].finish()


def test_an_unknown_mode_and_an_online_one_without_a_key_are_refused(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    for mode, said in (("sometimes", "WANDB_MODE=sometimes"), ("online", "WANDB_MODE=online")):
        monkeypatch.setenv("WANDB_MODE", mode)
        with pytest.raises(ConfigError, match=said):
            WandbTracking().check_account()


def test_config_holds_sweep_and_commit_and_system_metrics_are_asked_for(tmp_path, monkeypatch):
    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=n", "-c", "user.email=e@x", *words]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-qm", "first")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "")  # as a shell's way not to set it
    for dirty in (False, True):
        (tmp_path / "file").write_text("2" if dirty else "1")
        folder = tmp_path / f"run{dirty}"
        folder.mkdir()
        job = OfflineTracking(system=dirty).in_sweep("demo lora.rank=2", "lora.rank=2 seed=1")
        (tracker,) = job._listeners(identity(), folder, "abcd1234")
        for step in range(1, 4):
            tracker.log({"loss": 1.0}, step=step)
        if dirty:
            time.sleep(3)
        tracker.finish()
        found = read_wandb(wandb_file(folder))
        assert found.config["git"] == {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
        assert found.config["sweep"] == "lora.rank=2 seed=1"
        assert (found.stats > 0) is dirty


def test_no_field_of_the_tracker_is_in_the_fingerprint():
    run = compose(["experiment=smoke"])
    own = ["project=p", "entity=e", "name=n", "group=g", "tags=[t]", "notes=x", "job_type=j"]
    own += ["sweep=s", "system=true", "log_artifact=true"]
    others = compose(["experiment=smoke", *(f"tracker.{item}" for item in own)])
    assert others.tracker != run.tracker and others.fingerprint == run.fingerprint
    names = {field.name for field in dataclasses.fields(WandbTracking)}
    assert {item.partition("=")[0] for item in own} >= {n for n in names if "seconds" not in n}


def test_sync_says_what_would_go_where_and_sends_nothing(two_runs, monkeypatch, tmp_path):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    ended = recurgolf("sync", str(two_runs), "--dry-run", cwd=tmp_path).finished()
    ids = [wandb_file(two_runs / f"seed{n}").stem.removeprefix("run-") for n in (1, 2)]
    lines = ended.out.splitlines()
    for line, run_id, seed in zip(lines, ids, (1, 2), strict=False):
        assert line.endswith(f"http://127.0.0.1:9/YOUR-ACCOUNT/recurgolf/runs/{run_id}")
        assert f"demo/seed{seed}" in line
    assert lines[2] == "2 of 2 would be uploaded, 0 before"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no offline W&B run"):
        sync.main([str(tmp_path / "empty")])
    env = {"WANDB_API_KEY": "0" * 40, "HOME": str(tmp_path)}
    refused = recurgolf("sync", str(two_runs), cwd=tmp_path, env=env).refused()
    assert "http://127.0.0.1:9 does not answer (Connection refused)" in refused
    env = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    assert "no API key" in recurgolf("sync", str(two_runs), cwd=tmp_path, env=env).refused()


def test_a_resumed_run_keeps_its_id_and_a_failed_one_its_exit_code(tmp_path):
    tracker = OfflineTracking().build(identity(run_id="abcd1234", resumed=True), tmp_path)
    assert tracker.run_id == "abcd1234"
    tracker.log({"loss": 1.0}, step=5)
    tracker.finish(143)
    tracker.finish(0)
    found = read_wandb(wandb_file(tmp_path))
    assert (found.run.run_id, found.exit_code) == ("abcd1234", 143)
    assert found.history[0]["step"] == found.history[0]["_step"] == 5
    assert read_jsonl(tmp_path / "metrics.jsonl")[0]["values"]["resumed"] is True


def test_a_run_whose_process_is_killed_is_closed_as_failed(tmp_path):
    program = (
        "import os, pathlib, sys, time\n"
        "from recurgolf.tracker import OfflineTracking, RunIdentity\n"
        "tracker = OfflineTracking().build(RunIdentity('n', 'g'), pathlib.Path(sys.argv[1]))\n"
        "for step in range(50): tracker.log({'loss': 1.0}, step=step)\n"
        "while tracker.trackers[1].location is None: time.sleep(0.01)\n"
        "time.sleep(0.2)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    root = str(Path(__file__).resolve().parents[1])
    ended = subprocess.run([sys.executable, "-c", program, str(tmp_path)], cwd=root)
    assert ended.returncode == -signal.SIGKILL
    wait_for(lambda: read_wandb(wandb_file(tmp_path)).exit_code is not None)
    found = read_wandb(wandb_file(tmp_path))
    assert found.exit_code == 1 and len(found.history) == 50


def log_steps(tracker, start: int, stop: int) -> float:
    """Log the steps; the longest call in seconds."""
    longest = 0.0
    for step in range(start, stop):
        begin = time.perf_counter()
        tracker.log({"loss": 1.0 / step}, step=step)
        longest = max(longest, time.perf_counter() - begin)
    return longest


def service_of(tracker) -> int:
    wait_for(lambda: wandb_of(tracker)._service_pid is not None)
    pid = wandb_of(tracker)._service_pid
    assert pid is not None
    return pid


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rsplit(")", 1)[1].split()[0] == "Z")


@pytest.mark.serial
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_service_that_dies_or_hangs_does_not_stop_the_run(tmp_path, capfd, blow):
    tracker = OfflineTracking(finish_timeout_seconds=2.0).build(identity(), tmp_path)
    log_steps(tracker, 1, 20)
    keeper, service = wandb_of(tracker)._process.pid, service_of(tracker)
    os.kill(service, blow)
    longest = log_steps(tracker, 20, 2000)
    begin = time.monotonic()
    tracker.finish()
    assert time.monotonic() - begin < 2.0 + 1.0
    assert longest < 0.5
    assert [row["step"] for row in history(read_jsonl(tmp_path / "metrics.jsonl"))] == list(
        range(1, 2000)
    )
    assert capfd.readouterr().err.count("W&B:") == 1
    wait_for(lambda: not is_running(keeper) and not is_running(service))


@pytest.mark.serial
def test_a_keeper_that_hangs_before_it_starts_costs_no_time_until_the_end(tmp_path, capfd):
    tracker = OfflineTracking(finish_timeout_seconds=1.0).build(identity(), tmp_path)
    os.kill(wandb_of(tracker)._process.pid, signal.SIGSTOP)
    longest = log_steps(tracker, 1, 12_000)  # more than the queue holds
    begin = time.monotonic()
    tracker.finish()
    assert time.monotonic() - begin < 1.0 + 1.0 and longest < 0.5
    assert len(history(read_jsonl(tmp_path / "metrics.jsonl"))) == 11_999
    err = capfd.readouterr().err
    assert err.count("W&B:") == 1 and "does not keep up" in err


@pytest.mark.serial
def test_logging_takes_less_than_a_millisecond(tmp_path):
    with OfflineTracking().build(identity(), tmp_path) as tracker:
        metrics = {f"loop/visit{n}": n / 7 for n in range(30)}
        spent = []
        for step in range(1, 500):
            begin = time.perf_counter()
            tracker.log(metrics, step=step)
            spent.append(time.perf_counter() - begin)
    assert sorted(spent)[len(spent) // 2] < 1e-3


def test_online_without_a_key_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(ConfigError, match=r"no API key.*`wandb login`.*tracker=offline"):
        OnlineTracking().build(identity(), folder)
    assert list(folder.iterdir()) == []
    OnlineTracking()  # a finished run is read without an account


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (lambda: OfflineTracking(project="a/b"), r"tracker\.project='a/b'"),
        (
            lambda: OfflineTracking(finish_timeout_seconds=0),
            r"finish_timeout_seconds=0: at least 1",
        ),
        (lambda: OnlineTracking(init_timeout_seconds=math.inf), r"init_timeout_seconds=inf"),
    ],
    ids=["project", "finish", "init"],
)
def test_impossible_options_are_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        options()


def test_an_unreachable_address_ends_in_an_offline_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    options = OnlineTracking(init_timeout_seconds=1.0)
    tracker = options.build(identity(), tmp_path)
    assert log_steps(tracker, 1, 100) < 0.5
    service_of(tracker)
    tracker.summary({"val_bpb": 1.25})
    tracker.finish()
    assert len(history(read_jsonl(tmp_path / "metrics.jsonl"))) == 99
    err = capfd.readouterr().err
    assert err.count("W&B:") == 1 and "cannot be reached" in err and "wandb sync" in err
    offline = next(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    found = read_wandb(offline)
    assert found.run.run_id == tracker.run_id and found.summary["val_bpb"] == 1.25
    assert len(found.history) == 99


class WandbServer(ThreadingHTTPServer):
    """Answers what a W&B run asks at its start; then, on request, nothing any more."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), WandbRequest)
        self.silent = threading.Event()
        self.closing = threading.Event()
        self.streamed = b""
        threading.Thread(target=self.serve_forever, daemon=True).start()


class WandbRequest(BaseHTTPRequestHandler):
    server: WandbServer  # type: ignore[assignment]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.silent.is_set():
            self.server.closing.wait(60)
            return
        if self.path.endswith("/file_stream"):
            self.server.streamed += body
        project = {"name": "recurgolf", "entity": {"name": "me"}}
        bucket = {"id": "1", "name": "1", "displayName": "n", "config": "{}", "project": project}
        data = {
            "upsertBucket": {"bucket": bucket, "inserted": True},
            "createRunFiles": {"runID": "1", "uploadHeaders": [], "files": []},
        }
        answer = json.dumps({"data": data} if self.path == "/graphql" else {}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, format: str, *args) -> None:
        pass


@pytest.mark.serial
def test_a_server_that_falls_silent_mid_run_does_not_stop_it(tmp_path, monkeypatch, capfd):
    server = WandbServer()
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    options = OnlineTracking(init_timeout_seconds=20.0, finish_timeout_seconds=4.0)
    tracker = options.build(identity(), tmp_path)
    try:
        service = service_of(tracker)
        assert str(tracker.location).endswith("/me/recurgolf/runs/1")
        log_steps(tracker, 1, 3)
        wait_for(lambda: b'\\"loss\\":1' in server.streamed)  # it was online, until now
        server.silent.set()
        longest = log_steps(tracker, 3, 301)
        tracker.summary({"val_bpb": 1.25})
        begin = time.monotonic()
        tracker.finish()
        assert time.monotonic() - begin < 4.0 + 1.0 and longest < 0.5
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
    assert len(history(read_jsonl(tmp_path / "metrics.jsonl"))) == 300
    err = capfd.readouterr().err
    assert err.count("W&B:") == 1 and f"wandb sync {tmp_path}" in err
    wait_for(lambda: not is_running(service))
    kept = read_wandb(wandb_file(tmp_path))
    assert len(kept.history) == 300 and kept.summary["val_bpb"] == 1.25
