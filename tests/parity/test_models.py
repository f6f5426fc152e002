"""Logits, losses, block outputs and gradients of the four systems equal the recorded ones."""

import pytest
import source_names
import torch
from recordings import (
    assert_close,
    cases,
    config_of,
    imported,
    recorded,
    removes_values_from_normed_outputs,
    weights_of,
    with_derived,
)

from recurgolf.config import kind_of

CASES = cases()


@pytest.mark.parametrize(
    ("folder", "case"), CASES, ids=[f"{f.parents[1].name}-{f.name}-{c}" for f, c in CASES]
)
def test_outputs_and_every_gradient_equal_the_recording(folder, case):
    numbers = recorded(folder, case)
    found = imported(folder, case)
    model, transformer = found.model, found.model.transformer
    xsa = removes_values_from_normed_outputs(folder, case)
    atol, rtol = (2e-3, 1e-5) if xsa else (1e-4, 1e-5)
    ids, targets = numbers["input_ids"].long(), numbers["target_ids"].long()

    outputs = []
    hidden = transformer.hidden(ids, model.plan, observe=lambda at, x: outputs.append(x))
    for name in numbers:
        kind, _, index = name.partition(".")
        if kind == "block_out":
            assert_close(outputs[int(index)], numbers[name], atol, rtol, name)
        if kind == "extra_logits":
            extra = transformer.mtp.logits(int(index), hidden, transformer.config.logit_softcap)
            assert_close(extra.flatten(0, 1), numbers[name], atol, rtol, name)
    if "bigram_hash" in numbers:
        assert torch.equal(transformer.bigram.bucket(ids), numbers["bigram_hash"].long())
    assert_close(model(ids), numbers["logits"], atol, rtol, "logits")
    loss = model.loss(ids, targets)
    assert_close(loss, numbers["loss"], 1e-5, 0, "loss")

    wanted = {n.removeprefix("grad."): t for n, t in numbers.items() if n.startswith("grad.")}
    if not wanted:
        return
    loss.backward()
    gradients = source_names.gradients(found, weights_of(folder))
    atol, relative = (2e-3, 1e-3) if xsa else (1e-5, 1e-4)
    for name, expected in wanted.items():
        allowed = atol + relative * expected.abs().max().item()
        assert_close(gradients[name], expected, allowed, 0, name)
    # What the source leaves without a gradient has none here.
    without = config_of(folder).get("params_without_grad", {}).get(case, [])
    assert not [name for name in without if name in gradients]
    assert set(gradients) == set(wanted)


def blocks_of_kind(model, kind):
    return [i for i in range(model.num_blocks) if kind_of(model.block_of(i)) == kind]


@pytest.mark.parametrize("folder", with_derived("per_iteration_lora"), ids=lambda f: f.name)
def test_visits_skips_and_adapters_follow_the_recorded_schedule(folder):
    derived = config_of(folder)["derived"]
    found = imported(folder, next(iter(config_of(folder)["cases"])))
    source_names.set_looping(found, True)
    found.model.train()
    plan, transformer = found.model.plan, found.model.transformer
    assert list(plan.blocks) == derived["encoder_indices"] + derived["decoder_indices"]
    assert len(transformer.skips.weight) == derived["num_skip_weights"]
    assert [i for i, b in enumerate(transformer.blocks) if b.mixer.xsa] == derived["xsa_blocks"]
    assert blocks_of_kind(found.run.model, "parallel") == derived["parallel_blocks"]
    factors = [block.norm.factor for block in transformer.blocks]
    assert factors == pytest.approx(derived["ln_scale_factors"], rel=1e-15)
    schedule = derived.get("encoder_lora_schedule", []) + derived.get("decoder_lora_schedule", [])
    assert not schedule or len(schedule) == len(plan.visits)
    start = config_of(folder)["hyperparameters"]["loop_start"]
    for visit, expected in zip(plan.visits, schedule, strict=False):
        slot = transformer.adapters.slot(visit)
        ours = None if slot is None else f"lora_adapters.{slot}.{visit.block - start}"
        assert ours == expected
    source_names.set_looping(found, False)
    halves = [derived[f"num_{half}_layers_when_inactive"] for half in ("encoder", "decoder")]
    assert found.model.plan.num_visits == sum(halves)
    assert len(transformer.skips.pairs(found.model.plan)) == min(halves)


@pytest.mark.parametrize("folder", with_derived("universal_rank1"), ids=lambda f: f.name)
def test_universal_visits_and_blocks_follow_the_recorded_schedule(folder):
    derived = config_of(folder)["derived"]
    transformer = (found := imported(folder, _unchanged(folder))).model.transformer
    assert list(found.model.plan.blocks) == derived["eff_to_unique"]
    assert [i for i, b in enumerate(transformer.blocks) if b.mixer.xsa] == derived["xsa_blocks"]
    factors = [block.norm.factor for block in transformer.blocks]
    assert factors == pytest.approx(derived["ln_scale_factors"], rel=1e-15)
    assert bool(transformer.skips.pairs(found.model.plan)) == derived["has_skip"]
    ends = [i for i, mode in enumerate(derived["block_modes"]) if mode == "preln"]
    assert blocks_of_kind(found.run.model, "sequential") == ends
    if found.run.model.value_embed.dim:
        assert found.run.model.value_embed.visits == derived["ve_layer_indices"]


def _unchanged(folder):
    """A case that changes no setting of its model."""
    settings = config_of(folder)["hyperparameters"]
    found = config_of(folder)["cases"].items()
    return next(name for name, how in found if how["mode"] == "train" and not settings.keys() & how)


@pytest.mark.parametrize(
    ("folder", "case"),
    [(f, c) for f, c in CASES if "recurrences" in config_of(f)["cases"][c]],
    ids=lambda value: getattr(value, "name", value),
)
def test_blocks_recur_as_often_as_recorded(folder, case):
    found = imported(folder, case)
    blocks = config_of(folder)["hyperparameters"]["num_unique_layers"]
    passes = config_of(folder)["cases"][case]["recurrences"]
    assert found.model.plan.blocks == tuple(range(blocks)) * passes
