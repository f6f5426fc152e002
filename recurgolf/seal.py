"""The seal of a finished run: one signature over all its files, so that a later edit shows.

seal.json, written at the end of a run, holds the SHA-256 of every file that says something about
the result, what identifies the last checkpoint, and one signature over all of these.

It proves that the files are as the run left them: an edited figure, an exchanged artifact or the
program of another run is named. It holds no secret, so whoever can edit a file can seal it again;
that the figures are true is shown by `recurgolf audit` alone, which scores the artifact again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from recurgolf.disk import read_json, sha256, write_json

FILE = "seal.json"
AUDIT = "audit.json"
SEALED = (
    *("run.json", "artifact.bin", "score.py", "train_gpt.py", "ledger.json"),
    *("summary.json", "evals.json", "packed_from.json"),
)
"""Files under the seal where they are there, besides all in scores/."""
OTHERS = (
    *("train.log", "metrics.jsonl", "failure.txt", AUDIT, FILE),
    *("scores", "checkpoints", "wandb", ".hydra", "non_finite"),
)
"""What else a run's folder has; nothing of it is needed to score the artifact."""
ASIDE = ("checkpoints_before_", "result_before_")
"""So begin the names of what a new run in the same folder moved aside."""
SCORES = "scores"
SUMMARY = "summary.json"


def seal(folder: Path) -> None:
    """Seal the folder of a run that has just ended: its files as they are now."""
    content = _content(Path(folder))
    write_json(Path(folder) / FILE, {"signature": _signature(content), **content})


@contextlib.contextmanager
def resealing(folder: Path) -> Iterator[None]:
    """Inside, files of a finished run are added to; the seal is renewed where it was whole before.

    A broken seal stays broken: an edit is not made good by an evaluation behind it.
    """
    whole = (Path(folder) / FILE).exists() and not broken(folder)
    yield
    if whole:
        seal(folder)


def broken(folder: Path) -> list[str]:
    """What differs from the seal, a phrase for each file; empty where all is as the run left it."""
    try:
        told = read_json(Path(folder) / FILE)
        files, checkpoint, signature = told["files"], told["checkpoint"], told["signature"]
        files, known = dict(files), dict(checkpoint or {})
        name, state_digest = str(known.get("name", "")), known.get("state")
    except FileNotFoundError:
        return [f"there is no {FILE}, which a run writes at its end"]
    except (ValueError, KeyError, TypeError):
        return [f"{FILE} is damaged"]
    now = _content(Path(folder))
    found = [
        f"{name} {'is gone' if name not in now['files'] else 'was changed'} since the run ended"
        for name, digest in files.items()
        if now["files"].get(name) != digest
    ]
    found += [f"{name} was added since the run ended" for name in now["files"] if name not in files]
    # Checkpoints are large and may be deleted; one that is there must be the run's own.
    state = Path(folder) / "checkpoints" / name / "state.json"
    if checkpoint and state.is_file() and sha256(state) != state_digest:
        found.append(f"checkpoint {name} is not the one that the run ended on")
    if not found and signature != _signature({"files": files, "checkpoint": checkpoint}):
        found.append(f"the signature in {FILE} is not that of its list")
    return found


def signature_of(folder: Path) -> str | None:
    """The signature of a folder whose seal is whole, else None."""
    if broken(folder):
        return None
    return read_json(Path(folder) / FILE)["signature"]


def audited(folder: Path, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What an audit has looked at, with a signature of its own: sealed files, and the entries of
    summary.json's `evals`, without their seconds.

    Args:
        known: what an earlier audit looked at; what was added since is then left out.
    """
    files = _content(Path(folder))["files"]
    summary = read_json(Path(folder) / SUMMARY) if SUMMARY in files else {}
    evals = {
        name: {key: value for key, value in entry.items() if key != "seconds"}
        for name, entry in (summary.pop("evals", None) or {}).items()
    }
    looked = known or {"files": [name for name in files if name != SUMMARY], "evals": list(evals)}
    found = {
        "files": {name: files.get(name) for name in looked["files"]},
        "summary": summary,
        "evals": {name: evals.get(name) for name in looked["evals"]},
    }
    return {"files": looked["files"], "evals": looked["evals"], "signature": _signature(found)}


def strangers(folder: Path) -> list[str]:
    """Files and folders that no run leaves, with their sizes: `weights.bin (1,000,000 bytes)`."""
    known = {*SEALED, *OTHERS}
    found = [
        path
        for path in Path(folder).iterdir()
        if path.name not in known and not path.name.startswith(ASIDE)
    ]
    if (Path(folder) / SCORES).is_dir():
        found += [p for p in (Path(folder) / SCORES).iterdir() if p.suffix != ".npz"]
    return [f"{path.relative_to(folder)} ({_size(path):,} bytes)" for path in sorted(found)]


def audit_state(folder: Path) -> str:
    """What is known of a run's score: `not audited`, `passed`, `failed: ...`, or what has changed.

    Whether audit.json itself was written by hand cannot be told; `recurgolf audit` can be asked
    again.
    """
    try:
        told = read_json(Path(folder) / AUDIT)
        failed = [name for name, check in told["checks"].items() if check["verdict"] == "fail"]
        passed, signature = told["passed"] is True, told.get("signature")
        known = told.get("audited")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "not audited"
    if failed or not passed:
        return f"failed: {', '.join(failed)}"
    changed = broken(folder)
    if changed:
        return f"not audited as it is now: {changed[0]}"
    # What `recurgolf evaluate` has added since is another score; the audited one is as it was.
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        if known and audited(folder, known)["signature"] == known["signature"]:
            return "passed"
    return "passed" if signature == signature_of(folder) else "not audited as it is now"


def _content(folder: Path) -> dict[str, Any]:
    paths = [folder / name for name in SEALED if (folder / name).is_file()]
    paths += sorted((folder / SCORES).glob("*.npz"))
    files = {str(p.relative_to(folder)): sha256(p) for p in paths}
    return {"files": files, "checkpoint": _checkpoint(folder)}


def _checkpoint(folder: Path) -> dict[str, str] | None:
    """Name and identity of the newest checkpoint."""
    states = sorted((folder / "checkpoints").glob("step_*/state.json"))
    if not states:
        return None
    return {"name": states[-1].parent.name, "state": sha256(states[-1])}


def _signature(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _size(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    return sum(
        (Path(here) / name).lstat().st_size for here, _, names in os.walk(path) for name in names
    )
