"""The CPU variant of every system's experiment is that experiment, only smaller."""

import json

import pytest
from command_line import recurgolf as run_line

import recurgolf
from recurgolf.config import to_dict

SYSTEMS = [
    "parameter_golf_baseline",
    "per_iteration_lora",
    "depth_recurrent_qat",
    "universal_rank1",
    "parallel_recurrent",
]

# What may shrink: sizes, positions, lengths and horizons.
SHRINKS = {
    "model": {"dim", "num_blocks", "mlp_mult", "vocab_size", "block_pattern", "mtp_heads"}
    | {"num_heads", "num_kv_heads", "xsa_last", "rows", "visits", "train_len"},
    "looping": {"start", "end", "passes", "passes_eval"},
    "lora": {"rank"},
    "optimizer": {"momentum_warmup_steps", "warmdown_steps", "compat_shard_rows"},
    "averaging": {"decay", "interval_steps"},
    "quant": {"keep_float_max_numel", "sequences"},
    "artifact": set(),
    "eval": {"stride", "seq_len", "batch_tokens"},
}


def differences(first, second):
    """Names of the leaves at which two option trees differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        assert first.keys() == second.keys()
        return {
            name if not isinstance(first[name], dict) else inner
            for name in first
            for inner in differences(first[name], second[name]) or ()
        }
    return set() if first == second else {"value"}


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_cpu_variant_only_shrinks(system):
    full, small = (recurgolf.compose([f"experiment={name}"]) for name in (system, f"{system}_cpu"))
    for part, may in SHRINKS.items():
        changed = differences(to_dict(getattr(full, part)), to_dict(getattr(small, part)))
        assert changed <= may, part
    assert type(full.data.loader) is type(small.data.loader)
    assert full.trainer.devices == 8 and small.trainer.device == "cpu"
    assert full.budget.artifact_bytes == 16_000_000


@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_cpu_variant_runs_to_the_score_of_its_file(system, tmp_path):
    line = (f"experiment={system}_cpu", "trainer.steps=4", "trainer.batch_tokens=1024")
    folder = tmp_path / "run"
    run_line(*line, "eval=plain", f"hydra.run.dir={folder}", cwd=tmp_path).finished()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["steps"] == 4
    assert summary["within_budget"]
    assert summary["bytes_model"] == (folder / "artifact.bin").stat().st_size
    assert 0 < summary["val_bpb"] < 6
