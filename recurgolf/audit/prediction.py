"""Checks 1 to 4: what a protocol may know when it predicts, measured from outside.

A protocol and its model are a black box that turns tokens into nats per target. Changing tokens and
looking at which nats move shows what a score depends on; no flag is read and no code is looked at
(conditions C1 to C4 of the challenge's "Field Guide to Valid Submissions").
"""

from __future__ import annotations

import contextlib
from itertools import pairwise

import numpy as np
import torch

from recurgolf.audit.check import FAIL, PASS, Check, judged, not_applicable
from recurgolf.audit.reduced_text import Trial
from recurgolf.eval import ScoreAccumulator

MOVED = 5e-5
"""Nats by which a score may differ for rounding alone: float32, in other batches."""
MASS = 2e-3
"""How far from 1 the sum of probabilities may be."""
CUTS = 9
"""Places from which on the text is changed."""
HEAVIEST, SAMPLED, EXACT_UP_TO = 12, 20, 48
"""Tokens tried at one position: the likeliest, and a sample of the others; all of a vocabulary up
to the last number."""


def causality(trial: Trial, chance: np.random.Generator) -> Check:
    """Change everything behind a cut: no score up to the cut may move."""
    plain = trial.scored(trial.text.tokens).target_nats
    worst, where, edges = 0.0, 0, trial.edges()
    cuts = _cuts(edges, trial.text.num_targets, chance)
    for cut in cuts:
        tokens = _changed(trial, cut + 2, len(trial.text.tokens), chance)
        moved = _moved(trial.scored(tokens).target_nats, plain, cut + 1)
        if not moved <= worst:
            worst, where = moved, cut
    line = (
        f"nats by which a score moves at most when all later tokens are replaced; {len(cuts)} cuts "
        f"over {trial.text.num_targets} targets, among them edges of windows and chunks"
    )
    if worst > MOVED or worst != worst:
        line += f"; worst with the text changed behind target {where}"
    return judged("causality", worst, MOVED, line)


def score_before_update(trial: Trial, chance: np.random.Generator) -> Check:
    """Replace the rest of a target's own chunk, the target included: what came before it stays.

    The text behind the chunk is left as it is, so that only learning from the chunk can show.
    """
    plain = trial.scored(trial.text.tokens).target_nats
    edges = [*trial.edges(), trial.text.num_targets]
    chunks = [(a, b) for a, b in pairwise(edges) if b - a > 1]
    if len(chunks) > CUTS:
        chunks = [chunks[i] for i in np.linspace(0, len(chunks) - 1, CUTS).astype(int)]
    worst = 0.0
    for first, stop in chunks:
        target = first + (stop - first) // 2
        tokens = _changed(trial, target + 1, stop + 1, chance)
        worst = _worse(worst, _moved(trial.scored(tokens).target_nats, plain, target))
    return judged(
        "score_before_update",
        worst,
        MOVED,
        "nats by which a score moves at most when later targets of its own chunk are replaced; "
        f"{len(chunks)} chunks",
    )


def normalised(trial: Trial, chance: np.random.Generator, positions: int = 2) -> Check:
    """Put every token in a target's place: their probabilities must sum to one.

    A score that has seen its target (by a leak, by learning from it first, or by choosing the
    better of two predictions) gives too much mass to whatever stands there. Of a large vocabulary
    the likeliest tokens are tried and others drawn by the model's own distribution; where the
    protocol's probabilities are proportional to it, as those of a fixed model are, the sum is
    exact all the same.
    """
    size = trial.scored_model.model.config.vocab_size
    scored = trial.scored(trial.text.tokens).scored > 0
    edges = trial.edges()
    # A target in the middle of a chunk, and the first one of a chunk.
    candidates = [*(edge + 1 for edge in reversed(edges)), *reversed(edges)]
    late = [p for p in candidates if p >= 2 * trial.length and p < len(scored) and scored[p]]
    late = late or np.flatnonzero(scored)[-1:].tolist()
    if not late:
        return not_applicable("normalised", "the protocol scores no target of the stretch")
    chosen = list(dict.fromkeys([late[0], *late[len(late) // 2 :]]))[:positions]
    worst, tried = 0.0, 0
    for place in chosen:
        mass, spread, count = _mass(trial, place, size, chance)
        tried += count
        worst = _worse(worst, max(abs(mass - 1) - 4 * spread, 0.0))
    how = "every token" if size <= EXACT_UP_TO else f"{tried // len(chosen)} tokens"
    return judged(
        "normalised",
        worst,
        MASS,
        f"how far from 1, at most, the probabilities of {how} of {size} in the place of "
        f"{len(chosen)} targets are in sum, beyond four standard errors",
    )


def single_pass(trial: Trial) -> Check:
    """Count how often every target is scored, and in which order."""
    try:
        accumulator = trial.scored(trial.text.tokens)
    except ValueError as error:
        return Check("single_pass", None, FAIL, f"the protocol could not be run: {error}")
    most, left_out = int(accumulator.scored.max()), int((accumulator.scored == 0).sum())
    if not most:
        return not_applicable("single_pass", "the protocol scores no target of the stretch")
    back = _out_of_order(accumulator)
    verdict = PASS if most == 1 and back == 0 else FAIL
    line = (
        f"times that a target is scored at most; {int((accumulator.scored > 1).sum())} more than "
        f"once, {back} behind a later target of their document, "
        f"{left_out} of {len(accumulator.scored)} never"
    )
    return Check("single_pass", most, verdict, line)


def _out_of_order(accumulator: ScoreAccumulator) -> int:
    """Targets entered after one that follows them in the same document."""
    back = 0
    starts = [*accumulator.text.starts.tolist(), accumulator.text.num_targets]
    for start, stop in pairwise(starts):
        turns = accumulator.turn[start:stop][accumulator.scored[start:stop] > 0]
        if len(turns):
            latest = np.minimum.accumulate(turns[::-1])[::-1]
            back += int((turns > latest).sum())
    return back


def _mass(
    trial: Trial, place: int, size: int, chance: np.random.Generator
) -> tuple[float, float, int]:
    """Sum of the probabilities of all tokens as target `place`, its standard error, and runs."""
    tokens = trial.text.tokens.copy()
    whole = (place // trial.length + 1) * trial.length + 1
    for stop in (place + 2, whole):
        # A shorter text does as well, if the protocol still scores the target at its end.
        if stop <= len(tokens) and trial.scored(tokens[:stop]).scored[place]:
            tokens = tokens[:stop]
            break

    def probability(token: int) -> float:
        tokens[place + 1] = token
        return float(np.exp(-trial.scored(tokens).target_nats[place]))

    if size <= EXACT_UP_TO:
        return sum(probability(token) for token in range(size)), 0.0, size
    guess = _distribution(trial, place)
    order = np.argsort(-guess, kind="stable")
    top, rest = order[:HEAVIEST], order[HEAVIEST:]
    sure = sum(probability(int(token)) for token in top)
    left = guess[rest].sum()
    drawn = chance.choice(rest, size=SAMPLED, p=guess[rest] / left)
    weights = np.array([probability(int(token)) / guess[token] for token in drawn]) * left
    spread = float(weights.std(ddof=1) / np.sqrt(SAMPLED))
    return sure + float(weights.mean()), spread, HEAVIEST + SAMPLED


@torch.no_grad()
def _distribution(trial: Trial, place: int) -> np.ndarray:
    """The model's own prediction of a target from its window, nowhere zero; float64 [v]."""
    scored_model, start = trial.scored_model, max(0, place + 1 - trial.length)
    with contextlib.suppress(NotImplementedError):
        windows = trial.protocol.windows(trial.text, trial.length)
        start = next((w.start for w in windows if w.first <= place < w.stop), start)
    ids = trial.text.ids(start, place + 1)[None].to(scored_model.device)
    hidden = scored_model.model.hidden(ids, scored_model.plan(trial.protocol.passes))
    shares = torch.softmax(scored_model.model.logits(hidden)[0, -1].double(), dim=-1).cpu().numpy()
    shares = np.maximum(shares, 1e-9)
    return shares / shares.sum()


def _cuts(edges: list[int], num_targets: int, chance: np.random.Generator) -> list[int]:
    """Targets behind which the text is changed: at edges, beside them, and anywhere."""
    near = [edge + step for edge in edges[1:] for step in (-1, 0)]
    if len(near) > CUTS - 3:
        near = [near[i] for i in np.linspace(0, len(near) - 1, CUTS - 3).astype(int)]
    anywhere = chance.integers(0, num_targets - 2, size=3).tolist()
    return sorted({min(max(cut, 0), num_targets - 2) for cut in (*near, *anywhere)})


def _changed(trial: Trial, first: int, stop: int, chance: np.random.Generator) -> np.ndarray:
    """The stretch with tokens `first` to `stop` - 1 replaced; documents begin where they did."""
    tokens, text = trial.text.tokens.copy(), trial.text
    ordinary = np.unique(tokens if text.bos is None else tokens[tokens != text.bos])
    part = tokens[first:stop]
    replaced = chance.choice(ordinary, size=len(part))
    # Every one differs from what stood there.
    same = replaced == part
    places = np.searchsorted(ordinary, part[same])
    replaced[same] = ordinary[(places + 1) % len(ordinary)]
    tokens[first:stop] = (
        replaced if text.bos is None else np.where(part == text.bos, part, replaced)
    )
    return tokens


def _moved(nats: np.ndarray, plain: np.ndarray, count: int) -> float:
    """Largest difference among the first `count` targets; not a number counts as infinite."""
    difference = np.abs(nats[:count] - plain[:count])
    if not len(difference):
        return 0.0
    return float("inf") if np.isnan(difference).any() else float(difference.max())


def _worse(one: float, other: float) -> float:
    return other if not other <= one else one
