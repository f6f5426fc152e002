"""The gated delta rule against its recordings, published sums and the token-by-token form."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from recurgolf.config import ConfigError
from recurgolf.model.mixers.gated_deltanet import gated_delta_rule

GOLDEN = Path(__file__).parents[1] / "fixtures/golden/gated_delta"
FORMS = ["chunked", "sequential"]
HEADS = {"one head": (1, 1), "several heads": (2, 2), "more value heads": (2, 4)}


def close(actual, expected, atol, rtol=0.0):
    torch.testing.assert_close(actual, expected, atol=atol, rtol=rtol)


def gradient_close(actual, expected):
    """The recordings' tolerance for gradients."""
    close(actual, expected, atol=1e-5 + 1e-4 * expected.abs().max().item())


def of_case(recorded, number):
    """The tensors of one case under their own names."""
    parts = {name: name.partition(".") for name in recorded}
    return {parts[n][2]: t for n, t in recorded.items() if parts[n][0] == str(number)}


def rule_inputs(length, heads=(2, 4), dims=(8, 6), batch=2, decay=(0.5, 1.0), dtype=torch.float64):
    """Random q, k (normalised), v, beta, log_decay and initial state."""
    generator = torch.Generator().manual_seed(length)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def uniform(low, high, *shape):
        return low + (high - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)

    (key_heads, value_heads), (key_dim, value_dim) = heads, dims
    q, k = (F.normalize(normal(batch, length, key_heads, key_dim), dim=-1) for _ in range(2))
    v = normal(batch, length, value_heads, value_dim)
    beta = uniform(0.02, 0.98, batch, length, value_heads)
    log_decay = uniform(*decay, batch, length, value_heads).log()
    state = 0.3 * normal(batch, value_heads, key_dim, value_dim)
    return [x.to(dtype) for x in (q, k, v, beta, log_decay, state)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "path", sorted((GOLDEN / "recurrence").glob("*.safetensors")), ids=lambda path: path.stem
)
def test_rule_equals_recorded_recurrence(path, form):
    r = load_file(path)
    q, k, v = (r[name][None, :, None] for name in "qkv")
    beta, log_decay = r["beta"][None, :, None], r["alpha"].log()[None, :, None]
    out, state = gated_delta_rule(q, k, v, beta, log_decay, r["h0"].T[None, None], form=form)
    close(out[0, :, 0], r["out_seq"], 1e-5)
    close(state[0, 0].T, r["h_seq"], 1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("seed", "length", "chunk", "low", "high", "out_sum", "state_sum"),
    [
        (7, 191, 64, 0.82, 0.999, 29.596682, 183.054769),
        (11, 384, 128, 0.82, 0.999, 63.999176, 220.074487),
        (23, 130, 64, 0.82, 0.999, 22.888774, 216.779463),
        (31, 160, 64, 1e-4, 0.4, 8.052198, 149.956977),
    ],
)
def test_rule_equals_published_sums(form, seed, length, chunk, low, high, out_sum, state_sum):
    rng = np.random.default_rng(seed)
    q, k = (rng.standard_normal((length, 128)) for _ in range(2))
    v = 0.15 * rng.standard_normal((length, 128))
    beta, alpha = rng.uniform(0.02, 0.98, length), rng.uniform(low, high, length)
    h0 = 0.03 * rng.standard_normal((128, 128))
    q, k = (x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6) for x in (q, k))
    as_batch = (torch.from_numpy(x)[None, :, None] for x in (q, k, v, beta, np.log(alpha)))
    state = torch.from_numpy(h0).T[None, None]
    out, state = gated_delta_rule(*as_batch, state, form=form, chunk_size=chunk)
    assert out.abs().sum().item() == pytest.approx(out_sum, abs=2e-5)
    assert state.abs().sum().item() == pytest.approx(state_sum, abs=2e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rule_and_its_gradients_equal_recordings(form):
    recorded = load_file(GOLDEN / "delta_rule/naive.safetensors")
    for case in json.loads((GOLDEN / "delta_rule/naive.json").read_text())["cases"]:
        r = of_case(recorded, case["case"])
        names = ["q", "k", "v", "beta", "g"]
        inputs = [r[name].requires_grad_() for name in names]
        out, state = gated_delta_rule(
            *inputs,
            initial_state=r.get("initial_state"),
            scale=case["scale"],
            form=form,
            chunk_size=case["chunk_size"],
        )
        close(out, r["o"], 1e-5)
        close(state, r["final_state"], 1e-5)
        for name, grad in zip(
            names, torch.autograd.grad(out, inputs, r["grad_output"]), strict=True
        ):
            gradient_close(grad, r[f"grad.{name}"])


@pytest.mark.parametrize("form", FORMS)
def test_rule_with_fewer_key_heads_equals_recordings(form):
    recorded = load_file(GOLDEN / "delta_rule/grouped.safetensors")
    for case in json.loads((GOLDEN / "delta_rule/grouped.json").read_text())["cases"]:
        r = of_case(recorded, case["case"])
        q, k = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (r["q"], r["k"]))
        rest = (r["v"], r["beta"], r["g"], r.get("initial_state"))
        out, state = gated_delta_rule(q, k, *rest, form=form, chunk_size=case["chunk_size"])
        close(out, r["o_recurrent"], 1e-5)
        close(state, r["state_recurrent"], 1e-5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("chunk", [1, 16, 64, 128])
@pytest.mark.parametrize("length", [1, 63, 100, 257])
def test_chunked_equals_sequential(length, chunk, dtype, atol):
    inputs = rule_inputs(length, dtype=dtype)
    out, state = gated_delta_rule(*inputs, chunk_size=chunk)
    true_out, true_state = gated_delta_rule(*inputs, form="sequential")
    close(out, true_out, atol)
    close(state, true_state, atol)


# Uniform 1e-4 is the recorded case; in the others neighbours differ by many orders, so that the
# running sum of logarithms is large where single decays must still be exact; 0 forgets everything.
@pytest.mark.parametrize("strong", [1e-4, 1e-30, 0.0])
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_strong_decay_neither_underflows_nor_loses_gradients(strong, every, dtype, atol):
    inputs = rule_inputs(200, decay=(0.7, 0.999), dtype=dtype)
    inputs[4][:, ::every] = math.log(strong) if strong else -torch.inf
    results = []
    for form in FORMS:
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, state = gated_delta_rule(*leaves, form=form)
        weights = torch.linspace(-1, 1, out.numel(), dtype=dtype).view_as(out)
        results.append([out, state, *torch.autograd.grad((out * weights).sum(), leaves)])
    for chunked, sequential in zip(*results, strict=True):
        assert chunked.isfinite().all()
        close(chunked, sequential, atol)


@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_rule_gradcheck(heads):
    inputs = [x.requires_grad_() for x in rule_inputs(7, heads=heads, dims=(3, 2), batch=1)]
    assert torch.autograd.gradcheck(lambda *xs: gated_delta_rule(*xs, chunk_size=4), inputs)


def test_rule_keeps_no_state_per_token():
    def saved_numbers(length):
        inputs = rule_inputs(length, heads=(1, 1), dims=(64, 64), batch=1, dtype=torch.float32)
        leaves = [x.requires_grad_() for x in inputs]
        stores = {}

        def note(x):
            stores[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // 4
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            kept = gated_delta_rule(*leaves)
        assert kept[0].shape[1] == length
        return sum(stores.values())

    per_token = (saved_numbers(1024) - saved_numbers(512)) / 512
    assert per_token < 64 * 64 / 2  # one state is 64 x 64 numbers


def test_half_precision_is_computed_in_float32():
    inputs = rule_inputs(70, dtype=torch.bfloat16)
    out, state = gated_delta_rule(*inputs)
    true_out, true_state = gated_delta_rule(*(x.float() for x in inputs))
    assert (out.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, true_out.bfloat16()) and torch.equal(state, true_state)
    with torch.autocast("cpu", torch.bfloat16):
        out, _ = gated_delta_rule(*(x.float() for x in inputs))
    assert torch.equal(out, true_out)


def test_backward_inside_autocast_is_as_exact_as_outside():
    leaves = [x.requires_grad_() for x in rule_inputs(70, dtype=torch.float32)]
    weights = torch.linspace(-1, 1, 70 * 2 * 4 * 6).view(2, 70, 4, 6)
    expected = torch.autograd.grad((gated_delta_rule(*leaves)[0] * weights).sum(), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        grads = torch.autograd.grad((gated_delta_rule(*leaves)[0] * weights).sum(), leaves)
    for grad, exact in zip(grads, expected, strict=True):
        assert torch.equal(grad, exact)


@pytest.mark.parametrize("wanted", [["final state"], ["output", "final state"]])
def test_chunked_gradients_equal_sequential_also_through_the_final_state(wanted):
    """A segment's state carries gradients to the segment before."""
    results = []
    for form in FORMS:
        leaves = [x.requires_grad_() for x in rule_inputs(45, heads=(2, 4))]
        named = dict(
            zip(["output", "final state"], gated_delta_rule(*leaves, form=form), strict=True)
        )
        parts = [named[name] for name in wanted]
        loss = sum((p * torch.linspace(-1, 1, p.numel()).view_as(p)).sum() for p in parts)
        results.append(torch.autograd.grad(loss, leaves, allow_unused=True))
    for chunked, sequential in zip(*results, strict=True):
        chunked = torch.zeros(()) if chunked is None else chunked
        expected = torch.zeros_like(chunked) if sequential is None else sequential
        close(chunked.to(expected.dtype), expected, 1e-10)


def test_rule_refuses_what_does_not_fit():
    q, k, v, beta, log_decay, state = rule_inputs(5)
    with pytest.raises(ConfigError, match=r"did you mean 'chunked'"):
        gated_delta_rule(q, k, v, beta, log_decay, form="chunk")
    with pytest.raises(ConfigError, match=r"chunk_size=0"):
        gated_delta_rule(q, k, v, beta, log_decay, chunk_size=0)
    with pytest.raises(ConfigError, match=r"beta is \(2, 5, 2\).*\(2, 5, 4\)"):
        gated_delta_rule(q, k, v, beta[..., :2], log_decay)
    with pytest.raises(ConfigError, match=r"initial_state is \(2, 4, 6, 8\)"):
        gated_delta_rule(q, k, v, beta, log_decay, state.mT)
    with pytest.raises(ConfigError, match="3 value heads for 2 key heads"):
        gated_delta_rule(q, k, v[:, :, :3], beta, log_decay)
