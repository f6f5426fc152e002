"""The table of an audit, on the console and in the log."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.markup import escape
from rich.table import Table

from recurgolf.audit.check import Audit
from recurgolf.audit.finished_run import FILE, audit_run
from recurgolf.log import Log


def audit_and_show(folder: Path, log: Log) -> Audit:
    """Audit a finished run, write audit.json into its folder and show the table."""
    found = audit_run(folder, log.line)
    found.write(folder / FILE)
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
        log.console.print(table)
    failed = [check.name for check in found.checks if check.failed]
    log.line(f"audit: {'failed: ' + ', '.join(failed) if failed else 'passed'}")
    return found
