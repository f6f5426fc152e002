"""W&B runs that were recorded offline and wait in run folders: `recurgolf sync`."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurgolf.config import ConfigError
from recurgolf.folders import walked


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
        from wandb.util import app_url

        host = app_url(_server())
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


def _server() -> str:
    """W&B's, as its settings and environment have it."""
    import wandb

    return str(wandb.setup().settings.base_url)


def check_server(seconds: float = 15.0) -> None:
    """Refuse to upload where nobody answers, which W&B itself would try for many minutes."""
    try:
        urllib.request.urlopen(_server(), timeout=seconds).close()
    except urllib.error.HTTPError:
        pass  # an answer, whatever it says
    except OSError as error:
        reason = getattr(error, "reason", error)
        told = getattr(reason, "strerror", None) or reason
        raise ConfigError(f"sync: {_server()} does not answer ({told})") from None


def offline_runs(folder: Path) -> list[OfflineRun]:
    """The W&B runs that wait in or below a folder, in order of their paths."""
    found = []
    # Beside the folder of a W&B run lies a link to it, latest-run.
    below = {path.resolve() for path, _ in walked(folder)}
    places = [path for path in below if path.match("wandb/offline-run-*")]
    for file in sorted(file for path in places for file in path.glob("run-*.wandb")):
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
