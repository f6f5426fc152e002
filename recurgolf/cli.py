"""The command line: verbs that compose a Run, and the way to those that need none.

This module, `composing.py`, `multirun.py` and `override_errors.py` are the only importers of Hydra.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback

from recurgolf import __version__
from recurgolf.composing import built, compose, compose_parts, explained, prepared, with_vocabulary
from recurgolf.conf import conf_folder
from recurgolf.config import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_OVER_BUDGET,
    EXIT_USER_ERROR,
    ConfigError,
    suggestion,
)
from recurgolf.folders import claimed, only_one
from recurgolf.help import VERBS, help_of, help_text
from recurgolf.multirun import (
    Command,
    check_sweep,
    command,
    composed_jobs,
    flags_first,
    of_sweep,
    run_single,
    varied_keys,
)
from recurgolf.override_errors import COMPOSE_ERRORS, is_bug
from recurgolf.overrides import (
    CONFIG_DIR_FLAGS,
    check_parts,
    config_dir,
    quoted,
    split_arguments,
)
from recurgolf.streams import steady_output, use_unicode
from recurgolf.training.faults import RunFailed, is_full_disk
from recurgolf.training.signals import WATCHED
from recurgolf.trust import look_in_working_folder

if TYPE_CHECKING:
    from recurgolf.compare.preview import SweepAhead
    from recurgolf.run import Run
    from recurgolf.training.summary import Summary


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; ends the process with its exit code."""
    if argv is None:
        use_unicode()
        _settle_surroundings()
    with steady_output(), _interrupts() as heard:
        try:
            code = _code(list(sys.argv[1:] if argv is None else argv))
        except (Exception, SystemExit):
            if not heard:
                raise
            # What training does not hear itself, or met an import that took it for a failure.
            told = signal.Signals(heard[0]).name
            print("interrupted" if told == "SIGINT" else f"{told}: stopped", file=sys.stderr)
            code = 128 + heard[0]
    sys.exit(code)


@contextlib.contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Inside, Ctrl-C raises KeyboardInterrupt as ever and is noted in the list; what else asks for
    an end raises SystemExit, so that half-made folders and processes started are cleared away."""
    heard: list[int] = []

    def hear(number: int, frame: Any) -> None:
        heard.append(number)
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        raise SystemExit(128 + number)

    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in WATCHED if here}
    usual = (signal.SIG_DFL, signal.default_int_handler)  # nohup and others have their own
    ours = [number for number, handler in before.items() if handler in usual]
    for number in ours:
        signal.signal(number, hear)
    try:
        yield heard
    finally:
        for number in ours:
            signal.signal(number, before[number])


def _settle_surroundings() -> None:
    """Keep what merely surrounds this process away from it and from those that it starts."""
    # Ranks and helpers begin without the folder that this was typed in: a random.py or queue.py
    # there must not stand in for Python's own. What plugins need of it is passed on.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    # A container's user may be in no list of users: caches would go into a folder called ~.
    if os.path.expanduser("~") == "~":
        os.environ["HOME"] = tempfile.gettempdir()


def _code(arguments: list[str]) -> int:
    """Do what is asked; the exit code."""
    try:
        code = _dispatch(arguments)
    except KeyboardInterrupt as error:
        # Whoever could say how to go on has said it; that is to be the last line.
        if not error.args:
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
    if {"-h", "--help"} & set(arguments) and (verb in ("train", "plan") or verb not in VERBS):
        folder = config_dir(arguments)
        words = rest if verb in VERBS else arguments
        named_words = [
            word
            for before, word in zip(["", *words], words, strict=False)
            if before not in CONFIG_DIR_FLAGS and re.match(r"[a-z][^=]*$", word)
        ]
        asked = [help_of(word, folder) for word in named_words]
        print("\n\n".join(asked) or help_text(folder))
        return 0
    if verb not in VERBS:
        raise ConfigError(
            f"unknown verb {verb!r}{suggestion(verb, VERBS)}; an override is written key=value"
        )
    if arguments == ["--version"]:
        print(f"recurgolf {__version__}")
        return 0
    if verb == "train":
        look_in_working_folder()
        return _train_command(rest)
    if verb == "plan":
        return _plan_command(rest)
    from recurgolf import verbs

    return verbs.run(verb, rest)


def _plan_command(arguments: list[str]) -> int:
    """Say what a run will be; with -m, what a sweep will be."""
    if {"-m", "--multirun"} & set(arguments):
        folder = prepared([a for a in arguments if not a.startswith("-")], config_dir(arguments))
        arguments = with_vocabulary(flags_first(arguments))
        asked = command(arguments, folder)
        assert asked is not None
        print("\n".join(_ahead(asked, arguments, folder).lines()))
        return 0
    from recurgolf.plan import plan_table

    print(plan_table(_planned(arguments)))
    return 0


def _ahead(asked: Command, arguments: Sequence[str], folder: Path | None) -> SweepAhead:
    """What is known of a sweep before it starts; all of its jobs are composed."""
    from recurgolf.compare.preview import SweepAhead, look_ahead

    elsewhere = "" if asked.launcher == "basic" else asked.launcher
    if not asked.jobs:
        # A sweeper that searches draws values later; what can be composed now is.
        check_sweep(_given(arguments), folder)
        return SweepAhead([], asked.at_once, elsewhere)
    seen = {item for job in asked.jobs for item in job}
    fixed = {item for item in seen if all(item in job for job in asked.jobs)}
    varied = [[item for item in job if item not in fixed] for job in asked.jobs]
    runs = composed_jobs(asked.jobs, folder, asked.config)
    return look_ahead(list(zip(varied, runs, strict=True)), asked.at_once, elsewhere)


def _given(arguments: Sequence[str]) -> list[str]:
    """The overrides of a command line."""
    return [a for a in arguments if "=" in a and not a.startswith("-")]


def _planned(arguments: list[str]) -> Run:
    """The Run to plan: composed, or that of a run folder with overrides behind it."""
    trust = "--trust" in arguments
    arguments = [argument for argument in arguments if argument != "--trust"]
    if not arguments or not (Path(arguments[0]) / "run.json").is_file():
        return compose(*split_arguments(arguments, "plan"))
    from recurgolf.run import Run

    run = Run.read(Path(arguments[0]), trust)
    overrides = split_arguments(arguments[1:], "plan")[0]
    check_parts(overrides, ("quant", "looping", "eval"), "plan FOLDER")
    return compose_parts(run, overrides)


def _train_command(arguments: list[str]) -> int:
    from recurgolf.training.distributed import started_by_torchrun

    if started_by_torchrun():
        if {"-m", "--multirun"} & set(arguments):
            raise ConfigError(
                "multirun under torchrun would sweep once per rank; start it without torchrun and "
                "set trainer.devices=N, which makes the ranks of every job"
            )
        return _train_under_torchrun(*split_arguments(arguments, "train under torchrun"))
    folder = prepared(arguments, config_dir(arguments))
    arguments = with_vocabulary(flags_first(arguments))
    asked = command(arguments, folder)
    if asked is None or asked.run is None:
        return _train_sweep(asked, arguments, folder)
    run, new = asked.run, asked.new or not asked.folder.exists()
    outcomes: list[Summary | Exception] = []

    def job(config: Any) -> None:
        from recurgolf.training.launch import launch, remove_shell

        output = Path(HydraConfig.get().runtime.output_dir)
        try:
            outcomes.append(launch(run, output))
        except Exception as error:
            # Kept for later: Hydra would print its own account of it.
            if new and isinstance(error, ConfigError):
                remove_shell(output)
            outcomes.append(error)

    run_single(asked, _own_folder(asked), job)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
        if not outcome.within_budget:
            return EXIT_OVER_BUDGET
    return 0


def _train_sweep(asked: Command | None, arguments: list[str], folder: Path | None) -> int:
    """Run the jobs of a sweep."""
    if asked is None:
        _by_hydra(lambda config: None, arguments)
        return 0
    from recurgolf.compare.sweep import RUNS_SWEEP

    ahead, varied = _ahead(asked, arguments, folder), varied_keys(_given(arguments))
    own = _own_folder(asked)
    place = own or asked.folder
    if ahead.jobs:
        print("\n".join([*ahead.lines(), f"  in {place}"]), flush=True)

    def job(config: Any) -> float | None:
        return _sweep_job(config, ahead, varied)

    SweepTable.exit_code = EXIT_FAILED
    place.mkdir(parents=True, exist_ok=True)
    try:
        with only_one(place, RUNS_SWEEP):
            _by_hydra(job, [*arguments, *([f"{asked.key}={quoted(str(own))}"] if own else [])])
    except (KeyboardInterrupt, SystemExit) as error:
        again = f"recurgolf sweep resume {shlex.quote(str(place))}"
        print(f"recurgolf: the sweep was stopped; continue with\n{again}", file=sys.stderr)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt("interrupted") from None  # that was the last line
        raise
    return SweepTable.exit_code


def _sweep_job(config: Any, ahead: SweepAhead, varied: Sequence[str]) -> float | None:
    """One job of a sweep, in whatever process: a head line, a bar, a line with its result."""
    from recurgolf.compare.sweep import note_failure, note_overrides
    from recurgolf.training.launch import launch

    told = HydraConfig.get()
    output = Path(told.runtime.output_dir)
    overrides = list(told.overrides.task)
    note_overrides(output, overrides)
    number, began = int(told.job.num), time.monotonic()
    known = ahead.jobs[number].varied if number < len(ahead.jobs) else None
    label = known if known is not None else [o for o in overrides if o.partition("=")[0] in varied]
    print(ahead.head(number, label), flush=True)
    try:
        of_yaml = told.sweeper.get("params") or {}
        run = of_sweep(built(config), overrides, [*varied, *of_yaml])
        # Bars of several jobs at a time would overwrite each other.
        summary = launch(run, output, "nothing" if ahead.elsewhere else "bar")
    except Exception as error:
        # Hydra would print its own account of it, and end the sweep here.
        note_failure(output, error, ahead.named(number, label))
        return None
    print(ahead.result(number, label, summary, time.monotonic() - began), flush=True)
    return summary.val_bpb


def _by_hydra(job: Callable[[Any], Any], arguments: Sequence[str]) -> None:
    """Have Hydra make the folders, compose and run the jobs."""
    with _hydra_environment(list(arguments)):
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()


def _own_folder(asked: Command) -> Path | None:
    """Have the run or sweep a folder that is no other one's, before Hydra writes into it.

    Returns:
        The folder, where it is to be a new one; None: the one that was named.
    """
    from recurgolf.compare.sweep import check_new_sweep
    from recurgolf.training.resume import check_unused

    if asked.new:
        return claimed(asked.folder)
    if asked.run is not None:
        check_unused(asked.run, asked.folder)
    else:
        check_new_sweep(asked.folder, asked.jobs)
    return None


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

        SweepTable.exit_code = finish_sweep(Path(config.hydra.sweep.dir))
