"""What the exported program says of the size of code; it stands in for `artifact.code`.

It does not pack anything again: the code that the run counts was weighed when the program was made,
or is the program itself. Nor does it predict what it is about to measure, which would need scipy.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from recurgolf.artifact.ledger import Line
    from recurgolf.quant import TensorRule


@dataclass
class KnownCode:
    """The counted program of the run that this one repeats, in the places where a run asks."""

    name: str
    packed_bytes: int
    raw_bytes: int

    @property
    def counted(self) -> KnownCode:
        return self

    def write(self, folder: Path) -> None:
        """This program, beside the artifact that it made."""
        (folder / "train_gpt.py").write_bytes(_program().read_bytes())

    def to_json(self) -> dict[str, Any]:
        size = {"packed": self.packed_bytes, "raw": self.raw_bytes}
        files = {self.name: size}
        return {"counted": f"{self.name}, packed", **size, "files": files, "modules": []}


def codes_of(run: Any) -> KnownCode:
    """The program that counts: as it was weighed, or this very file."""
    known = sys.modules["__main__"].ARGUMENTS[1]
    packed = known["packed"] or _program().stat().st_size
    return KnownCode(known["name"], packed, known["raw"])


def _program() -> Path:
    return Path(sys.modules["__main__"].__file__ or "")


def predict(shapes: Mapping[str, Sequence[int]], rules: Mapping[str, TensorRule]) -> list[Line]:
    """Lines by component with the width of the codes for a prediction: an upper bound."""
    from recurgolf.artifact.ledger import Line, component

    lines: dict[str, Line] = {}
    for name, shape in shapes.items():
        grid, count = rules[name].grid, math.prod(shape)
        line = lines.setdefault(component(name), Line(component(name), 0, 0.0))
        line.params += count
        line.predicted += count * (grid.bits if grid else 16) / 8
    return [*lines.values(), Line("header", 0, 0.0)]
