"""The official baseline: flat blocks with U-Net skips. Only names differ from ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recurgolf.importers.settings import IDLE, TRAINING_DEFAULTS, UNTIED_DEFAULTS, shared_overrides
from recurgolf.importers.source import System

DEFAULTS = {
    **TRAINING_DEFAULTS,
    **UNTIED_DEFAULTS,
    "vocab_size": 1024,
    "num_layers": 9,
    "model_dim": 512,
    "num_heads": 8,
    "num_kv_heads": 4,
    "mlp_mult": 2,
    "logit_softcap": 30.0,
    "rope_base": 10000.0,
    "qk_gain_init": 1.5,
    "train_seq_len": 1024,
    "train_batch_tokens": 524_288,
    "warmdown_iters": 1200,
    "tied_embed_lr": 0.05,
    "matrix_lr": 0.04,
    "muon_momentum": 0.95,
    "muon_momentum_warmup_start": 0.85,
    "muon_momentum_warmup_steps": 500,
    "grad_clip_norm": 0.0,
}


def overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = {**shared_overrides(settings), "model.num_blocks": settings["num_layers"]}
    if settings["grad_clip_norm"] > 0:
        found["optimizer.clip_scope"] = "global"
    return found


SYSTEM = System("baseline", "parameter_golf_baseline", DEFAULTS, overrides, idle=IDLE)
