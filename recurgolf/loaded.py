"""A finished run as an object: its model, tokenizer and plan, to score, to look into, to sample.

model = recurgolf.load("outputs/demo/…")
model.evaluate("eval=sliding").val_bpb
model.sample("The history of", temperature=0.8)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recurgolf.artifact import ArtifactError
from recurgolf.artifact import load as load_artifact
from recurgolf.artifact.decode import MissingLibrary
from recurgolf.artifact.score import check_data, check_run, rebuild, text_of
from recurgolf.config import ConfigError
from recurgolf.data import Dataset
from recurgolf.data.tokenizer import PieceKind, Tokenizer
from recurgolf.eval import Score, ScoredModel, score
from recurgolf.looping import LoopPlan
from recurgolf.model.transformer import Transformer
from recurgolf.overrides import check_parts
from recurgolf.run import Run
from recurgolf.training.base import read_finished
from recurgolf.training.packing import ARTIFACT

PARTS = ("eval", "data")
"""Parts of a Run that an evaluation may have otherwise."""


@dataclass
class Loaded:
    """A run, exported or imported folder, read.

    Attributes:
        folder: where it was read from.
        run: what was trained.
        model: the network with its final weights, in evaluation mode, float32, on the CPU;
            `model.to(...)` moves it, and the methods here follow.
        source: the file the weights are from: artifact.bin, or the newest checkpoint of a run
            that has no artifact yet.
    """

    folder: Path
    run: Run = field(repr=False)
    model: Transformer = field(repr=False)
    source: str
    _header: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def plan(self) -> LoopPlan:
        """The visits of a forward pass when scoring."""
        return self.run.eval_plan

    @property
    def tokenizer(self) -> Tokenizer:
        """The one the model was trained with.

        Raises:
            DataError: the data of the run are not here, or are others now.
        """
        return self._dataset.tokenizer

    def evaluate(self, *overrides: str) -> Score:
        """Score the weights on the run's validation text, or another one; nothing is written.

        Args:
            overrides: of eval and data: `evaluate("eval=sliding", "eval.stride=32")`. Without any
                the run's own protocol, whose figures are those of summary.json.

        Returns:
            The headline: `.val_bpb`, `.val_loss`, `.tokens`, `.bytes`. One protocol at a time;
            `recurgolf evaluate` scores by several and keeps the result.

        Raises:
            ConfigError: other overrides, or what the model or the text does not fit.
        """
        from recurgolf.composing import compose_parts

        check_parts(overrides, PARTS, "evaluate")
        run = compose_parts(self.run, overrides)
        dataset = self._dataset if run.data == self.run.data else self._prepared(run)
        protocol = run.eval.alone
        protocol.check_model(self.model.config, self.run.looping)
        return score(protocol, self._scored_model, text_of(dataset))

    @torch.no_grad()
    def logits(self, text: str, passes: int | None = None) -> Tensor:
        """What the model expects behind every token of a text.

        Args:
            passes: of the looped blocks; None: as in scoring.

        Returns:
            [t, v], float32: row i is about the token that follows the first i + 1 of `ids(text)`.
            The text is read in one window, whatever its length.
        """
        return self.model(self._row(text), self._plan(passes))[0].float()

    @torch.no_grad()
    def states(self, text: str, passes: int | None = None) -> Tensor:
        """The state behind every visit: [visits, t, d], as the next block receives it.

        `plan.visits[i]` says which block made `states(text)[i]`, and on which of its visits.
        Arguments as of `logits`.
        """
        found: list[Tensor] = []

        def observe(position: int, state: Tensor) -> None:
            found.append(state[0])

        self.model.hidden(self._row(text), self._plan(passes), observe=observe)
        return torch.stack(found)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text as the model reads them: BOS first, as a document begins."""
        if not isinstance(text, str):
            raise ConfigError(f"{text!r}: expected a text, a string")
        return self.tokenizer.encode([text])[0].tolist()

    @torch.no_grad()
    def sample(
        self,
        prompt: str = "",
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        tokens: int = 64,
        passes: int | None = None,
        seed: int = 0,
    ) -> str:
        """Let the model go on with a text.

        Args:
            prompt: how a document begins.
            temperature: divides the logits; 0: always the likeliest token.
            top_k: choose among so many likeliest tokens; None: among all.
            tokens: at most; a document that ends, ends earlier.
            passes: of the looped blocks; None: as in scoring.
            seed: of the choices; the same one gives the same text.

        Returns:
            The prompt, as the tokenizer reads it, and what follows.
        """
        number = type(temperature) in (int, float) and math.isfinite(temperature)
        if not number or temperature < 0:
            raise ConfigError(f"temperature={temperature!r}: a number from 0 (no chance) upwards")
        for name, value in {"top_k": top_k, "tokens": tokens}.items():
            if value is not None and (type(value) is not int or value < 1):
                raise ConfigError(f"{name}={value!r}: a whole number, at least 1")
        if type(seed) is not int or not 0 <= seed < 2**63:
            raise ConfigError(f"seed={seed!r}: a whole number from 0 to {2**63 - 1}")
        plan, ids = self._plan(passes), self.ids(prompt)
        chance = torch.Generator().manual_seed(seed)
        allowed, bos = self._says_something, self.tokenizer.bos_id
        for _ in range(tokens):
            # No longer context than the model was trained with.
            row = torch.tensor([ids[-self.run.trainer.seq_len :]], device=self._device)
            hidden = self.model.hidden(row, plan, read_from=row.shape[1] - 1)
            logits = self.model.logits(hidden)[0, -1].float().cpu()
            chosen = choose(logits.masked_fill(~allowed, -math.inf), temperature, top_k, chance)
            if chosen == bos:
                break
            ids.append(chosen)
        return self.tokenizer.decode([np.array(ids, dtype=np.uint16)])[0]

    @cached_property
    def _dataset(self) -> Dataset:
        return self._prepared(self.run)

    def _prepared(self, run: Run) -> Dataset:
        """The data of a Run, with the tokenizer that the model knows."""
        dataset = run.data.prepare()
        try:
            if self._header is not None:
                check_data(self._header, dataset)
        except ArtifactError as error:
            raise ConfigError(f"{self.folder}: {error}") from None
        return dataset

    @cached_property
    def _says_something(self) -> Tensor:
        """Which ids [v] may be chosen: pieces with a text, and BOS, with which the next one begins.

        The token table may be larger than the tokenizer.
        """
        mask = torch.zeros(self.model.config.vocab_size, dtype=torch.bool)
        for index, piece in enumerate(self.tokenizer.pieces()):
            mask[index] = piece.kind is not PieceKind.SPECIAL
        mask[self.tokenizer.bos_id] = True
        return mask

    @property
    def _device(self) -> torch.device:
        return self.model.embed.weight.device

    @property
    def _scored_model(self) -> ScoredModel:
        run = self.run
        # A protocol may learn from the text: it has weights of its own to change.
        model = copy.deepcopy(self.model)
        return ScoredModel(model, run.looping, run.trainer.seq_len, self._device)

    def _row(self, text: str) -> Tensor:
        """A text as one row of ids [1, t]."""
        return torch.tensor([self.ids(text)], device=self._device)

    def _plan(self, passes: int | None) -> LoopPlan:
        if passes is None:
            return self.plan
        if type(passes) is not int or passes < 1:
            raise ConfigError(f"passes={passes!r}: a whole number, at least 1")
        blocks = self.run.model.num_blocks
        self.run.looping.check_passes(blocks, [passes])
        return self.run.looping.eval_plan(blocks, passes)


def load(folder: str | Path, trust: bool = False) -> Loaded:
    """Read a run's folder; see `Loaded`.

    Args:
        folder: of a finished run, or one that `recurgolf export` or `import` made.
        trust: import plugins of it that are not installed.

    Raises:
        ConfigError: no such folder, or nothing in it that can be read; the text says what.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give that of a run")
    path = folder / ARTIFACT
    if not path.exists():
        finished = read_finished(folder, trust)
        return Loaded(folder, finished.run, finished.model(), finished.source)
    run = Run.read(folder, trust)
    try:
        scorable = rebuild(load_artifact(path))
        check_run(scorable.metadata, run)
    except (ArtifactError, MissingLibrary) as error:
        raise ConfigError(f"{path}: {error}") from None
    return Loaded(folder, run, scorable.model, str(path), scorable.metadata)


def choose(logits: Tensor, temperature: float, top_k: int | None, chance: torch.Generator) -> int:
    """A token by its logits [v]."""
    if temperature == 0:
        return int(logits.argmax())
    if top_k is not None and top_k < len(logits):
        best = logits.topk(top_k)
        logits = torch.full_like(logits, -math.inf).scatter(0, best.indices, best.values)
    # From the largest down: a tiny temperature may not make infinities of them.
    weights = ((logits - logits.max()) / temperature).softmax(-1)
    return int(weights.multinomial(1, generator=chance))
