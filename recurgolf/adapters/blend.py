"""Several adapters as one: the weighted sum of their corrections."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recurgolf.adapters.adapter import Adapter, Base, Factors, Place
from recurgolf.config import ConfigError


def blend(
    adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None = None
) -> Adapter:
    """The adapter whose correction is the weighted sum of those given.

    Exact by default: the A are stacked, the B set side by side with weight and scale in them, and
    the ranks add up. Averaging the factors instead would give another product.

    Args:
        weights: one per adapter; any finite numbers, 0 leaves an adapter out.
        rank: limit for the result's ranks; a sum of higher rank is replaced by the nearest matrix
            of that rank (its largest singular values), which loses something. None: exact.

    Raises:
        ConfigError: no adapters, numbers of weights and adapters that differ, another base, shapes
            that differ, or single iterations beside adapters for all visits.
    """
    if not adapters:
        raise ConfigError("blend: no adapters")
    if len(adapters) != len(weights):
        raise ConfigError(f"blend: {len(weights)} weights for {len(adapters)} adapters")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"blend: weights {list(weights)}; expected finite numbers")
    if rank is not None and rank < 1:
        raise ConfigError(f"blend: rank={rank}; at least 1")
    if len({adapter.iterated for adapter in adapters}) > 1:
        raise ConfigError(
            "blend: some adapters are for single iterations and some for all visits; they cannot "
            "be one file"
        )
    base = _common_base(adapters)
    used = [(a, w) for a, w in zip(adapters, weights, strict=True) if w != 0]
    if not used:
        raise ConfigError("blend: all weights are 0")
    factors: dict[Place, Factors] = {}
    for place in _places([adapter for adapter, _ in used]):
        parts = [(f, w) for adapter, w in used if (f := _of(adapter, place)) is not None]
        summed = _stacked(place, parts)
        factors[place] = summed if rank is None else _limited(summed, rank)
    return Adapter(factors, base)


def _places(adapters: Sequence[Adapter]) -> list[Place]:
    """Every place of any of them, each module with the iterations that any of them tells apart."""
    numbers: dict[Place, set[int]] = {}
    for adapter in adapters:
        for module, own in adapter.iterations().items():
            numbers.setdefault(module, set()).update(own)
    return [
        module._replace(iteration=number)
        for module, own in numbers.items()
        for number in (sorted(own) or [None])
    ]


def _of(adapter: Adapter, place: Place) -> Factors | None:
    """What an adapter does at a place; where it has fewer iterations, its last one does it."""
    module = place._replace(iteration=None)
    if module not in adapter.iterations():
        return None
    return adapter.at(module, place.iteration or 0)


def _stacked(place: Place, parts: Sequence[tuple[Factors, float]]) -> Factors:
    for shape in ({f.a.shape[1] for f, _ in parts}, {f.b.shape[0] for f, _ in parts}):
        if len(shape) > 1:
            raise ConfigError(f"blend, {place}: expected one width, found {sorted(shape)}")
    a = torch.cat([f.a for f, _ in parts])
    b = torch.cat([f.b * (f.scale * weight) for f, weight in parts], 1)
    return Factors(a, b, float(a.shape[0]))


def _limited(factors: Factors, rank: int) -> Factors:
    """The nearest pair of at most this rank (Eckart and Young), without forming the product."""
    if factors.rank <= rank:
        return factors
    # B A = Qb (Rb Ra^T) Qa^T: only the small matrix in the middle is decomposed.
    qb, rb = torch.linalg.qr(factors.b.double() * factors.scale)
    qa, ra = torch.linalg.qr(factors.a.double().mT)
    u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    a, b = root[:, None] * (qa @ vh[:kept].mT).mT, (qb @ u[:, :kept]) * root
    return Factors(a.float(), b.float(), float(kept))


def _common_base(adapters: Sequence[Adapter]) -> Base:
    """The base of all; what only some of them state is taken from these."""
    facts: dict[str, str | None] = {}
    for name in ("fingerprint", "tokenizer", "run"):
        stated = sorted({value for a in adapters if (value := getattr(a.base, name)) is not None})
        if len(stated) > 1 and name != "run":
            raise ConfigError(
                f"blend: the adapters are for bases of another {name}: {', '.join(stated)}"
            )
        facts[name] = stated[0] if len(stated) == 1 else None
    return Base(**facts)
