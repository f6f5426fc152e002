"""Token ids for calibration: windows of the training text, or text that the model writes itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from recurgolf.data.dataset import Dataset
from recurgolf.data.shards import TokenStream

if TYPE_CHECKING:
    from recurgolf.looping import LoopPlan
    from recurgolf.model.transformer import Transformer

_WINDOWS, _SAMPLES = 0xCA11B, 0x5A3E1E
"""Keep these random streams apart from those that training draws from the same seeds."""


@dataclass(frozen=True)
class CalibrationText:
    """Token ids for calibration: windows of the training text, or text that the model writes.

    Attributes:
        plan: the visits of a forward pass when the model writes.
        data_seed: picks the training windows.
        noise_seed: the uniform numbers behind every sampled token.
        vocab_size: ids that the data uses; the model may know more.
    """

    dataset: Dataset
    model: Transformer
    plan: LoopPlan
    data_seed: int
    noise_seed: int
    vocab_size: int

    def training_rows(self, numbers: Sequence[int], length: int, of: int) -> Tensor:
        """See `quant.calibration.TextSource`."""
        stream = TokenStream(self.dataset.train_shards)
        rng = np.random.Generator(np.random.PCG64([self.data_seed, _WINDOWS]))
        starts = rng.permutation(stream.num_tokens // length)[:of] * length
        rows = [stream.read(int(starts[number]), length) for number in numbers]
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    @torch.no_grad()
    def sampled_rows(self, numbers: Sequence[int], length: int, temperature: float) -> Tensor:
        """Rows that begin as documents do and go on by the model's own distribution.

        Every row has its own uniform numbers, so that a row does not depend on its batch.
        """
        generators = [
            np.random.Generator(np.random.PCG64([self.noise_seed, _SAMPLES, number]))
            for number in numbers
        ]
        device = self.model.embed.weight.device
        uniform = torch.from_numpy(np.stack([g.random(length) for g in generators])).to(device)
        first = self.dataset.tokenizer.bos_id
        ids = torch.full((len(numbers), 1), first, dtype=torch.int64, device=device)
        while ids.shape[1] < length:
            last = self.model.logits(self.model.hidden(ids, self.plan)[:, -1])
            shares = torch.softmax(last[:, : self.vocab_size].double() / temperature, -1)
            reached = shares.cumsum(-1) < uniform[:, ids.shape[1], None]
            # The sum of shares can end a rounding error below a number that is almost 1.
            chosen = reached.sum(-1, keepdim=True).clamp_max(shares.shape[1] - 1)
            ids = torch.cat((ids, chosen), dim=1)
        return ids.cpu()
