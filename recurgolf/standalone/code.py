"""What the exported program knows of its own bytes, where a run predicts them.

It packs no program again: the code that counts was weighed when the program was made, or is the
program itself. Nor does it predict what it is about to measure, which would need scipy.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recurgolf.artifact.ledger import Line, component
from recurgolf.plan import effective, packed_shapes, shapes_of

if TYPE_CHECKING:
    from recurgolf.run import Run


@dataclass
class KnownPlan:
    """What the end of a run asks of its plan, and of the code that counts.

    Attributes:
        lines: by component, with the width of the codes for a prediction: an upper bound.
    """

    effective_params: int
    lines: list[Line]
    name: str
    code_bytes: int
    raw_bytes: int

    @property
    def code(self) -> KnownPlan:
        return self

    def write(self, folder: Path) -> None:
        """This program, beside the artifact that it made."""
        (folder / "train_gpt.py").write_bytes(_program().read_bytes())

    def to_json(self) -> dict[str, Any]:
        size = {"packed": self.code_bytes, "raw": self.raw_bytes}
        files = {self.name: size}
        return {"counted": f"{self.name}, packed", **size, "files": files, "modules": []}


def known_plan(run: Run) -> KnownPlan:
    """The plan of the run that this program repeats."""
    shapes = packed_shapes(shapes_of(run))
    rules = run.quant.assign(shapes)
    lines: dict[str, Line] = {}
    for name, shape in shapes.items():
        grid, count = rules[name].grid, math.prod(shape)
        line = lines.setdefault(component(name), Line(component(name), 0, 0.0))
        line.params += count
        line.predicted += count * (grid.bits if grid else 16) / 8
    known = sys.modules["__main__"].ARGUMENTS[1]
    packed = known["packed"] or _program().stat().st_size
    effective_params = effective(shapes, run.plan(1.0))
    all_lines = [*lines.values(), Line("header", 0, 0.0)]
    return KnownPlan(effective_params, all_lines, known["name"], packed, known["raw"])


def _program() -> Path:
    return Path(sys.modules["__main__"].__file__ or "")
