"""The universal transformer with rank-1 adapters: prelude, shared core, coda.

The source keeps the blocks' matrices in banks (queries of all blocks, then all output projections;
keys, then values), and its rank-1 vectors as rows, one per visit of the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recurgolf.config import ConfigError
from recurgolf.importers.settings import TRAINING_DEFAULTS, shared_overrides
from recurgolf.importers.source import Place, System, whole_places
from recurgolf.model.transformer import Transformer

DEFAULTS = {
    **TRAINING_DEFAULTS,
    "vocab_size": 1024,
    "num_prelude": 1,
    "num_shared": 4,
    "num_coda": 1,
    "num_loops": 3,
    "model_dim": 640,
    "num_heads": 10,
    "num_kv_heads": 5,
    "mlp_mult": 3.0,
    "tie_embeddings": True,
    "tied_embed_init_std": 0.005,
    "logit_softcap": 30.0,
    "rope_base": 10000.0,
    "rope_dims": 16,
    "qk_gain_init": 1.5,
    "xsa_last_n": 11,
    "ln_scale": True,
    "dtg": False,
    "r1_lora": True,
    "bigram_vocab_size": 3072,
    "bigram_dim": 128,
    "ve_enabled": True,
    "ve_dim": 128,
    "ve_layers": "9,10",
    "mtp_num_heads": 0,
    "mtp_loss_weight": 0.2,
    "noisy_qat": True,
    "train_seq_len": 2048,
    "eval_seq_len": 2048,
    "train_batch_tokens": 524_288,
    "warmdown_iters": 3000,
    "tied_embed_lr": 0.035,
    "matrix_lr": 0.01,
    "scalar_lr": 0.025,
    "muon_momentum": 0.99,
    "muon_momentum_warmup_start": 0.92,
    "muon_momentum_warmup_steps": 1500,
    "muon_wd": 0.04,
    "adam_wd": 0.04,
    "grad_clip_norm": 0.3,
}

_BANKS = {
    "qo_bank": ("mixer.q_proj", "mixer.o_proj"),
    "kv_bank": ("mixer.k_proj", "mixer.v_proj"),
    "mlp_up_bank": ("mlp.up_proj",),
    "mlp_down_bank": ("mlp.down_proj",),
}

_VECTORS = {"q": "q_proj", "v": "v_proj", "up": "up_proj", "down": "down_proj"}


def overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    prelude, shared, coda = (settings[f"num_{part}"] for part in ("prelude", "shared", "coda"))
    loops, blocks = settings["num_loops"], prelude + shared + coda
    order = [
        *range(prelude),
        *(block for _ in range(loops) for block in range(prelude, prelude + shared)),
        *range(prelude + shared, blocks),
    ]
    # The last visits' blocks are always the last blocks, the core repeating as one.
    xsa = settings["xsa_last_n"]
    xsa_blocks = len(set(order[-xsa:])) if xsa > 0 else 0
    visits = _numbers("ve_layers", settings["ve_layers"])
    ends = [*range(prelude), *range(prelude + shared, blocks)]
    return {
        **shared_overrides(settings),
        "model.num_blocks": blocks,
        "model.second_block_at": ends,
        "model.block.update_gate": settings["dtg"],
        "model.second_block.update_gate": settings["dtg"],
        "model.mixer.remove_value_direction": xsa_blocks > 0,
        "model.mixer.remove_value_direction_last": xsa_blocks,
        "model.skips": "prelude_to_coda" if prelude and coda else "none",
        "model.depth_scaled_norm": settings["ln_scale"],
        "model.bigram.rows": settings["bigram_vocab_size"],
        "model.bigram.dim": settings["bigram_dim"],
        "model.value_embed.dim": settings["ve_dim"] if settings["ve_enabled"] else 0,
        "model.value_embed.visits": visits,
        "model.rope.dims": settings["rope_dims"],
        "model.rope.train_len": settings["train_seq_len"],
        "model.mtp_heads": settings["mtp_num_heads"],
        "model.mtp_weight": settings["mtp_loss_weight"],
        "looping.prelude": prelude,
        "looping.coda": coda,
        "looping.passes": loops,
        "lora.rank": 1 if settings["r1_lora"] else 0,
        "optimizer.momentum_start": settings["muon_momentum_warmup_start"],
        "optimizer.momentum_warmup_steps": settings["muon_momentum_warmup_steps"],
        "optimizer.matrix_weight_decay": settings["muon_wd"],
        "optimizer.mtp_lr": settings["matrix_lr"],
        "optimizer.mtp_weight_decay": settings["muon_wd"],
        "optimizer.embed_weight_decay": settings["adam_wd"],
        "optimizer.scalar_weight_decay": settings["adam_wd"],
        "optimizer.lora_lr": settings["scalar_lr"],
        "optimizer.lora_weight_decay": settings["adam_wd"],
        "optimizer.grad_clip": settings["grad_clip_norm"],
        "optimizer.schedule.warmdown_steps": settings["warmdown_iters"],
        "eval.seq_len": settings["eval_seq_len"],
        "quant/qat": "noise" if settings["noisy_qat"] else "none",
    }


def _numbers(name: str, text: str) -> list[int]:
    try:
        return [int(word) for word in text.strip("[] ").split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"{name}={text!r}: expected whole numbers with commas between") from None


def places(
    model: Transformer, settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> list[Place]:
    blocks = len(model.blocks)
    banked = [Place("", f"blocks.{i}.{name}.weight") for i in range(blocks) for name in _names()]
    banked_names = {place.ours for place in banked}
    found = [
        place
        for place in whole_places(model)
        if place.ours not in banked_names and place.source != "skip_weights"
    ]
    for bank, parts in _BANKS.items():
        for half, part in enumerate(parts):
            for block in range(blocks):
                ours = f"blocks.{block}.{part}.weight"
                found.append(Place(bank, ours, (half * blocks + block,)))
    if model.config.skips != "none":
        # The source may have rows for more pairs; it only ever reads the first.
        rows = len(weights["skip_weights"]) if "skip_weights" in weights else 1
        found.append(Place("skip_weights", "skips.weight", (0,), (0,), rows=rows))
    if model.value_embed is not None:
        for row in range(len(model.value_embed.rows)):
            ours = "value_embed.visit_scale"
            found.append(Place(f"ve_layer_scales.{row}", ours, (), (slice(row, row + 1),)))
    return found + _vector_places(model, settings)


def _names() -> list[str]:
    return [part for parts in _BANKS.values() for part in parts]


def _vector_places(model: Transformer, settings: Mapping[str, Any]) -> list[Place]:
    if model.adapters is None:
        return []
    prelude, shared = settings["num_prelude"], settings["num_shared"]
    found = []
    for block, slots in model.adapters.num_slots.items():
        for slot in range(slots):
            row = slot * shared + block - prelude
            for vector, target in _VECTORS.items():
                ours = f"adapters.banks.{block}.{target}"
                found += [
                    Place(f"r1_{vector}_a", f"{ours}.lora_a", (row,), (slot, 0)),
                    Place(f"r1_{vector}_b", f"{ours}.lora_b", (row,), (slot, slice(None), 0)),
                ]
    return found


SYSTEM = System("universal_rank1", DEFAULTS, overrides, places, {"dtg_enabled": "dtg"})

__all__ = ["SYSTEM"]
