"""What earlier versions wrote (run.json, headers of artifacts), read as this one would write it.

Fields are looked up by the kind of the option that they are in. Only what is read from files comes
through here: an override or a YAML with an old name is refused with the right one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recurgolf.config import ConfigError

RENAMED: dict[tuple[str, str], str] = {
    ("attention", "remove_value_direction"): "xsa",
    ("attention", "remove_value_direction_last"): "xsa_last",
}
"""(kind, old name) -> the field's name today."""

REMOVED: dict[tuple[str, str], Any] = {
    ("transformer", "visit_gain_clamp"): 4.0,
    ("sequential", "branch_gains"): True,
    ("parallel", "branch_gains"): True,
    ("peri_norm", "branch_gains"): False,
    ("muon_adam", "muon_scale"): "sqrt_max1",
    ("muon_adam", "batch_matrices"): True,
    ("lawa", "below_lr_scale"): 1.0,
    ("lawa", "min_snapshots"): 2,
    ("swa", "below_lr_scale"): 0.2,
    ("swa", "min_snapshots"): 1,
    ("rate", "share"): 1.0,
}
"""(kind, old name) -> the only value that is left of what the field could say."""


_SECOND = frozenset(
    {"second_mixer", "second_mixer_at", "second_mixer_every", "second_block", "second_block_at"}
)


def modern(node: Any) -> Any:
    """A tree of options as `config.from_dict` takes it."""
    if isinstance(node, list):
        return [modern(item) for item in node]
    if not isinstance(node, Mapping):
        return node
    kind, fields = str(node.get("kind")), {}
    if kind == "transformer" and not _SECOND.isdisjoint(node):
        try:
            node = _with_patterns(node)
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ConfigError("model: its fields of an earlier version contradict it") from None
    for name, value in node.items():
        if (kind, name) not in REMOVED:
            fields[RENAMED.get((kind, name), name)] = modern(value)
        elif value != REMOVED[kind, name]:
            raise ConfigError(
                f"{kind}.{name}={value!r} was written by an earlier version; this one has no such "
                f"option, and does what {REMOVED[kind, name]!r} did"
            )
    return fields


def _with_patterns(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model whose second block and second mixer stood in fields of their own."""
    fields = dict(model)
    every, pattern = fields.pop("second_mixer_every", None), fields.get("mixer_pattern") or []
    if not pattern and every:
        pattern = ["mixer"] * (every - 1) + ["second"]
    own = ("mixer", fields["mixer"]["kind"])
    for name, patterned in (("mixer", pattern), ("block", [])):
        at, second = fields.pop(f"second_{name}_at", []), fields.pop(f"second_{name}", None)
        if at:
            patterned = ["second" if i in at else name for i in range(fields["num_blocks"])]
        if second is not None:
            fields[f"{name}_pattern"] = [name if e in (name, *own) else second for e in patterned]
    return fields
