"""Two ranks give what one rank gives: updates, momentum, checkpoints."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_optim_groups import toy

from recurgolf.optim import MuonAdam, build
from recurgolf.optim.work_partition import deal

PLAIN = MuonAdam(matrix_weight_decay=0.1, row_normalize=True, lora_optimizer="muon")
BF16 = MuonAdam(buffer_dtype="bf16", compat_shard_rows=2)
FLOAT32 = MuonAdam(ns_dtype="float32", ns_arithmetic="fused")
PRE_SYNC = MuonAdam(grad_clip=1.0, clip_scope="global", compat_clip_stage="pre_sync")


def fresh():
    torch.manual_seed(0)
    return toy()


def steps(model, optimizers, config, numbers):
    for step in numbers:
        generator = torch.Generator().manual_seed(step)
        for name, param in model.named_parameters():
            grad = torch.randn(param.shape, generator=generator)
            absent = step == 1 and name in ("qo.bank", "blocks.0.mlp.down_proj.weight")
            param.grad = None if absent else grad
        optimizers.step(0.9, config.momentum_at(step))


def trained(config, numbers, start=None):
    """Weights and optimizer state after some steps from the start or from a checkpoint."""
    model = fresh()
    optimizers = build(config, model)
    if start is not None:
        model.load_state_dict(start[0])
        optimizers.load_state_dict(start[1])
    steps(model, optimizers, config, numbers)
    state = {key: value.clone() for key, value in optimizers.state_dict().items()}
    return {name: value.clone() for name, value in model.state_dict().items()}, state


def clipped(rank_seeds):
    """Gradients after the clip of one rank each, averaged by hand."""
    total = None
    for seed in rank_seeds:
        model = fresh()
        optimizers = build(PRE_SYNC, model)
        generator = torch.Generator().manual_seed(seed)
        for param in model.parameters():
            param.grad = torch.randn(param.shape, generator=generator)
        optimizers.clip_gradients()
        grads = [param.grad for param in model.parameters()]
        total = grads if total is None else [a + b for a, b in zip(total, grads, strict=True)]
    return [grad / len(rank_seeds) for grad in total]


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2)
    half = torch.load(f"{folder}/half.pt")
    results = {
        "whole": trained(PLAIN, range(4)),
        "half": trained(PLAIN, range(2)),
        "resumed": trained(PLAIN, range(2, 4), half),
        "bf16": trained(BF16, range(4)),
        "float32": trained(FLOAT32, range(4)),
        "clipped": clipped([rank]),
    }
    model = fresh()
    optimizers = build(PLAIN, model)
    steps(model, optimizers, PLAIN, range(1))
    results["momenta held"] = len(optimizers.muon.state)
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_ranks")
    torch.save(trained(PLAIN, range(2)), folder / "half.pt")
    mp.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            assert one[name].dtype == value.dtype
            assert torch.equal(one[name], value), name


def test_two_ranks_match_one_bit_for_bit(ranks):
    for rank in ranks:
        assert_equal(rank["whole"], trained(PLAIN, range(4)))
        assert_equal(rank["bf16"], trained(BF16, range(4)))
        assert_equal(rank["float32"], trained(FLOAT32, range(4)))


def test_a_checkpoint_of_one_rank_continues_on_two(ranks):
    for rank in ranks:
        assert_equal(rank["resumed"], trained(PLAIN, range(4)))


def test_a_checkpoint_of_two_ranks_continues_on_one(ranks):
    assert_equal(trained(PLAIN, range(2, 4), ranks[1]["half"]), trained(PLAIN, range(4)))


def test_momentum_is_divided_between_the_ranks(ranks):
    model = fresh()
    optimizers = build(PLAIN, model)
    steps(model, optimizers, PLAIN, range(1))
    everything = len(optimizers.muon.state)
    held = [rank["momenta held"] for rank in ranks]
    assert all(0 < count < everything for count in held)


def test_clipping_before_the_average_is_the_mean_of_clipped_gradients(ranks):
    expected = clipped([0, 1])
    for rank in ranks:
        for found, want in zip(rank["clipped"], expected, strict=True):
            torch.testing.assert_close(found, want, atol=1e-7, rtol=1e-6)


def test_the_deal_is_complete_and_even():
    costs = [7, 1, 1, 5, 3, 3, 8, 2]
    for world in (1, 2, 3, 8, 11):
        owners = deal(costs, world)
        loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(world)]
        assert sum(loads) == sum(costs)
        assert max(loads) <= sum(costs) / world + max(costs)
        assert owners == deal(costs, world)
