"""Adapter folders, in the layout that `peft` reads and writes.

    adapter_model.safetensors    base_model.model.blocks.1.mixer.q_proj.lora_A.weight [rank, in]
                                 base_model.model.blocks.1.mixer.q_proj.lora_B.weight [out, rank]
    adapter_config.json          peft_type, r, lora_alpha, target_modules, rank_pattern, ...

Tensor names contain the module's real path. Two things go beyond peft's layout. Factors of a single
iteration are called `….q_proj.iteration_2.lora_A.weight` (third visit of the block), and the
peft_type is then LORA_PER_ITERATION, which peft refuses by name instead of applying one pair to
every visit. The same type marks adapters of a block's output (`residual`), for which the base has
no module. And the safetensors header names the base model (key `recurgolf`: fingerprint, tokenizer,
run): peft does not read it, and it travels with the weights.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from recurgolf.adapters.adapter import Adapter, Base, Factors, Place
from recurgolf.config import ConfigError
from recurgolf.disk import json_text, write_file, write_json

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PLAIN, ITERATED = "LORA", "LORA_PER_ITERATION"
PREFIX = "base_model.model."
_KEY = re.compile(
    r"base_model\.model\.blocks\.(?P<block>0|[1-9]\d*)"
    r"\.(?P<module>(?!iteration_)\w+(?:\.(?!iteration_)\w+)*?)"
    r"(?:\.iteration_(?P<iteration>0|[1-9]\d{0,5}))?\.lora_(?P<half>[AB])\.weight"
)
_REFUSED = (
    "use_dora",
    "lora_bias",
    "fan_in_fan_out",
    "use_qalora",
    "use_bdlora",
    "modules_to_save",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "layer_replication",
)
"""Settings of peft that need more than two factors and a scale."""
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")
"""Values of init_lora_weights that also change the weights of the base."""


def write(folder: str | Path, adapter: Adapter, modules: Iterable[str] = ()) -> None:
    """Write an adapter folder; factors are stored as float32.

    Args:
        folder: created if missing; an adapter in it is replaced.
        modules: paths of all linear layers of the base, so that `target_modules` can use a short
            name (`q_proj`) where every layer of that name is adapted. Without them it lists full
            paths.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for place, factors in adapter.factors.items():
        for half, tensor in (("A", factors.a), ("B", factors.b)):
            tensors[_key(place, half)] = tensor.detach().float().cpu().contiguous().clone()
    about = {name: value for name, value in vars(adapter.base).items() if value is not None}
    about = {"format": "pt", "recurgolf": json_text(about)}
    write_file(folder / TENSORS, save(tensors, about))
    write_json(folder / CONFIG, dict(sorted(_config(adapter, list(modules)).items())))


def read(folder: str | Path) -> Adapter:
    """Read an adapter folder, ours or peft's; factors are returned as float32.

    Raises:
        ConfigError: a missing, empty or damaged file, settings that need more than a pair of
            factors, an unknown tensor, half a pair, ranks that contradict each other or the
            config, or values that are not finite. The message names layer, module, what was
            expected and what was found.
    """
    folder = Path(folder)
    config = _read_config(folder / CONFIG)
    tensors, about = _read_tensors(folder / TENSORS)
    halves: dict[Place, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        place, half = _place(name, folder)
        halves.setdefault(place, {})[half] = tensor
    factors = {place: _pair(place, found, config) for place, found in halves.items()}
    if not factors:
        raise ConfigError(f"{folder / TENSORS} holds no tensors: the adapter is empty")
    return Adapter(factors, Base(**{name: about.get(name) for name in vars(Base())}))


def _key(place: Place, half: str) -> str:
    visit = "" if place.iteration is None else f".iteration_{place.iteration}"
    return f"{PREFIX}{place.path}{visit}.lora_{half}.weight"


def _place(name: str, folder: Path) -> tuple[Place, str]:
    match = _KEY.fullmatch(name)
    if match is None:
        raise ConfigError(
            f"{folder / TENSORS}: no use for the tensor {name!r}; expected names such as "
            f"{_key(Place(0, 'mixer.q_proj'), 'A')}"
        )
    iteration = match["iteration"]
    place = Place(
        int(match["block"]), match["module"], None if iteration is None else int(iteration)
    )
    return place, match["half"]


def _pair(place: Place, halves: Mapping[str, Tensor], config: Mapping[str, Any]) -> Factors:
    for half in "AB":
        if half not in halves:
            raise ConfigError(
                f"adapter, {place}: lora_{half} is missing; expected a pair, found only "
                f"lora_{'AB'.replace(half, '')}"
            )
        tensor = halves[half]
        if tensor.ndim != 2 or 0 in tensor.shape:
            raise ConfigError(
                f"adapter, {place}: lora_{half} is {tuple(tensor.shape)}; expected a matrix"
            )
        if not tensor.isfinite().all():
            wrong = int((~tensor.isfinite()).sum())
            raise ConfigError(
                f"adapter, {place}: expected finite numbers, found {wrong} in lora_{half} that are "
                "inf or nan"
            )
    a, b = halves["A"], halves["B"]
    if a.shape[0] != b.shape[1]:
        raise ConfigError(
            f"adapter, {place}: expected one rank, found {a.shape[0]} in lora_A {tuple(a.shape)} "
            f"and {b.shape[1]} in lora_B {tuple(b.shape)}"
        )
    rank = _setting(config, place, "r", "rank_pattern")
    if a.shape[0] != rank:
        raise ConfigError(
            f"adapter, {place}: expected rank {rank:g} by {CONFIG}, found {a.shape[0]} in the file"
        )
    alpha = _setting(config, place, "lora_alpha", "alpha_pattern")
    # rsLoRA (2312.03732) divides by the root of the rank instead.
    return Factors(a, b, alpha * rank**0.5 if config.get("use_rslora") else alpha)


def _setting(config: Mapping[str, Any], place: Place, name: str, pattern: str) -> float:
    """As peft does it: the first pattern that matches the path or its end, else the default."""
    for key, value in (config.get(pattern) or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", place.path):
            return value
    return config[name]


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(
            f"{path.parent} is not an adapter folder: it has no {path.name}"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds a {type(config).__name__}; expected an object")
    if config.get("peft_type") not in (PLAIN, ITERATED):
        raise ConfigError(
            f"{path}: peft_type is {config.get('peft_type')!r}; expected {PLAIN} or {ITERATED}"
        )
    for name, pattern in (("r", "rank_pattern"), ("lora_alpha", "alpha_pattern")):
        if not _is_number(config.get(name)):
            raise ConfigError(
                f"{path}: {name} is {config.get(name)!r}; expected a number other than 0"
            )
        named = config.get(pattern) or {}
        if not isinstance(named, dict) or not all(map(_is_number, named.values())):
            raise ConfigError(
                f"{path}: {pattern} is {named!r}; expected names and their numbers, none of them 0"
            )
        for key in named:
            _check_pattern(key, f"{path}: {pattern}")
    start = str(config.get("init_lora_weights"))
    if start.startswith(_CHANGES_BASE):
        raise ConfigError(
            f"{path}: init_lora_weights={start!r} changes the weights of the base as well; convert "
            "the adapter to plain LoRA first"
        )
    for name in _REFUSED:
        if config.get(name):
            raise ConfigError(
                f"{path}: {name}={config[name]!r} means more than a pair of factors, which is all "
                "that is read here"
            )
    return config


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 < abs(value) < math.inf


def _check_pattern(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"{where}: {pattern!r} is no regular expression: {error}") from None


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    if not path.is_file():
        raise ConfigError(f"{path.parent} is not an adapter folder: it has no {path.name}")
    if path.stat().st_size == 0:
        raise ConfigError(f"{path} is empty: 0 bytes")
    try:
        with safe_open(path, "pt") as file:
            # `keys` here is the file's own list; safe_open is no mapping.
            tensors = {name: file.get_tensor(name) for name in list(file.keys())}
            about = json.loads((file.metadata() or {}).get("recurgolf", "{}"))
        if not isinstance(about, dict) or not all(isinstance(v, str) for v in about.values()):
            raise ValueError(f"its header says recurgolf={about!r}; expected names of its base")
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged: {error}") from None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ConfigError(f"{path}: {name} is {tensor.dtype}; expected floating point")
    return {n: t.to(torch.float32) for n, t in tensors.items()}, about


def _config(adapter: Adapter, modules: list[str]) -> dict[str, Any]:
    """The config from which peft builds the same adapter, with the keys peft itself would write."""
    ranks = {place.path: f.rank for place, f in adapter.factors.items()}
    alphas = {place.path: f.alpha for place, f in adapter.factors.items()}
    rank, alpha = _commonest(ranks.values()), _commonest(alphas.values())
    linear = not adapter.iterated and all(place.module != "residual" for place in adapter.factors)
    return {
        "peft_type": PLAIN if linear else ITERATED,
        "task_type": None,
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {re.escape(p): r for p, r in ranks.items() if r != rank},
        "alpha_pattern": {re.escape(p): a for p, a in alphas.items() if a != alpha},
        "target_modules": _targets(adapter, modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": False,
        "use_rslora": False,
        "inference_mode": True,
    }


def _commonest(values: Iterable[Any]) -> Any:
    values = list(values)
    return max(sorted(set(values)), key=values.count)


def _targets(adapter: Adapter, modules: list[str]) -> list[str]:
    """Short names where every module of that name is adapted, full paths elsewhere."""
    adapted = {place.path for place in adapter.factors}
    targets: set[str] = set()
    for path in adapted:
        name = path.rpartition(".")[2]
        namesakes = {m for m in modules if m.rpartition(".")[2] == name}
        targets.add(name if namesakes and namesakes <= adapted else path)
    return sorted(targets)
