"""The universal transformer with rank-1 adapters: prelude, shared core, coda.

The source keeps the blocks' matrices in banks (queries of all blocks, then all output projections;
keys, then values), and its rank-1 vectors as rows, one per visit of the core.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recurgolf.importers.settings import (
    IDLE,
    TRAINING_DEFAULTS,
    UNTIED_DEFAULTS,
    numbers,
    positive,
    shared_overrides,
)
from recurgolf.importers.source import Place, System, whole_places
from recurgolf.model.transformer import Transformer

DEFAULTS = {
    **TRAINING_DEFAULTS,
    **UNTIED_DEFAULTS,
    "vocab_size": 1024,
    "num_prelude": 1,
    "num_shared": 4,
    "num_coda": 1,
    "num_loops": 3,
    "model_dim": 640,
    "num_heads": 10,
    "num_kv_heads": 5,
    "mlp_mult": 3.0,
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
    "eval_stride": 0,
    "ttt_enabled": False,
    "ttt_lr": 0.002,
    "ttt_epochs": 3,
    "ttt_momentum": 0.9,
    "ttt_chunk_tokens": 32768,
    "ttt_batch_seqs": 32,
    "ttt_grad_clip": 1.0,
    "ttt_freeze_blocks": 2,
    "val_loss_every": 4000,
    "train_log_every": 500,
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

# Never read, or collected and never used. The last one touches the two tables' projections alone,
# which have no fake quantizer here. The parts of a banked model say how many layers it has.
_IDLE = IDLE | {"num_layers", "muon_beta2", "shared_muon_wd", "swa_enabled", "swa_every"}
_IDLE |= {"lawa_k", "lawa_freq", "late_qat_threshold"}
_OFF = {
    "lawa_enabled": False,
    "qat_enabled": False,
    "gated_attention": False,
    "value_residual": False,
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
    xsa = positive(settings["xsa_last_n"])
    xsa_blocks = len(set(order[-xsa:])) if xsa > 0 else 0
    visits = numbers("ve_layers", settings["ve_layers"])
    ends = {*range(prelude), *range(prelude + shared, blocks)}
    end = {"kind": "sequential", "update_gate": settings["dtg"]}
    return {
        **shared_overrides(settings),
        "model.num_blocks": blocks,
        "model.block_pattern": [end if block in ends else "block" for block in range(blocks)],
        "model.block.update_gate": settings["dtg"],
        "model.mixer.xsa": xsa_blocks > 0,
        "model.mixer.xsa_last": xsa_blocks,
        "model.skips": "prelude_to_coda" if prelude and coda else "none",
        "model.depth_scaled_norm": settings["ln_scale"],
        "model.bigram.rows": positive(settings["bigram_vocab_size"]),
        "model.bigram.dim": settings["bigram_dim"],
        "model.value_embed.dim": settings["ve_dim"] if settings["ve_enabled"] else 0,
        "model.value_embed.visits": visits,
        "model.rope.dims": positive(settings["rope_dims"]),
        "model.rope.train_len": settings["train_seq_len"],
        "model.mtp_heads": positive(settings["mtp_num_heads"]),
        "model.mtp_weight": settings["mtp_loss_weight"],
        "looping.prelude": prelude,
        "looping.coda": coda,
        "looping.passes": loops,
        "lora.rank": 1 if settings["r1_lora"] else 0,
        "optimizer.matrix_weight_decay": settings["muon_wd"],
        "optimizer.mtp_lr": settings["matrix_lr"],
        "optimizer.mtp_weight_decay": settings["muon_wd"],
        "optimizer.embed_weight_decay": settings["adam_wd"],
        "optimizer.scalar_weight_decay": settings["adam_wd"],
        "optimizer.lora_lr": settings["scalar_lr"],
        "optimizer.lora_weight_decay": settings["adam_wd"],
        "quant/qat": "noise" if settings["noisy_qat"] else "none",
        **_scoring(settings),
    }


def _scoring(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Windows as the source's last report has them: a stride of its own, or else 64."""
    trained = settings["train_seq_len"]
    length = settings["eval_seq_len"] if settings["eval_seq_len"] > 0 else trained
    asked, chunk = settings["eval_stride"], settings["ttt_chunk_tokens"]
    blocks = sum(settings[f"num_{part}"] for part in ("prelude", "shared", "coda"))
    frozen = range(min(settings["ttt_freeze_blocks"], blocks))
    if settings["ttt_enabled"] and settings["ttt_epochs"] > 0 and chunk >= trained:
        return {
            "eval": "ttt_sgd",
            "eval.seq_len": trained,
            "eval.stride": min(asked if asked > 0 else 64, trained),
            "eval.whole_windows": True,
            "eval.chunk_tokens": chunk,
            "eval.sgd.lr": settings["ttt_lr"],
            "eval.sgd.momentum": settings["ttt_momentum"],
            "eval.sgd.epochs": settings["ttt_epochs"],
            "eval.sgd.batch_sequences": settings["ttt_batch_seqs"],
            "eval.sgd.clip": settings["ttt_grad_clip"],
            "eval.sgd.freeze": [f"blocks.{b}.*" for b in frozen],
        }
    strides = [stride for stride in (asked, 64) if 0 < stride < length]
    if not strides:
        return {"eval": "plain", "eval.seq_len": length}
    return {"eval.seq_len": length, "eval.stride": strides[0]}


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


SYSTEM = System(
    "universal_rank1",
    "universal_rank1",
    DEFAULTS,
    overrides,
    places,
    _IDLE,
    _OFF,
    {"dtg_enabled": "dtg"},
)
