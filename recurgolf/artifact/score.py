"""From an artifact back to a model, and its score: all that the counted code has to do.

    python -m recurgolf.artifact.score artifact.bin --data FOLDER [--tokenizer FILE]

prints one JSON object: protocol -> val_loss, val_bpb, tokens, bytes, seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from recurgolf.artifact.reader import Artifact, ArtifactError, load
from recurgolf.config import from_dict
from recurgolf.data.dataset import ValidationData, open_validation
from recurgolf.eval.protocol import Eval, ScoredModel, score
from recurgolf.eval.text import Text
from recurgolf.looping import Looping
from recurgolf.lora import LoRA
from recurgolf.model.transformer import Model
from recurgolf.quant.quantized_tensor import dequantize_state


@dataclass(kw_only=True)
class Scorable(ScoredModel):
    """A model from a file with what is needed to score it.

    Attributes:
        protocol: that of the headline.
        metadata: the file's header.
    """

    protocol: Eval
    metadata: Mapping[str, Any]


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
    return Scorable(model.eval(), looping, int(data["seq_len"]), protocol=protocol, metadata=data)


def check_data(metadata: Mapping[str, Any], dataset: ValidationData) -> None:
    """Refuse another tokenizer than the one the model was trained with."""
    if metadata["tokenizer"] != dataset.tokenizer.sha256:
        raise ArtifactError(
            f"the artifact was made with tokenizer {metadata['tokenizer'][:12]}…, the data in "
            f"{dataset.folder} has {dataset.tokenizer.sha256[:12]}…"
        )


def text_of(dataset: ValidationData) -> Text:
    """The validation text of a data set."""
    return Text(
        dataset.validation_tokens(),
        dataset.byte_count,
        dataset.val_byte_sidecar,
        dataset.tokenizer.bos_id,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Score an artifact.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--tokenizer", type=Path, help="if no manifest names it")
    asked = parser.parse_args()
    scorable = rebuild(load(asked.artifact))
    dataset = open_validation(asked.data, asked.tokenizer, scorable.metadata["data_vocab_size"])
    check_data(scorable.metadata, dataset)
    dataset.byte_count.check(dataset.tokens, dataset.tokenizer)
    result = score(scorable.protocol, scorable, text_of(dataset))
    name = scorable.metadata["eval"]["kind"]
    print(json.dumps({name: result.to_dict()}))


if __name__ == "__main__":
    main()
