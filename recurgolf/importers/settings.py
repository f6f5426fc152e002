"""What the importers share about settings: reading a source's, and what they change in a Run.

Every setting that somebody gives reaches the Run, is known to change nothing, or is refused by its
name. None is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recurgolf.config import ConfigError, suggestion
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
    "muon_backend_steps": 5,
    "val_loss_every": 1000,
    "train_log_every": 200,
}
"""Settings of training that all the systems have, most of them with these values."""

UNTIED_DEFAULTS = {"tie_embeddings": True, "tied_embed_init_std": 0.005, "embed_lr": 0.6}
UNTIED_DEFAULTS |= {"head_lr": 0.008}
"""Settings of the systems whose head may have a matrix of its own."""

_FILES = {"data_path", "data_dir", "datasets_dir", "train_files", "val_files", "tokenizer_path"}
_FILES |= {"run_id", "logfile", "model_path", "quantized_model_path"}
# Every source trains alike on any number of GPUs that divides eight.
_MACHINE = {"distributed", "rank", "world_size", "local_rank", "is_main_process"}
_MACHINE |= {"grad_accum_steps", "val_batch_size", "val_batch_tokens"}
IDLE = frozenset(_FILES | _MACHINE)
"""Settings of all the systems that change neither a model nor its score."""


def read_settings(system: System, config: Mapping[str, Any]) -> dict[str, Any]:
    """The source's settings, its defaults where `config` says nothing.

    Args:
        config: the source's names, or its environment's (capitals, values as text), perhaps under
            `hyperparameters`.
    """
    settings = dict(system.defaults)
    for key, value in _given(config).items():
        name = _name(system, key)
        if name in settings:
            settings[name] = _typed(key, value, settings[name])
        elif name in system.off:
            off = system.off[name]
            if _typed(key, value, off) != off:
                raise ConfigError(
                    f"{key}={value!r}: {system.name} has this, but it is not reproduced here; "
                    f"only {key}={off!r} can be imported"
                )
        elif name not in system.idle and not _asks_for_nothing(value):
            known = [*system.defaults, *system.off, *system.idle, *system.aliases]
            raise ConfigError(
                f"{key}={value!r}: {system.name} has no such setting{suggestion(name, known)}"
            )
    return settings


def without_bearing(system: System, config: Mapping[str, Any]) -> list[str]:
    """The settings of `config` that change nothing, as they are spelled there."""
    return [key for key in _given(config) if _name(system, key) not in system.defaults]


def _asks_for_nothing(value: Any) -> bool:
    """Whether a setting that nobody knows is switched off."""
    return value is None or str(value).strip().lower() in ("", "0", "0.0", "false")


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


def positive(value: Any) -> Any:
    """The value, or 0 where it is negative: a source switches something off by either."""
    return max(value, type(value)(0))


def numbers(name: str, text: str) -> list[int]:
    """The whole numbers of a setting that lists them, as in `9,10`."""
    try:
        return [int(word) for word in text.strip("[] ").split(",") if word.strip()]
    except ValueError:
        raise ConfigError(f"{name}={text!r}: expected whole numbers with commas between") from None


def shared_overrides(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What all systems' settings change alike."""
    tied = settings.get("tie_embeddings", True)
    found = {
        "data.vocab_size": settings["vocab_size"],
        "model.dim": settings["model_dim"],
        "model.mlp_mult": float(settings["mlp_mult"]),
        "model.mixer.num_heads": settings["num_heads"],
        "model.mixer.num_kv_heads": settings["num_kv_heads"],
        "model.mixer.q_gain_init": settings["qk_gain_init"],
        "model.rope.base": settings["rope_base"],
        "model.logit_softcap": settings["logit_softcap"],
        "model.tie_embeddings": tied,
        "optimizer.matrix_lr": settings["matrix_lr"],
        "optimizer.embed_lr": settings.get("tied_embed_lr" if tied else "", settings["embed_lr"]),
        "optimizer.scalar_lr": settings["scalar_lr"],
        "optimizer.beta1": settings["beta1"],
        "optimizer.beta2": settings["beta2"],
        "optimizer.eps": settings["adam_eps"],
        "optimizer.ns_steps": settings["muon_backend_steps"],
        "optimizer.momentum": settings["muon_momentum"],
        **_training(settings),
    }
    further = {
        "model.init.embed_std": "tied_embed_init_std",
        "optimizer.head_lr": "head_lr",
        "optimizer.momentum_start": "muon_momentum_warmup_start",
        "optimizer.momentum_warmup_steps": "muon_momentum_warmup_steps",
        "optimizer.grad_clip": "grad_clip_norm",
        "optimizer.schedule.warmdown_steps": "warmdown_iters",
    }
    off_below_zero = ("muon_momentum_warmup_steps", "grad_clip_norm", "warmdown_iters")
    for ours, name in further.items():
        if name in settings:
            value = settings[name]
            found[ours] = positive(value) if name in off_below_zero else value
    return found


def _training(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Length, batch and clock, for a batch of whole rows on eight ranks as the sources train.

    A batch that does not divide, which a model read for scoring need not care about, is cut.
    """
    rows = settings["train_batch_tokens"] // (8 * settings["train_seq_len"])
    seconds = positive(settings["max_wallclock_seconds"])
    logged = settings["train_log_every"]
    return {
        "trainer.devices": 8,
        "trainer.grad_accum": 1,
        "trainer.seq_len": settings["train_seq_len"],
        "trainer.batch_tokens": max(rows, 1) * 8 * settings["train_seq_len"],
        "trainer.steps": settings["iterations"],
        "trainer.warmup_steps": positive(settings["warmup_steps"]),
        "trainer.val_every": positive(settings["val_loss_every"]),
        # A source that logs nothing is one that logs its last step alone.
        "trainer.log_every": logged if logged > 0 else settings["iterations"],
        "budget.train_seconds": seconds or None,
        "trainer.progress": "wallclock" if seconds else "steps",
        "seed": settings["seed"],
    }
