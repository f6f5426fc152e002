"""What the tests of protocols score: a toy model, small networks, texts, and ranks as threads."""

import threading
from types import SimpleNamespace

import numpy as np
import torch
from torch import nn

from recurgolf.eval import RankShare, Score, ScoredModel, Text, score
from recurgolf.looping import Looping, NoLooping
from recurgolf.model.transformer import Model

VOCAB, BOS = 17, 1


class FixedBytes:
    """A byte table for the tests: token t counts t % 4 bytes."""

    def count(self, targets, previous):
        return targets % 4


class ToyModel(nn.Module):
    """A causal model whose scores depend on the position in the window and the last two tokens."""

    config = SimpleNamespace(num_blocks=1, head_dims=[])

    def hidden(self, tokens, plan, documents=None, *, read_from=0, rope_base=None):
        before = nn.functional.pad(tokens[:, :-1], (1, 0), value=0)
        place = torch.arange(tokens.shape[1])
        return (tokens * 7 + before * 3 + place)[:, read_from:, None].double()

    def logits(self, hidden):
        return torch.sin(hidden + torch.arange(VOCAB)) * 2


def toy(seq_len: int = 8) -> ScoredModel:
    return ScoredModel(ToyModel(), NoLooping(), seq_len)


def network(config: Model, looping: Looping, seq_len: int, seed: int = 0) -> ScoredModel:
    """A network all of whose parameters are random."""
    torch.manual_seed(seed)
    model = config.build(looping.largest_plan(config.num_blocks))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    return ScoredModel(model.eval(), looping, seq_len)


def stream(length: int, documents: bool = False) -> Text:
    tokens = np.random.default_rng(length).integers(2, VOCAB, length).astype(np.uint16)
    if documents:
        tokens[0] = BOS
        tokens[np.random.default_rng(length + 1).random(length) < 0.08] = BOS
    return Text(tokens, FixedBytes(), bos=BOS if documents else None)


def score_on_ranks(protocol, scored_model, text, world_size, **options) -> list[Score]:
    """The scores that the ranks of a run have, which add up in threads instead of processes."""
    meeting = threading.Barrier(world_size)
    parts: dict[int, torch.Tensor] = {}
    found: dict[int, Score] = {}

    def work(rank: int) -> None:
        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            parts[rank] = tensor
            meeting.wait()
            total = torch.stack([parts[r] for r in range(world_size)]).sum(0)
            meeting.wait()
            return total

        found[rank] = score(
            protocol,
            scored_model,
            text,
            share=RankShare(rank, world_size, all_reduce),
            **options,
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world_size)]
