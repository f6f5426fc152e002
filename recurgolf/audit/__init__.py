"""Audits: is the score of a run one that the rules allow, and is it counted right?

    found = audit_run(Path("outputs/demo/..."))
    found.write(folder / "audit.json")

Nine checks, each with a number, a verdict and one line: causality, normalised,
score_before_update, single_pass (`prediction`), bytes, separation, limits (`accounts`), rescored
(`isolated`) and files (`finished_run`, `recurgolf.seal`).
"""

from recurgolf.audit.check import Audit, Check
from recurgolf.audit.finished_run import audit_run
from recurgolf.audit.report import audit_and_show, audit_at_the_end
from recurgolf.seal import AUDIT as FILE

__all__ = [
    "FILE",
    "Audit",
    "Check",
    "audit_and_show",
    "audit_at_the_end",
    "audit_run",
]
