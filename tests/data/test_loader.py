"""Loaders: the recorded batches, the same data for any number of ranks, and exact continuation."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from recurgolf.config import REGISTRY, ConfigError
from recurgolf.data.loader import RankShardsShuffledConfig, SequentialConfig, ShuffledConfig
from recurgolf.data.shards import DataError, TokenStream, find_shards, write_shard

KINDS = sorted(REGISTRY["data/loader"])
PARITY = {
    "baseline": SequentialConfig(),
    "per_iteration_lora": RankShardsShuffledConfig(seed_includes_run_seed=False),
}


@pytest.fixture(scope="module")
def train_shards(recorded):
    return find_shards(recorded / "shards", "train")


@pytest.fixture
def numbered(tmp_path):
    """Five shards whose tokens are 0, 1, 2 ... 4,999: a token says where it was."""
    paths = []
    for n, part in enumerate(np.split(np.arange(5000, dtype=np.uint16), [700, 1500, 1501, 4000])):
        paths.append(tmp_path / f"fineweb_train_{n:06d}.bin")
        write_shard(paths[-1], part)
    return paths


def build(config, shards, *, seq_len=16, rank=0, world_size=1, seed=7):
    return config.build(shards, seq_len=seq_len, rank=rank, world_size=world_size, seed=seed)


@pytest.mark.parametrize("system", PARITY)
def test_batches_are_the_recorded_ones(recorded, train_shards, system):
    batches = load_file(recorded / "batches.safetensors")
    for case in json.loads((recorded / "batches.json").read_text())[system]:
        assert_recorded(case, system, train_shards, batches)


def assert_recorded(c, system, train_shards, batches):
    accum, world_size = c["grad_accum_steps"], c["world_size"]
    for rank in range(world_size):
        seq_len = c.get("seq_len") or c["train_seq_len"]
        loader = build(
            PARITY[system], train_shards, seq_len=seq_len, rank=rank, world_size=world_size
        )
        for call in range(c["calls"]):
            x, y = loader.next_batch(c["global_tokens"], accum)
            key = f"{system}.ws{world_size}.ga{accum}.rank{rank}.call{call}"
            assert torch.equal(x, batches[f"{key}.x"].long())
            assert torch.equal(y[:, -1], batches[f"{key}.y_last"].long())
            assert torch.equal(y[:, :-1], x[:, 1:])


def test_stream_takes_are_the_recorded_ones(recorded, train_shards):
    batches = load_file(recorded / "batches.safetensors")
    stream, position = TokenStream(train_shards), 0
    for n, count in enumerate(
        json.loads((recorded / "batches.json").read_text())["token_stream_takes"]
    ):
        taken = torch.from_numpy(stream.read(position, count).astype(np.int64))
        assert torch.equal(taken, batches[f"token_stream.take.{n}"].long())
        position += count


def starts_of_step(shards, world_size, grad_accum, steps, seed=7, config=None):
    """First tokens of the rows that all ranks see in each step."""
    loaders = [
        build(config or ShuffledConfig(), shards, rank=rank, world_size=world_size, seed=seed)
        for rank in range(world_size)
    ]
    seen = []
    for _ in range(steps):
        rows = [
            loader.next_batch(16 * 24, grad_accum)[0][:, 0]
            for _ in range(grad_accum)
            for loader in loaders
        ]
        seen.append(torch.cat(rows).tolist())
    return seen


@pytest.mark.parametrize(
    ("world_size", "grad_accum"), [(1, 2), (2, 1), (2, 4), (3, 1), (4, 3), (8, 3)]
)
def test_shuffled_steps_hold_the_same_rows_for_any_split(numbered, world_size, grad_accum):
    # 40 steps of 24 rows go through three epochs of 311 windows.
    expected = starts_of_step(numbered, 1, 1, 40)
    assert starts_of_step(numbered, world_size, grad_accum, 40) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_loader_says_on_what_its_order_depends(numbered, kind):
    """Splits with the same words give the same rows in every step, others do not."""
    config = REGISTRY["data/loader"][kind]()
    rows: dict[str, list] = {}
    for world_size, grad_accum in [(1, 1), (1, 2), (2, 1), (2, 2), (1, 4)]:
        words = build(config, numbered).order_key(world_size, grad_accum)
        found = starts_of_step(numbered, world_size, grad_accum, 4, config=config)
        found = [sorted(step) for step in found]
        assert rows.setdefault(words, found) == found, (world_size, grad_accum)
    assert len({str(found) for found in rows.values()}) == len(rows)


def test_shuffled_epoch_meets_every_window_once_and_the_next_one_others(numbered):
    loader = build(ShuffledConfig(), numbered)
    epochs = []
    for _ in range(2):
        x, y = loader.next_batch(16 * 311, 1)
        assert torch.equal(y, x + 1)
        starts = x[:, 0].sort().values
        assert torch.equal(starts.diff(), torch.full((310,), 16))
        assert not torch.equal(starts, x[:, 0])
        epochs.append(int(starts[0]))
    assert epochs[0] != epochs[1]
    assert all(0 <= phase < 24 for phase in epochs)


def test_shuffled_order_depends_on_the_seed(numbered):
    assert starts_of_step(numbered, 1, 1, 2, seed=1) != starts_of_step(numbered, 1, 1, 2, seed=2)


def test_every_token_is_a_target_sooner_or_later(numbered):
    loader = build(ShuffledConfig(), numbered)
    seen = torch.cat([loader.next_batch(16 * 311, 1)[1].reshape(-1) for _ in range(200)])
    assert set(range(1, 5000)) - set(seen.tolist()) == set()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_a_loader_continues_exactly_where_it_was_saved(numbered, kind, rank, world_size):
    def fresh():
        return build(REGISTRY["data/loader"][kind](), numbered, rank=rank, world_size=world_size)

    loader = fresh()
    for calls in (0, 1, 3, 30, 100):
        for _ in range(calls):
            loader.next_batch(16 * 32, 4)
        state = json.loads(json.dumps(loader.state_dict()))
        resumed = fresh()
        resumed.load_state_dict(state)
        for _ in range(100):  # past the end of the data
            for ours, theirs in zip(
                loader.next_batch(16 * 32, 4), resumed.next_batch(16 * 32, 4), strict=True
            ):
                assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_int64_and_contiguous(numbered, kind):
    x, y = build(REGISTRY["data/loader"][kind](), numbered).next_batch(16 * 12, 3)
    for ids in (x, y):
        assert ids.dtype == torch.int64
        assert ids.shape == (4, 16)
        assert ids.is_contiguous()


def test_run_seed_changes_the_order_unless_compat_says_otherwise(numbered):
    def first(config, seed):
        return build(config, numbered, seed=seed).next_batch(16 * 8, 1)[0].tolist()

    assert first(RankShardsShuffledConfig(), 1) != first(RankShardsShuffledConfig(), 2)
    compat = RankShardsShuffledConfig(seed_includes_run_seed=False)
    assert first(compat, 1) == first(compat, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_tokens_than_a_batch_are_refused(numbered, kind):
    loader = build(REGISTRY["data/loader"][kind](), numbered)
    with pytest.raises(DataError, match="fewer training tokens than one batch"):
        loader.next_batch(16 * 400, 1)


@pytest.mark.parametrize("kind", ["shuffled", "sequential"])
def test_no_training_shards_are_refused(kind):
    with pytest.raises(DataError, match="fewer training tokens than one batch"):
        build(REGISTRY["data/loader"][kind](), []).next_batch(16, 1)


def test_more_ranks_than_shards_are_refused_where_ranks_own_shards(numbered):
    with pytest.raises(ConfigError, match="6 ranks and 5 training shards"):
        build(RankShardsShuffledConfig(), numbered, world_size=6)
