"""What cannot go together fails while composing, with its numbers and with what would do."""

import shlex

import pytest
from command_line import recurgolf

LINES = [
    # a loop range outside the blocks
    (
        "looping=segment looping.start=1 looping.end=9",
        ["looping.start=1 to looping.end=9", "3 blocks (0 to 2)"],
    ),
    (
        "experiment=per_iteration_lora model.num_blocks=5 model.block_pattern=[]",
        ["looping.start=3 to looping.end=5", "5 blocks (0 to 4)"],
    ),
    (
        "looping=prelude_core_coda looping.prelude=2 looping.coda=1",
        ["looping.prelude=2 + looping.coda=1", "model of 3 blocks", "together at most 2"],
    ),
    ("looping=cycle looping.passes=0", ["looping.passes=0: at least 1"]),
    ("looping.start_fraction=1.5", ["looping.start_fraction=1.5", "from 0 to 1"]),
    # heads that do not divide
    (
        "model.dim=96 model.mixer.num_heads=5",
        ["model.dim=96 is not divisible by model.mixer.num_heads=5", "1, 2, 3, 4, 6, 8, 12, 16"],
    ),
    (
        "model.dim=96 model.mixer.num_heads=6 model.mixer.num_kv_heads=4",
        ["num_heads=6 is not a multiple of model.mixer.num_kv_heads=4", "(1, 2, 3, 6 would do)"],
    ),
    (
        "model.dim=96 model.mixer.num_heads=32",
        ["gives heads of 3; rotary positions need an even number", "24, 48 would do"],
    ),
    ("model.dim=97 model.mixer.num_heads=2", ["model.dim=97 is not", "(no number would do)"]),
    (
        "model/mixer=gated_deltanet model.mixer.num_key_heads=2 model.mixer.num_value_heads=3",
        ["num_value_heads=3 is not a multiple of model.mixer.num_key_heads=2"],
    ),
    # adapters on what the block lacks
    (
        "looping=cycle lora=rank1 lora.targets=[q_proj,gate_proj]",
        ["have no projection 'gate_proj'; theirs are", "down_proj", "up_proj", "v_proj"],
    ),
    (
        "looping=cycle lora=attention model/mixer=gated_deltanet",
        ["no projection 'q_proj'; theirs are", "in_proj_qkv"],
    ),
    ("looping=none lora=rank1", ["lora.rank=1", "no visit qualifies in the plan 0 1 2"]),
    (
        "looping=cycle lora=rank1 lora.rank=200 model.dim=128",
        [
            "lora.rank=200 exceeds the smaller side 128 of q_proj in block 0,",
            "from 0 (no adapters) to 128",
        ],
    ),
    # noise on the looped blocks of a flat network
    (
        "experiment=universal_rank1_cpu looping=none lora=none",
        ["quant.qat.blocks=looped", "0 1 2 3 loops no block", "quant.qat.blocks=all"],
    ),
    # passes where nothing can change, or none
    ("looping=none eval.passes=3", ["looping=none has 1 and nothing else"]),
    ("eval.passes=0", ["eval.passes=0: at least 1"]),
]


@pytest.mark.parametrize(("line", "said"), LINES, ids=[line for line, _ in LINES])
def test_it_is_refused_from_the_command_line_before_any_work(line, said, tmp_path):
    message = recurgolf("plan", *shlex.split(line), cwd=tmp_path).refused()
    for words in said:
        assert words in message
    assert not list(tmp_path.iterdir())
