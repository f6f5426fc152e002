"""The command line: composes Runs with Hydra, and works on the folders of finished runs.

This is the only module that imports Hydra.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.experimental.callback import Callback

from recurgolf.config import (
    CONFIG_LIBRARY_ERRORS,
    REGISTRY,
    ConfigError,
    key_names,
    kind_of,
    load_plugins,
    suggestion,
    to_dict,
    to_object,
)
from recurgolf.help import VERBS, help_text

EXIT_USER_ERROR = 2
EXIT_OVER_BUDGET = 3

COMPOSE_ERRORS = (HydraException, *CONFIG_LIBRARY_ERRORS)


def conf_folder() -> Path:
    """The YAML: beside the modules in an installed package, beside the package in a checkout."""
    here = Path(__file__).resolve().parent
    inside = here / "conf"
    return inside if inside.is_dir() else here.parent / "conf"


def main(argv: Sequence[str] | None = None) -> None:
    """The console script `recurgolf`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = arguments[0] if arguments and not arguments[0].startswith("-") else ""
    if "=" in verb:
        verb = ""
    if {"-h", "--help"} & set(arguments) and verb in ("", "train", "plan"):
        print(help_text(conf_folder()))
        return
    try:
        sys.exit(_dispatch(verb, arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except ConfigError as error:
        _fail(str(error))
    except COMPOSE_ERRORS as error:
        _fail(explain(error))
    except OSError as error:
        if error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; choose another folder or free the path")


def _dispatch(verb: str, arguments: list[str]) -> int:
    if verb in ("", "train"):
        return _train_command(arguments[1:] if verb else arguments)
    if verb == "plan":
        from recurgolf.plan import plan_table

        print(plan_table(_composed_from(arguments[1:])))
        return 0
    if verb in VERBS:
        from recurgolf import verbs

        return verbs.run(verb, arguments[1:])
    raise ConfigError(
        f"unknown verb {verb!r}{suggestion(verb, VERBS)}; an override is written key=value"
    )


def _fail(message: str) -> None:
    print(f"recurgolf: {message}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


def _train_command(arguments: list[str]) -> int:
    from recurgolf.training.distributed import started_by_torchrun

    if started_by_torchrun():
        return _train_under_torchrun(arguments)
    multirun = any(a in ("-m", "--multirun") for a in arguments)
    outcomes: list[str | Exception] = []

    def job(config: Any) -> float | None:
        from recurgolf.training.launch import launch

        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            summary = launch(_run_of(config), folder)
        except Exception as error:
            # Kept for later: Hydra would print its own account of it, and end a sweep here.
            if multirun:
                note_failure(folder, error)
            outcomes.append(error)
            return None
        outcomes.append(summary.status)
        return summary.val_bpb

    check_overrides(arguments)
    register()
    folders = config_dirs(arguments)
    load_plugins(plugin_modules(folders))
    before = list(sys.argv)
    sys.argv = [before[0], *_absolute_config_dirs(arguments)]
    # Hydra then raises what went wrong instead of printing its own account of it.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")(job)()
    finally:
        sys.argv = before
    if multirun:
        return int(SweepTable.any_failed)
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return EXIT_OVER_BUDGET if "over_budget" in outcomes else 0


def _train_under_torchrun(arguments: list[str]) -> int:
    """Every rank composes the same Run; rank 0's folder is everybody's."""
    from datetime import datetime

    from recurgolf.training.distributed import environment_rank
    from recurgolf.training.launch import launch

    if any(a in ("-m", "--multirun") for a in arguments):
        raise ConfigError(
            "multirun under torchrun would sweep once per rank; start it without torchrun and set "
            "trainer.devices=N, which makes the ranks of every job"
        )
    run = _composed_from(arguments)
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path("outputs") / run.name / f"{stamp}_seed={run.seed}"
    summary = launch(run, folder)
    return EXIT_OVER_BUDGET if summary.status == "over_budget" and environment_rank() == 0 else 0


def _composed_from(arguments: list[str]) -> Any:
    folders = config_dirs(arguments)
    overrides = [a for a in arguments if "=" in a and not a.startswith("--")]
    return compose(overrides, config_dir=folders[0] if folders else None)


def compose(overrides: Sequence[str] = (), config_dir: str | Path | None = None) -> Any:
    """The Run that the command line would make of these overrides.

    Args:
        overrides: as on the command line: `["lora.rank=1", "experiment=smoke"]`.
        config_dir: a folder with YAML of your own, searched besides the package's.

    Raises:
        ConfigError: what cannot be composed, with the nearest right name.
    """
    check_overrides(overrides)
    register()
    folders = [Path(config_dir).resolve()] if config_dir else []
    load_plugins(plugin_modules(folders))
    search = [f"hydra.searchpath=[file://{folders[0]}]"] if folders else []
    try:
        with _hydra_initialized():
            return _run_of(hydra.compose("config", overrides=[*search, *overrides]))
    except COMPOSE_ERRORS as error:
        raise ConfigError(explain(error)) from None


def compose_parts(run: Any, overrides: Sequence[str]) -> Any:
    """A Run with some of its parts changed by overrides, the rest as it was.

    A key alone (`eval.stride=32`) changes the run's own option; a group (`eval=sliding`) starts
    from that option's YAML.
    """
    changed: dict[str, list[str]] = {}
    for override in overrides:
        changed.setdefault(re.split(r"[=./]", override, maxsplit=1)[0], []).append(override)
    own: list[str] = []
    for group, changes in changed.items():
        if not any(change.startswith(f"{group}=") for change in changes):
            own += [f"{group}={kind_of(getattr(run, group))}"]
            own += as_overrides(group, to_dict(getattr(run, group)))
    composed = compose([*own, *overrides])
    return dataclasses.replace(run, **{group: getattr(composed, group) for group in changed})


def as_overrides(path: str, node: dict[str, Any]) -> list[str]:
    """Overrides that bring back an option tree as `to_dict` wrote it."""
    found = []
    for key, value in node.items():
        if isinstance(value, dict):
            if "kind" in value:
                found.append(f"{path}/{key}={value['kind']}")
            found += as_overrides(f"{path}.{key}", value)
        elif key != "kind":
            found.append(f"{path}.{key}={_quoted(value)}")
    return found


def _quoted(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace("'", "\\'")
        return f"'{escaped}'"
    if isinstance(value, list):
        return "[" + ",".join(map(_quoted, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


@contextlib.contextmanager
def _hydra_initialized() -> Iterator[None]:
    with hydra.initialize_config_dir(str(conf_folder()), version_base="1.3", job_name="recurgolf"):
        yield


def _run_of(config: Any) -> Any:
    return to_object(config)


def register() -> None:
    """Hand every registered dataclass to Hydra, as schema/<group>/<kind>."""
    from recurgolf.run import Run

    store = ConfigStore.instance()
    store.store(group="schema", name="run", node=Run)
    for group, kinds in REGISTRY.items():
        for kind, cls in kinds.items():
            if dataclasses.is_dataclass(cls):
                store.store(group=f"schema/{group}", name=kind, node=cls)


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse what Hydra itself would break on."""
    for override in overrides:
        group, _, value = override.partition("=")
        if value == "null" and (conf_folder() / group).is_dir():
            raise ConfigError(
                f"{override}: a group cannot be null; where absence makes sense it is an option of "
                f"its own, as in {group}=none"
            )


def config_dirs(arguments: Sequence[str]) -> list[Path]:
    """The folders given by --config-dir."""
    found = []
    for position, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in ("--config-dir", "-cd"):
            value = value or (arguments[position + 1] if position + 1 < len(arguments) else "")
            if not Path(value).is_dir():
                raise ConfigError(f"--config-dir {value!r} is not a folder")
            found.append(Path(value).resolve())
    return found


def _absolute_config_dirs(arguments: Sequence[str]) -> list[str]:
    """Hydra reads a relative --config-dir from its own place; make it the user's."""
    folders = {str(folder.name): folder for folder in config_dirs(arguments)}
    return [
        str(folders[Path(a).name])
        if position and arguments[position - 1] in ("--config-dir", "-cd")
        else a
        for position, a in enumerate(arguments)
    ]


def plugin_modules(folders: Sequence[Path]) -> list[str]:
    """Modules named under `plugins:` in the YAML of the user's folders.

    They must be imported before composing, since they register the schemas that YAML refers to.
    """
    modules: list[str] = []
    for folder in folders:
        for base in (str(folder), os.getcwd()):
            if base not in sys.path:
                sys.path.insert(0, base)
        for path in sorted(folder.rglob("*.yaml")):
            content = yaml.safe_load(path.read_text()) or {}
            if isinstance(content, dict):
                modules += [m for m in content.get("plugins") or [] if m not in modules]
    return modules


def explain(error: BaseException) -> str:
    """What Hydra or OmegaConf refused, in one or two lines, with the nearest right name."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    if any(isinstance(e, ConfigError) for e in chain):
        return str(next(e for e in chain if isinstance(e, ConfigError)))
    texts = [str(e) for e in chain]
    whole = "\n".join(texts)
    if isinstance(error, MissingConfigException):
        return _unknown_option(whole)
    if isinstance(error, OverrideParseException):
        return f"cannot read an override: {texts[0].splitlines()[0]}"
    unknown = re.search(r"Key '([^']+)' (?:is )?not in '?(\w+)'?", whole)
    key = re.search(r"full_key: (\S+)", whole)
    override = re.search(r"[Cc]ould not override '([^']+)'", whole)
    if override and (unknown or isinstance(error, ConfigCompositionException)):
        return _unknown_key(override.group(1))
    if unknown and key:
        return _unknown_key(key.group(1))
    if key:
        return f"{key.group(1)}: {texts[-1].splitlines()[0]}"
    lines = [line.strip() for line in texts[0].splitlines() if line.strip()]
    return " ".join(lines[:2])


def _unknown_option(text: str) -> str:
    match = re.search(r"[Cc]ould not find '([^']+)'", text)
    if match is None:
        return text.splitlines()[0]
    group, _, name = match.group(1).rpartition("/")
    known = [p.stem for p in (conf_folder() / group).glob("*.yaml")]
    return f"{group}={name}: no such option{suggestion(name, known)}"


def _unknown_key(key: str) -> str:
    parent, _, name = key.rpartition(".")
    with _hydra_initialized():
        default = hydra.compose("config")
    known = key_names(default, parent)
    if parent and not known:
        return f"{parent} has no key {name!r}: the chosen option of {parent} has none"
    groups = [str(p.relative_to(conf_folder())) for p in conf_folder().rglob("*") if p.is_dir()]
    if "/" in key or not parent:
        known = [*known, *groups]
        name = key
    where = f"{parent} has no key" if parent else "there is no key or group"
    return f"{where} {name!r}{suggestion(name, known)}"


def note_failure(folder: Path, error: Exception) -> None:
    """Leave the cause in the job's folder, where the table at the end finds it."""
    from recurgolf.compare.sweep import FAILURE

    (folder / FAILURE).write_text(traceback.format_exc())
    print(f"recurgolf: this job failed: {error}", file=sys.stderr)


class SweepTable(Callback):
    """At the end of a multirun: mean and deviation over seeds, and what failed.

    Hydra makes the object and keeps it to itself, hence the result on the class.
    """

    any_failed: ClassVar[bool] = False

    def on_multirun_end(self, config: Any, **kwargs: Any) -> None:
        from recurgolf.compare.sweep import finish_sweep

        SweepTable.any_failed = finish_sweep(Path(config.hydra.sweep.dir))
