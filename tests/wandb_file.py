"""Reads an offline W&B run from its .wandb file: LevelDB's log framing around protobuf records.

The file is `:W&B`, a magic number and a version, then blocks of 32 KiB. A piece in a block has
crc32 (masked, of type and data), length and type (1 whole, 2 first, 3 middle, 4 last).
"""

import json
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined]

BLOCK, HEADER = 32768, struct.Struct("<IHB")


@dataclass
class WandbRun:
    """`run` is the protobuf (project, run_group, tags); `exit_code` is None if unfinished;
    `stats` counts the measurements of the system."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: set[str] = field(default_factory=set)
    artifacts: list[Any] = field(default_factory=list)
    exit_code: int | None = None
    stats: int = 0


def read_wandb(path: Path) -> WandbRun:
    found = WandbRun()
    for record in _records(path.read_bytes()):
        match record.WhichOneof("record_type"):
            case "run":
                found.run = record.run
                found.config |= _items(record.run.config.update)
            case "history":
                found.history.append(_items(record.history.item))
            case "summary":
                found.summary |= _items(record.summary.update)
            case "metric":
                found.metrics.add(record.metric.name)
            case "artifact":
                found.artifacts.append(record.artifact)
            case "stats":
                found.stats += 1
            case "exit":
                found.exit_code = record.exit.exit_code
    return found


def _items(items: Any) -> dict[str, Any]:
    return {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}


def _records(data: bytes):
    assert data[:4] == b":W&B", data[:8]
    at, whole = 7, b""
    while at + HEADER.size <= len(data):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK  # too little room for a header: padding
            continue
        _, length, kind = HEADER.unpack_from(data, at)
        at += HEADER.size
        whole += data[at : at + length]
        at += length
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""
