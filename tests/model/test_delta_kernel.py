"""Which form of the rule runs, and the kernel against the truth where there is a GPU for it."""

import pytest
import torch
import torch.nn.functional as F

from recurgolf.config import ConfigError
from recurgolf.model.mixers import delta_kernel
from recurgolf.model.mixers.gated_deltanet import gated_delta_rule


def inputs(length, device="cpu", dtype=torch.float32):
    generator = torch.Generator().manual_seed(length)
    q, k = (F.normalize(torch.randn(2, length, 2, 16, generator=generator), dim=-1) for _ in "qk")
    v = torch.randn(2, length, 4, 32, generator=generator)
    beta = torch.rand(2, length, 4, generator=generator)
    log_decay = -0.3 * torch.rand(2, length, 4, generator=generator)
    log_decay[:, length // 2] = -torch.inf
    tensors = [q.to(dtype), k.to(dtype), v.to(dtype), beta, log_decay]
    return [x.to(device).requires_grad_() for x in tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_a_gpu_auto_is_the_chunked_form_bit_for_bit(dtype):
    given = inputs(70, dtype=dtype)
    for auto, chunked in zip(
        gated_delta_rule(*given, form="auto"), gated_delta_rule(*given), strict=True
    ):
        assert torch.equal(auto, chunked)


def test_asking_for_the_kernel_where_it_cannot_run_says_why():
    with pytest.raises(ConfigError, match="form='kernel' cannot run: the tensors are on the cpu"):
        gated_delta_rule(*inputs(5, dtype=torch.bfloat16), form="kernel")


@pytest.mark.gpu
@pytest.mark.parametrize("length", [63, 200])
def test_the_kernel_equals_the_sequential_form_within_half_precision(length):
    pytest.importorskip("fla")
    given = inputs(length, "cuda", torch.bfloat16)
    assert not delta_kernel.missing(given[1], given[2])
    results = []
    for form in ("auto", "sequential"):
        output, state = gated_delta_rule(*given, form=form)
        grads = torch.autograd.grad(output.float().sum() + state.sum(), given)
        results.append([output, state, *grads])
    for kernel, truth in zip(*results, strict=True):
        error = (kernel.float() - truth.float()).square().mean().sqrt()
        assert error < 0.02 * truth.float().square().mean().sqrt()


@pytest.mark.gpu
def test_float32_on_a_gpu_keeps_the_chunked_form():
    given = inputs(70, "cuda")
    assert "half precision" in delta_kernel.missing(given[1], given[2])
    assert torch.equal(gated_delta_rule(*given, form="auto")[0], gated_delta_rule(*given)[0])
