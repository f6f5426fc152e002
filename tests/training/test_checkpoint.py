"""Checkpoints come back bit for bit, or say what is wrong."""

import pytest
import torch

from recurgolf.config import ConfigError
from recurgolf.training import checkpoint


def saved(folder, step=3):
    parts = {
        "model": {"a": torch.randn(3, 4), "half": torch.randn(5).bfloat16()},
        "rng": {"torch": torch.get_rng_state()},
    }
    return parts, checkpoint.save(folder, step, parts, {"fingerprint": "f", "loader": {"n": 7}})


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    parts, path = saved(tmp_path)
    found, state = checkpoint.load(path)
    assert state["step"] == 3
    assert state["loader"] == {"n": 7}
    for part, named in parts.items():
        for name, tensor in named.items():
            assert torch.equal(found[part][name], tensor)


def test_tied_and_strided_tensors_are_kept(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    path = checkpoint.save(tmp_path, 1, {"m": {"x": base, "y": base.t()}}, {})
    assert torch.equal(checkpoint.load(path)[0]["m"]["y"], base.t())


@pytest.mark.parametrize("damage", ["flip", "cut", "missing", "state"])
def test_damage_is_named(tmp_path, damage):
    _, path = saved(tmp_path)
    tensors = path / checkpoint.TENSORS
    data = bytearray(tensors.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        tensors.write_bytes(data)
    elif damage == "cut":
        tensors.write_bytes(data[:-3])
    elif damage == "missing":
        tensors.unlink()
    else:
        (path / checkpoint.STATE).write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match=path.name):
        checkpoint.load(path)


def test_the_newest_is_the_one_with_most_steps_and_drafts_do_not_count(tmp_path):
    saved(tmp_path, 9)
    _, last = saved(tmp_path, 120)
    (tmp_path / ".step_000999.1").mkdir()
    assert checkpoint.newest(tmp_path) == last


def test_a_link_that_leads_nowhere_makes_way_for_the_checkpoint(tmp_path):
    (tmp_path / "step_000009").symlink_to(tmp_path / "gone")
    assert checkpoint.newest(tmp_path) is None
    _, path = saved(tmp_path, 9)
    assert checkpoint.newest(tmp_path) == path and not path.is_symlink()


def test_one_under_the_name_of_another_step_is_refused_by_both(tmp_path):
    _, path = saved(tmp_path, 3)
    later = path.rename(tmp_path / "step_000900")
    with pytest.raises(ConfigError, match=r"step_000900 was renamed: it is of step 3; step_000003"):
        checkpoint.load(later)
    assert checkpoint.load(later.rename(tmp_path / "kept"))[1]["step"] == 3  # no name of a step


def test_what_only_resembles_a_checkpoint_is_none(tmp_path):
    _, path = saved(tmp_path)
    for name in ("step_x", "step_", "step_-5", "stop_9"):
        (tmp_path / name).mkdir()
    (tmp_path / "step_999999").write_text("a file")
    assert checkpoint.steps(tmp_path) == [path]
    checkpoint.prune(tmp_path, 1, 0)
    assert checkpoint.newest(tmp_path) == path and (tmp_path / "step_x").is_dir()


def test_a_state_nested_beyond_reason_is_damage(tmp_path):
    _, path = saved(tmp_path)
    (path / checkpoint.STATE).write_text("[" * 200_000)
    with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
        checkpoint.load(path)


def test_a_score_that_is_no_number_is_null_in_the_state(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"m": {"x": torch.ones(1)}}, {"val_bpb": float("nan")})
    assert "NaN" not in (path / checkpoint.STATE).read_text()
    assert checkpoint.load(path)[1]["val_bpb"] is None
