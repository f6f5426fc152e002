"""From an artifact back to a model, and its score: all that the counted code has to do.

    python -m recurgolf.artifact.score artifact.bin --data FOLDER [--tokenizer FILE]

prints one JSON object: protocol -> val_loss, val_bpb, tokens, bytes, seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recurgolf.artifact.reader import Artifact, ArtifactError, load
from recurgolf.config import from_dict
from recurgolf.data.dataset import Dataset, open_dataset
from recurgolf.eval import Eval, Score, score
from recurgolf.looping import Looping, LoopPlan
from recurgolf.lora import LoRA
from recurgolf.model.transformer import Model, Transformer
from recurgolf.quant.codes import dequantize_state


@dataclass
class Scorable:
    """A model from a file with what is needed to score it."""

    model: Transformer
    looping: Looping
    protocol: Eval
    seq_len: int
    metadata: Mapping[str, Any]

    def plan(self, protocol: Eval) -> LoopPlan:
        return self.looping.eval_plan(self.model.config.num_blocks, protocol.passes)


def rebuild(artifact: Artifact) -> Scorable:
    """The model that an artifact holds, in evaluation mode, float32.

    Raises:
        ArtifactError: metadata or tensors that are no model of ours.
    """
    data = artifact.metadata
    try:
        config = from_dict(Model, data["model"])
        looping = from_dict(Looping, data["looping"])
        lora = from_dict(LoRA, data["lora"])
        protocol = from_dict(Eval, data["eval"])
        plan = looping.largest_plan(config.num_blocks)
        with torch.device("meta"):
            model = config.build(plan)
            model.adapters = lora.build(config.projections, plan)
        model.load_state_dict(dequantize_state(artifact.tensors), strict=True, assign=True)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ArtifactError(f"the artifact holds no model of this version: {error}") from None
    return Scorable(model.eval(), looping, protocol, int(data["seq_len"]), data)


def logits_of(model: Transformer, plan: LoopPlan) -> Callable[[Tensor, int], Tensor]:
    """The callable that protocols score: ids [b, t], first -> logits [b, t - first, v]."""
    return lambda ids, first: model.logits(model.hidden(ids, plan)[:, first:])


def check_data(metadata: Mapping[str, Any], dataset: Dataset) -> None:
    """Refuse another tokenizer than the one the model was trained with."""
    if metadata["tokenizer"] != dataset.tokenizer.sha256:
        raise ArtifactError(
            f"the artifact was made with tokenizer {metadata['tokenizer'][:12]}…, the data in "
            f"{dataset.folder} has {dataset.tokenizer.sha256[:12]}…"
        )


def score_dataset(scorable: Scorable, protocol: Eval, dataset: Dataset, **options: Any) -> Score:
    """Score the validation text of a data set; options as in `eval.score`."""
    return score(
        logits_of(scorable.model, scorable.plan(protocol)),
        protocol,
        dataset.validation_tokens(),
        dataset.byte_count,
        seq_len=scorable.seq_len,
        sidecar=dataset.val_byte_sidecar,
        **options,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Score an artifact.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--tokenizer", type=Path, help="if no manifest names it")
    asked = parser.parse_args()
    scorable = rebuild(load(asked.artifact))
    dataset = open_dataset(asked.data, asked.tokenizer, scorable.metadata["data_vocab_size"])
    check_data(scorable.metadata, dataset)
    result = score_dataset(scorable, scorable.protocol, dataset)
    name = scorable.metadata["eval"]["kind"]
    print(json.dumps({name: result.to_dict()}))


if __name__ == "__main__":
    main()
