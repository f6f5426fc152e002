"""The config group `quant`: ordered rules that say how every parameter is stored.

A rule is a pattern over parameter names with a method, bits, clip and groups; the first that
matches wins. Small tensors, vectors and thin matrices (adapters, mixes, per-visit scales) stay
floats whatever rule they match: their bytes are few and their errors are repeated at every visit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any

from recurgolf.config import (
    REGISTRY,
    Checked,
    ConfigError,
    from_dict,
    kind_of,
    option,
    suggestion,
)
from recurgolf.limits import above, at_least, one_of
from recurgolf.quant.calibration import Calibration, TrainCalibration
from recurgolf.quant.clip import Clip
from recurgolf.quant.lqer import LowRankCorrection
from recurgolf.quant.qat import NoQat, Qat
from recurgolf.quant.quantizer_grid import QuantizerGrid

KEEP_DTYPES = ("float16", "float32", "bfloat16")


@dataclass(frozen=True)
class TensorRule:
    """What happens to one tensor.

    Attributes:
        method: `none` (kept as a float), `rtn` or `gptq`.
        grid: None where kept.
        keep_dtype: the type of a kept floating tensor; integers are kept as they are.
        correction: what is stored beside the codes to make up for their error; None: nothing.
    """

    method: str
    grid: QuantizerGrid | None = None
    keep_dtype: str = "float16"
    block_size: int = 128
    damping: float = 0.01
    act_order: bool = True
    correction: LowRankCorrection | None = None


@dataclass
class Rule(Checked):
    """`pattern` → how the matching tensors are stored."""

    pattern: str = "*"
    """Shell pattern over whole parameter names: `embed.*`, `blocks.[0-3].*`."""
    method: str = "rtn"
    """`none` keeps floats, `rtn` rounds, `gptq` rounds with the Gram matrix of the inputs."""
    bits: Annotated[int, at_least(1, at_most=8)] = 6
    """1 (sign), 2 (symmetric: ternary) to 8."""
    clip: dict[str, Any] = field(default_factory=lambda: {"kind": "max"})
    """A `quant/clip` option: its `kind` and its fields, `{kind: sigma, k: 12.85}`."""
    group_size: Annotated[int | None, at_least(1)] = None
    """Columns that share a scale; null: a whole row."""
    symmetric: bool = True
    """Codes around zero; false: an offset per row or group besides."""
    keep_dtype: Annotated[str | None, one_of(KEEP_DTYPES)] = None
    """Type of the tensors that this rule keeps; null: `quant.keep_dtype`."""
    optional: bool = False
    """True lets the pattern match nothing; else that is an error."""
    block_size: Annotated[int, at_least(1)] = 128
    """gptq: columns finished before the rest of the matrix hears of their errors."""
    damping: Annotated[float, above(0)] = 0.01
    """gptq: share of the mean diagonal added to the Gram matrix."""
    act_order: bool = True
    """gptq: columns with the busiest inputs first."""
    lqer_rank: Annotated[int, at_least(0)] = 0
    """Rank of a correction of the rounding error that is stored beside the codes; 0: none."""
    lqer_bits: Annotated[int | None, at_least(2, at_most=8)] = 8
    """Width of the correction's own codes; null: float16."""
    lqer_symmetric: bool = True
    """False gives the correction's codes an offset per vector."""
    scale_floor: Annotated[str | None, one_of("inv_qmax")] = None
    """compat: `inv_qmax`, the step floor of the official baseline; it coarsens small rows."""
    code_scale: Annotated[str, one_of("stored", "float32")] = "stored"
    """compat: `float32` rounds with the step before it became float16."""

    def resolve(self, keep_dtype: str) -> TensorRule:
        """What the rule says, built.

        Raises:
            ConfigError: an unknown method or clip, or a clip's numbers that make no grid.
        """
        methods = REGISTRY.get("quant/method", {})
        if self.method not in methods:
            raise self._error(f"method={self.method!r}{suggestion(self.method, methods)}")
        keep = self.keep_dtype or keep_dtype
        if self.method == "none":
            return TensorRule("none", keep_dtype=keep)
        try:
            clip = clip_from(self.clip)
            grid = QuantizerGrid(
                self.bits, clip, self.group_size, self.symmetric, self.scale_floor, self.code_scale
            )
            correction = None
            if self.lqer_rank:
                correction = LowRankCorrection(self.lqer_rank, self.lqer_bits, self.lqer_symmetric)
        except ConfigError as error:
            raise self._error(str(error)) from None
        return TensorRule(
            self.method, grid, keep, self.block_size, self.damping, self.act_order, correction
        )

    def _error(self, what: str) -> ConfigError:
        return ConfigError(f"quant rule {self.pattern!r}: {what}")


def clip_from(spec: Mapping[str, Any]) -> Clip:
    """The clip rule that a `{kind: …, field: …}` mapping names."""
    if "kind" not in spec:
        raise ConfigError(f"clip needs a kind{suggestion('', REGISTRY['quant/clip'])}")
    kinds = REGISTRY["quant/clip"]
    if spec["kind"] not in kinds:
        raise ConfigError(f"no clip of kind {spec['kind']!r}{suggestion(str(spec['kind']), kinds)}")
    return from_dict(kinds[spec["kind"]], {k: v for k, v in spec.items() if k != "kind"})


@dataclass
class Quant(Checked):
    """How the weights become the file: ordered rules, and what is too small for them."""

    rules: list[Rule] = field(default_factory=list)
    """First match wins; a matrix above the thresholds that no rule matches is an error."""
    keep_float_max_numel: Annotated[int, at_least(0)] = 65536
    """Matrices of at most so many entries stay floats."""
    keep_float_max_side: Annotated[int, at_least(0)] = 16
    """Matrices whose smaller side is at most this stay floats: adapters, mixes, per-visit rows."""
    keep_dtype: Annotated[str, one_of(KEEP_DTYPES)] = "float16"
    """`float16`, `float32` or `bfloat16`: the type of what stays float."""
    fill_budget: bool = False
    """True: bits and clips of the rules are replaced, per group of layers, so that the file just
    fits budget.artifact_bytes with the least error (see `quant/fill.py`)."""
    tolerance: Annotated[float | None, above(0)] = None
    """Bits per byte that packing may cost while the budget has room: beyond it the k·σ clips of the
    rules give way to finer steps (see `training/tolerance.py`); null: the rules as they are, which
    they also are for steps that training knows."""
    # Schema defaults are the common classes: OmegaConf composes other kinds over nothing else.
    calibration: Calibration = field(default_factory=Calibration)
    """The text that gptq asks for the inputs of layers; read only where a rule says gptq."""
    qat: Qat = field(default_factory=Qat)
    """What training knows of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.calibration) is Calibration:
            self.calibration = TrainCalibration()
        if type(self.qat) is Qat:
            self.qat = NoQat()

    def check(self) -> None:
        """Refuse rules that contradict themselves, before any weight exists."""
        for rule in self.rules:
            rule.resolve(self.keep_dtype)
        if self.fill_budget and type(self.qat) is not NoQat:
            raise ConfigError(
                f"quant.fill_budget=true chooses bits and clips after training, but quant.qat="
                f"{kind_of(self.qat)} trains for its own; use one of the two"
            )
        if self.qat.learns_steps and all(rule.method == "none" for rule in self.rules):
            raise ConfigError(
                f"quant/qat={kind_of(self.qat)} learns quantizer steps, but the rules of quant="
                f"{kind_of(self)} keep every tensor as a float; choose another, as in quant=int6"
            )

    @property
    def tolerated(self) -> float | None:
        """The `tolerance` where the steps of the rules are the file's; None where others are."""
        return None if self.fill_budget or type(self.qat) is not NoQat else self.tolerance

    def learned(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
        """The tensors whose steps its QAT learns: rules that keep floats by name hold for it."""
        keeping = [rule.pattern for rule in self.rules if rule.method == "none"]
        return {
            name: shape
            for name, shape in shapes.items()
            if self.qat.learns(shape) and not any(fnmatchcase(name, p) for p in keeping)
        }

    def assign(self, shapes: Mapping[str, Sequence[int]]) -> dict[str, TensorRule]:
        """The rule of every tensor.

        Args:
            shapes: shape of every tensor of the state, by name.

        Raises:
            ConfigError: a rule that matches nothing (with near names), or a matrix that no rule
                matches.
        """
        self.check()
        resolved = [rule.resolve(self.keep_dtype) for rule in self.rules]
        for rule in self.rules:
            if not rule.optional and not any(fnmatchcase(name, rule.pattern) for name in shapes):
                raise ConfigError(
                    f"quant rule {rule.pattern!r} matches no parameter"
                    f"{_near(rule.pattern, shapes)}; correct it or set optional=true"
                )
        return {name: self._assign_one(name, shape, resolved) for name, shape in shapes.items()}

    def _assign_one(
        self, name: str, shape: Sequence[int], resolved: list[TensorRule]
    ) -> TensorRule:
        found = next(
            (
                tensor_rule
                for rule, tensor_rule in zip(self.rules, resolved, strict=True)
                if fnmatchcase(name, rule.pattern)
            ),
            None,
        )
        if self._stays_float(shape):
            return TensorRule("none", keep_dtype=found.keep_dtype if found else self.keep_dtype)
        if found is None:
            raise ConfigError(
                f"no quant rule matches {name!r} of shape {tuple(shape)}; add one, or end the "
                "rules with pattern '*'"
            )
        if found.correction is not None and found.correction.rank > min(shape):
            raise ConfigError(
                f"quant: lqer_rank={found.correction.rank} for {name!r} of shape {tuple(shape)}; "
                f"at most {min(shape)}"
            )
        return found

    def _stays_float(self, shape: Sequence[int]) -> bool:
        return (
            len(shape) != 2
            or math.prod(shape) <= self.keep_float_max_numel
            or min(shape) <= self.keep_float_max_side
        )


@option("quant", "none")
@dataclass
class NoQuant(Quant):
    """Every floating tensor as `keep_dtype`."""

    rules: list[Rule] = field(default_factory=lambda: [Rule(pattern="*", method="none")])


@option("quant", "int8")
@dataclass
class Int8(Quant):
    """Matrices at 8 bits per row without clipping: nearly lossless, 6 to 7 bits a weight coded."""

    rules: list[Rule] = field(
        default_factory=lambda: [Rule(pattern="*", bits=8, clip={"kind": "max"})]
    )
    keep_float_max_numel: int = 4096


@option("quant", "int6")
@dataclass
class Int6(Quant):
    """Matrices at 6 bits per row, embeddings at 8, with k·σ clips sized for entropy coding.

    k = 6 at 6 bits is a step of 0.19 σ: about 4.4 coded bits a weight, noise 25 dB below it.
    """

    rules: list[Rule] = field(
        default_factory=lambda: [
            Rule(pattern="*embed*", bits=8, clip={"kind": "sigma", "k": 12.0}, optional=True),
            Rule(pattern="*", bits=6, clip={"kind": "sigma", "k": 6.0}),
        ]
    )
    keep_float_max_numel: int = 4096


def _near(pattern: str, names: Iterable[str]) -> str:
    return suggestion(pattern, names) if names else " (the model has none)"
