"""Merge adapters into the base weights, and unroll a loop into separate blocks.

All visits of a block share its weights, so an adapter for every visit merges exactly, while one for
single iterations cannot. `untie` turns every visit into a block of its own, which gives up the
bytes that weight sharing saves; after that, adapters of single iterations merge too.
"""

from __future__ import annotations

import copy
import dataclasses

import torch

from recurgolf.adapters.adapter import Adapter, Place
from recurgolf.adapters.attach import check, visits_of
from recurgolf.config import ConfigError
from recurgolf.looping import NoLooping
from recurgolf.lora import LoRA
from recurgolf.model.transformer import Transformer
from recurgolf.run import Run


def merge(
    run: Run,
    model: Transformer,
    adapter: Adapter,
    tokenizer: str | None = None,
    untied: bool = False,
) -> tuple[Run, Transformer]:
    """A copy of the model with the adapter merged into its weights, and the Run that describes it.

    Adapters attached to the model are dropped; extract them with `adapter_of` and merge them in
    turn. The given model is not changed.

    Args:
        untied: first turn every visit of the scoring plan into a block of its own.

    Raises:
        ConfigError: what `attach.check` refuses; factors of single iterations where several visits
            share a weight; corrections of a block's output, which no weight can hold.
    """
    check(run, model, adapter, tokenizer)
    for place in adapter.factors:
        if place.module == "residual":
            raise ConfigError(
                f"merge, {place}: a correction of the block's output is on no linear layer, so "
                "there is no weight to add it to; use the adapter beside the base"
            )
    visits = visits_of(run)
    if not untied:
        for place, numbers in adapter.iterations().items():
            if numbers and visits[place.block] > 1:
                raise ConfigError(
                    f"merge, {place}: factors for the iterations {numbers}, but the "
                    f"{visits[place.block]} visits of block {place.block} share one weight; keep "
                    "the adapter beside the base, or make the visits separate blocks (--untie)"
                )
    plain = copy.deepcopy(model)
    plain.adapters = None
    bare = dataclasses.replace(run, lora=LoRA())
    if untied:
        order = bare.eval_plan.visits
        bare, plain = untie(bare, plain)
    else:
        order = tuple(v for v in run.largest_plan.visits if v.nth == 0)
    with torch.no_grad():
        for index, visit in enumerate(order):
            block = index if untied else visit.block
            _add(plain, adapter, visit.block, visit.nth, block)
    return bare, plain


def untie(run: Run, model: Transformer) -> tuple[Run, Transformer]:
    """The same function without weight sharing: every visit of the scoring plan as its own block.

    Raises:
        ConfigError: some part of the model depends on the number of blocks or on where the loop is
            (logits of both models are compared).
    """
    plan, config = run.eval_plan, run.model
    blocks = plan.blocks
    flat = dataclasses.replace(
        config,
        num_blocks=len(blocks),
        mixer_pattern=[config.mixer_of(block) for block in blocks],
        block_pattern=[config.block_of(block) for block in blocks],
    )
    looping = NoLooping()
    new_run = dataclasses.replace(
        run,
        model=flat,
        looping=looping,
        lora=LoRA(),
        eval=dataclasses.replace(run.eval, passes=None),
    )
    new = flat.build(new_run.largest_plan)
    state = {n: t for n, t in model.state_dict().items() if not n.startswith("blocks.")}
    for index, block in enumerate(blocks):
        for name, tensor in model.blocks[block].state_dict().items():
            state[f"blocks.{index}.{name}"] = tensor
    plain = {n: t for n, t in state.items() if not n.startswith("adapters.")}
    try:
        new.load_state_dict(plain, strict=True)
    except RuntimeError as error:
        raise ConfigError(
            f"untie: {' '.join(str(error).split())}; this model's loop cannot be undone"
        ) from None
    _compare(run, model, new_run, new)
    return new_run, new.train(model.training)


@torch.no_grad()
def _compare(run: Run, model: Transformer, new_run: Run, new: Transformer) -> None:
    """Refuse where logits differ: because of depth-scaled norms, skips around the loop, ..."""
    tokens = torch.arange(32).remainder(run.model.vocab_size).view(2, 16)
    adapters, model.adapters = model.adapters, None
    try:
        before, after = model(tokens, run.eval_plan), new(tokens, new_run.eval_plan)
    finally:
        model.adapters = adapters
    difference = float((before - after).abs().max())
    if not difference <= 1e-5 * max(1.0, float(before.abs().max())):
        raise ConfigError(
            f"untie: the separate blocks compute something else (logits differ by "
            f"{difference:.1e}): a part of this model depends on the number of blocks or on where "
            "the loop is (model.depth_scaled_norm, model.skips, the mixer's last blocks)"
        )


def _add(model: Transformer, adapter: Adapter, block: int, nth: int, into: int) -> None:
    """Add the update of the `nth` visit of `block` to the weights of block `into`."""
    for module in adapter.iterations():
        factors = adapter.at(module, nth) if module.block == block else None
        if factors is not None:
            weight = model.get_parameter(f"{Place(into, module.module).path}.weight")
            weight.copy_(weight.double() + factors.delta().to(weight.device))
