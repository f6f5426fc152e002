"""Parallel-residual blocks run several times over, more often when scored than in training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from recurgolf.importers.settings import TRAINING_DEFAULTS, shared_overrides
from recurgolf.importers.source import Place, System, whole_places
from recurgolf.model.transformer import Transformer

DEFAULTS = {
    **TRAINING_DEFAULTS,
    "vocab_size": 8192,
    "num_unique_layers": 3,
    "num_recurrences": 8,
    "num_eval_recurrences": 0,
    "model_dim": 768,
    "num_heads": 12,
    "num_kv_heads": 4,
    "mlp_mult": 4,
    "tied_embed_init_std": 0.005,
    "logit_softcap": 30.0,
    "rope_base": 10000.0,
    "qk_gain_init": 5.25,
    "train_seq_len": 1024,
    "train_batch_tokens": 524_288,
    "warmdown_iters": 3500,
    "tied_embed_lr": 0.05,
    "matrix_lr": 0.04,
    "muon_momentum": 0.95,
    "muon_wd": 0.09,
    "swa_decay": 0.999,
    "swa_start_frac": 0.4,
    "sw_stride": 64,
    "sw_seq_len": 1024,
}


def overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    passes = settings["num_recurrences"]
    return {
        **shared_overrides(settings),
        "model.num_blocks": settings["num_unique_layers"],
        "looping.passes": passes,
        # 0 stands for twice as often as in training.
        "looping.passes_eval": settings["num_eval_recurrences"] or 2 * passes,
        "optimizer.matrix_weight_decay": settings["muon_wd"],
        "optimizer.schedule.warmdown_steps": settings["warmdown_iters"],
        "averaging.decay": settings["swa_decay"],
        "averaging.start_fraction": settings["swa_start_frac"],
        "eval.stride": settings["sw_stride"],
        "eval.seq_len": settings["sw_seq_len"],
    }


def places(
    model: Transformer, settings: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> list[Place]:
    return whole_places(model)


SYSTEM = System("parallel_recurrent", DEFAULTS, overrides, places)

__all__ = ["SYSTEM"]
