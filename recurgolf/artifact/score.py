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
from recurgolf.config import from_dict, to_dict
from recurgolf.data.dataset import ValidationData, open_validation
from recurgolf.eval.protocol import Eval, ScoredModel, score
from recurgolf.eval.text import Text
from recurgolf.looping import Looping
from recurgolf.lora import LoRA
from recurgolf.model.transformer import Model
from recurgolf.quant.quantized_tensor import dequantize_state

MAX_VISITS = 2**12
MAX_SEQ_LEN = 2**20


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
        _check_sizes(data, len(artifact.tensors))
        config = from_dict(Model, data["model"])
        looping = from_dict(Looping, data["looping"])
        lora = from_dict(LoRA, data["lora"])
        protocol = from_dict(Eval, data["eval"])
        plan = looping.largest_plan(config.num_blocks)
        with torch.device("meta"):
            model = config.build(plan)
            model.adapters = lora.build(config.projections, plan)
        weights = dequantize_state(artifact.tensors)
        for name, weight in weights.items():
            if not weight.isfinite().all():
                raise ValueError(f"{name} is not finite")
        model.load_state_dict(weights, strict=True, assign=True)
    except Exception as error:
        # Parts fail in ways of their own on settings that no Run could have written.
        raise ArtifactError(
            f"the artifact holds no model of this version: {type(error).__name__}: {error}"
        ) from None
    return Scorable(model.eval(), looping, int(data["seq_len"]), protocol=protocol, metadata=data)


def _check_sizes(data: Mapping[str, Any], num_tensors: int) -> None:
    """Bound what a header asks for before anything is made: every block has a tensor at least."""
    blocks, passes = data["model"]["num_blocks"], data["eval"].get("passes")
    counts = [*data["looping"].values(), *(passes if isinstance(passes, list) else [passes])]
    visits = blocks * max([1, *(count for count in counts if isinstance(count, (int, float)))])
    heads = data["model"].get("mtp_heads")  # of training; a file has none
    if blocks > num_tensors or visits > MAX_VISITS or data["seq_len"] > MAX_SEQ_LEN or heads:
        raise ValueError(f"{blocks} blocks, {visits} visits, seq_len {data['seq_len']}: too many")


def check_run(metadata: Mapping[str, Any], run: Any) -> None:
    """Refuse a header that is not of the Run beside it: they would be scored differently."""
    for key, part in (("model", run.model), ("looping", run.looping), ("lora", run.lora)):
        theirs = to_dict(from_dict(type(part), metadata[key]))
        for name, value in to_dict(part).items():
            if theirs.get(name) != value and name not in ("init", "mtp_heads"):
                raise ArtifactError(
                    f"its header says {key}.{name}={theirs.get(name)!r}, run.json {value!r}"
                )
    for key, value in (("seq_len", run.trainer.seq_len), ("data_vocab_size", run.data.vocab_size)):
        if metadata[key] != value:
            raise ArtifactError(f"its header says {key}={metadata[key]!r}, run.json {value!r}")
    if from_dict(Eval, metadata["eval"]) != run.eval.alone:
        raise ArtifactError("its header says another eval than run.json")


def check_data(metadata: Mapping[str, Any], dataset: ValidationData) -> None:
    """Refuse another tokenizer than the one the model was trained with."""
    if metadata["tokenizer"] != dataset.tokenizer.sha256:
        raise ArtifactError(
            f"its tokenizer is {metadata['tokenizer'][:12]}, that of the data in {dataset.folder} "
            f"{dataset.tokenizer.sha256[:12]}"
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
    print(json.dumps({name: result.to_dict()}, allow_nan=False))


if __name__ == "__main__":
    main()
