"""recurgolf resume: go on with a run that was stopped, from its newest whole checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from recurgolf.config import EXIT_OVER_BUDGET, ConfigError, from_dict, suggestion, to_dict
from recurgolf.run import Run
from recurgolf.settings import TrainerConfig
from recurgolf.training.launch import launch
from recurgolf.training.resume import MAY_CHANGE_ON_RESUME
from recurgolf.verbs import add_trust, parser_of


def main(arguments: Sequence[str]) -> int:
    """Go on with a run that was stopped, from its newest whole checkpoint."""
    parser = parser_of("resume", main.__doc__)
    parser.add_argument("folder", type=Path, help="folder of the run, with its run.json")
    parser.add_argument(
        "overrides", nargs="*", help="tracker=KIND and trainer fields that may change"
    )
    add_trust(parser)
    asked = parser.parse_intermixed_args(arguments)
    run = reconfigured(Run.read(asked.folder, asked.trust), asked.overrides)
    return 0 if launch(run, asked.folder).within_budget else EXIT_OVER_BUDGET


def reconfigured(run: Run, overrides: Sequence[str]) -> Run:
    """The Run with `trainer.resume=auto` and what else was asked for."""
    changes: dict[str, Any] = {"resume": "auto"}
    tracker = run.tracker
    for override in overrides:
        key, sign, value = override.partition("=")
        name = key.removeprefix("trainer.")
        if key == "tracker" and sign:
            from recurgolf.composing import compose

            tracker = compose([override]).tracker
        elif sign and key.startswith("trainer.") and name in MAY_CHANGE_ON_RESUME:
            changes[name] = yaml.safe_load(value)
        else:
            raise ConfigError(
                f"resume takes tracker=KIND and trainer.KEY=VALUE with a KEY that cannot change "
                f"the result, not {override!r}{suggestion(name, MAY_CHANGE_ON_RESUME)}"
            )
    trainer = from_dict(TrainerConfig, {**to_dict(run.trainer), **changes})
    return dataclasses.replace(run, trainer=trainer, tracker=tracker)
