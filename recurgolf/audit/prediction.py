"""Checks 1 to 4: what a protocol may know when it predicts, measured from outside.

A protocol and its model are a box that turns tokens into nats per target (`scorer`). Changing
tokens of the whole validation text and looking at which nats move shows what a score depends on; no
flag is read and no code is looked at (conditions C1 to C4 of the challenge's "Field Guide to Valid
Submissions").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from recurgolf.audit.check import FAIL, NOT_APPLICABLE, PASS, Check, judged, not_applicable
from recurgolf.audit.copies import Copies, Mass, examine_copies
from recurgolf.audit.scorer import Scored, Scorer, Trials
from recurgolf.eval.text import Text

MOVED = 5e-5
"""Nats by which a score may differ for rounding alone: float32, in other batches."""
MASS = 2e-3
"""How far beyond 1 rounding may take a sum of probabilities."""
POSITIONS = 8
"""Changed texts that causality is measured on; the other checks follow."""
BETS = 2048
"""Targets that are bet on in one scoring, at most."""
BETWEEN_BETS = 16
"""Targets per bet in the windows that are chosen for them."""
STAKES = (0.02, 0.1, 0.3, 0.9)
ODDS = 6.0
"""Bets that turn 1 into ten to this power do not happen to a player without an edge: their chance
is 10^-6 (Ville's inequality)."""
BETWEEN_LATE_BETS = 4
"""The same behind a beginning of the text that stays real."""
LATEST = 0.9
"""Where in the text such a beginning ends at most."""
EVEN = 0.1
"""Share of every bet spread over the whole vocabulary."""
FOLLOWING = 0.3
"""Share of every bet on what follows the token before it elsewhere in the text."""
RAGGED = 0.1
"""Share of all targets that may be left out at the beginning and the end, whatever the window."""

Say = Callable[[str], None]


def prediction_checks(
    scorer: Scorer,
    text: Text,
    chance: np.random.Generator | None = None,
    positions: int = POSITIONS,
    kinds: np.ndarray | None = None,
) -> tuple[list[Check], Trials]:
    """Checks 1 to 4 of one protocol, and the trials with the real text's scoring.

    Args:
        kinds: kind of every token [v]; a text in which tokens are exchanged for others of their
            kind is then scored as well, and kept as the trials' `witness`.
        chance: says where; None: from the system's source.
        positions: changed texts for causality; others follow: twice as many take twice as long.
    """
    trials = Trials(scorer, np.array(text.tokens), text.bos, chance or np.random.default_rng())
    once = single_pass(trials, text)
    if trials.plain.error or not trials.plain.times.max():
        others = ("causality", "normalised", "score_before_update")
        return [*(not_applicable(name, once.line) for name in others), once], trials
    copies = Copies()
    for _ in range(max(1, positions // 4)):
        examine_copies(trials, copies)
    return [
        causality(trials, positions, copies),
        normalised(trials, copies, max(1, positions // 4), kinds),
        score_before_update(trials, max(1, positions // 2)),
        once,
    ], trials


def causality(trials: Trials, count: int, copies: Copies) -> Check:
    """Change everything behind a cut: no score up to the cut may move."""
    worst, where, cuts = 0.0, "", _cuts(trials, count)
    for cut in cuts:
        found = trials.scored(trials.changed(cut + 2, len(trials.tokens)))
        moved = _moved(found, trials.plain, cut + 1)
        if not moved <= worst:
            worst, where = moved, f"; worst with the text changed behind target {cut:,}"
    line = (
        f"nats by which a score moves at most when all later tokens are replaced; {len(cuts)} cuts "
        f"through {trials.num_targets:,} targets, at edges of windows, chunks and documents and "
        "anywhere"
    )
    if copies.compared:
        line += f", and {copies.compared:,} more in copies of one stretch, at every row of a window"
        if not copies.moved <= worst:
            worst = copies.moved
            where = f"; worst with the text changed behind row {copies.row} of a stretch"
    return judged("causality", worst, MOVED, line + (where if not worst <= MOVED else ""))


def score_before_update(trials: Trials, count: int) -> Check:
    """Replace the rest of a target's own chunk, the target included: what came before it stays.

    The text behind the chunk is left as it is, so that only learning from the chunk can show.
    """
    edges = [*trials.scorer.hints.edges, trials.num_targets]
    chunks = [(a, b) for a, b in pairwise(edges) if b - a > 1]
    if len(chunks) > count:
        chosen = np.sort(trials.chance.choice(len(chunks), count, replace=False))
        chunks = [chunks[i] for i in chosen]
    worst = 0.0
    for first, stop in chunks:
        target = int(trials.chance.integers(first + 1, stop))
        found = trials.scored(trials.changed(target + 1, stop + 1))
        moved = _moved(found, trials.plain, target)
        worst = worst if moved <= worst else moved
    return judged(
        "score_before_update",
        worst,
        MOVED,
        "nats by which a score moves at most when later targets of its own chunk are replaced; "
        f"{len(chunks)} chunks",
    )


def normalised(
    trials: Trials, copies: Copies, count: int, kinds: np.ndarray | None = None
) -> Check:
    """Put other tokens in a target's place: all their probabilities may be 1 in sum, not more.

    Two kinds of evidence. The probabilities of *different* tokens in the place of one target, with
    the same text before it, add up to a lower bound of what the score gives away there: above 1 is
    proof. And at thousands of targets all over the text a token is drawn from a known distribution
    g and the score's probability p is compared: a score that is a distribution pays p / g, 1 on
    average at most, so a gambler who keeps staking a share on it does not get rich. Most
    bets are laid behind a beginning of the text that stays as it is, in every part of it.
    """
    parts = np.linspace(0, LATEST, 2 * count + 1)
    late = [int(trials.chance.uniform(*ends) * trials.num_targets) for ends in pairwise(parts)]
    paid = [_bets(trials, first) for first in (*[0] * count, *late)]
    if kinds is not None:
        paid.append(_bets(trials, kinds=kinds))
    odds, paid = _odds(paid), np.concatenate(paid)
    mean = float(paid.mean()) if len(paid) else 0.0
    bets = (
        f"at {len(paid):,} random targets a drawn token has {mean:.4f} times its share on average, "
        f"odds of 10^{odds:.1f} to 1 against a sum of at most 1 (proof from 10^{ODDS:.0f})"
    )
    rich = not odds < ODDS
    worst = copies.heaviest
    if worst is None:
        why = copies.why or "the text is too short for copies of a stretch"
        line = f"probability of a token in a target's place against its share; {bets}; {why}"
        return Check("normalised", mean, FAIL if rich else PASS, line)
    wrong = any(_wrong(mass) for mass in copies.masses)
    line = (
        f"sum of the probabilities of {_tried(worst)} in the place of one target, the largest of "
        f"{len(copies.masses)} places, a lower bound of what the score gives away; {bets}"
    )
    return Check("normalised", worst.total, FAIL if wrong or rich else PASS, line)


def _odds(paid: Sequence[np.ndarray]) -> float:
    """What gamblers turn 1 into, as a power of ten: one for every stake and every scoring, and one
    for every stake in all scorings together. They share the 1, so that Ville's bound is for all."""
    rounds = [*paid, np.concatenate(paid)]
    growth = [np.log1p(stake * (own - 1)).sum() for own in rounds for stake in STAKES]
    return float(np.logaddexp.reduce(growth) - np.log(len(growth))) / np.log(10)


def _wrong(mass: Mass) -> bool:
    """More than 1 is too much whatever was tried; less is, too, where every token was."""
    return not mass.total <= 1 + MASS or (mass.tried == mass.of and mass.total < 1 - MASS)


def _tried(mass: Mass) -> str:
    if mass.tried == mass.of:
        return f"all {mass.of:,} tokens"
    return f"{mass.tried:,} of {mass.of:,} tokens, the likeliest and others,"


def single_pass(trials: Trials, text: Text) -> Check:
    """Count how often every target is scored, which are left out, and in which order."""
    plain = trials.plain
    if plain.error:
        return Check("single_pass", None, FAIL, f"the protocol could not be run: {plain.error}")
    most, count = int(plain.times.max()), len(plain.times)
    if not most:
        return Check("single_pass", 0, FAIL, "the protocol scores no target")
    back = _out_of_order(plain, text)
    scored = np.flatnonzero(plain.times)
    head, tail = int(scored[0]), count - 1 - int(scored[-1])
    holes = int((plain.times[head : count - tail] == 0).sum())
    length = trials.scorer.hints.length
    ragged = max(head, tail) >= length or head + tail > RAGGED * count
    wrong = most > 1 or back or holes or ragged
    line = (
        f"times that a target is scored at most; {int((plain.times > 1).sum()):,} more than once, "
        f"{back:,} behind a later target of their document, {count - len(scored):,} of {count:,} "
        f"never"
    )
    if head or tail or holes:
        line += (
            f" ({head:,} at the beginning, {tail:,} at the end, where less than a window of "
            f"{length:,} may be ragged, and a tenth of the text; {holes:,} in between, where none "
            "may)"
        )
    return Check("single_pass", most, FAIL if wrong else PASS, line)


def _out_of_order(plain: Scored, text: Text) -> int:
    """Targets entered after one that follows them in the same document."""
    back = 0
    for start, stop in pairwise([*text.starts.tolist(), text.num_targets]):
        turns = plain.turn[start:stop][plain.times[start:stop] > 0]
        if len(turns):
            latest = np.minimum.accumulate(turns[::-1])[::-1]
            back += int((turns > latest).sum())
    return back


def _bets(trials: Trials, first: int = 0, kinds: np.ndarray | None = None) -> np.ndarray:
    """What tokens drawn at random targets have of probability, in units of their drawn share.

    Args:
        first: target before which the text stays real, so that a score that knows the text's
            beginning is bet against as well.
        kinds: kind of every token [v]; one is then exchanged for another of its kind only, those
            of kind 0 not at all, and the text is kept as `trials.witness`.
    """
    chance, size = trials.chance, trials.scorer.hints.vocab_size
    length = min(trials.scorer.hints.length, trials.num_targets - first)
    each = max(1, length // (BETWEEN_LATE_BETS if first else BETWEEN_BETS))
    phase = 0 if first else int(chance.integers(0, max(1, trials.num_targets % length + 1)))
    grid = np.arange(first + phase, trials.num_targets - length + 1, length)
    wanted = -(-BETS // each)
    # Behind a known beginning the nearest windows: what is real ends with the first bet.
    starts = grid[:wanted] if first else chance.choice(grid, min(len(grid), wanted), replace=False)
    offsets = np.stack([chance.choice(length, each, replace=False) for _ in starts])
    places = (starts[:, None] + offsets).reshape(-1)
    shares = trials.scorer.guess(trials.tokens, starts, offsets).reshape(-1, size)
    allowed = np.ones((1, size), dtype=bool)
    if trials.bos is not None:
        # Documents are to begin where they did.
        allowed[:, trials.bos] = False
    if kinds is not None:
        allowed = allowed & (kinds[:size] == kinds[trials.tokens[places + 1]][:, None])
    real = trials.tokens[places + 1]
    kept = np.ones(len(places), dtype=bool) if trials.bos is None else real != trials.bos
    if kinds is not None:
        kept &= kinds[real] > 0
    allowed = np.broadcast_to(allowed, shares.shape)[kept]
    shares, places = _mixed(trials, shares[kept], places[kept], allowed), places[kept]
    drawn = (shares.cumsum(1) < chance.random((len(shares), 1))).sum(1).clip(0, size - 1)
    # A rounding error at the very end of the sum may point at a token without a share.
    row = np.arange(len(drawn))
    drawn = np.where(allowed[row, drawn], drawn, shares.argmax(1))
    tokens = np.array(trials.tokens)
    tokens[places + 1] = drawn
    found = trials.scored(tokens)
    if kinds is not None:
        trials.witness = tokens, found
    if found.error:
        return np.array([np.inf])
    paid = np.exp(-found.nats[places]) / shares[row, drawn]
    return np.where(np.isnan(paid), np.inf, paid)[found.times[places] > 0]


def _mixed(
    trials: Trials, shares: np.ndarray, places: np.ndarray, allowed: np.ndarray
) -> np.ndarray:
    """Shares to draw by [k, v]: what the model says, what follows the token before in the text (a
    model that lied would else choose the bets), and a little of everything."""
    follows = np.zeros(shares.shape)
    before, after = trials.tokens[:-1], trials.tokens[1:]
    order = np.argsort(before, kind="stable")
    values, inverse = np.unique(trials.tokens[places], return_inverse=True)
    begin = np.searchsorted(before, values, side="left", sorter=order)
    end = np.searchsorted(before, values, side="right", sorter=order)
    for number, (start, stop) in enumerate(zip(begin, end, strict=True)):
        counts = np.bincount(after[order[start:stop]], minlength=shares.shape[1])
        follows[inverse == number] = counts[: shares.shape[1]]
    mixed = EVEN * allowed / allowed.sum(1, keepdims=True)
    for weight, part in ((1 - EVEN - FOLLOWING, shares), (FOLLOWING, follows)):
        part = np.where(allowed, np.nan_to_num(part.astype(np.float64)), 0).clip(0)
        part = part + 1e-12 * allowed
        mixed = mixed + weight * part / part.sum(1, keepdims=True)
    return mixed


def _cuts(trials: Trials, count: int) -> list[int]:
    """Targets behind which the text is changed: half at edges or beside them, half anywhere."""
    last = trials.num_targets - 2
    edges = [edge for edge in trials.scorer.hints.edges if edge]
    near = trials.chance.choice(edges, min(len(edges), count // 2), replace=False) if edges else []
    beside = [int(edge) - int(trials.chance.integers(0, 2)) for edge in near]
    anywhere = trials.chance.integers(0, last + 1, size=count - len(beside)).tolist()
    return sorted({min(max(cut, 0), last) for cut in (*beside, *anywhere)})


def _moved(found: Scored, plain: Scored, count: int) -> float:
    """Largest difference among the first `count` targets; no number counts as infinite."""
    if found.error:
        return float("inf")
    difference = np.abs(found.nats[:count] - plain.nats[:count])
    if not len(difference):
        return 0.0
    return float("inf") if np.isnan(difference).any() else float(difference.max())


def worst_of(checks: Sequence[Check], names: Sequence[str]) -> Check:
    """Of one check under several protocols the worst finding, with its protocol."""
    order = {FAIL: 2, NOT_APPLICABLE: 1, PASS: 0}
    ranked = [
        (order[check.verdict], check.number or 0.0, -place) for place, check in enumerate(checks)
    ]
    worst = checks[ranked.index(max(ranked))]
    if len(checks) == 1:
        return worst
    line = f"{names[checks.index(worst)]}: {worst.line}"
    return Check(worst.name, worst.number, worst.verdict, line)
