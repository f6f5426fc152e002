"""recurgolf adapters: take the adapters of a run, put some on, merge them, blend several.

    recurgolf adapters save RUN DEST                      a run's adapters as a folder to exchange
    recurgolf adapters load RUN ADAPTER DEST              a run with these adapters, packed
    recurgolf adapters merge RUN ADAPTER DEST [--untie]   a run with them in its weights, packed
    recurgolf adapters blend A B … DEST [--weights 1,1]   their weighted sum

RUN is a run folder, ADAPTER one that `save`, `blend` or peft wrote. The folders that load and merge
make are run folders: evaluate, plan and trainer.base take them.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from recurgolf import adapters
from recurgolf.adapters import Adapter
from recurgolf.adapters.attach import linear_modules
from recurgolf.config import ConfigError
from recurgolf.folders import check_new, made_whole
from recurgolf.model.transformer import Transformer
from recurgolf.overrides import check_parts
from recurgolf.run import Run
from recurgolf.training.base import FinishedRun, read_finished
from recurgolf.training.new_folder import keep_weights, new_folder, pack, pack_and_score
from recurgolf.training.own_data import check_own_data
from recurgolf.verbs import add_trust, parser_of

OVERRIDABLE = ("quant", "data")
"""Parts of the Run that `load` and `merge` can exchange: how the result is packed."""


def main(arguments: Sequence[str]) -> int:
    """Exchange low-rank adapters: save a run's, load or merge some, blend several."""
    parser = parser_of("adapters", __doc__)
    verbs = parser.add_subparsers(required=True, metavar="save|load|merge|blend")
    save = verbs.add_parser("save", help="write a run's adapters to a folder")
    save.set_defaults(act=_save)
    save.add_argument("run", type=Path, help="folder of a finished run")
    save.add_argument("dest", type=Path, help="folder to be made")
    load = verbs.add_parser("load", help="put adapters on a copy of a run")
    load.set_defaults(act=_load)
    merge = verbs.add_parser("merge", help="write adapters into the weights of a copy of a run")
    merge.set_defaults(act=_merge)
    for verb in (save, load, merge):
        add_trust(verb)
    for verb in (load, merge):
        verb.add_argument("run", type=Path, help="folder of the finished run that is the base")
        verb.add_argument("adapter", type=Path, help="folder with adapter_model.safetensors")
        verb.add_argument("dest", type=Path, help="folder to be made")
        verb.add_argument("overrides", nargs="*", help="of quant and data, as in quant=none")
        verb.add_argument("--score", action="store_true", help="score the file: summary.json")
    merge.add_argument(
        "--untie",
        action="store_true",
        help="give every visit of a looped block a block of its own, so that adapters of single "
        "iterations can be merged",
    )
    blend = verbs.add_parser("blend", help="make one adapter of several")
    blend.set_defaults(act=_blend)
    blend.add_argument("adapters", type=Path, nargs="+", help="adapter folders")
    blend.add_argument("dest", type=Path, help="folder to be made")
    blend.add_argument("--weights", help="one per adapter, as in 0.7,0.3; default: 1 each")
    blend.add_argument("--rank", type=int, help="largest rank of the result; default: exact")
    asked = parser.parse_args(arguments)
    _check_new(asked.dest)
    return asked.act(asked)


def _save(asked: argparse.Namespace) -> int:
    found = read_finished(asked.run, asked.trust)
    model = found.model()
    if model.adapters is None:
        raise ConfigError(f"{asked.run} has no adapters to save: its lora.rank is 0")
    base = adapters.base_of(found.run, found.state, found.tokenizer)
    adapter = adapters.adapter_of(found.run, model.adapters, base)
    with made_whole(asked.dest) as draft:
        adapters.write(draft, adapter, linear_modules(found.run.model))
    _tell(asked.dest, adapter)
    return 0


def _load(asked: argparse.Namespace) -> int:
    found = read_finished(asked.run, asked.trust)
    model = found.model()
    run, adapter = adapters.load(found.run, model, asked.adapter, found.tokenizer)
    _warn_unchecked(asked.adapter, adapter)
    _write_run(asked, found, run, model)
    return 0


def _merge(asked: argparse.Namespace) -> int:
    found = read_finished(asked.run, asked.trust)
    adapter = adapters.read(asked.adapter)
    _warn_unchecked(asked.adapter, adapter)
    run, model = adapters.merge(
        found.run, found.model(), adapter, found.tokenizer, untied=asked.untie
    )
    _write_run(asked, found, run, model)
    return 0


def _blend(asked: argparse.Namespace) -> int:
    parts = [adapters.read(folder) for folder in asked.adapters]
    weights = [1.0] * len(parts)
    if asked.weights is not None:
        try:
            weights = [float(weight) for weight in asked.weights.split(",")]
        except ValueError:
            raise ConfigError(
                f"--weights {asked.weights}: expected numbers, as in 0.7,0.3"
            ) from None
    adapter = adapters.blend(parts, weights, asked.rank)
    with made_whole(asked.dest) as draft:
        adapters.write(draft, adapter)
    _tell(asked.dest, adapter)
    return 0


def _write_run(asked: argparse.Namespace, found: FinishedRun, run: Run, model: Transformer) -> None:
    """A run folder of a model that no training has made."""
    from recurgolf.composing import compose_parts

    check_parts(asked.overrides, OVERRIDABLE, "adapters")
    # Nothing trains here, and what was trained alone before is a whole model now.
    run.trainer = dataclasses.replace(run.trainer, trainable="all", base=None)
    run = compose_parts(run, asked.overrides) if asked.overrides else Run.from_dict(run.to_dict())
    with new_folder(run, asked.dest) as job:
        tokenizer = job.dataset.tokenizer.sha256
        if tokenizer != found.tokenizer:
            raise ConfigError(
                f"{asked.run} was trained with tokenizer {found.tokenizer[:12]}…, the data has "
                f"{tokenizer[:12]}…"
            )
        own = not any(override.startswith("data") for override in asked.overrides)
        check_own_data(asked.run, job.dataset, text=own)
        keep_weights(job, model, {})
        (pack_and_score if asked.score else pack)(job, model)
        weights = sum(p.numel() for p in model.parameters())
        job.log.line(f"{run.plan(1.0).describe()}: {weights:,} weights")
        job.log.line(f"folder: {asked.dest} (recurgolf evaluate {asked.dest})")


def _check_new(folder: Path) -> None:
    check_new(folder)
    if not folder.resolve().parent.is_dir():
        raise ConfigError(f"{folder.resolve().parent} is no folder: {folder} cannot be made in it")


def _warn_unchecked(folder: Path, adapter: Adapter) -> None:
    """Say once where a file from elsewhere does not name its base."""
    if adapter.base.fingerprint is None:
        print(f"{folder} does not say which base it is for: only names and sizes were checked")


def _tell(folder: Path, adapter: Adapter) -> None:
    ranks = sorted({factors.rank for factors in adapter.factors.values()})
    numbers = sum(f.a.numel() + f.b.numel() for f in adapter.factors.values())
    kind = "for single iterations" if adapter.iterated else "for all visits"
    print(
        f"{folder}: {len(adapter.factors)} pairs {kind}, rank {', '.join(map(str, ranks))}, "
        f"{numbers:,} numbers"
    )
