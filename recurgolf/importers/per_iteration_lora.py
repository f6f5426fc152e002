"""Per-iteration LoRA: a looped middle band whose repetitions have adapters of their own.

The source keeps adapters by repetition and block, `lora_adapters.<c>.<b>.q_A` [in, rank] for the
(c + 2)-th visit of block loop_start + b; ours lie per block, transposed, repetitions stacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recurgolf.config import ConfigError
from recurgolf.importers.settings import (
    IDLE,
    TRAINING_DEFAULTS,
    UNTIED_DEFAULTS,
    positive,
    shared_overrides,
)
from recurgolf.importers.source import Place, System, whole_places
from recurgolf.model.transformer import Transformer

DEFAULTS = {
    **TRAINING_DEFAULTS,
    **UNTIED_DEFAULTS,
    "vocab_size": 8192,
    "num_layers": 11,
    "model_dim": 512,
    "embedding_dim": 512,
    "num_heads": 8,
    "num_kv_heads": 4,
    "mlp_mult": 4.0,
    "logit_softcap": 30.0,
    "rope_base": 10000.0,
    "rope_dims": 16,
    "qk_gain_init": 5.0,
    "xsa_last_n": 11,
    "parallel_residual_start": 7,
    "skip_gates_enabled": True,
    "ln_scale": True,
    "num_loops": 2,
    "loop_start": 3,
    "loop_end": 5,
    "enable_looping_at": 0.35,
    "lora_rank": 0,
    "lora_lr": 0.01,
    "mtp_num_heads": 2,
    "mtp_loss_weight": 0.2,
    "train_seq_len": 2048,
    "eval_seq_len": 2048,
    "eval_stride": 64,
    "sliding_window_enabled": True,
    "ttt_enabled": False,
    "ttt_lr": 0.005,
    "ttt_epochs": 3,
    "ttt_momentum": 0.9,
    "ttt_chunk_tokens": 32768,
    "train_batch_tokens": 786_432,
    "val_loss_every": 4000,
    "train_log_every": 500,
    "warmdown_frac": 0.72,
    "min_lr": 0.0,
    "tied_embed_lr": 0.03,
    "matrix_lr": 0.022,
    "scalar_lr": 0.02,
    "muon_momentum": 0.99,
    "muon_momentum_warmup_start": 0.92,
    "muon_momentum_warmup_steps": 1500,
    "muon_row_normalize": True,
    "muon_wd": 0.095,
    "adam_wd": 0.02,
    "embed_wd": 0.085,
    "grad_clip_norm": 0.3,
    "ema_decay": 0.9965,
    "gptq_reserve_seconds": 12.0,
    "gptq_calibration_batches": 64,
    "matrix_bits": 6,
    "embed_bits": 8,
    "matrix_clip_sigmas": 12.85,
    "embed_clip_sigmas": 20.0,
    "compressor": "brotli",
}

# What the source lists and never reads.
_IDLE = IDLE | {"rope_train_seq_len", "muon_beta2"}
_IDLE |= {"etlb_enabled", "etlb_lr", "etlb_steps", "etlb_clip"}

_FACTORS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "proj": "o_proj"}


def _blocks(count: int, parallel: int) -> dict[str, Any]:
    """Blocks from number `parallel` on are parallel ones; below 0: none."""
    before = count if parallel < 0 else min(parallel, count)
    if before in (0, count):
        return {"model/block": "sequential" if before else "parallel", "model.block_pattern": []}
    return {"model.block_pattern": ["block"] * before + ["parallel"] * (count - before)}


def overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    blocks, parallel = settings["num_layers"], settings["parallel_residual_start"]
    loops, xsa = positive(settings["num_loops"]), positive(settings["xsa_last_n"])
    wide = settings["embedding_dim"] == settings["model_dim"]
    return {
        **shared_overrides(settings),
        "model.num_blocks": blocks,
        "model.embed_dim": None if wide else settings["embedding_dim"],
        "model.mixer.xsa": xsa > 0,
        "model.mixer.xsa_last": xsa,
        **_blocks(blocks, parallel),
        "model.skips": "unet_gated" if settings["skip_gates_enabled"] else "unet",
        "model.depth_scaled_norm": settings["ln_scale"],
        "model.rope.dims": positive(settings["rope_dims"]),
        "model.rope.train_len": settings["train_seq_len"],
        "model.mtp_heads": positive(settings["mtp_num_heads"]),
        "model.mtp_weight": settings["mtp_loss_weight"],
        "lora.rank": positive(settings["lora_rank"]) if loops else 0,
        "optimizer.lora_lr": settings["lora_lr"],
        # The extra heads train at the rate of an untied head.
        "optimizer.mtp_lr": settings["head_lr"],
        "optimizer.row_normalize": settings["muon_row_normalize"],
        "optimizer.matrix_weight_decay": positive(settings["muon_wd"]),
        "optimizer.scalar_weight_decay": settings["adam_wd"],
        "optimizer.embed_weight_decay": settings["embed_wd"],
        "optimizer.schedule.warmdown_fraction": positive(settings["warmdown_frac"]),
        "optimizer.schedule.min_lr": settings["min_lr"],
        "averaging.decay": settings["ema_decay"],
        # Without a limit on time there is nothing to reserve.
        "budget.reserve_seconds": settings["gptq_reserve_seconds"]
        if settings["max_wallclock_seconds"] > 0
        else 0.0,
        # Without loops the range has no meaning, and may lie outside the blocks.
        "looping.start": settings["loop_start"] if loops else 0,
        "looping.end": settings["loop_end"] if loops else 0,
        "looping.passes": 1 + loops,
        "looping.start_fraction": positive(settings["enable_looping_at"]),
        "quant.rules.0.bits": settings["embed_bits"],
        "quant.rules.0.clip.k": settings["embed_clip_sigmas"],
        "quant.rules.1.bits": settings["matrix_bits"],
        "quant.rules.1.clip.k": settings["matrix_clip_sigmas"],
        # A batch of its calibration is what one of eight GPUs trains on.
        "quant.calibration.sequences": settings["gptq_calibration_batches"]
        * max(settings["train_batch_tokens"] // (8 * settings["train_seq_len"]), 1),
        "artifact/codec": _codec(settings["compressor"]),
        **_scoring(settings),
    }


def _codec(compressor: str) -> str:
    if compressor not in ("brotli", "lzma"):
        raise ConfigError(f"compressor={compressor!r}: the source has 'brotli' and 'lzma'")
    return compressor


def _scoring(settings: Mapping[str, Any]) -> dict[str, Any]:
    length, chunk = settings["eval_seq_len"], settings["ttt_chunk_tokens"]
    if not settings["sliding_window_enabled"]:
        return {"eval": "plain", "eval.seq_len": length}
    windows = {"eval.seq_len": length, "eval.stride": settings["eval_stride"]}
    # A chunk without a whole row teaches nothing.
    if not settings["ttt_enabled"] or settings["ttt_epochs"] < 1 or chunk < length:
        return windows
    return {
        "eval": "ttt_sgd",
        **windows,
        "eval.whole_windows": True,
        "eval.chunk_tokens": chunk,
        "eval.sgd.lr": settings["ttt_lr"],
        "eval.sgd.momentum": settings["ttt_momentum"],
        "eval.sgd.epochs": settings["ttt_epochs"],
    }


def places(
    model: Transformer, settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> list[Place]:
    found = whole_places(model)
    if model.adapters is None:
        return found
    start = settings["loop_start"]
    for block, slots in model.adapters.num_slots.items():
        for slot in range(slots):
            for factor, target in _FACTORS.items():
                source = f"lora_adapters.{slot}.{block - start}.{factor}"
                ours = f"adapters.banks.{block}.{target}"
                for side, name in (("A", "lora_a"), ("B", "lora_b")):
                    found.append(
                        Place(f"{source}_{side}", f"{ours}.{name}", (), (slot,), transposed=True)
                    )
    return found


SYSTEM = System("per_iteration_lora", "per_iteration_lora", DEFAULTS, overrides, places, _IDLE)
