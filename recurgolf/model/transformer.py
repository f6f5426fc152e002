"""The transformer: embed, run a LoopPlan over the blocks, read out. One forward for everything.

Training, evaluation, test-time training, calibration and the artifact all call this module with a
plan; nothing here knows which schedule, which public system or which phase asked.

Shapes: b batch, t length, d model width, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from recurgolf.config import Checked, ConfigError, from_dict, kind_of, option
from recurgolf.limits import above, at_least, one_of
from recurgolf.looping import LoopPlan
from recurgolf.lora import Adapters
from recurgolf.model.block import Block, BlockConfig, BlockNorm, SequentialConfig
from recurgolf.model.embedding import BigramConfig, BigramHash, Smear, ValueEmbed, ValueEmbedConfig
from recurgolf.model.heads import MultiTokenHeads, readout_loss, softcap
from recurgolf.model.linear import Embedding, Linear, init_linear
from recurgolf.model.mixers import Mixer
from recurgolf.model.mixers.attention import AttentionConfig
from recurgolf.model.mlp import MLPS
from recurgolf.model.norm import rms_norm
from recurgolf.model.rope import rope_base, rope_table
from recurgolf.model.skips import SKIPS, NoSkips, Skips
from recurgolf.model.visit import VisitInputs

TRAINING_ONLY = ("mtp.", "quantizers.")
"""What the names of parameters and buffers begin with that are not in the file."""
VISIT_GAIN_LIMIT = 4.0
"""Gains per visit are held within this, or a looped band could multiply itself out of range."""


@dataclass
class RopeConfig(Checked):
    """Rotary positions."""

    base: Annotated[float, above(0)] = 10000.0
    """Wavelengths reach from 2π to about 2π times this, in tokens."""
    dims: Annotated[int, at_least(0)] = 0
    """Dimensions of each head that turn; 0: all."""
    train_len: Annotated[int | None, at_least(1)] = None
    """Length from which on the base grows with the sequence (NTK); null: never."""


@dataclass
class InitConfig(Checked):
    """Starting values."""

    embed_std: Annotated[float, at_least(0)] = 0.005
    """Standard deviation of the token table."""
    linear: Annotated[str, one_of("uniform", "orthogonal")] = "uniform"
    """Matrices: uniform (torch's default) | orthogonal."""
    orthogonal_min_side: int = 64
    """Matrices with a smaller side stay uniform."""
    zero_output: bool = True
    """Projections that write to the residual stream start at zero."""


@option("model", "transformer")
@dataclass
class Model(Checked):
    """Sizes and parts of the network."""

    vocab_size: Annotated[int, at_least(1)] = 1024
    """Rows of the token table; at least data.vocab_size."""
    dim: Annotated[int, at_least(1)] = 192
    """Width of the state between blocks; a multiple of the mixer's heads."""
    num_blocks: Annotated[int, at_least(1)] = 4
    """Blocks with weights of their own; looping decides how often each is visited."""
    mlp_mult: Annotated[float, above(0)] = 2.0
    """Width of every MLP, in units of dim."""
    mlp_activation: Annotated[str, one_of(MLPS)] = "relu2"
    """relu2 (the square of a ReLU) | leaky_relu2 (of a leaky one, slope 1/2) | swiglu, with three
    matrices."""
    # Schema defaults are the common classes: OmegaConf composes other kinds over nothing else.
    block: BlockConfig = field(default_factory=BlockConfig)
    mixer: Mixer = field(default_factory=Mixer)
    block_pattern: list[Any] = field(default_factory=list)
    """Blocks along the depth, repeated; empty: `block` everywhere. An entry is `block` (or its
    kind), another kind, or a kind with options: [block, {kind: parallel, update_gate: true}]."""
    mixer_pattern: list[Any] = field(default_factory=list)
    """The same for mixers: [mixer, mixer, attention] is attention in every third block."""
    skips: Annotated[str, one_of(SKIPS)] = "none"
    """none | unet | unet_gated | prelude_to_coda."""
    depth_scaled_norm: bool = False
    """Every norm of block i is followed by the factor 1/sqrt(i + 1)."""
    visit_gains: bool = False
    """A learned gain per visit and channel on both branches."""
    embed_dim: Annotated[int | None, at_least(1)] = None
    """Width of the token table where it differs from dim."""
    smear: bool = False
    """Mix every state with the one before it, behind the embedding."""
    bigram: BigramConfig = field(default_factory=BigramConfig)
    value_embed: ValueEmbedConfig = field(default_factory=ValueEmbedConfig)
    rope: RopeConfig = field(default_factory=RopeConfig)
    tie_embeddings: bool = True
    """Read out with the token table; false: with a head of its own."""
    logit_softcap: Annotated[float | None, above(0)] = 30.0
    """Logits are squashed to ±this by c * tanh(x / c); null: left as they are."""
    mtp_heads: Annotated[int, at_least(0)] = 0
    """Extra heads that predict further ahead, in training only."""
    mtp_weight: float = 0.2
    """Weight of the extra heads' mean loss beside the next token's."""
    compat_mtp_drop_last: bool = False
    """Train the extra heads at one position less than have targets, as per_iteration_lora does."""
    norm_eps: Annotated[float, at_least(0)] = 1.1920928955078125e-07
    """Of every RMS norm; the default is float32's machine epsilon, as in the baseline."""
    init: InitConfig = field(default_factory=InitConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.block) is BlockConfig:
            self.block = SequentialConfig()
        if type(self.mixer) is Mixer:
            self.mixer = AttentionConfig()
        self.block_pattern = self._pattern("block", BlockConfig)
        self.mixer_pattern = self._pattern("mixer", Mixer)
        for block in range(self.num_blocks):
            self.mixer_of(block).check(self.dim)
        self._check_positions()
        if self.value_embed.dim and self.value_embed.visits:
            _ = self.kv_dim

    def _pattern(self, name: str, base: type[Any]) -> list[Any]:
        """A pattern whose entries are options, or the name of the field whose option they take."""
        own, entries = getattr(self, name), getattr(self, f"{name}_pattern")
        said = f"model.{name}_pattern={entries}"
        if len(entries) > self.num_blocks:
            raise ConfigError(f"{said}: {len(entries)} entries for {self.num_blocks} blocks")
        pattern = []
        for entry in entries:
            if isinstance(entry, str) and entry not in (name, kind_of(own)):
                entry = {"kind": entry}
            option = from_dict(base, entry) if isinstance(entry, Mapping) else entry
            pattern.append(name if isinstance(option, str) or option == own else option)
        if pattern and name not in pattern:
            raise ConfigError(
                f"{said} does not name model.{name}, which is {kind_of(own)}: choose another "
                f"(model/{name}=KIND) or name it"
            )
        return pattern

    def _check_positions(self) -> None:
        widths, dims = self.head_dims, self.rope.dims
        if not widths and dims:
            raise ConfigError(
                f"model.rope.dims={dims}, but no block attends: nothing is rotated; leave it at 0"
            )
        if len(widths) > 1 and dims == 0:
            raise ConfigError(
                f"the attention heads of this hybrid are {widths} wide; model.rope.dims=0 turns "
                "whole heads, so say how many dimensions turn in all of them"
            )
        if widths and (dims > widths[0] or dims % 2):
            raise ConfigError(
                f"model.rope.dims={dims}: an even number from 0 (all) to the head "
                f"dimension {widths[0]}"
            )

    @property
    def mlp_hidden(self) -> int:
        return int(self.mlp_mult * self.dim)

    @property
    def head_dims(self) -> list[int]:
        """Widths of the attention heads, ascending without repetition; empty: no block attends."""
        mixers = [self.mixer_of(block) for block in range(self.num_blocks)]
        return sorted(
            {self.dim // m.heads(self.dim)[0] for m in mixers if isinstance(m, AttentionConfig)}
        )

    @property
    def kv_dim(self) -> int:
        """Width of the attention values, where all blocks have the same.

        Raises:
            ConfigError: a block without attention, or values of several widths.
        """
        widths = [self.projections(i).get("v_proj", (0, 0))[1] for i in range(self.num_blocks)]
        if not all(widths) or len(set(widths)) > 1:
            raise ConfigError(
                "model.value_embed is added to attention values of one width, but those of the "
                f"blocks are {widths} wide (0: no attention); set model.value_embed.dim=0"
            )
        return widths[0]

    def block_of(self, block: int) -> BlockConfig:
        return _entry(self.block_pattern, self.block, block)

    def mixer_of(self, block: int) -> Mixer:
        return _entry(self.mixer_pattern, self.mixer, block)

    def projections(self, block: int) -> dict[str, tuple[int, int]]:
        """Linear projections of a block, name -> (in_dim, out_dim): what adapters can sit on."""
        hidden = self.mlp_hidden
        mlp = {"up_proj": (self.dim, hidden), "down_proj": (hidden, self.dim)}
        if self.mlp_activation == "swiglu":
            mlp["gate_proj"] = (self.dim, hidden)
        return {
            **self.mixer_of(block).projections(self.dim),
            **mlp,
            "residual": (self.dim, self.dim),
        }

    def build(self, largest_plan: LoopPlan) -> Transformer:
        """The network, initialised from torch's current random state.

        Args:
            largest_plan: the plan with the most visits; per-visit parameters get its size.
        """
        return Transformer(self, largest_plan)


def _entry(pattern: Sequence[Any], own: Any, block: int) -> Any:
    entry = pattern[block % len(pattern)] if pattern else own
    return own if isinstance(entry, str) else entry


class Transformer(nn.Module):
    """`model(tokens, plan)` gives logits [b, t, v]; with targets, the mean loss in nats."""

    def __init__(self, config: Model, largest_plan: LoopPlan):
        super().__init__()
        self.config = config
        dim, embed_dim = config.dim, config.embed_dim or config.dim
        self.embed = Embedding(config.vocab_size, embed_dim)
        self.embed_proj = Linear(embed_dim, dim) if embed_dim != dim else None
        self.head_proj = Linear(dim, embed_dim) if embed_dim != dim else None
        self.bigram = BigramHash(config.bigram, embed_dim) if config.bigram.rows else None
        self.smear = Smear(dim) if config.smear else None
        self.value_embed = (
            ValueEmbed(config.value_embed, config.vocab_size, config.kv_dim)
            if config.value_embed.dim and config.value_embed.visits
            else None
        )
        self.blocks = nn.ModuleList(self._build_block(i) for i in range(config.num_blocks))
        self.skips: Skips | NoSkips = SKIPS[config.skips](largest_plan, dim)
        shape = (largest_plan.num_visits, dim)
        self.mixer_visit_gain = nn.Parameter(torch.ones(shape)) if config.visit_gains else None
        self.mlp_visit_gain = nn.Parameter(torch.ones(shape)) if config.visit_gains else None
        self.lm_head = (
            None if config.tie_embeddings else Linear(embed_dim, config.vocab_size, zero_init=True)
        )
        self.mtp = (
            MultiTokenHeads(config.mtp_heads, dim, config.vocab_size, config.compat_mtp_drop_last)
            if config.mtp_heads
            else None
        )
        self.adapters: Adapters | None = None
        self.quantizers: nn.Module | None = None
        if not self.embed.weight.is_meta:  # without storage there is nothing to draw
            self.init_weights()

    def forward(
        self,
        tokens: Tensor,
        plan: LoopPlan,
        targets: Tensor | None = None,
        documents: Tensor | None = None,
    ) -> Tensor:
        """Logits [b, t, v] or, with `targets` [b, t], the training loss in nats per token.

        Args:
            tokens: ids [b, t].
            documents: document number per position where nothing may cross documents.
        """
        hidden = self.hidden(tokens, plan, documents)
        if targets is None:
            return self.logits(hidden)
        loss = self.main_loss(hidden, targets)
        if self.mtp is not None and self.training:
            loss = loss + self.config.mtp_weight * self.mtp.loss(
                hidden, targets, self.config.logit_softcap
            )
        return loss

    def hidden(
        self,
        tokens: Tensor,
        plan: LoopPlan,
        documents: Tensor | None = None,
        observe: Callable[[int, Tensor], None] | None = None,
        *,
        read_from: int = 0,
        rope_base: float | None = None,
    ) -> Tensor:
        """The normed state behind the last visit [b, t - read_from, d], which the heads read.

        Args:
            observe: called with (position in the plan, state) behind every visit.
            read_from: first position that is wanted; the last visit computes no earlier one.
            rope_base: of the rotary positions; None: as `config.rope` has it for this length.
        """
        x = self.embedded(tokens, documents)
        rope = self._rope(tokens.shape[1], tokens.device, rope_base)
        inputs = VisitInputs(x, rope, documents=documents)
        values = self.value_embed(tokens) if self.value_embed is not None else {}
        pairs = self.skips.pairs(plan)
        sources = {source for source, _ in pairs.values()}
        kept: dict[int, Tensor] = {}  # states that a later visit will join
        for position, visit in enumerate(plan.visits):
            if position in pairs:
                source, row = pairs[position]
                x = self.skips.join(x, kept.pop(source), row)
            if position == plan.num_visits - 1:
                # Only here: every earlier visit's output is still attended to by the next one.
                inputs.read_from = read_from
            if self.adapters is not None:
                inputs.adapters = self.adapters.of_visit(visit)
            inputs.values = values.get(position)
            inputs.mixer_gain = self._visit_gain(self.mixer_visit_gain, position)
            inputs.mlp_gain = self._visit_gain(self.mlp_visit_gain, position)
            if position < plan.grad_from and torch.is_grad_enabled():
                # Truncated backpropagation. Not through apply_block, which training may replace
                # by one that recomputes: nothing is kept here for a backward pass.
                with torch.no_grad():
                    x = self.blocks[visit.block](x, inputs)
            else:
                x = self.apply_block(self.blocks[visit.block], x, inputs)
            if observe is not None:
                observe(position, x)
            if position in sources:
                kept[position] = x
        return rms_norm(x, self.config.norm_eps)

    @staticmethod
    def apply_block(block: nn.Module, x: Tensor, inputs: VisitInputs) -> Tensor:
        """One visit with gradients; training may put its own way in place of it."""
        return block(x, inputs)

    def embedded(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """The state in front of the first block [b, t, d]."""
        x = self.embed(tokens)
        if self.bigram is not None:
            x = x + self.bigram(tokens, documents)
        x = rms_norm(x, self.config.norm_eps)
        if self.embed_proj is not None:
            x = self.embed_proj(x)
        return x if self.smear is None else self.smear(x, documents)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., v] of normed states [..., d]."""
        hidden = self._readable(hidden)
        raw = nn.functional.linear(hidden, self.readout.to(hidden.dtype))
        return softcap(raw, self.config.logit_softcap)

    def main_loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats of the main head alone: normed states [b, t, d], targets [b, t]."""
        weight, cap = self.readout, self.config.logit_softcap
        return readout_loss(self._readable(hidden), weight, targets, cap)

    @property
    def num_parameters(self) -> int:
        """Weights of the network, those that only train included, steps of quantizers not."""
        named = self.named_parameters()
        return sum(p.numel() for name, p in named if not name.startswith("quantizers."))

    @property
    def readout(self) -> Tensor:
        """The matrix of the main head [v, d]."""
        return (self.lm_head or self.embed).seen_weight

    def idle_parameters(self, plan: LoopPlan) -> list[str]:
        """Names of the parameters that a training step under this plan gives no gradient."""
        trained = plan.visits[plan.grad_from :]
        blocks = {visit.block for visit in trained}
        idle = [f"blocks.{i}." for i in range(len(self.blocks)) if i not in blocks]
        if self.adapters is not None:
            adapted = {v.block for v in trained if self.adapters.slot(v) is not None}
            banks = map(int, self.adapters.banks)
            idle += [f"adapters.banks.{i}." for i in banks if i not in adapted]
        # What a visit without gradients has joined or received leaves no trace.
        if not any(position >= plan.grad_from for position in self.skips.pairs(plan)):
            idle.append("skips.")
        if self.value_embed is not None and not any(
            plan.grad_from <= position < plan.num_visits for position in self.value_embed.rows
        ):
            idle.append("value_embed.")
        if plan.grad_from > 0 and not any(self.blocks[i].reads_x0 for i in blocks):
            idle += ["embed_proj.", "bigram.", "smear."]
            idle += ["embed."] if self.lm_head is not None else []
        return [name for name, _ in self.named_parameters() if name.startswith(tuple(idle))]

    @torch.no_grad()
    def init_weights(self) -> None:
        """Set every parameter but those that modules and adapters start themselves."""
        init = self.config.init
        nn.init.normal_(self.embed.weight, std=init.embed_std if self.lm_head is None else 1.0)
        for module in self.modules():
            if isinstance(module, Linear):
                init_linear(module, init.linear, init.zero_output, init.orthogonal_min_side)
        if self.bigram is not None:
            nn.init.zeros_(self.bigram.embed.weight)
        if self.value_embed is not None:
            nn.init.normal_(self.value_embed.embed.weight, std=0.01)
        # Blocks may be orthogonal at any width; as published, a narrow table's projection is zero.
        projections = [table.proj for table in (self.bigram, self.value_embed) if table is not None]
        for proj in projections if init.linear == "orthogonal" else []:
            if proj is not None and min(proj.weight.shape) < 64:
                nn.init.zeros_(proj.weight)
        # Heads start at zero even where other output projections do not: the first loss is then
        # log(vocab_size) whatever the rest does.
        if self.lm_head is not None:
            nn.init.zeros_(self.lm_head.weight)
        if self.mtp is not None:
            for weight in self.mtp.parameters():
                nn.init.zeros_(weight)

    def _build_block(self, index: int) -> Block:
        config = self.config
        norm = BlockNorm(config.norm_eps, (index + 1) ** -0.5 if config.depth_scaled_norm else 1.0)
        mixer = config.mixer_of(index).build(config.dim, index, config.num_blocks, config.norm_eps)
        mlp = MLPS[config.mlp_activation](config.dim, config.mlp_hidden)
        return config.block_of(index).build(config.dim, mixer, mlp, norm)

    def _rope(self, length: int, device: torch.device, base: float | None) -> tuple[Tensor, Tensor]:
        rope = self.config.rope
        dims = rope.dims or max(self.config.head_dims, default=0)
        if base is None:
            base = rope_base(rope.base, dims, length, rope.train_len)
        return rope_table(length, dims, base, device)

    def _readable(self, hidden: Tensor) -> Tensor:
        return hidden if self.head_proj is None else self.head_proj(hidden)

    def _visit_gain(self, table: Tensor | None, position: int) -> Tensor | None:
        if table is None:
            return None
        # Visits beyond the table, in scoring with more passes, use its last row.
        return table[min(position, len(table) - 1)].clamp(-VISIT_GAIN_LIMIT, VISIT_GAIN_LIMIT)
