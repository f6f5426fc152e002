"""The table of an audit, on the console and in the log."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from recurgolf.audit.check import Audit
from recurgolf.audit.finished_run import audit_run
from recurgolf.audit.scoring_process import own_environment
from recurgolf.config import ConfigError
from recurgolf.disk import read_json
from recurgolf.log import Log
from recurgolf.seal import AUDIT as FILE


def audit_and_show(folder: Path, log: Log, **options: Any) -> Audit:
    """Audit a finished run, write audit.json into its folder and show the table.

    A run with plugins is judged in a process of its own, since this one may have imported them.
    """
    found = audit_run(folder, log.line, **options)
    try:
        found.write(folder / FILE)
    except OSError as error:
        log.line(f"audit.json is not kept in {folder}: {error.strerror}")
    table = Table(box=box.SIMPLE)
    table.add_column("check")
    table.add_column("number", justify="right")
    table.add_column("verdict")
    table.add_column("what was measured")
    for check in found.checks:
        number = "" if check.number is None else f"{check.number:.6g}"
        colour = "red" if check.failed else "green" if check.number is not None else ""
        verdict = f"[{colour}]{check.verdict}[/]" if colour else check.verdict
        table.add_row(check.name, number, verdict, escape(check.line))
        log.note(f"audit: {check.name} {number} {check.verdict}: {check.line}")
    if log.console is not None:
        # In columns of a few characters nothing could be read; a narrow terminal breaks the lines.
        log.console.width = max(log.console.width, 80)
        log.console.print(table)
    facts = found.facts
    log.line(
        f"audit: {facts['scorings']} scorings of {', '.join(facts['protocols'])} in "
        f"{facts['seconds']:.0f} s; --positions {facts['positions']} --chance {facts['chance']} "
        "looks at the same places again"
    )
    failed = [check.name for check in found.checks if check.failed]
    log.line(f"audit: {'failed: ' + ', '.join(failed) if failed else 'passed'}")
    return found


def audit_at_the_end(folder: Path, log: Log) -> None:
    """Audit a run that this process has just trained, whose code is trusted.

    Where it has plugins, they are imported here and could reach the checks: another process judges.
    """
    if not read_json(folder / "run.json").get("plugins"):
        audit_and_show(folder, log, trust=True)
        return
    command = [sys.executable, "-P", "-m", "recurgolf", "audit", str(folder), "--trust"]
    done = subprocess.run(
        command, env=own_environment(), capture_output=True, text=True, check=False
    )
    for line in done.stdout.splitlines():
        log.line(line)
    if not (folder / FILE).exists():
        raise ConfigError(done.stderr.strip().removeprefix("recurgolf: ") or "the audit failed")
