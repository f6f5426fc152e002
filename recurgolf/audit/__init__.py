"""Audits: is the score of a run one that the rules allow, and is it counted right?

    found = audit_run(Path("outputs/demo/..."))
    found.write(folder / "audit.json")

Seven checks, each with a number, a verdict and one line: causality, normalised,
score_before_update, single_pass (`prediction`), bytes, separation, limits (`accounts`).
"""

from recurgolf.audit.check import Audit, Check
from recurgolf.audit.finished_run import FILE, audit_run, prediction_checks, validation_text
from recurgolf.audit.report import audit_and_show

__all__ = [
    "FILE",
    "Audit",
    "Check",
    "audit_and_show",
    "audit_run",
    "prediction_checks",
    "validation_text",
]
