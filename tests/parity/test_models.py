"""Logits, losses, block outputs and gradients of the four systems equal the recorded ones."""

import pytest
import torch
from recordings import (
    assert_close,
    cases,
    config_of,
    imported,
    recorded,
    removes_values_from_normed_outputs,
)

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
    gradients = found.source_gradients()
    atol, relative = (2e-3, 1e-3) if xsa else (1e-5, 1e-4)
    for name, expected in wanted.items():
        allowed = atol + relative * expected.abs().max().item()
        assert_close(gradients[name], expected, allowed, 0, name)
    # What the source leaves without a gradient has none here.
    without = config_of(folder).get("params_without_grad", {}).get(case, [])
    assert not [name for name in without if name in gradients]
    assert set(gradients) == set(wanted)


@pytest.mark.parametrize(
    "name", ["lora0", "lora2_mtp_untied", "lora3", "noloop"], ids=lambda name: name
)
def test_visits_skips_and_adapters_follow_the_recorded_schedule(name):
    folder = next(f for f, _ in CASES if f.name == name)
    derived = config_of(folder)["derived"]
    found = imported(folder, "io_loop_off")
    found.model.set_looping(True)
    plan, transformer = found.model.plan, found.model.transformer
    assert list(plan.blocks) == derived["encoder_indices"] + derived["decoder_indices"]
    assert len(transformer.skips.weight) == derived["num_skip_weights"]
    assert [i for i, b in enumerate(transformer.blocks) if b.mixer.xsa] == derived["xsa_blocks"]
    schedule = derived.get("encoder_lora_schedule", []) + derived.get("decoder_lora_schedule", [])
    start = config_of(folder)["hyperparameters"]["loop_start"]
    for visit, expected in zip(plan.visits, schedule, strict=False):
        slot = transformer.adapters.slot(visit)
        ours = None if slot is None else f"lora_adapters.{slot}.{visit.block - start}"
        assert ours == expected


@pytest.mark.parametrize("name", ["full", "noprelude_dtg_mtp", "plain"])
def test_universal_visits_and_blocks_follow_the_recorded_schedule(name):
    folder = next(f for f, _ in CASES if f.name == name)
    derived = config_of(folder)["derived"]
    transformer = (found := imported(folder, "io_train")).model.transformer
    assert list(found.model.plan.blocks) == derived["eff_to_unique"]
    assert [i for i, b in enumerate(transformer.blocks) if b.mixer.xsa] == derived["xsa_blocks"]
    factors = [block.norm.factor for block in transformer.blocks]
    assert factors == pytest.approx(derived["ln_scale_factors"], rel=1e-15)
    assert bool(transformer.skips.pairs(found.model.plan)) == derived["has_skip"]
