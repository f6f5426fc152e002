"""The command line: verbs that compose a Run, and the way to those that need none.

This module, `composing.py` and `override_errors.py` are the only importers of Hydra.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback

from recurgolf import __version__
from recurgolf.composing import (
    Command,
    built,
    check_sweep,
    command,
    compose,
    compose_parts,
    explained,
    of_sweep,
    prepared,
    varied_keys,
    with_vocabulary,
)
from recurgolf.conf import conf_folder, options
from recurgolf.config import ConfigError, suggestion
from recurgolf.folders import claimed
from recurgolf.help import VERBS, group_help, help_text
from recurgolf.override_errors import COMPOSE_ERRORS, is_bug
from recurgolf.overrides import config_dir, group_of, quoted, split_arguments
from recurgolf.streams import steady_output, use_unicode
from recurgolf.training.faults import RunFailed, is_full_disk
from recurgolf.trust import look_in_working_folder

if TYPE_CHECKING:
    from recurgolf.run import Run
    from recurgolf.training.summary import Summary

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_OVER_BUDGET = 3
EXIT_INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `recurgolf`; ends the process with its exit code."""
    if argv is None:
        use_unicode()
    with steady_output():
        code = _code(list(sys.argv[1:] if argv is None else argv))
    sys.exit(code)


def _code(arguments: list[str]) -> int:
    """Do what is asked; the exit code."""
    try:
        code = _dispatch(arguments)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = EXIT_INTERRUPTED
    except ConfigError as error:
        code = _refused(str(error))
    except RunFailed as error:
        print(f"recurgolf: {error}", file=sys.stderr)
        code = EXIT_FAILED
    except COMPOSE_ERRORS as error:
        if is_bug(error):
            raise
        code = _refused(explained(error, arguments, config_dir(arguments)))
    except OSError as error:
        if error.filename is None and not is_full_disk(error):
            raise
        code = _refused(f"{error.filename or 'the folder of the run'}: {error.strerror}")
    return code


def _refused(message: str) -> int:
    print(f"recurgolf: {message}", file=sys.stderr)
    return EXIT_USER_ERROR


def _dispatch(arguments: list[str]) -> int:
    named = bool(arguments) and re.fullmatch(r"[a-z][\w-]*", arguments[0]) is not None
    verb, rest = (arguments[0], arguments[1:]) if named else ("train", arguments)
    if verb not in VERBS:
        raise ConfigError(
            f"unknown verb {verb!r}{suggestion(verb, VERBS)}; an override is written key=value"
        )
    if arguments == ["--version"]:
        print(f"recurgolf {__version__}")
        return 0
    if {"-h", "--help"} & set(arguments) and verb in ("train", "plan"):
        folder = config_dir(arguments)
        asked = [group_help(a, folder) for a in rest if a in options(folder)]
        print("\n\n".join(asked) or help_text(folder))
        return 0
    if verb == "train":
        look_in_working_folder()
        return _train_command(rest)
    if verb == "plan":
        from recurgolf.plan import plan_table

        print(plan_table(_planned(rest)))
        return 0
    from recurgolf import verbs

    return verbs.run(verb, rest)


def _planned(arguments: list[str]) -> Run:
    """The Run to plan: composed, or that of a run folder with overrides behind it."""
    trust = "--trust" in arguments
    arguments = [argument for argument in arguments if argument != "--trust"]
    if not arguments or not (Path(arguments[0]) / "run.json").is_file():
        return compose(*split_arguments(arguments, "plan"))
    from recurgolf.run import Run

    run = Run.read(Path(arguments[0]), trust)
    overrides = split_arguments(arguments[1:], "plan")[0]
    for override in overrides:
        if group_of(override) not in ("quant", "looping", "eval"):
            raise ConfigError(f"plan FOLDER takes quant, looping and eval, not {override!r}")
    return compose_parts(run, overrides) if overrides else run


def _train_command(arguments: list[str]) -> int:
    from recurgolf.training.distributed import started_by_torchrun

    if started_by_torchrun():
        if {"-m", "--multirun"} & set(arguments):
            raise ConfigError(
                "multirun under torchrun would sweep once per rank; start it without torchrun and "
                "set trainer.devices=N, which makes the ranks of every job"
            )
        return _train_under_torchrun(*split_arguments(arguments, "train under torchrun"))
    outcomes: list[Summary | Exception] = []

    def job(config: Any) -> float | None:
        from recurgolf.training.launch import launch

        folder = Path(HydraConfig.get().runtime.output_dir)
        if multirun:
            from recurgolf.compare.sweep import note_overrides

            note_overrides(folder, list(HydraConfig.get().overrides.task))
        try:
            run = built(config)
            if multirun:
                told = HydraConfig.get()
                run = of_sweep(
                    run, told.overrides.task, [*varied, *(told.sweeper.get("params") or {})]
                )
            summary = launch(run, folder)
        except Exception as error:
            # Kept for later: Hydra would print its own account of it, and end a sweep here.
            if multirun:
                from recurgolf.compare.sweep import note_failure

                note_failure(folder, error)
            outcomes.append(error)
            return None
        outcomes.append(summary)
        return summary.val_bpb

    folder = prepared(arguments, config_dir(arguments))
    arguments = with_vocabulary(arguments)
    asked = command(arguments, folder)
    multirun, varied = asked is not None and asked.run is None, list[str]()
    if multirun:
        given = [a for a in arguments if "=" in a and not a.startswith("-")]
        check_sweep(given, folder)
        varied = varied_keys(given)
    if asked is not None:
        arguments = [*arguments, *_own_folder(asked)]
    SweepTable.exit_code = EXIT_FAILED
    with _hydra_environment(arguments):
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    if multirun:
        return SweepTable.exit_code
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
        if not outcome.within_budget:
            return EXIT_OVER_BUDGET
    return 0


def _own_folder(asked: Command) -> list[str]:
    """Have the run or sweep a folder that is no other one's, before Hydra writes into it.

    Returns:
        Overrides that name it.

    Raises:
        ConfigError: the folder that was named is another one's.
    """
    from recurgolf.compare.sweep import check_new_sweep
    from recurgolf.training.resume import check_unused

    if asked.new:
        return [f"{asked.key}={quoted(str(claimed(asked.folder)))}"]
    if asked.run is not None:
        check_unused(asked.run, asked.folder)
    else:
        check_new_sweep(asked.folder, asked.jobs)
    return []


@contextlib.contextmanager
def _hydra_environment(arguments: list[str]) -> Iterator[None]:
    """What Hydra's main reads: the command line, and to raise errors instead of wording them."""
    before, full_error = list(sys.argv), os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = [before[0], *arguments]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        if full_error is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = full_error


def _train_under_torchrun(overrides: list[str], folder: Path | None) -> int:
    """Every rank composes the same Run; rank 0's output folder is everybody's."""
    from recurgolf.training.distributed import environment_rank
    from recurgolf.training.launch import launch

    if not any(override.startswith("trainer.devices=") for override in overrides):
        overrides = [*overrides, f"trainer.devices={os.environ['WORLD_SIZE']}"]
    prepared(overrides, folder)
    asked = command(overrides, folder)
    if asked is None or asked.run is None:
        raise ConfigError("hydra.mode=MULTIRUN under torchrun would sweep once per rank")
    first = environment_rank() == 0
    output = claimed(asked.folder) if asked.new and first else asked.folder
    summary = launch(asked.run, output)
    return EXIT_OVER_BUDGET if not summary.within_budget and first else 0


class SweepTable(Callback):
    """At the end of a multirun: mean and deviation over seeds, and what failed.

    Hydra makes the object and keeps it to itself, hence the result on the class.
    """

    exit_code: ClassVar[int] = EXIT_FAILED

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        from recurgolf.compare.sweep import finish_sweep

        jobs = finish_sweep(Path(config.hydra.sweep.dir))
        over = EXIT_OVER_BUDGET if jobs.over_budget else 0
        SweepTable.exit_code = EXIT_FAILED if jobs.failed else over
