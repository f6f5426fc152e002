"""recurgolf sync: upload the W&B runs that lie in and below folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recurgolf.config import EXIT_FAILED, ConfigError
from recurgolf.tracker import check_key
from recurgolf.verbs import parser_of
from recurgolf.wandb_offline import check_server, offline_runs


def main(arguments: Sequence[str]) -> int:
    """Upload the W&B runs that were recorded offline, and say where each is to be seen."""
    parser = parser_of("sync", main.__doc__)
    parser.add_argument("folders", type=Path, nargs="+", help="of runs, or of sweeps")
    parser.add_argument("--dry-run", action="store_true", help="say what would go where")
    parser.add_argument("--again", action="store_true", help="also those uploaded before")
    asked = parser.parse_args(arguments)
    found = []
    for folder in asked.folders:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; give folders of runs or sweeps")
        found += offline_runs(folder)
    if not found:
        shown = ", ".join(map(str, asked.folders))
        raise ConfigError(f"{shown}: no offline W&B run in or below (tracker=offline makes one)")
    waiting = [run for run in found if asked.again or not run.synced]
    if not asked.dry_run and waiting:
        check_key("sync")
        check_server()
    failed = 0
    for run in waiting:
        if asked.dry_run:
            print(f"would upload {run.folder} ({run.name}) to {run.url}")
            continue
        well, told = run.upload()
        failed += not well
        print(f"{run.folder}: {told if well else 'failed: ' + told}", flush=True)
    done = f"{len(waiting) - failed} of {len(found)} uploaded now"
    done = f"{len(waiting)} of {len(found)} would be uploaded" if asked.dry_run else done
    print(f"{done}, {len(found) - len(waiting)} before")
    return EXIT_FAILED if failed else 0
