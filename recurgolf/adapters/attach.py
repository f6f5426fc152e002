"""Attach an adapter to a model, extract one from it, and check that the two fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from recurgolf.adapters.adapter import Adapter, Base, Factors, Place, fingerprint
from recurgolf.adapters.files import read
from recurgolf.config import ConfigError, kind_of
from recurgolf.log import counted
from recurgolf.lora import Adapters, LoRA
from recurgolf.model.transformer import Model, Transformer
from recurgolf.run import Run


def load(
    run: Run, model: Transformer, folder: str | Path, tokenizer: str | None = None
) -> tuple[Run, Adapter]:
    """Read an adapter folder and attach it to a model; see `attach`.

    Returns:
        The Run with the adapter's `lora` part, and the adapter.
    """
    adapter = read(folder)
    return attach(run, model, adapter, tokenizer), adapter


def attach(run: Run, model: Transformer, adapter: Adapter, tokenizer: str | None = None) -> Run:
    """Attach an adapter to a model, replacing the adapters it has.

    Everything is checked first: an error leaves the model unchanged.

    Args:
        run: the model's Run.
        tokenizer: SHA-256 of the model's tokenizer file; None: not compared.

    Returns:
        The Run with a `lora` part that describes the model as it is now.
    """
    check(run, model, adapter, tokenizer)
    model.adapters = _bank(run, adapter).to(model.embed.weight.device)
    # Set after replace(): a rank larger than the matrix is refused for training but valid here.
    changed = dataclasses.replace(run)
    changed.lora = model.adapters.config
    return changed


def check(run: Run, model: Transformer, adapter: Adapter, tokenizer: str | None = None) -> None:
    """Refuse an adapter that does not fit a model."""
    check_base(model, adapter.base, tokenizer)
    visits = visits_of(run)
    for place, factors in adapter.factors.items():
        check_place(run.model, place)
        in_dim, out_dim = run.model.projections(place.block)[place.target]
        for half, found, wanted in (
            ("lora_A", tuple(factors.a.shape), (factors.rank, in_dim)),
            ("lora_B", tuple(factors.b.shape), (out_dim, factors.rank)),
        ):
            if found != wanted:
                raise ConfigError(f"adapter, {place}: expected {half} {wanted}, found {found}")
        count = visits.get(place.block, 0)
        if place.iteration is not None and place.iteration >= count:
            raise ConfigError(
                f"adapter, {place}: expected iterations 0 to {count - 1}, found "
                f"{place.iteration}: this Run visits block {place.block} {counted(count, 'time')} "
                f"({run.largest_plan.describe()})"
            )


def check_base(model: Transformer, base: Base, tokenizer: str | None) -> None:
    """Refuse factors that were trained on other weights or with another tokenizer."""
    if base.tokenizer is not None and tokenizer is not None and base.tokenizer != tokenizer:
        raise ConfigError(
            f"adapter: expected a base with tokenizer {base.tokenizer[:12]}…, found "
            f"{tokenizer[:12]}…"
        )
    if base.fingerprint is None:
        return
    found = fingerprint(model.state_dict())
    if found != base.fingerprint:
        named = f" (of the run {base.run!r})" if base.run else ""
        raise ConfigError(
            f"adapter: expected the base with fingerprint {base.fingerprint}{named}, found "
            f"{found}: these are other weights than it was trained on"
        )


def check_place(model: Model, place: Place) -> None:
    """Refuse a layer out of range, or a module that the layer does not have."""
    if not 0 <= place.block < model.num_blocks:
        raise ConfigError(
            f"adapter, {place}: the layer is out of range; expected 0 to {model.num_blocks - 1}"
        )
    known = modules_of(model, place.block)
    if place.module not in known.values():
        mixer = kind_of(model.mixer_of(place.block))
        raise ConfigError(
            f"adapter, {place}: unknown module {place.module!r} for a layer that mixes by {mixer}; "
            f"expected one of {', '.join(known.values())}"
        )


def modules_of(model: Model, block: int) -> dict[str, str]:
    """Adaptable projection -> its path within the block."""
    mixer = model.mixer_of(block).projections(model.dim)
    return {
        name: name if name == "residual" else f"{'mixer' if name in mixer else 'mlp'}.{name}"
        for name in model.projections(block)
    }


def linear_modules(model: Model) -> list[str]:
    """Paths of all adaptable linear layers in the model."""
    return [
        f"blocks.{block}.{module}"
        for block in range(model.num_blocks)
        for module in modules_of(model, block).values()
        if module != "residual"
    ]


def visits_of(run: Run) -> dict[int, int]:
    """Block -> number of visits in the plan that has the most."""
    counts: dict[int, int] = {}
    for visit in run.largest_plan.visits:
        counts[visit.block] = visit.nth + 1
    return counts


def adapter_of(run: Run, adapters: Adapters, base: Base | None = None) -> Adapter:
    """A model's adapters as an `Adapter` that can be written, blended or merged.

    Where no block is visited twice, factors have no iteration: that is ordinary LoRA.
    """
    config, visits = run.lora, visits_of(run)
    first = 1 if config.visits == "repeats" else 0
    # One kind for the whole file: without iterations only where no block repeats.
    plain = config.visits == "shared" or all(
        visits[block] == 1 and count == 1 for block, count in adapters.num_slots.items()
    )
    factors: dict[Place, Factors] = {}
    for block, count in adapters.num_slots.items():
        paths = modules_of(run.model, block)
        for target, bank in adapters.bank(block).items():
            for slot in range(count):
                place = Place(block, paths[target], None if plain else slot + first)
                a, b = (half[slot].detach().clone() for half in (bank.lora_a, bank.lora_b))
                alpha = config.rank if config.alpha is None else config.alpha
                factors[place] = Factors(a, b, float(alpha))
    return Adapter(factors, base or Base())


def lora_of(run: Run, adapter: Adapter) -> LoRA:
    """The `lora` part of a Run with a slot for every place of the adapter.

    Factors that share rank and alpha are kept as they are. Otherwise `_bank` pads them with zeros
    to the largest rank and folds their scale into B.
    """
    kinds = {(f.rank, f.alpha) for f in adapter.factors.values()}
    rank = max(rank for rank, _ in kinds)
    alpha = next(iter(kinds))[1] if len(kinds) == 1 else None
    first = [numbers[0] for numbers in adapter.iterations().values() if numbers]
    looped = {place.block for place in adapter.factors} <= set(run.largest_plan.looped_blocks)
    # In the order in which the blocks define their projections, as the parameters are.
    known = [name for block in range(run.model.num_blocks) for name in run.model.projections(block)]
    adapted = {place.target for place in adapter.factors}
    return LoRA(
        rank=rank,
        targets=[name for name in dict.fromkeys(known) if name in adapted],
        blocks="looped" if looped else "all",
        visits="shared" if not first else "repeats" if min(first) == 1 else "all",
        alpha=None if alpha == rank else alpha,
    )


@torch.no_grad()
def _bank(run: Run, adapter: Adapter) -> Adapters:
    """The module that applies an adapter; slots that the adapter has no factors for are zero."""
    config = lora_of(run, adapter)
    with torch.random.fork_rng(devices=[]):  # overwritten; must not move the RNG state
        bank = Adapters(config, run.model.projections, config.slots(run.largest_plan))
    first = 1 if config.visits == "repeats" else 0
    have = set(adapter.iterations())
    for block, count in bank.num_slots.items():
        paths = modules_of(run.model, block)
        for target, halves in bank.bank(block).items():
            halves.lora_a.zero_()
            module = Place(block, paths[target])
            for slot in range(count):
                factors = adapter.at(module, slot + first) if module in have else None
                if factors is not None:
                    factor = factors.scale / config.scale
                    halves.lora_a[slot, : factors.rank] = factors.a
                    halves.lora_b[slot, :, : factors.rank] = factors.b * factor
    return bank
