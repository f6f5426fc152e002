"""recurgolf search: look for the best settings within a space, by bits per byte and bytes.

    recurgolf search experiment=demo 'optimizer.matrix_lr=tag(log,interval(0.01,0.1))' \\
        'lora.rank=choice(0,1,2)' trainer.val_every=50 --trials 30 --folder outputs/search/demo

Values are Hydra's: choice(a,b,...), a,b, range(1,9), interval(low,high), tag(log,interval(...)),
int(interval(...)). The same command goes on with a search that was stopped; a larger --trials
adds to one that has ended. `trainer.val_every` lets beaten trials be given up early.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from recurgolf.config import EXIT_FAILED, ConfigError
from recurgolf.overrides import split_arguments
from recurgolf.verbs import parser_of


def main(arguments: Sequence[str]) -> int:
    """Run trials, print the Pareto front."""
    from recurgolf.composing import compose
    from recurgolf.multirun import search_space

    parser = parser_of("search", __doc__)
    parser.add_argument("--folder", type=Path, help="of trials and study (default: outputs/search)")
    parser.add_argument("--trials", type=int, default=20, help="how many in all")
    parser.add_argument("--jobs", type=int, default=1, help="how many at a time")
    parser.add_argument(
        "--objectives",
        default="val_bpb,artifact_bytes",
        help="what to make small, comma-separated",
    )
    parser.add_argument("--patience", type=int, default=3, help="finished before one is given up")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.0,
        help="bits per byte worse than their median",
    )
    parser.add_argument("--sampler-seed", type=int, default=0, help="of what is tried")
    asked, rest = parser.parse_known_args(list(arguments))
    try:
        from recurgolf.compare.search import Search, all_failed, search, table
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        raise ConfigError(
            "recurgolf search needs the package optuna: pip install 'recurgolf[search]'"
        ) from None
    overrides, config_dir = split_arguments(rest, "search")
    fixed, space = search_space(overrides)
    wanted = Search(
        folder=(asked.folder or Path("outputs") / "search").resolve(),
        fixed=tuple(fixed),
        space=space,
        compose=lambda own: compose(own, config_dir),
        flags=(f"--config-dir={config_dir}",) if config_dir else (),
        objectives=tuple(asked.objectives.split(",")),
        trials=asked.trials,
        jobs=asked.jobs,
        seed=asked.sampler_seed,
        patience=asked.patience,
        margin=asked.margin,
    )
    study = search(wanted, lambda text: print(text, flush=True))
    print(table(study, wanted))
    return EXIT_FAILED if all_failed(study) else 0
