"""What the importers share about settings: reading a source's, and what they change in a Run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recurgolf.config import ConfigError
from recurgolf.importers.source import System

TRAINING_DEFAULTS = {
    "iterations": 20000,
    "warmup_steps": 20,
    "max_wallclock_seconds": 600.0,
    "seed": 1337,
    "beta1": 0.9,
    "beta2": 0.95,
    "adam_eps": 1e-8,
    "scalar_lr": 0.04,
    "head_lr": 0.008,
    "embed_lr": 0.6,
    "muon_backend_steps": 5,
}
"""Settings of training that all the systems have with these values."""


def read_settings(system: System, config: Mapping[str, Any]) -> dict[str, Any]:
    """The source's settings, its defaults where `config` says nothing.

    Args:
        config: the source's names, or its environment's (capitals, values as text), perhaps under
            `hyperparameters`. Names that have no bearing on the model or a Run are passed over.

    Raises:
        ConfigError: a value that is not of the setting's type.
    """
    settings = dict(system.defaults)
    for key, value in _given(config).items():
        name = _name(system, key)
        if name in settings:
            settings[name] = _typed(key, value, settings[name])
    return settings


def without_bearing(system: System, config: Mapping[str, Any]) -> list[str]:
    """The settings of `config` that `read_settings` passes over, as they are spelled there."""
    return [key for key in _given(config) if _name(system, key) not in system.defaults]


def _given(config: Mapping[str, Any]) -> Mapping[str, Any]:
    given = config.get("hyperparameters", config) if isinstance(config, Mapping) else config
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"config: holds a {type(given).__name__}; expected a mapping from the source's setting "
            "names to their values"
        )
    return given


def _name(system: System, key: str) -> str:
    return system.aliases.get(key.lower(), key.lower())


def _typed(key: str, value: Any, default: Any) -> Any:
    kind = type(default)
    if kind is str and isinstance(value, (list, tuple)):
        value = ",".join(map(str, value))
    try:
        if kind is bool:
            words = {"0": False, "1": True, "false": False, "true": True, "": False}
            return words[str(value).lower()]
        if kind is int and float(value) != int(float(value)):
            raise ValueError
        return int(float(value)) if kind is int else kind(value)
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{key}={value!r} is no {kind.__name__}") from None


def shared_overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What all systems' settings change alike."""
    tied = settings.get("tie_embeddings", True)
    return {
        "data.vocab_size": settings["vocab_size"],
        "model.dim": settings["model_dim"],
        "model.mlp_mult": float(settings["mlp_mult"]),
        "model.mixer.num_heads": settings["num_heads"],
        "model.mixer.num_kv_heads": settings["num_kv_heads"],
        "model.mixer.q_gain_init": settings["qk_gain_init"],
        "model.rope.base": settings["rope_base"],
        "model.logit_softcap": settings["logit_softcap"],
        "model.tie_embeddings": tied,
        "model.init.embed_std": settings["tied_embed_init_std"],
        "optimizer.matrix_lr": settings["matrix_lr"],
        "optimizer.embed_lr": settings["tied_embed_lr" if tied else "embed_lr"],
        "optimizer.head_lr": settings["head_lr"],
        "optimizer.scalar_lr": settings["scalar_lr"],
        "optimizer.beta1": settings["beta1"],
        "optimizer.beta2": settings["beta2"],
        "optimizer.eps": settings["adam_eps"],
        "optimizer.ns_steps": settings["muon_backend_steps"],
        "optimizer.momentum": settings["muon_momentum"],
        **_whole_batches(settings),
    }


def _whole_batches(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Trainer overrides for a batch of whole rows on eight ranks, as the sources train.

    A batch that does not divide, which a model read for scoring need not care about, is cut.
    """
    rows = settings["train_batch_tokens"] // (8 * settings["train_seq_len"])
    return {
        "trainer.devices": 8,
        "trainer.grad_accum": 1,
        "trainer.seq_len": settings["train_seq_len"],
        "trainer.batch_tokens": max(rows, 1) * 8 * settings["train_seq_len"],
        "trainer.steps": settings["iterations"],
        "trainer.warmup_steps": settings["warmup_steps"],
        "budget.train_seconds": settings["max_wallclock_seconds"] or None,
        "trainer.progress": "wallclock" if settings["max_wallclock_seconds"] else "steps",
        "seed": settings["seed"],
    }


__all__ = ["TRAINING_DEFAULTS", "read_settings", "shared_overrides", "without_bearing"]
