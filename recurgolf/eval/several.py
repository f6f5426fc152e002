"""Several protocols on one file: their names, what sets them apart, and scores/ in a run's folder.

scores/<protocol>.npz    nats, tokens, bytes: per document, in the order of the text
                         text: fingerprint of validation tokens and tokenizer
                         protocol: the settings, as JSON
"""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from recurgolf.config import kind_of, to_dict
from recurgolf.disk import DamagedFile, write_file
from recurgolf.eval.protocol import Eval, ScoredModel
from recurgolf.eval.text import Score
from recurgolf.eval.windows import Overlapping

FOLDER = "scores"
DAMAGES = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    RecursionError,
    BadZipFile,
    zlib.error,
)
"""What numpy raises on a file that is cut or something else."""

_NOT_SETTINGS = ("batch_tokens", "also", "audit")
"""Fields that no score depends on."""


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
        content = io.BytesIO()
        np.savez_compressed(
            content,
            nats=result.accumulator.nats,
            tokens=result.accumulator.tokens,
            bytes=result.accumulator.bytes,
            text=np.array(text),
            protocol=np.array(settings),
        )
        write_file(folder / FOLDER / file_name(name), content.getvalue())


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
    """Settings of the evaluation in a file of scores/, with its `kind`; fingerprint of its text.

    Raises:
        DamagedFile: it is cut, or no such file.
    """
    try:
        with path.open("rb") as file, np.load(file) as kept:
            settings = dict(json.loads(str(kept["protocol"])))
            text = str(kept["text"])
    except DAMAGES as error:
        # numpy takes garbage for a pickle, and says so.
        why = "it holds no scores" if "pickle" in str(error) else error
        raise DamagedFile(f"{path} is damaged: {why}") from None
    return {k: v for k, v in settings.items() if k != "name"}, text


def _asked_as(name: str, protocols: Mapping[str, Eval]) -> str:
    """The protocol that gave the entry `name`, which may be a variant of it."""
    return max((known for known in protocols if f"{name}/".startswith(f"{known}/")), key=len)
