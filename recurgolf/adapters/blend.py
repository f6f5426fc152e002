"""Blend adapters: the weighted sum of their weight updates, as one adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from recurgolf.adapters.adapter import Adapter, Base, Factors, Place
from recurgolf.config import ConfigError


def blend(
    adapters: Sequence[Adapter], weights: Sequence[float], rank: int | None = None
) -> Adapter:
    """The adapter whose update is the weighted sum of the given ones: sum_i w_i B_i A_i.

    Exact by default: the A_i are stacked and the B_i concatenated, with weight and scale folded
    into B, so that ranks add up. Averaging the factors would not average the products.

    Args:
        weights: one finite number per adapter; 0 leaves an adapter out.
        rank: maximum rank of the result; a sum of higher rank is truncated to its largest singular
            values, which is lossy. None: exact.

    Raises:
        ConfigError: no adapters, not one weight per adapter, different bases or shapes, or
            factors for single iterations blended with factors for every visit.
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
    """The union of all places: each module with every iteration that some adapter distinguishes."""
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
    """An adapter's factors at a place; beyond its last iteration, those of the last one."""
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
    """The best approximation of at most this rank (Eckart-Young), without forming B A."""
    if factors.rank <= rank:
        return factors
    # B A = Qb (Rb Ra^T) Qa^T: the SVD is of the small matrix in the middle alone.
    qb, rb = torch.linalg.qr(factors.b.double() * factors.scale)
    qa, ra = torch.linalg.qr(factors.a.double().mT)
    u, s, vh = torch.linalg.svd(rb @ ra.mT, full_matrices=False)
    kept = min(rank, len(s))
    root = s[:kept].sqrt()
    a, b = root[:, None] * (qa @ vh[:kept].mT).mT, (qb @ u[:, :kept]) * root
    return Factors(a.float(), b.float(), float(kept))


def _common_base(adapters: Sequence[Adapter]) -> Base:
    """The base that all adapters share; what some leave open is filled in from the others."""
    facts: dict[str, str | None] = {}
    for name in ("fingerprint", "tokenizer", "run"):
        stated = sorted({value for a in adapters if (value := getattr(a.base, name)) is not None})
        if len(stated) > 1 and name != "run":
            raise ConfigError(
                f"blend: the adapters are for bases of another {name}: {', '.join(stated)}"
            )
        facts[name] = stated[0] if len(stated) == 1 else None
    return Base(**facts)
