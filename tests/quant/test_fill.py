"""Bits and clips that fill a budget: the file fits, nearly to the byte, with the least error."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from command_line import recurgolf
from smoke_runs import small, train

from recurgolf.artifact import load, pack_bytes
from recurgolf.config import ConfigError
from recurgolf.quant import (
    QuantizedTensor,
    QuantizerGrid,
    SigmaClip,
    TensorRule,
    dequantize_state,
    quantize_state,
)
from recurgolf.quant.fill import Choice, Group, at_step, choices_for, fill, tabulate
from recurgolf.run import Run
from recurgolf.training import checkpoint


def trained():
    """Weights and rules of a finished run, and a packer that counts bytes."""
    folder = train().path
    parts, _ = checkpoint.load(checkpoint.steps(folder / "checkpoints")[-1])
    state = parts["model"]
    run = Run.read(folder)
    rules = run.quant.assign({name: tuple(t.shape) for name, t in state.items()})
    metadata = load(folder / "artifact.bin").metadata

    def size(found):
        return len(pack_bytes(metadata, quantize_state(state, found), run.artifact.codec)[0])

    return state, rules, size


def error(state, rules):
    """Sum of squared errors of the weights as they come back."""
    back = dequantize_state(quantize_state(state, rules))
    return sum(float((back[name] - state[name]).double().square().sum()) for name in state)


@pytest.mark.parametrize("target", [13_500, pytest.param(18_000, marks=pytest.mark.slow)])
def test_the_file_fits_and_no_uniform_step_that_fits_has_less_error(target):
    state, rules, size = trained()
    found = fill(state, rules, target, size)
    assert 0.995 * target <= size(found.rules) == found.bytes <= target
    uniform = [at_step(rules, 0.06 * 1.1**i) for i in range(36)]
    fitting = [error(state, one) for one in uniform if size(one) <= target]
    assert len(fitting) > 3
    assert error(state, found.rules) <= min(fitting)


@pytest.mark.parametrize("target", [5_000, 6_200])
def test_where_a_large_group_grows_by_jumps_small_ones_fill_the_rest(target):
    generator = torch.Generator().manual_seed(2)
    state = {"large.weight": torch.randn(96, 64, generator=generator)}
    state["small.weight"] = torch.randn(32, 64, generator=generator)
    rules = dict.fromkeys(state, TensorRule("rtn", QuantizerGrid(6, SigmaClip(7.0))))

    def size(found):
        large, small = (
            len(pack_bytes({}, quantize_state({name: weight}, {name: found[name]}))[0])
            for name, weight in state.items()
        )
        return 300 * math.ceil(large / 300) + small

    found = fill(state, rules, target, size)
    assert 0.995 * target <= size(found.rules) == found.bytes <= target


def test_the_table_says_what_the_rules_are():
    state, rules, size = trained()
    found = fill(state, rules, 15_000, size)
    named = {row["group"] for row in found.table}
    assert {"embed.weight", "blocks.*.mlp.up_proj.weight"} <= named
    by_group = {row["group"]: row for row in found.table}
    grid = found.rules["blocks.1.mlp.up_proj.weight"].grid
    assert grid is not None
    row = by_group["blocks.*.mlp.up_proj.weight"]
    assert (row["layers"], row["bits"]) == (2, grid.bits)
    assert grid == found.rules["blocks.0.mlp.up_proj.weight"].grid
    assert any(f"{row['clip']:.2f} σ" in line for line in found.render())


def test_busy_inputs_get_the_finer_steps():
    """Two equal layers, the inputs of one ten times larger: error counts where inputs are busy."""
    torch.manual_seed(0)
    state = {name: torch.randn(96, 64) for name in ("quiet.weight", "busy.weight")}
    _, rules, _ = trained()
    rule = rules["embed.weight"]
    grams = {"quiet.weight": torch.eye(64), "busy.weight": 100 * torch.eye(64)}

    def size(found):
        return len(pack_bytes({}, quantize_state(state, found))[0])

    both = dict.fromkeys(state, rule)
    found = fill(state, both, 7_000, size, grams=grams)
    steps = {}
    for name, one in found.rules.items():
        assert one.grid is not None
        steps[name] = one.grid.clip.k / one.grid.range[1]  # type: ignore[attr-defined]
    # At high rate error falls with the square of the step: ten times larger, ten times finer.
    assert steps["quiet.weight"] / steps["busy.weight"] == pytest.approx(10, rel=0.35)
    plain = fill(state, both, 7_000, size)
    clips = [one.grid.clip.k for one in plain.rules.values()]  # type: ignore[union-attr]
    assert max(clips) / min(clips) < 1.1


def test_the_search_finds_the_best_of_all_combinations():
    """Against enumeration, where bytes allow exactly what a rate can reach."""
    torch.manual_seed(1)
    groups = []
    for number in range(3):
        errors = torch.rand(6).cumsum(0).flip(0).square().tolist()
        sizes = [100.0 - 15 * i for i in range(6)]
        choices = [
            Choice(0.1 * (i + 1), 6, 5.0, size, 1e3 / (1 + e) ** number + i**2)
            for i, (size, e) in enumerate(zip(sizes, errors, strict=True))
        ]
        groups.append(Group(str(number), [str(number)], choices))
    for target in (90, 150, 220, 300):
        _, chosen, _ = choices_for(groups, target)
        spent = sum(choice.bytes for choice in chosen)
        assert spent <= target
        # What a rate picks is the best of everything that takes no more bytes than it.
        rivals = [
            sum(c.error for c in combination)
            for combination in itertools.product(*(g.choices for g in groups))
            if sum(c.bytes for c in combination) <= spent
        ]
        assert sum(c.error for c in chosen) == pytest.approx(min(rivals))


def test_bytes_fall_and_error_grows_from_fine_to_coarse():
    state, rules, _ = trained()
    for group in tabulate(state, rules, {}, [0.05, 0.1, 0.2, 0.4, 0.8]):
        sizes = [choice.bytes for choice in group.choices]
        errors = [choice.error for choice in group.choices]
        assert sizes == sorted(sizes, reverse=True)
        assert errors == sorted(errors)


def test_a_budget_that_cannot_be_filled_gets_the_finest_and_one_too_small_is_refused():
    state, rules, size = trained()
    finest = fill(state, rules, 10**6, size)
    assert all(row["bits"] == 8 for row in finest.table)
    with pytest.raises(ConfigError, match=r"4,000 bytes are left for the model.* takes [\d,]+;"):
        fill(state, rules, 4_000, size)


def test_a_run_fills_its_budget():
    run = train("quant.fill_budget=true", "budget.artifact_bytes=40000")
    ledger = json.loads((run.path / "ledger.json").read_text())
    left = 40_000 - ledger["code"]["packed"]
    model = (run.path / "artifact.bin").stat().st_size
    assert 0.995 * left <= model <= left
    assert run.summary["status"] == "finished"
    assert ledger["filled"]["bytes"] == model and ledger["filled"]["target_bytes"] == left
    stored = load(run.path / "artifact.bin").tensors["embed.weight"]
    assert isinstance(stored, QuantizedTensor)
    rows = {row["group"]: row for row in ledger["filled"]["groups"]}
    assert rows["embed.weight"]["bits"] == stored.bits
    assert "choosing bits and clips" in run.ended.out and "embed.weight" in run.ended.out


def test_it_is_refused_beside_training_that_knows_its_quantizer(tmp_path):
    asked = small("quant.fill_budget=true", "quant/qat=straight_through")
    assert "use one of the two" in recurgolf(*asked, cwd=tmp_path).refused()


def test_groups_that_the_output_feels_more_get_the_finer_steps():
    """Two equal layers; what the network suffers from one is a hundred times the other's."""
    torch.manual_seed(0)
    state = {name: torch.randn(96, 64) for name in ("quiet.weight", "loud.weight")}
    _, rules, _ = trained()
    both = dict.fromkeys(state, rules["embed.weight"])

    def damage(own):
        felt = {"quiet.weight": 1.0, "loud.weight": 100.0}
        values = dequantize_state(quantize_state({n: state[n] for n in own}, own))
        errors = {n: float((v - state[n]).double().square().sum()) for n, v in values.items()}
        return sum(felt[name] * error for name, error in errors.items())

    def size(found):
        return len(pack_bytes({}, quantize_state(state, found))[0])

    found = fill(state, both, 7_000, size, damage=damage)
    grids = {name: one.grid for name, one in found.rules.items()}
    steps = {n: g.clip.k / g.range[1] for n, g in grids.items()}  # type: ignore[union-attr]
    assert steps["quiet.weight"] / steps["loud.weight"] == pytest.approx(10, rel=0.35)


def test_what_gptq_saves_in_a_layer_is_spent_on_the_others():
    """Bytes fall by as much for every octave of a step, and errors with its square: where bytes
    are spent best, GPTQ leaves both layers the same error. Rounded, it would not."""
    generator = torch.Generator().manual_seed(0)
    state = {name: torch.randn(96, 64, generator=generator) for name in ("white", "correlated")}
    _, rules, _ = trained()
    both = {name: replace(rules["embed.weight"], method="gptq") for name in state}
    mixed = torch.randn(64, 6, generator=generator)
    correlated = mixed @ mixed.T + 0.05 * torch.eye(64)
    grams = {"white": torch.eye(64), "correlated": correlated * 64 / correlated.trace()}

    def errors(own):
        values = dequantize_state(quantize_state({n: state[n] for n in own}, own, grams))
        changes = {name: (value - state[name]).double() for name, value in values.items()}
        return {n: float(((c @ grams[n].double()) * c).sum()) for n, c in changes.items()}

    def size(found):
        return len(pack_bytes({}, quantize_state(state, found, grams))[0])

    found = fill(
        state, both, 7_000, size, grams=grams, damage=lambda own: sum(errors(own).values())
    )
    left = errors(found.rules)
    assert left["correlated"] / left["white"] == pytest.approx(1, rel=0.35)
    left = errors({name: replace(rule, method="rtn") for name, rule in found.rules.items()})
    assert left["correlated"] > 2 * left["white"]
