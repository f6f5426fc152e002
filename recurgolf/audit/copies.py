"""Many trials in one scoring: a text of copies of one real stretch, each with another ending.

What reads windows or documents sees in every copy what it saw in the real text, up to the place
where the copy was changed. So one scoring tries thousands of endings: every token of a vocabulary
in the place of one target, and a changed text behind every row of a window. That a copy is scored
as the real stretch was is checked on the targets before the place; a protocol that carries what it
has read from copy to copy (one that trains its weights on the whole text) shows itself there and is
left to the trials on the text as it stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from recurgolf.audit.scorer import Trials

ENUMERATED = 0.75
"""Share of the copies that try tokens in the place of a few targets; the others try rows."""
PLACES = 4
"""Targets whose vocabulary is gone through in one scoring, at most."""
SAME = 5e-5
"""Nats by which copies may differ for rounding."""
LEAST = 8
"""Copies of a stretch that a text must have room for."""


@dataclass(frozen=True)
class Mass:
    """Sum of the probabilities of `tried` different tokens, of a vocabulary of `of`."""

    total: float
    tried: int
    of: int


@dataclass
class Copies:
    """What copies have shown.

    Attributes:
        moved: nats by which a target before the changed place differs from the real scoring at
            most, and the row of the place where it does.
        compared: changed copies looked at.
        why: why there is nothing, where there is nothing.
    """

    moved: float = 0.0
    row: int = 0
    compared: int = 0
    masses: list[Mass] = field(default_factory=list)
    why: str = ""

    @property
    def heaviest(self) -> Mass | None:
        """The largest sum; what is no number counts as such."""
        sums = self.masses
        return max(sums, key=lambda mass: np.nan_to_num(mass.total, nan=np.inf), default=None)


def examine_copies(trials: Trials, found: Copies) -> None:
    """Score one text of copies and add what it shows."""
    hints, tokens = trials.scorer.hints, trials.tokens
    length, stride = hints.length, hints.stride
    # A target from `length` on is read in windows that lie inside its own copy.
    size = -(-(length + max(stride, LEAST)) // stride) * stride
    count = trials.num_targets // size
    start = _start(trials, size)
    if count < LEAST or start is None:
        found.why = f"{trials.num_targets:,} targets are too few for copies of {size:,}"
        return
    stretch = tokens[start : start + size]
    rows = np.arange(length, size - 1)
    plan = _places(trials, start, stretch, rows, count)
    # The text stays as long as it was, and its remainder real.
    text = np.array(tokens)
    for copy, (row, token) in enumerate(plan):
        part = np.array(stretch)
        part[row + 2 :] = trials.replaced(part[row + 2 :])
        part[row + 1] = token
        text[copy * size : (copy + 1) * size] = part
    scored = trials.scored(text)
    if scored.error:
        found.why = f"copies of a stretch cannot be scored: {scored.error}"
        return
    nats = scored.nats[: count * size].reshape(count, size)
    times = scored.times[: count * size].reshape(count, size)
    real = trials.plain.nats[start : start + size]
    place = np.array([row for row, _ in plan])
    off = np.abs(nats - real)
    if _carries(off, place, length, size):
        found.why = (
            "what it has read changes how it reads on, so that copies of a stretch are no trial"
        )
        return
    before = (np.arange(size) >= length) & (np.arange(size) < place[:, None]) & (times > 0)
    worst = np.where(before, np.nan_to_num(off, nan=np.inf), 0).max(1)
    found.compared += count
    if worst.max() > found.moved:
        found.moved, found.row = float(worst.max()), int(place[worst.argmax()])
    for row in dict.fromkeys(place[place >= 0].tolist()):
        own = np.flatnonzero((place == row) & (times[np.arange(count), place] > 0))
        chosen = {plan[copy][1]: copy for copy in own}
        if len(chosen) >= LEAST:
            total = float(np.exp(-nats[list(chosen.values()), row]).sum())
            found.masses.append(Mass(total, len(chosen), hints.vocab_size))


def _start(trials: Trials, size: int) -> int | None:
    """Where the stretch begins: as windows do, and with a document's beginning in its first window
    where nothing crosses documents."""
    hints = trials.scorer.hints
    last = (trials.num_targets - size) // hints.stride
    if last < 0:
        return None
    for _ in range(1000):
        start = hints.stride * int(trials.chance.integers(0, last + 1))
        # The first window of a text scores more than others and reads less.
        if start < hints.length and last * hints.stride >= hints.length:
            continue
        head = trials.tokens[start : start + hints.length + 1]
        if not hints.within_documents or trials.bos is None or (head == trials.bos).any():
            return start
    return None


def _places(
    trials: Trials, start: int, stretch: np.ndarray, rows: np.ndarray, count: int
) -> list[tuple[int, int]]:
    """(row, token in its target's place) of every copy, in random order."""
    chance, vocab = trials.chance, trials.scorer.hints.vocab_size
    room = int(ENUMERATED * count)
    several = min(PLACES, max(1, room // vocab), len(rows))
    each = min(vocab, room // several)
    # The first and the last row of a window, and others.
    edges = [int(rows[0]), int(rows[-1])]
    others = chance.permutation(rows[1:-1])[: max(0, several - 2)].tolist()
    chosen = list(dict.fromkeys([*chance.permutation(edges).tolist(), *others]))[:several]
    plan: list[tuple[int, int]] = []
    for row in chosen:
        # As windows have it: the last `length` tokens up to the place.
        first = start + max(0, row + 1 - trials.scorer.hints.length)
        offset = np.array([[start + row - first]])
        shares = trials.scorer.guess(trials.tokens, np.array([first]), offset)[0, 0]
        order = [int(stretch[row + 1]), *np.argsort(-shares, kind="stable").tolist()]
        order = list(dict.fromkeys(order))
        likely, rest = order[: 2 * each // 3], order[2 * each // 3 :]
        tokens = [*likely, *chance.permutation(rest)[: each - len(likely)].tolist()]
        plan += [(row, int(token)) for token in tokens]
    left = count - len(plan)
    turns = np.concatenate([chance.permutation(rows) for _ in range(left // len(rows) + 1)])[:left]
    drawn = chance.choice(trials.ordinary, size=left)
    known = set(plan)
    # A token that was tried at this row already would be counted twice.
    plan += [
        (int(row), int(token))
        for row, token in zip(turns, drawn, strict=True)
        if (int(row), int(token)) not in known
    ]
    plan += [plan[-1]] * (count - len(plan))
    return [plan[i] for i in chance.permutation(count)]


def _carries(off: np.ndarray, place: np.ndarray, first: int, size: int) -> bool:
    """Whether most copies differ from the real stretch well before they were changed."""
    far = place >= first + (size - first) // 2
    return bool(np.median(np.nan_to_num(off[far, first], nan=0)) > SAME) if far.any() else True
