"""Bits and clip per group of layers so that the file just fits a number of bytes, with least error.

For every group the bytes of its codes are tabulated against its error, at steps from fine to
coarse. An error is what rounding the group does to the weights, in units of what it does to the
network: where that can be measured, groups are probed one by one, since equal errors of weights
cost a hundred times more loss in one layer than in another. Under a total of bytes the best choice
has one exchange rate between error and bytes in all groups (Lagrange; Shoham and Gersho 1988), so
the search is over that one number. Bytes are first those of the entropy of the codes and then
corrected by files that are really packed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurgolf.config import ConfigError
from recurgolf.quant.clip import HessianSigmaClip, SigmaClip
from recurgolf.quant.entropy import code_entropy
from recurgolf.quant.gptq import hessian_error
from recurgolf.quant.quantized_tensor import code_range, dequantize
from recurgolf.quant.quantizer_grid import QuantizerGrid
from recurgolf.quant.rtn import checked_scales, round_to_grid
from recurgolf.quant.rules import TensorRule

Rules = Mapping[str, TensorRule]
Measure = Callable[[Rules], int]
"""Bytes of the file that these rules give, really packed."""

Damage = Callable[[Rules], float]
"""Rules of a few tensors -> how far a network's output moves (KL), in nats per token, when these
alone are quantized."""

STEPS = tuple(0.045 * 1.3**i for i in range(16))
"""Tabulated steps in units of a row's σ, from 8 bits at a clip of 5.7 σ to 2.3 σ."""
PROBES = (0.1, 0.3, 0.7, 1.4)
"""Steps at which the damage of a group is measured; between them its ratio to the error of the
weights is interpolated."""
FINER = 16
"""Steps that are interpolated between two tabulated ones."""
LEAST_CLIP = 5.5
"""Bits are the fewest that reach so many σ at a step: what is clipped is not worth a bit."""
CLOSE = 0.995
"""Share of the target that is near enough."""
_ENTRIES = 2**19
"""Of a larger matrix only so many entries, in whole rows, are looked at."""


@dataclass(frozen=True)
class Choice:
    """One way to store a group: a step in units of σ, and what follows from it.

    Attributes:
        bytes: of the group's codes, by their entropy.
        error: sum over its weights, Hessian-weighted where there are Gram matrices.
    """

    step: float
    bits: int
    clip: float
    bytes: float
    error: float


@dataclass(frozen=True)
class Group:
    """Layers that get the same bits and clip, and the choices there are, fine to coarse."""

    pattern: str
    names: list[str]
    choices: list[Choice]


@dataclass(frozen=True)
class Filled:
    """What the search found.

    Attributes:
        rules: for every tensor.
        bytes: of the file, measured.
        table: one line per group: group, layers, bits, clip, bytes, error.
        tries: (exchange rate, bytes measured) of every file that was packed.
    """

    rules: dict[str, TensorRule]
    bytes: int
    target: int
    table: list[dict[str, float | int | str]]
    tries: list[tuple[float, int]]

    def render(self) -> list[str]:
        """The search in lines, for the log."""
        lines = [f"{'group':<40}{'layers':>7}{'bits':>6}{'clip':>9}{'bytes':>12}{'error':>12}"]
        lines += [
            f"{row['group']:<40}{row['layers']:>7}{row['bits']:>6}{row['clip']:>7.2f} σ"
            f"{row['bytes']:>12,.0f}{row['error']:>12.4g}"
            for row in self.table
        ]
        share = 100 * self.bytes / self.target
        packed = len(self.tries)
        lines.append(f"{self.bytes:,} of {self.target:,} bytes ({share:.2f} %), {packed} packings")
        return lines

    def to_json(self) -> dict[str, Any]:
        """The entry `filled` of ledger.json."""
        tries = [{"rate": rate, "bytes": size} for rate, size in self.tries]
        sizes = {"bytes": self.bytes, "target_bytes": self.target}
        return {**sizes, "groups": self.table, "packings": tries}


def fill(
    state: Mapping[str, Tensor],
    rules: Rules,
    target_bytes: int,
    measure: Measure,
    *,
    grams: Mapping[str, Tensor] | None = None,
    damage: Damage | None = None,
    steps: Sequence[float] = STEPS,
    most_packings: int = 10,
) -> Filled:
    """Choose bits and clip of every group of quantized layers.

    Args:
        state: weights by name.
        rules: what `Quant.assign` gave: which tensors are quantized, by which method, in which
            groups of columns; their bits and clips are replaced.
        target_bytes: what the file may have.
        measure: packs with rules and counts; called up to `most_packings` times.
        grams: Gram matrices of inputs by weight name; error is then of the layer's output.
        damage: called `PROBES` times for every group; error is then of the network's output.
        steps: to tabulate, in units of a row's σ, ascending.

    Raises:
        ConfigError: nothing to choose, or the coarsest choice is still too large.
    """
    groups = tabulate(state, rules, grams or {}, steps)
    if damage is not None:
        groups = [weighed(group, rules, damage) for group in groups]
    if not groups:
        raise ConfigError(
            "quant.fill_budget=true, but no rule quantizes any matrix: nothing to fill"
        )
    tries: list[tuple[float, int]] = []
    seen: list[_Try] = []
    aim = target_bytes * (1 + CLOSE) / 2
    # Codes are nearly the whole file; what else is in it the first packing tells.
    wanted = 0.97 * aim
    while len(tries) < most_packings:
        rate, chosen, above = choices_for(groups, wanted)
        if any(chosen == one.chosen for one in seen) and all(o.size <= target_bytes for o in seen):
            chosen = above
        if any(chosen == one.chosen for one in seen):
            # No rate lies between; take part of the way from what fits to what does not.
            chosen = _on_the_way(groups, seen, target_bytes, aim)
            if chosen is None or any(chosen == one.chosen for one in seen):
                chosen = _one_finer(groups, seen, target_bytes)
            if chosen is None:
                break
        size = measure(ruled(rules, groups, chosen))
        tries.append((rate, size))
        seen.append(_Try(chosen, sum(choice.bytes for choice in chosen), size))
        if CLOSE * target_bytes <= size <= target_bytes:
            break
        wanted = _next_guess(seen, target_bytes, aim)
    if all(one.size > target_bytes for one in seen):
        coarse = [group.choices[-1] for group in groups]
        size = measure(ruled(rules, groups, coarse))
        tries.append((math.inf, size))
        if size > target_bytes:
            raise ConfigError(
                f"quant.fill_budget: {target_bytes:,} bytes are left for the model, but with the "
                f"coarsest steps it takes {size:,}; raise budget.artifact_bytes or shrink the model"
            )
        seen.append(_Try(coarse, 0.0, size))
    best = _largest_that_fits(seen, target_bytes)
    assert best is not None
    size, chosen = best.size, best.chosen
    table = [_row(group, choice) for group, choice in zip(groups, chosen, strict=True)]
    return Filled(ruled(rules, groups, chosen), size, target_bytes, table, tries)


def tabulate(
    state: Mapping[str, Tensor], rules: Rules, grams: Mapping[str, Tensor], steps: Sequence[float]
) -> list[Group]:
    """Groups of quantized matrices, with bytes and error at every step.

    Layers of one role (the same name but for block numbers) under one rule are a group.
    """
    members: dict[tuple[str, str], list[str]] = {}
    for name, weight in state.items():
        rule = rules[name]
        if rule.grid is not None and weight.dim() == 2 and weight.is_floating_point():
            members.setdefault((re.sub(r"\d+", "*", name), repr(rule)), []).append(name)
    usual = _mean_square(grams)
    groups = []
    for (pattern, _), names in members.items():
        rows = [_at_step(step, names, state, rules, grams, usual) for step in steps]
        groups.append(Group(pattern, names, _between(rows)))
    return groups


def weighed(group: Group, rules: Rules, damage: Damage) -> Group:
    """A group whose errors are what the network suffers when this group alone is quantized.

    By the method of its rules: what GPTQ saves differs between layers, most where inputs are
    correlated and nothing in the token table.
    """
    own = {name: rules[name] for name in group.names}
    ratios = []
    for step in PROBES:
        near = _nearest(group, step)
        ratios.append(max(damage(ruled(own, [group], [near])), 1e-12) / max(near.error, 1e-30))
    places = np.log([_nearest(group, step).step for step in PROBES])
    errors = [
        choice.error * math.exp(np.interp(math.log(choice.step), places, np.log(ratios)))
        for choice in group.choices
    ]
    choices = [replace(c, error=e) for c, e in zip(group.choices, errors, strict=True)]
    return replace(group, choices=choices)


def _nearest(group: Group, step: float) -> Choice:
    return min(group.choices, key=lambda choice: abs(math.log(choice.step / step)))


def choices_for(
    groups: Sequence[Group], entropy_bytes: float
) -> tuple[float, list[Choice], list[Choice]]:
    """The choices of least error whose entropy is at most so many bytes.

    Returns:
        Their exchange rate, the choices (the coarsest where even they take more), and the next ones
        above them, which take more (the finest where nothing does).
    """

    def chosen(rate: float) -> list[Choice]:
        return [min(g.choices, key=lambda c: c.error + rate * c.bytes) for g in groups]

    low, high = -80.0, 80.0
    for _ in range(60):
        middle = (low + high) / 2
        if sum(c.bytes for c in chosen(2.0**middle)) <= entropy_bytes:
            high = middle
        else:
            low = middle
    return 2.0**high, chosen(2.0**high), chosen(2.0**low)


def ruled(rules: Rules, groups: Sequence[Group], chosen: Sequence[Choice]) -> dict[str, TensorRule]:
    """The rules with every group's choice in them."""
    found = dict(rules)
    for group, choice in zip(groups, chosen, strict=True):
        for name in group.names:
            grid = rules[name].grid
            assert grid is not None
            found[name] = replace(rules[name], grid=grid_of(grid, choice.bits, choice.clip))
    return found


def at_step(rules: Rules, step: float) -> dict[str, TensorRule]:
    """The rules with one step, in units of a row's σ, for every quantized tensor."""
    bits, clip = _reach(step)
    return {
        name: rule if rule.grid is None else replace(rule, grid=grid_of(rule.grid, bits, clip))
        for name, rule in rules.items()
    }


def finer(rules: Rules, share: float) -> dict[str, TensorRule]:
    """The rules with this share of the steps of their k·σ clips, down to the finest step."""
    found = dict(rules)
    if share == 1:  # their own bits and clips, not the fewest bits that reach as far
        return found
    for name, rule in rules.items():
        if rule.grid is not None and isinstance(rule.grid.clip, SigmaClip):
            step = rule.grid.clip.k / code_range(rule.grid.bits)[1]
            bits, clip = _reach(max(share * step, min(step, STEPS[0])))
            found[name] = replace(rule, grid=grid_of(rule.grid, bits, clip))
    return found


def _reach(step: float) -> tuple[int, float]:
    """Bits and clip of a step: the fewest that reach far enough."""
    bits = next((b for b in range(2, 8) if step * code_range(b)[1] >= LEAST_CLIP), 8)
    return bits, step * code_range(bits)[1]


def grid_of(grid: QuantizerGrid, bits: int, clip: float) -> QuantizerGrid:
    """A grid with other bits and a clip of so many σ; a Hessian-aware σ stays one."""
    kind = replace(grid.clip, k=clip) if isinstance(grid.clip, HessianSigmaClip) else None
    return replace(grid, bits=bits, clip=kind or SigmaClip(clip), scale_floor=None)


def _at_step(
    step: float,
    names: Sequence[str],
    state: Mapping[str, Tensor],
    rules: Rules,
    grams: Mapping[str, Tensor],
    usual: float,
) -> Choice:
    """A group's bytes and error at a step, by rounding."""
    bits, clip = _reach(step)
    total, error = 0.0, 0.0
    for name in names:
        weight, grid = state[name].detach().cpu().float(), rules[name].grid
        assert grid is not None
        every = max(1, math.ceil(weight.numel() / _ENTRIES))
        part = weight[::every]
        scale = len(weight) / max(len(part), 1)
        spec = grid_of(grid, bits, clip)
        gram = grams.get(name)
        codes, found = round_to_grid(part, spec)
        scales = checked_scales(found, part)
        back = dequantize(
            codes.to(torch.int8), scales, group_size=spec.group_size, symmetric=spec.symmetric
        )
        total += scale * code_entropy(codes.to(torch.int8)) * part.numel() / 8
        if gram is None:
            error += scale * usual * float((back - part).double().square().sum())
        else:
            error += scale * len(part) * hessian_error(part - back, gram.float())
    return Choice(step, bits, clip, total, error)


def _between(rows: Sequence[Choice]) -> list[Choice]:
    """The tabulated choices and finer ones between: straight in log step, log error and bytes."""
    found: list[Choice] = []
    for left, right in pairwise(rows):
        for part in range(FINER):
            share = part / FINER
            step = left.step * (right.step / left.step) ** share
            bits, clip = _reach(step)
            size = left.bytes + share * (right.bytes - left.bytes)
            error = (
                max(left.error, 1e-30) * (max(right.error, 1e-30) / max(left.error, 1e-30)) ** share
            )
            found.append(Choice(step, bits, clip, size, error))
    return [*found, rows[-1]]


def _mean_square(grams: Mapping[str, Tensor]) -> float:
    """Mean square of an input: what a weight without a Gram matrix is weighed by."""
    if not grams:
        return 1.0
    diagonals = torch.cat([gram.diagonal().double() for gram in grams.values()])
    return float(diagonals.mean())


@dataclass(frozen=True)
class _Try:
    """Choices that were packed: their entropy and the file's size, in bytes."""

    chosen: list[Choice]
    entropy: float
    size: int


def _next_guess(seen: Sequence[_Try], target: float, aim: float) -> float:
    """Entropy at which the file should have `aim` bytes, by the last packings."""
    last, ratio = seen[-1], 1.0
    if len(seen) > 1 and abs(seen[-2].entropy - last.entropy) > 1e-6:
        ratio = (seen[-2].size - last.size) / (seen[-2].entropy - last.entropy)
    guess = last.entropy + (aim - last.size) / min(max(ratio, 0.8), 1.25)
    low = max((one.entropy for one in seen if one.size <= target), default=0.0)
    high = min((one.entropy for one in seen if one.size > target), default=math.inf)
    if low < high < math.inf and not low < guess < high:
        guess = (low + high) / 2
    return max(guess, 0.0)


def _on_the_way(
    groups: Sequence[Group], seen: Sequence[_Try], target: float, aim: float
) -> list[Choice] | None:
    """Choices between the largest file that fits and the smallest that does not."""
    fits = _largest_that_fits(seen, target)
    over = min((o for o in seen if o.size > target), key=lambda o: o.size, default=None)
    if fits is None or over is None:
        return None
    ends = [
        (group.choices.index(one), group.choices.index(other))
        for group, one, other in zip(groups, fits.chosen, over.chosen, strict=True)
    ]
    # One finer step of one group is a move; all groups move side by side.
    moves = sorted(
        ((part + 0.5) / abs(end - start), number)
        for number, (start, end) in enumerate(ends)
        for part in range(abs(end - start))
    )
    share = (aim - fits.size) / (over.size - fits.size)
    made = [n for _, n in moves[: min(max(round(share * len(moves)), 1), len(moves) - 1)]]
    return [
        group.choices[start + made.count(number) * (1 if end > start else -1)]
        for number, (group, (start, end)) in enumerate(zip(groups, ends, strict=True))
    ]


def _one_finer(groups: Sequence[Group], seen: Sequence[_Try], target: float) -> list[Choice] | None:
    """What fits best with one group a step finer, the largest that should fit: in a small file one
    step of the largest group may be more than the half percent that is wanted."""
    fits = _largest_that_fits(seen, target)
    found = []
    for number, group in enumerate(groups if fits is not None else ()):
        assert fits is not None
        finer = list(fits.chosen)
        finer[number] = group.choices[max(group.choices.index(finer[number]) - 1, 0)]
        size = fits.size + sum(choice.bytes for choice in finer) - fits.entropy
        if size <= target and all(finer != one.chosen for one in seen):
            found.append((size, number, finer))
    return max(found)[2] if found else None


def _largest_that_fits(seen: Sequence[_Try], target: float) -> _Try | None:
    return max((o for o in seen if o.size <= target), key=lambda o: o.size, default=None)


def _row(group: Group, choice: Choice) -> dict[str, float | int | str]:
    return {
        "group": group.pattern,
        "layers": len(group.names),
        "bits": choice.bits,
        "clip": choice.clip,
        "bytes": choice.bytes,
        "error": choice.error,
    }


__all__ = [
    "Choice",
    "Filled",
    "Group",
    "at_step",
    "choices_for",
    "fill",
    "finer",
    "grid_of",
    "ruled",
    "tabulate",
    "weighed",
]
