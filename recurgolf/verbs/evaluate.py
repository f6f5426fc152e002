"""recurgolf evaluate: score the artifact of a finished run again."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from recurgolf.artifact import ArtifactError, load
from recurgolf.artifact.decode import MissingLibrary
from recurgolf.artifact.score import check_data, rebuild, score_dataset
from recurgolf.config import ConfigError, kind_of
from recurgolf.run import Run
from recurgolf.training.progress import Log


def main(arguments: Sequence[str]) -> int:
    """Score the artifact of a finished run again."""
    parser = argparse.ArgumentParser(prog="recurgolf evaluate", description=main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of a finished run")
    parser.add_argument("overrides", nargs="*", help="of eval and data, as in eval=sliding")
    parser.add_argument("--json", action="store_true", help="end with one JSON object on stdout")
    asked = parser.parse_args(arguments)
    configured = _reconfigured(Run.read(asked.folder), asked.overrides)
    log = Log(None, console=not asked.json)
    path = asked.folder / "artifact.bin"
    if not path.exists():
        raise ConfigError(f"{asked.folder} has no artifact.bin: the run did not finish")
    try:
        scorable = rebuild(load(path))
        dataset = configured.data.prepare(log.line)
        check_data(scorable.metadata, dataset)
    except (ArtifactError, MissingLibrary) as error:
        raise ConfigError(f"{path}: {error}") from None
    protocol = configured.eval
    with log.bar("scoring", 1) as bar:

        def shown(done: int, total: int) -> None:
            bar.total = total
            bar.at(done)

        result = score_dataset(scorable, protocol, dataset, progress=shown)
    log.line(
        f"{kind_of(protocol)}: val_bpb {result.val_bpb:.6f}, val_loss {result.val_loss:.6f} over "
        f"{result.tokens:,} tokens = {result.bytes:,} bytes in {result.seconds:.1f} s"
    )
    if asked.json:
        print(json.dumps({kind_of(protocol): result.to_dict()}))
    return 0


def _reconfigured(run: Run, overrides: Sequence[str]) -> Run:
    """The finished Run with another protocol or other data."""
    from recurgolf.cli import compose_parts

    for override in overrides:
        if override.partition("=")[0].split(".")[0].split("/")[0] not in ("eval", "data"):
            raise ConfigError(f"evaluate takes overrides of eval and data, not {override!r}")
    return compose_parts(run, overrides) if overrides else run
