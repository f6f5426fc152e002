"""recurgolf: depth-recurrent language models within a byte budget.

import recurgolf
run = recurgolf.compose(["experiment=smoke", "lora.rank=2"])
summary = recurgolf.train(run)
print(summary.val_bpb, summary.artifact_bytes)
print(recurgolf.load(summary.folder).sample("The history of"))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recurgolf.loaded import Loaded
    from recurgolf.run import Run
    from recurgolf.training.summary import Summary

__version__ = "0.2.0"


def compose(overrides: str | Sequence[str] = (), config_dir: str | Path | None = None) -> Run:
    """The Run that `recurgolf *overrides` would train.

    Args:
        overrides: as on the command line, `["experiment=smoke", "lora.rank=1"]` or
            `"experiment=smoke lora.rank=1"`; in one string, quotes work as in a shell.
        config_dir: a folder with YAML of your own, as `--config-dir`.

    Raises:
        recurgolf.config.ConfigError: what cannot be composed, with the nearest right name.
    """
    from recurgolf.composing import compose as composed
    from recurgolf.overrides import as_list

    return composed(as_list(overrides), config_dir)


def train(run: Run, folder: str | Path | None = None, quiet: bool = False) -> Summary:
    """Train, pack and score a Run, as the command does.

    Args:
        folder: where everything goes; default `outputs/<name>/<time>_seed<seed>`.
        quiet: print nothing; the folder's train.log has it all the same.

    Returns:
        The figures of summary.json; `summary.folder` is where the rest lies.

    Raises:
        recurgolf.config.ConfigError: what cannot be trained, such as a field of the Run that was
            assigned a value of another type.
    """
    from datetime import datetime

    from recurgolf.config import ConfigError, check_types
    from recurgolf.folders import claimed, plain_name
    from recurgolf.overrides import added_keys
    from recurgolf.training.launch import launch

    if unknown := next(added_keys(run), None):
        raise ConfigError(f"{unknown} was assigned, but a run has no such field")
    check_types(run)
    type(run).from_dict(run.to_dict())  # limits and relations, which assigning has not met
    if folder is None:
        stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        folder = claimed(Path("outputs") / plain_name(run.name) / f"{stamp}_seed{run.seed}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    return launch(run, Path(folder), "nothing" if quiet else "lines")


def load(folder: str | Path, trust: bool = False) -> Loaded:
    """The model of a run, exported or imported folder, to score, to look into and to sample.

    Args:
        trust: import plugins of it that are not installed.

    Raises:
        recurgolf.config.ConfigError: nothing in it that can be read; the text says what.
    """
    from recurgolf.loaded import load as loaded

    return loaded(folder, trust)
