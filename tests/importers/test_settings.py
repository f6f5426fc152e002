"""Every setting of a source reaches the Run, changes nothing, or is refused: none is lost."""

import re

import pytest
import torch

import recurgolf
from recurgolf import importers
from recurgolf.config import ConfigError, kind_of, to_dict
from recurgolf.importers.settings import read_settings, without_bearing

# The sources' lists of parameters, each with a value that is not its default.
TRAINING = {
    "iterations": 500,
    "warmup_steps": 3,
    "max_wallclock_seconds": 90.0,
    "seed": 7,
    "train_batch_tokens": 262_144,
    "train_seq_len": 512,
    "val_loss_every": 17,
    "train_log_every": 19,
    "beta1": 0.8,
    "beta2": 0.99,
    "adam_eps": 1e-7,
    "matrix_lr": 0.011,
    "scalar_lr": 0.013,
    "muon_momentum": 0.91,
    "muon_backend_steps": 4,
}
NETWORK = {
    "vocab_size": 512,
    "model_dim": 960,
    "num_heads": 20,
    "num_kv_heads": 1,
    "mlp_mult": 5,
    "logit_softcap": 17.0,
    "rope_base": 5000.0,
    "qk_gain_init": 2.5,
}
UNTIED = {"tie_embeddings": 0, "tied_embed_init_std": 0.01, "tied_embed_lr": 0.07}
WARM_MOMENTUM = {"muon_momentum_warmup_start": 0.5, "muon_momentum_warmup_steps": 77}
TTT = {"ttt_lr": 0.04, "ttt_epochs": 7, "ttt_momentum": 0.5, "ttt_chunk_tokens": 8192}

REACH = {
    "baseline": TRAINING
    | NETWORK
    | UNTIED
    | WARM_MOMENTUM
    | {"num_layers": 4, "warmdown_iters": 60, "grad_clip_norm": 0.7},
    "per_iteration_lora": TRAINING
    | NETWORK
    | UNTIED
    | WARM_MOMENTUM
    | {
        "num_layers": 8,
        "embedding_dim": 256,
        "rope_dims": 8,
        "xsa_last_n": 2,
        "parallel_residual_start": 5,
        "skip_gates_enabled": 0,
        "ln_scale": 0,
        "num_loops": 1,
        "loop_start": 2,
        "loop_end": 6,
        "enable_looping_at": 0.5,
        "lora_rank": 4,
        "lora_lr": 0.02,
        "mtp_num_heads": 1,
        "mtp_loss_weight": 0.4,
        "head_lr": 0.03,
        "eval_seq_len": 1024,
        "eval_stride": 32,
        "sliding_window_enabled": 0,
        "ttt_enabled": 1,
        "warmdown_frac": 0.3,
        "min_lr": 0.1,
        "muon_row_normalize": 0,
        "muon_wd": 0.01,
        "adam_wd": 0.03,
        "embed_wd": 0.04,
        "grad_clip_norm": 0.7,
        "ema_decay": 0.9,
        "gptq_calibration_batches": 5,
        "gptq_reserve_seconds": 3.0,
        "matrix_bits": 5,
        "embed_bits": 7,
        "matrix_clip_sigmas": 10.0,
        "embed_clip_sigmas": 15.0,
        "compressor": "lzma",
    },
    "universal_rank1": TRAINING
    | NETWORK
    | UNTIED
    | WARM_MOMENTUM
    | {
        "num_prelude": 2,
        "num_shared": 3,
        "num_coda": 2,
        "num_loops": 2,
        "rope_dims": 8,
        "xsa_last_n": 2,
        "ln_scale": 0,
        "dtg_enabled": 1,
        "r1_lora": 0,
        "bigram_vocab_size": 500,
        "bigram_dim": 64,
        "ve_enabled": 0,
        "ve_dim": 64,
        "ve_layers": "3,5",
        "mtp_num_heads": 1,
        "mtp_loss_weight": 0.4,
        "noisy_qat": 0,
        "eval_seq_len": 1024,
        "eval_stride": 32,
        "ttt_enabled": 1,
        "warmdown_iters": 60,
        "muon_wd": 0.01,
        "adam_wd": 0.03,
        "grad_clip_norm": 0.7,
    },
    "parallel_recurrent": TRAINING
    | NETWORK
    | {
        "num_unique_layers": 2,
        "num_recurrences": 3,
        "num_eval_recurrences": 5,
        "warmdown_iters": 60,
        "embed_lr": 0.02,
        "muon_weight_decay": 0.01,
        "swa_decay": 0.9,
        "swa_start_frac": 0.2,
        "gptq_bits": 5,
        "sdclip_nstd": 3.0,
        "sw_stride": 32,
        "sw_seq_len": 512,
        "ttt_enabled": 1,
    },
}
# Settings that a source reads only together with others.
TOGETHER = {
    "baseline": [({"tie_embeddings": 0}, {"embed_lr": 0.3, "head_lr": 0.02})],
    "per_iteration_lora": [
        ({"tie_embeddings": 0}, {"embed_lr": 0.3}),
        ({"ttt_enabled": 1}, TTT),
    ],
    "universal_rank1": [
        ({"tie_embeddings": 0}, {"embed_lr": 0.3, "head_lr": 0.02}),
        (
            {"ttt_enabled": 1},
            TTT | {"ttt_freeze_blocks": 1, "ttt_batch_seqs": 8, "ttt_grad_clip": 0.5},
        ),
    ],
    "parallel_recurrent": [
        ({"ttt_enabled": 1}, {"ttt_lr": 0.02, "ttt_chunk_size": 32, "ttt_layers": "0,2"})
    ],
}
# What the sources list although nothing that is scored depends on it.
MACHINE = {"data_path", "data_dir", "datasets_dir", "train_files", "val_files", "tokenizer_path"}
MACHINE |= {"run_id", "logfile", "model_path", "quantized_model_path", "distributed", "rank"}
MACHINE |= {"world_size", "local_rank", "is_main_process", "grad_accum_steps"}
MACHINE |= {"val_batch_size", "val_batch_tokens"}
CHANGES_NOTHING = {
    "baseline": MACHINE,
    "per_iteration_lora": MACHINE
    | {"rope_train_seq_len", "muon_beta2"}
    | {"etlb_enabled", "etlb_lr", "etlb_steps", "etlb_clip"},
    "universal_rank1": MACHINE
    | {"num_layers", "muon_beta2", "shared_muon_wd", "swa_enabled", "swa_every"}
    | {"lawa_k", "lawa_freq", "late_qat_threshold"},
    "parallel_recurrent": MACHINE | {"gptq_group_size"},
}
REFUSED = {
    "universal_rank1": {"lawa_enabled", "qat_enabled", "gated_attention", "value_residual"},
}


def changes(system, settings):
    """What settings change in the system's experiment, as overrides."""
    known = importers.SYSTEMS[system]
    return known.overrides(read_settings(known, settings))


def run_with(system, settings):
    known = importers.SYSTEMS[system]
    return importers.run_of(known, read_settings(known, settings))


CASES = [(system, {}, name, value) for system in REACH for name, value in REACH[system].items()]
CASES += [
    (system, given, name, value)
    for system, pairs in TOGETHER.items()
    for given, settings in pairs
    for name, value in settings.items()
]


@pytest.mark.parametrize(
    ("system", "given", "name", "value"), CASES, ids=[f"{s}-{n}" for s, _, n, _ in CASES]
)
def test_every_setting_of_a_source_changes_something(system, given, name, value):
    assert changes(system, given | {name.upper(): str(value)}) != changes(system, given)


def shows(found, value):
    """Whether a part of a Run is what an override says: an option's kind, some fields, or all."""
    if isinstance(found, dict):
        return found.get("kind") == value if isinstance(value, str) else {**found, **value} == found
    if isinstance(value, list):
        return len(found) == len(value) and all(map(shows, found, value))
    return found == value


@pytest.mark.parametrize("system", REACH)
def test_what_they_change_is_in_the_run(system):
    """All settings at once, so that each field of the Run has a value that is not its default."""
    settings = (
        REACH[system] | {"tie_embeddings": 1} if "head_lr" in REACH[system] else REACH[system]
    )
    settings = {
        n: v for n, v in settings.items() if n not in ("sliding_window_enabled", "dtg_enabled")
    }
    tree = to_dict(run_with(system, settings))
    for key, value in changes(system, settings).items():
        found = tree
        for part in key.replace("/", ".").split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        assert shows(found, value), key


@pytest.mark.parametrize("system", REACH)
def test_these_are_all_the_settings_that_an_importer_knows(system):
    known = importers.SYSTEMS[system]
    listed = set(REACH[system]) | {n for _, found in TOGETHER[system] for n in found}
    assert {known.aliases.get(name, name) for name in listed} == set(known.defaults)
    assert known.idle == CHANGES_NOTHING[system]
    assert set(known.off) == REFUSED.get(system, set())


@pytest.mark.parametrize("system", REACH)
def test_what_changes_nothing_is_told(system):
    given = {name.upper(): "5" for name in CHANGES_NOTHING[system]}
    assert changes(system, given) == changes(system, {})
    assert set(without_bearing(importers.SYSTEMS[system], given)) == set(given)


@pytest.mark.parametrize("system", REACH)
def test_a_setting_that_the_system_does_not_have_is_refused_by_its_name(system):
    for name in ("MODEL_DIMS", "num_experts"):
        with pytest.raises(ConfigError, match=rf"{name}='8': {system} has no such setting"):
            changes(system, {name: "8"})
        # Switched off, it asks for nothing, and is told all the same.
        for value in ("0", 0, False, None, ""):
            assert changes(system, {name: value}) == changes(system, {})
            assert without_bearing(importers.SYSTEMS[system], {name: value}) == [name]
    for name in REFUSED.get(system, ()):
        with pytest.raises(ConfigError, match=rf"{name.upper()}='1': .*not reproduced"):
            changes(system, {name.upper(): "1"})
        assert changes(system, {name.upper(): "0"}) == changes(system, {})


def test_one_systems_names_are_not_anothers():
    for name in ("muon_wd", "tied_embed_lr", "head_lr", "tie_embeddings", "grad_clip_norm"):
        with pytest.raises(ConfigError, match=rf"{name}=0.5: parallel_recurrent has no such"):
            changes("parallel_recurrent", {name: 0.5})


@pytest.mark.parametrize("asked", [5, 6, 8])
def test_parallel_recurrents_bits_clip_rate_and_decay_are_what_was_asked(asked):
    settings = {"GPTQ_BITS": str(asked), "SDCLIP_NSTD": "3.25"}
    settings |= {"EMBED_LR": "0.031", "MUON_WEIGHT_DECAY": "0.17"}
    run = run_with("parallel_recurrent", settings)
    with torch.device("meta"):
        state = run.build_model().state_dict()
    rules = run.quant.assign({name: tuple(tensor.shape) for name, tensor in state.items()})
    bits = {name: rule.grid.bits for name, rule in rules.items() if rule.grid is not None}
    # 6 means 6, anything else 8; the table has 8 always.
    assert bits.pop("embed.weight") == 8
    assert set(bits.values()) == {6 if asked == 6 else 8}
    assert {rule.grid.clip.k for rule in rules.values() if rule.grid is not None} == {3.25}
    assert run.optimizer.embed_lr == 0.031
    assert run.optimizer.matrix_weight_decay == 0.17
    assert run.optimizer.weight_decay_mode == "coupled_l2"


OFF = {
    "warmdown_iters": "optimizer.schedule.warmdown_steps",
    "warmdown_frac": "optimizer.schedule.warmdown_fraction",
    "muon_momentum_warmup_steps": "optimizer.momentum_warmup_steps",
    "grad_clip_norm": "optimizer.grad_clip",
    "warmup_steps": "trainer.warmup_steps",
    "val_loss_every": "trainer.val_every",
    "max_wallclock_seconds": "budget.train_seconds",
    "rope_dims": "model.rope.dims",
    "xsa_last_n": "model.mixer.xsa",
    "mtp_num_heads": "model.mtp_heads",
    "lora_rank": "lora.rank",
    "bigram_vocab_size": "model.bigram.rows",
}


@pytest.mark.parametrize("system", REACH)
def test_a_negative_value_switches_off_what_zero_switches_off(system):
    for name in OFF.keys() & importers.SYSTEMS[system].defaults:
        negative, zero = (changes(system, {name: value}) for value in (-3, 0))
        assert negative == zero, name
        assert not negative[OFF[name]], name


@pytest.mark.parametrize(
    ("system", "settings"),
    [(s, {"warmdown_iters": n}) for s in REACH for n in (-5, 0) if s != "per_iteration_lora"]
    + [("per_iteration_lora", {"warmdown_frac": f}) for f in (-0.5, 0.0)],
)
def test_without_a_warm_down_the_rate_is_whole_to_the_last_step(system, settings):
    schedule = run_with(system, settings).optimizer.schedule
    for elapsed, limit in ((0.0, None), (599.9, 600.0)):
        assert schedule.lr_scale(19_999, 20_000, elapsed, limit) == 1.0


def test_settings_of_every_type_reach_the_run():
    told = {"ve_layers": [1, 4, 7], "NOISY_QAT": "0", "SWA_EVERY": "50", "num_layers": 11}
    run = run_with("universal_rank1", told)
    assert run.model.value_embed.visits == [1, 4, 7]
    assert kind_of(run.quant.qat) == "none"
    assert changes("universal_rank1", {"noisy_qat": 1})["quant/qat"] == "noise"
    with pytest.raises(ConfigError, match="ve_layers='1;4': expected whole numbers"):
        changes("universal_rank1", {"ve_layers": "1;4"})
    with pytest.raises(ConfigError, match="a list; expected a mapping"):
        changes("universal_rank1", [1])
    with pytest.raises(ConfigError, match="compressor='zip': the source has 'brotli'"):
        changes("per_iteration_lora", {"COMPRESSOR": "zip"})


def test_the_sources_grid_reaches_the_run_unless_another_quantizer_is_asked_for():
    known = importers.SYSTEMS["per_iteration_lora"]
    settings = read_settings(known, {"MATRIX_BITS": "5", "embed_clip_sigmas": 15})
    rules = importers.run_of(known, settings).quant.rules
    assert [(rule.bits, rule.clip["k"]) for rule in rules] == [(8, 15.0), (5, 12.85)]
    other = importers.run_of(known, settings, ["quant=int8"]).quant.rules
    assert {rule.bits for rule in other} == {8}


# What the importers and experiments of a name may differ in: rank 8 is the experiment's subject.
LEFT_OPEN = {"per_iteration_lora": {"lora_rank": 8}}


@pytest.mark.parametrize("system", REACH)
def test_a_source_with_its_own_defaults_is_the_experiment(system):
    known = importers.SYSTEMS[system]
    experiment = to_dict(recurgolf.compose([f"experiment={known.experiment}"]))
    found = to_dict(run_with(system, LEFT_OPEN.get(system, {})))
    assert differences(found, experiment) == []


def differences(first, second, at=""):
    """Where two option trees differ; null in the second stands for what the first says."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [d for key in first for d in differences(first[key], second[key], f"{at}.{key}")]
    return [] if second in (first, None) else [f"{re.sub('^.', '', at)}: {first} {second}"]


CONTROLS = ("_scale", "q_gain", "input_mix.weight", "skips.weight")


@pytest.mark.parametrize(
    ("system", "kept", "method"),
    [
        ("baseline", torch.float32, "rtn"),
        ("parallel_recurrent", torch.float32, "rtn"),
        ("per_iteration_lora", torch.float16, "gptq"),
        ("universal_rank1", torch.float16, "gptq"),
    ],
)
def test_files_hold_what_the_sources_files_hold(system, kept, method):
    """Gains and mixes in the source's type, other small tensors in float16, matrices by its way."""
    run = run_with(system, {})
    with torch.device("meta"):
        state = run.build_model().state_dict()
    rules = run.quant.assign({name: tuple(tensor.shape) for name, tensor in state.items()})
    blocks = [name for name in rules if name.startswith(("blocks.", "skips."))]
    for name in blocks:
        if name.endswith(CONTROLS):
            assert (rules[name].method, rules[name].keep_dtype) == ("none", str(kept)[6:]), name
        elif state[name].numel() > 65_536:
            assert rules[name].method == method, name
    table = "rtn" if system != "per_iteration_lora" else "gptq"
    assert (rules["embed.weight"].method, rules["embed.weight"].grid.bits) == (table, 8)
