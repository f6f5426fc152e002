"""Adapters put on a model: the same logits as before, or nothing at all."""

import dataclasses

import pytest
import torch
from adapted_models import FLAT, LATE, LOOPED, SHARED, adapted, run_without, some_tokens
from smoke_runs import composed

from recurgolf import adapters
from recurgolf.adapters import Adapter, Base, Factors, Place
from recurgolf.config import ConfigError

KINDS = {"each block once": FLAT, "every visit": LOOPED, "shared": SHARED, "repeats": LATE}


def bytes_of(model):
    state = model.state_dict()
    return {n: t.numpy().tobytes() for n, t in state.items()}, model.adapters


def only(adapter, place, **changes):
    """The adapter with the factors of one place changed, or added."""
    old = adapter.factors.get(place) or next(iter(adapter.factors.values()))
    return dataclasses.replace(
        adapter, factors={**adapter.factors, place: dataclasses.replace(old, **changes)}
    )


@pytest.mark.parametrize("overrides", KINDS.values(), ids=KINDS)
@torch.no_grad()
def test_saved_adapters_on_their_base_give_the_same_logits_bit_for_bit(overrides, tmp_path):
    run = composed(*overrides)
    model, base, adapter = adapted(run)
    tokens = some_tokens(run)
    expected = model(tokens, run.eval_plan)
    bare = run_without(run)
    assert (base(tokens, bare.eval_plan) - expected).abs().max() > 0.1
    adapters.write(tmp_path, adapter)
    changed, _ = adapters.load(bare, base, tmp_path, tokenizer="f00d" * 16)
    assert torch.equal(base(tokens, changed.eval_plan), expected)
    # The Run says what the model has: it can be built again from it.
    again = type(run).from_dict(changed.to_dict()).build_model().eval()
    again.load_state_dict(base.state_dict())
    assert torch.equal(again(tokens, changed.eval_plan), expected)


@torch.no_grad()
def test_pairs_of_several_ranks_and_scales_are_filled_up_without_changing_the_sum():
    run = run_without(composed(*FLAT))
    _, base, _ = adapted(composed(*FLAT))
    places = {
        Place(0, "mixer.in_proj_b"): Factors(torch.randn(1, 16), torch.randn(4, 1), 0.5),
        Place(1, "mlp.up_proj"): Factors(torch.randn(3, 16), torch.randn(32, 3), 7.0),
    }
    tokens = some_tokens(run)
    seen = {}
    for place in places:
        layer = base.get_submodule(place.path)
        layer.register_forward_hook(
            lambda module, args, out, path=place.path: seen.update(
                {path: (args[0], args[1](args[0]) if args[1] is not None else None)}
            )
        )
    changed = adapters.attach(run, base, Adapter(places))
    base(tokens, changed.eval_plan)
    for place, factors in places.items():
        x, delta = seen[place.path]
        expected = factors.alpha / factors.rank * (x @ factors.a.T @ factors.b.T)
        torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-5)
    assert base.adapters.num_slots == {0: 1, 1: 1}


@torch.no_grad()
def test_a_visit_beyond_the_last_iteration_uses_the_last():
    """As `Adapters.slot` has it for more passes in scoring than in training."""
    run = composed(*LOOPED)
    model, base, adapter = adapted(run)
    less = {p: f for p, f in adapter.factors.items() if p.iteration < 2}
    last = {p: f for p, f in adapter.factors.items() if p.iteration == 1}
    full = less | {p._replace(iteration=2): f for p, f in last.items()}
    tokens, bare = some_tokens(run), run_without(run)
    changed = adapters.attach(bare, base, dataclasses.replace(adapter, factors=full))
    expected = base(tokens, changed.eval_plan)
    changed = adapters.attach(bare, base, dataclasses.replace(adapter, factors=less))
    assert torch.equal(base(tokens, changed.eval_plan), expected)
    assert not torch.equal(model(tokens, run.eval_plan), expected)


def test_a_residual_correction_is_saved_and_loaded(tmp_path):
    run = composed("experiment=smoke", "data.vocab_size=64", "model.dim=16", "lora=residual")
    model, base, adapter = adapted(run)
    adapters.write(tmp_path, adapter)
    tokens = some_tokens(run)
    changed, _ = adapters.load(run_without(run), base, tmp_path)
    assert torch.equal(base(tokens, changed.eval_plan), model(tokens, run.eval_plan))


WIDE = {"a": torch.ones(2, 16), "b": torch.ones(40, 2)}
GATE = Place(1, "mixer.in_proj_qkv", 0)
QUERY = Place(1, "mixer.q_proj", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda a: only(a, GATE),
            r"layer 1, module mixer\.in_proj_qkv, iteration 0: unknown module 'mixer\.in_proj_qkv' "
            r"for a layer that mixes by attention; expected one of mixer\.q_proj",
        ),
        (
            lambda a: only(a, Place(0, "self_attn.q_proj", 0)),
            r"unknown module 'self_attn\.q_proj' for a layer that mixes by gated_deltanet",
        ),
        (
            lambda a: only(a, Place(2, "mlp.up_proj", 0)),
            r"layer 2, module mlp\.up_proj, iteration 0: the layer is out of range",
        ),
        (
            lambda a: only(a, QUERY, **WIDE),
            r"mixer\.q_proj, iteration 0: expected lora_B \(16, 2\), found \(40, 2\)",
        ),
        (
            lambda a: only(a, QUERY, a=torch.ones(2, 17)),
            r"module mixer\.q_proj, iteration 0: expected lora_A \(2, 16\), found \(2, 17\)",
        ),
        (
            lambda a: only(a, QUERY._replace(iteration=3), **vars(a.factors[QUERY])),
            r"iteration 3: expected iterations 0 to 2, found 3: this Run visits block 1 3 time",
        ),
        (
            lambda a: dataclasses.replace(a, base=Base("0123456789abcdef", None, "other")),
            r"expected the base with fingerprint 0123456789abcdef \(of the run 'other'\), found",
        ),
        (
            lambda a: dataclasses.replace(a, base=dataclasses.replace(a.base, tokenizer="e" * 64)),
            r"expected a base with tokenizer eeeeeeeeeeee…, found f00df00df00d…",
        ),
    ],
)
@pytest.mark.parametrize("has_adapters", [False, True])
def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(change, message, has_adapters):
    run = composed(*LOOPED)
    model, base, adapter = adapted(run)
    target, its_run = (model, run) if has_adapters else (base, run_without(run))
    before, bank = bytes_of(target)
    with pytest.raises(ConfigError, match=message):
        adapters.attach(its_run, target, change(adapter), tokenizer="f00d" * 16)
    assert bytes_of(target) == (before, bank)
    assert target.adapters is bank


def test_loading_draws_no_random_number(tmp_path):
    run = composed(*LOOPED)
    _, base, adapter = adapted(run)
    before = torch.get_rng_state()
    adapters.attach(run_without(run), base, adapter)
    assert torch.equal(torch.get_rng_state(), before)


def test_fingerprint_changes_with_one_bit_of_the_base_and_not_with_adapters():
    run = composed(*FLAT)
    model, base, _ = adapted(run)
    prints = [adapters.fingerprint(m.state_dict()) for m in (model, base)]
    assert prints[0] == prints[1]
    with torch.no_grad():
        base.embed.weight[3, 2] = torch.nextafter(base.embed.weight[3, 2], torch.tensor(9.0))
    assert adapters.fingerprint(base.state_dict()) != prints[0]
