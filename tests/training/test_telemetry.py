"""Telemetry: its figures against hooks and float64, and a run that it does not disturb."""

import itertools
import math

import numpy as np
import pytest
import torch
from smoke_runs import composed, small, train

from recurgolf.config import ConfigError
from recurgolf.looping import LoopPlan, NoLooping, SegmentLooping
from recurgolf.lora import LoRA
from recurgolf.model.transformer import Model, Transformer
from recurgolf.settings import TELEMETRY, TrainerConfig
from recurgolf.training.telemetry import LEVELS, bpb_by_passes, contraction, visit_curves

VOCAB, DIM, BLOCKS, LENGTH = 40, 16, 3, 12


class OneByte:
    """Every token stands for as many bytes as its id modulo 3, plus 1."""

    def to(self, device: str) -> "OneByte":
        return self

    def count(self, targets: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        return targets % 3 + 1


def looping(**options) -> SegmentLooping:
    return SegmentLooping(start=1, end=1, **{"passes": 4, **options})


def network(loops: SegmentLooping | NoLooping, rank: int = 2) -> Transformer:
    """A small model whose every weight is random, in float64."""
    torch.manual_seed(3)
    config = Model(vocab_size=VOCAB, dim=DIM, num_blocks=BLOCKS)
    largest = loops.largest_plan(BLOCKS)
    model = config.build(largest)
    model.adapters = LoRA(rank=rank, targets=["q_proj", "up_proj"], alpha=1.0).build(
        config.projections, largest
    )
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model.double().eval()


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.from_numpy(np.random.default_rng(5).integers(0, VOCAB, (2, LENGTH + 1)))
    return ids[:, :-1], ids[:, 1:]


def watched(model: Transformer, plan: LoopPlan, inputs: torch.Tensor) -> list[np.ndarray]:
    """What goes into the first block and comes out of every one, seen by hooks on the blocks."""
    chain: list[np.ndarray] = []
    hooks = [
        model.blocks[plan.blocks[0]].register_forward_pre_hook(
            lambda _, given: chain.append(given[0].numpy().copy()) if not chain else None
        )
    ]
    hooks += [
        block.register_forward_hook(lambda _, __, out: chain.append(out.numpy().copy()))
        for block in model.blocks
    ]
    with torch.no_grad():
        model.hidden(inputs, plan)
    for hook in hooks:
        hook.remove()
    return chain


def test_norms_and_cosines_are_those_of_the_states_between_the_blocks(batch):
    loops = looping()
    model, plan = network(loops), loops.plan(BLOCKS)
    found = visit_curves(model, plan, *batch)
    chain = watched(model, plan, batch[0])
    assert len(chain) == plan.num_visits + 1 == 7
    for position, (before, after) in enumerate(itertools.pairwise(chain)):
        name = f"visit{position:02d}"
        assert found[f"loop/residual_rms/{name}"] == pytest.approx(
            math.sqrt(np.mean(after**2)), rel=1e-5
        )
        dots = (before * after).sum(-1)
        cosines = dots / np.linalg.norm(before, axis=-1) / np.linalg.norm(after, axis=-1)
        assert found[f"loop/cosine/{name}"] == pytest.approx(cosines.mean(), rel=1e-5)
    steps = [np.linalg.norm(chain[p + 1] - chain[p]) for p in range(1, 5)]
    for number in (2, 3, 4):
        assert found[f"loop/contraction/pass{number:02d}"] == pytest.approx(
            steps[number - 1] / steps[number - 2], rel=1e-5
        )
    assert "loop/contraction/pass05" not in found


def test_contraction_by_hand():
    # The core (0 1)x3 goes 0 -> 8 -> 12 -> 13, whatever lies between its two blocks.
    plan = LoopPlan((0, 1, 0, 1, 0, 1), core=(0, 6))
    chain = [torch.tensor([float(x)]) for x in (0, 99, 8, -7, 12, 55, 13)]
    assert contraction(plan, chain) == {
        "loop/contraction/pass02": 0.5,
        "loop/contraction/pass03": 0.25,
    }
    assert contraction(LoopPlan((0, 1), core=(2, 2)), chain[:3]) == {}


def test_adapter_norms_are_those_of_the_products_of_their_factors(batch):
    loops = looping()
    model, plan = network(loops), loops.plan(BLOCKS)
    found = visit_curves(model, plan, *batch)
    assert model.adapters is not None
    bank = model.adapters.bank(1)
    for slot, position in enumerate((2, 3, 4)):  # the repeats of block 1
        squares = 0.0
        for target in ("q_proj", "up_proj"):
            a, b = (getattr(bank[target], f"lora_{x}")[slot].detach().numpy() for x in "ab")
            squares += np.sum((0.5 * b @ a) ** 2)  # alpha / rank
        norm = found[f"loop/adapter_norm/visit{position:02d}"]
        assert norm == pytest.approx(math.sqrt(squares), rel=1e-6)
    assert {key for key in found if "adapter" in key} == {
        f"loop/adapter_norm/visit0{n}" for n in (2, 3, 4)
    }


def test_gradient_norms_are_slopes_of_the_loss(batch):
    """A small step along a visit's gradient changes the loss by its norm."""
    loops = looping(passes=2)
    model, plan = network(loops), loops.plan(BLOCKS)
    inputs, targets = batch
    found = visit_curves(model, plan, inputs, targets)

    def loss(position: int, shift: torch.Tensor) -> torch.Tensor:
        calls = iter(range(plan.num_visits))
        hooks = [
            block.register_forward_hook(
                lambda _, __, out: torch.add(out, shift) if next(calls) == position else out
            )
            for block in model.blocks
        ]
        logits = model(inputs, plan)  # in float64; the training loss would be float32
        value = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        for hook in hooks:
            hook.remove()
        return value

    for position in range(plan.num_visits):
        shift = torch.zeros(2, LENGTH, DIM, dtype=torch.float64, requires_grad=True)
        (direction,) = torch.autograd.grad(loss(position, shift), shift)
        unit = 1e-5 * direction / direction.norm()
        with torch.no_grad():
            slope = (loss(position, unit) - loss(position, -unit)).item() / 2e-5
        assert found[f"loop/grad_norm/visit{position:02d}"] == pytest.approx(slope, rel=1e-4)


def test_visits_that_gradients_do_not_reach_have_no_gradient_norm(batch):
    loops = looping(backprop_passes=1)
    plan = loops.plan(BLOCKS)
    found = visit_curves(network(loops), plan, *batch)
    names = {key[-2:] for key in found if key.startswith("loop/grad_norm/")}
    assert names == {f"{v:02d}" for v in range(plan.grad_from, plan.num_visits)}


def test_watching_leaves_no_gradient_and_no_random_number_behind(batch):
    loops = looping()
    model = network(loops)
    rng = torch.get_rng_state()
    visit_curves(model, loops.plan(BLOCKS), *batch)
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(weight.grad is None for weight in model.parameters())


def test_bpb_by_passes_is_that_of_each_plan_on_the_first_windows():
    loops = looping(passes=3)
    model = network(loops)
    tokens = np.random.default_rng(6).integers(0, VOCAB, 5 * LENGTH + 7).astype(np.uint16)
    found = bpb_by_passes(model, loops, tokens, OneByte(), seq_len=LENGTH)  # type: ignore[arg-type]
    assert sorted(found) == [f"loop/bpb/passes{n:02d}" for n in (1, 2, 3)]
    for passes in (1, 2, 3):
        nats, num_bytes = 0.0, 0
        for window in range(5):
            ids = tokens[window * LENGTH : (window + 1) * LENGTH + 1].astype(np.int64)
            with torch.no_grad():
                logits = model(torch.from_numpy(ids[None, :-1]), loops.eval_plan(BLOCKS, passes))
            rows = logits[0].numpy()
            rows = rows - rows.max(-1, keepdims=True)
            logs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
            nats -= logs[np.arange(LENGTH), ids[1:]].sum()
            num_bytes += int(np.sum(ids[1:] % 3 + 1))
        expected = nats / math.log(2) / num_bytes
        assert found[f"loop/bpb/passes{passes:02d}"] == pytest.approx(expected, rel=1e-5)
    assert len(set(found.values())) == 3


def test_bytes_of_a_sidecar_count_where_there_is_one():
    loops = looping(passes=2)
    model = network(loops)
    tokens = np.random.default_rng(6).integers(0, VOCAB, 3 * LENGTH + 1).astype(np.uint16)
    doubled = (2 * (tokens % 3 + 1)).astype(np.uint16)
    options = {"seq_len": LENGTH}
    by_table = bpb_by_passes(model, loops, tokens, OneByte(), **options)  # type: ignore[arg-type]
    by_sidecar = bpb_by_passes(model, loops, tokens, OneByte(), sidecar=doubled, **options)  # type: ignore[arg-type]
    for key, value in by_table.items():
        assert by_sidecar[key] == pytest.approx(value / 2, rel=1e-9)


def test_a_flat_schedule_has_no_figures_by_pass(batch):
    model, loops = network(NoLooping(), rank=0), NoLooping()
    found = visit_curves(model, loops.plan(BLOCKS), *batch)
    assert len({key for key in found if "residual_rms" in key}) == BLOCKS
    assert not any("contraction" in key or "adapter" in key for key in found)
    tokens = np.zeros(50, dtype=np.uint16)
    assert bpb_by_passes(model, loops, tokens, OneByte(), seq_len=10) == {}  # type: ignore[arg-type]


LOOPED = ("looping=cycle", "looping.passes=2", "lora.rank=2", "trainer.log_every=5")


def test_a_run_logs_the_loop_and_is_not_changed_by_it():
    silent = train(*LOOPED, "trainer.telemetry=none")
    told = train(*LOOPED, "trainer.telemetry=log")
    assert told.losses == silent.losses
    assert told.figures == silent.figures
    run = composed(*small(*LOOPED))
    visits = run.eval_plan.num_visits
    last = [event for event in told.events if "val/bpb" in event][-1]
    for name in ("residual_rms", "cosine", "grad_norm"):
        of_visits = sorted(key for key in last if key.startswith(f"loop/{name}/"))
        assert of_visits == [f"loop/{name}/visit{v:02d}" for v in range(visits)]
    assert {"loop/contraction/pass02", "loop/bpb/passes01", "loop/bpb/passes02"} <= last.keys()
    assert any(key.startswith("loop/adapter_norm/") for key in last)
    lines = [event for event in told.events if "train/loss" in event]
    assert all("loop/residual_rms/visit00" in event for event in lines)
    assert not any("loop/bpb/passes01" in event for event in lines)
    assert not any(key.startswith("loop/residual") for event in silent.events for key in event)


def test_the_default_looks_at_the_loop_when_it_validates():
    events = train(*LOOPED, "trainer.val_every=10").events
    with_loop = [event for event in events if "loop/residual_rms/visit00" in event]
    assert with_loop == [event for event in events if "val/bpb" in event]
    assert len(with_loop) >= 2


def test_a_wrong_level_names_the_right_ones():
    assert set(TELEMETRY) == set(LEVELS)
    with pytest.raises(ConfigError, match=r"trainer\.telemetry='logs': .*did you mean 'log'"):
        TrainerConfig(telemetry="logs")
