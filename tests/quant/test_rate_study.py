"""The gradients of scripts/benches/rate.py are those of what it says."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from benches.rate import LIMIT, RoundedThrough, TableBits, bits_per_code


def drawn():
    torch.manual_seed(0)
    weight = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    log_step = torch.linspace(-2, -0.5, 4, dtype=torch.float64)[:, None].requires_grad_()
    return weight, log_step


def test_bits_have_the_gradient_of_their_table():
    weight, log_step = drawn()
    counts = torch.tensor([1e3 * 0.6 ** abs(c) for c in range(-LIMIT, LIMIT + 1)]).double()
    table, noise = bits_per_code(counts), torch.rand(4, 6, dtype=torch.float64) - 0.5

    def bits(weight, log_step):
        return TableBits.apply(weight, log_step, table, noise)

    assert torch.autograd.gradcheck(bits, (weight, log_step), eps=1e-7, atol=1e-3)


def test_a_step_learns_what_rounding_that_passes_gradients_through_teaches_it():
    weight, log_step = drawn()
    seen = RoundedThrough.apply(weight, log_step)
    seen.square().sum().backward()
    w, s = weight.detach().clone().requires_grad_(), log_step.detach().clone().requires_grad_()
    value = w / s.exp2()
    by_hand = (value + (value.round() - value).detach()) * s.exp2()
    by_hand.square().sum().backward()
    torch.testing.assert_close(seen, by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weight.grad, w.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_step.grad, s.grad, rtol=1e-12, atol=1e-12)
