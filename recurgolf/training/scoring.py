"""Scoring in a run and in `recurgolf evaluate`: several protocols, progress, sums per document.

scores/<protocol>.npz    nats, tokens, bytes: per document, in the order of the text
                         text: fingerprint of validation tokens and tokenizer
                         protocol: the settings, as JSON
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recurgolf.artifact.score import text_of
from recurgolf.config import kind_of, to_dict
from recurgolf.data import Dataset
from recurgolf.disk import writing
from recurgolf.eval import Eval, Score, ScoredModel, Text, score
from recurgolf.eval.windows import Overlapping
from recurgolf.training.distributed import Ranks
from recurgolf.training.progress import Log
from recurgolf.training.telemetry import curves

if TYPE_CHECKING:
    from recurgolf.training.trainer import Trainer

FOLDER = "scores"
_NOT_SETTINGS = ("batch_tokens", "also", "audit")
"""Fields that no score depends on."""


def validate(trainer: Trainer) -> Score:
    """Score the unpacked model under the run's protocol."""
    with trainer.clock.phase("validation"):
        result = shown(trainer.run.eval.alone, scored_model_of(trainer), trainer.text, trainer)
    trainer.log.line(
        f"step {trainer.step:5d}/{trainer.config.steps} | val_loss {result.val_loss:.4f} | "
        f"val_bpb {result.val_bpb:.4f}"
    )
    values = {"val/loss": result.val_loss, "val/bpb": result.val_bpb}
    if trainer.ranks.is_first:
        plan = trainer.run.looping.eval_plan(trainer.run.model.num_blocks)
        values |= curves(trainer, plan, "validation")
    # It counts as made when it is recorded; no signal comes between.
    with trainer.signals.deferred():
        if trainer.ranks.is_first:
            trainer.tracker.log({**values, **trainer.progress()}, step=trainer.step)
        trainer.validated[trainer.step] = result.val_bpb
    trainer.signals.stop_if_heard()
    return result


def scored_model_of(trainer: Trainer, model: torch.nn.Module | None = None) -> ScoredModel:
    """The trainer's model, or another one of the same run, as protocols see it."""
    run = trainer.run
    model = trainer.model if model is None else model
    return ScoredModel(model, run.looping, run.trainer.seq_len, trainer.device)


def shown(
    protocol: Eval, scored_model: ScoredModel, text: Text, where: Trainer | Log, what: str = ""
) -> Score:
    """A protocol's score over all ranks, with a bar that tells the time left.

    Args:
        where: a trainer, for its log and ranks, or a log alone.
        what: words for the bar; empty: the protocol's kind.
    """
    log, ranks = (where, Ranks()) if isinstance(where, Log) else (where.log, where.ranks)
    began = time.monotonic()
    with log.bar(f"scoring {what or kind_of(protocol)}", 1) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            if bar.live is not None:
                bar.live.update(bar.task, total=total)
            left = (time.monotonic() - began) * (total - done) / done
            bar.at(done, f"{left:.0f} s left")
            if not isinstance(where, Log) and 20 * done >= total:
                where.caps.expect(where.clock.running, left, "use fewer windows or fewer passes")

        return score(
            protocol,
            scored_model,
            text,
            rank=ranks.rank,
            world_size=ranks.world_size,
            all_reduce=all_reduced if ranks.world_size > 1 else None,
            progress=progress,
        )


def all_reduced(tensor: Tensor) -> Tensor:
    """A tensor's sum over ranks, on its own device where the backend works there."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    total = tensor.to(device, copy=True)
    dist.all_reduce(total)
    return total.to(tensor.device)


def score_all(
    protocols: Mapping[str, Eval],
    scored_model: ScoredModel,
    text: Text,
    where: Trainer | Log,
) -> dict[str, Score]:
    """Score by each protocol, in order; what differs only in name is scored once.

    Returns:
        Name -> score; what a protocol measured besides follows it as name/variant.
    """
    found: dict[str, Score] = {}
    known: dict[str, Score] = {}
    for name, protocol in protocols.items():
        settings = {**settings_of(protocol), "passes": None}
        key = json.dumps([settings, scored_model.plan(protocol.passes).blocks])
        if key not in known:
            known[key] = shown(protocol, scored_model, text, where, name)
        found[name] = known[key]
        for variant, own in known[key].variants.items():
            found[f"{name}/{variant}"] = own
    return found


def named_protocols(protocols: list[Eval], seq_len: int) -> dict[str, Eval]:
    """Every evaluation that protocols ask for, the headline first: name -> protocol by itself.

    `eval.also` and lists of `eval.passes` are taken apart. The name is the kind, behind it what
    differs where there are several of a kind: `sliding`, `sliding/stride=64`, `sliding/passes=3`.

    Args:
        seq_len: of training; window and stride are written out, so that the same evaluation has
            the same settings however it was asked for.
    """
    found: dict[str, Eval] = {}
    for protocol in [p for asked in protocols for p in (asked, *asked.also)]:
        counts = protocol.passes if isinstance(protocol.passes, list) else []
        alone = _written_out(protocol.alone, seq_len)
        for each in [alone, *(replace(alone, passes=passes) for passes in counts)]:
            name = kind_of(each)
            if name in found:
                name = "/".join([name, *difference(settings_of(found[name]), settings_of(each))])
            found.setdefault(name, each)
    return found


def _written_out(protocol: Eval, seq_len: int) -> Eval:
    found = replace(protocol, seq_len=protocol.seq_len or seq_len)
    if isinstance(found, Overlapping):
        found = replace(found, stride=found.step(found.seq_len or seq_len))
    return found


def settings_of(protocol: Eval) -> dict[str, Any]:
    """The fields of a protocol that its score depends on."""
    return {k: v for k, v in to_dict(protocol).items() if k not in _NOT_SETTINGS}


def difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """`stride=64` for every field that differs."""
    changed = [key for key, value in after.items() if before.get(key) != value]
    return [f"{key}={json.dumps(after[key]).strip(chr(34))}" for key in changed]


def entry_of(result: Score, dataset: Dataset) -> dict[str, float]:
    """The entry of an evaluation in summary.json's `evals`.

    `bytes` are those of the table (or sidecar) over the targets scored. `raw_bytes`, where the raw
    text is known, are that text's, less the share of what the protocol left out; by them
    `val_bpb_raw` divides.
    """
    entry = result.to_dict()
    if dataset.val_raw_bytes is None:
        return entry
    sidecar = dataset.val_byte_sidecar
    counted = dataset.val_bytes if sidecar is None else int(sidecar.sum())
    raw_bytes = result.bytes * dataset.val_raw_bytes / counted
    raw_bpb = result.val_bpb * counted / dataset.val_raw_bytes
    return {**entry, "raw_bytes": raw_bytes, "val_bpb_raw": raw_bpb}


def by_passes(
    scores: Mapping[str, Score], protocols: Mapping[str, Eval], scored_model: ScoredModel
) -> dict[str, float]:
    """Passes -> val_bpb of the headline protocol; empty where it was scored with one number.

    Args:
        protocols: as `named_protocols` gives them.
    """
    headline = next(iter(protocols.values()))
    same = {**settings_of(headline), "passes": None}
    found = {}
    for name, protocol in protocols.items():
        if {**settings_of(protocol), "passes": None} == same:
            visits = scored_model.plan(protocol.passes).visits
            found[1 + max(visit.nth for visit in visits)] = scores[name].val_bpb
    return {str(n): found[n] for n in sorted(found)} if len(found) > 1 else {}


def write_scores(
    folder: Path,
    scores: Mapping[str, Score],
    protocols: Mapping[str, Eval],
    text: str,
    names: Mapping[str, str] | None = None,
) -> None:
    """Write scores/<protocol>.npz below a run's folder.

    Args:
        text: fingerprint of the text.
        names: under which scores are kept, where not under their own.
    """
    (folder / FOLDER).mkdir(exist_ok=True)
    for own, result in scores.items():
        assert result.accumulator is not None
        name = names[own] if names else own
        settings = json.dumps({**settings_of(protocols[_asked_as(own, protocols)]), "name": name})
        draft = folder / FOLDER / f".{file_name(name)}"
        with writing(folder / FOLDER / file_name(name)), draft.open("wb") as file:
            np.savez_compressed(
                file,
                nats=result.accumulator.nats,
                tokens=result.accumulator.tokens,
                bytes=result.accumulator.bytes,
                text=np.array(text),
                protocol=np.array(settings),
            )
        draft.replace(folder / FOLDER / file_name(name))


def file_name(name: str) -> str:
    """`sliding/passes=3` -> `sliding_passes=3.npz`."""
    return name.replace("/", "_") + ".npz"


def free_names(
    folder: Path, names: Iterable[str], protocols: Mapping[str, Eval], text: str
) -> dict[str, str]:
    """The names under which evaluations are kept beside those that a folder has.

    They are as given, unless the folder's evaluation of the kind had other settings or another
    text; then what differs from that one is added, so that no entry is overwritten by something
    else, and no name says less than it means.
    """
    found = {}
    for name in names:
        of = _asked_as(name, protocols)
        path = folder / FOLDER / file_name(kind_of(protocols[of]))
        found[name] = name
        if path.exists():
            settings, other = kept_settings(path)
            extra = difference(settings, settings_of(protocols[of]))
            extra += [] if other == text else [f"text={text[:8]}"]
            found[name] = "/".join([kind_of(protocols[of]), *extra]) + name[len(of) :]
    return found


def kept_settings(path: Path) -> tuple[dict[str, Any], str]:
    """Settings of the evaluation in a file of scores/, with its `kind`; fingerprint of its text."""
    with np.load(path) as kept:
        settings = json.loads(str(kept["protocol"]))
        return {k: v for k, v in settings.items() if k != "name"}, str(kept["text"])


def _asked_as(name: str, protocols: Mapping[str, Eval]) -> str:
    """The protocol that gave the entry `name`, which may be a variant of it."""
    return max((known for known in protocols if f"{name}/".startswith(f"{known}/")), key=len)


__all__ = [
    "by_passes",
    "entry_of",
    "named_protocols",
    "score_all",
    "scored_model_of",
    "shown",
    "text_of",
    "validate",
    "write_scores",
]
