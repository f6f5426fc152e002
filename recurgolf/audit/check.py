"""One check of an audit: its question, the number measured, and the verdict."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recurgolf.disk import write_json

PASS, FAIL, NOT_APPLICABLE = "pass", "fail", "not applicable"


@dataclass(frozen=True)
class Check:
    """A finding.

    Attributes:
        name: of the check; the key in audit.json.
        number: what was measured, in the unit that `line` names; None where nothing could be.
        verdict: pass | fail | not applicable.
        line: one line of explanation.
    """

    name: str
    number: float | None
    verdict: str
    line: str

    @property
    def failed(self) -> bool:
        return self.verdict == FAIL


def judged(name: str, number: float, limit: float, line: str) -> Check:
    """Pass where the number is at most the limit; a number that is not one fails."""
    return Check(name, number, PASS if number <= limit else FAIL, line)


def not_applicable(name: str, line: str) -> Check:
    """Nothing to measure, and why."""
    return Check(name, None, NOT_APPLICABLE, line)


@dataclass(frozen=True)
class Audit:
    """All findings about one run; what audit.json holds."""

    checks: list[Check]
    facts: dict[str, Any]
    """What was looked at: fingerprints, the protocol, the stretch of text, seconds."""

    @property
    def passed(self) -> bool:
        return not any(check.failed for check in self.checks)

    def __getitem__(self, name: str) -> Check:
        """The check of this name."""
        return next(check for check in self.checks if check.name == name)

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": self.passed,
            "checks": {c.name: dataclasses.asdict(c) for c in self.checks},
            **self.facts,
        }

    def write(self, path: Path) -> None:
        """Write audit.json, whole or not at all."""
        write_json(path, self.to_dict())
