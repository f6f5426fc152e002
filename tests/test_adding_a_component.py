"""README's "Adding a component", followed to the letter in a copy of the package.

A schedule lies in a user's own folder, as README's two code blocks have it; a mixer, a codec, a
clip and a protocol are each one new module in the package and one new YAML in `conf/`. Nothing
else is edited.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import Ended
from smoke_runs import RunFolder, small
from test_end_to_end import scored_alone

from recurgolf.composing import conf_folder

ROOT = Path(__file__).parents[1]

MIXER = '''
from dataclasses import dataclass

from torch import nn

from recurgolf.config import option
from recurgolf.model.linear import Linear
from recurgolf.model.mixers import Mixer


@option("model/mixer", "previous")
@dataclass
class PreviousConfig(Mixer):
    """Every token sees the one before it."""

    def projections(self, dim):
        return {"v_proj": (dim, dim)}

    def build(self, dim, block, num_blocks, norm_eps):
        return Previous(dim)

    def flops(self, dim, length):
        return dim


class Previous(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.v_proj = Linear(dim, dim, zero_init=True)

    def forward(self, x, inputs):
        values = self.v_proj(x, inputs.adapters.get("v_proj"))
        return nn.functional.pad(values[:, :-1], (0, 0, 1, 0))
'''

CODEC = '''
from dataclasses import dataclass

from recurgolf.artifact.codecs import Codec
from recurgolf.artifact.decode import DECODERS
from recurgolf.config import option


@option("artifact/codec", "inverted")
@dataclass
class InvertedCodec(Codec):
    """Every bit turned over."""

    def compress(self, data, segments):
        return bytes(255 - byte for byte in data)


def inverted(data, size, segments):
    return bytes(255 - byte for byte in data)


DECODERS["inverted"] = inverted
'''

CLIP = '''
from dataclasses import dataclass

import numpy as np

from recurgolf.config import option
from recurgolf.quant.clip import Clip


@option("quant/clip", "twice_mean")
@dataclass
class TwiceMean(Clip):
    """Twice the mean magnitude of a row."""

    def clip_value(self, weight, gram_diag=None):
        return 2 * weight.abs().mean(dim=1)

    def ratios(self, cols, spread):
        return [np.array([1.6])]
'''

PROTOCOL = '''
from dataclasses import dataclass

from recurgolf.config import option
from recurgolf.eval.protocol import Eval, Window


@option("eval", "late_half")
@dataclass
class LateHalf(Eval):
    """Half a window of context in front of every target, read from the start of the text."""

    def windows(self, text, seq_len):
        half = seq_len // 2
        for first in range(0, text.num_targets, half):
            yield Window(max(0, first - half), first, min(first + half, text.num_targets))
'''

NEW = {
    "recurgolf/model/mixers/previous.py": MIXER,
    "recurgolf/artifact/inverted.py": CODEC,
    "recurgolf/quant/twice_mean.py": CLIP,
    "recurgolf/eval/late_half.py": PROTOCOL,
    "conf/model/mixer/previous.yaml": """
# recurgolf model/mixer=previous
# Every token sees the one before it.
defaults: [/schema/model/mixer/previous@_here_, _self_]
""",
    "conf/artifact/codec/inverted.yaml": """
# recurgolf artifact/codec=inverted
# Every bit turned over.
defaults: [/schema/artifact/codec/inverted@_here_, _self_]
""",
    "conf/quant/int4_twice_mean.yaml": """
# recurgolf quant=int4_twice_mean
# 4 bits, clipped at twice the mean magnitude.
defaults: [/schema/quant/int6@_here_, calibration: train, qat: none, _self_]
rules: [{pattern: "*", bits: 4, clip: {kind: twice_mean}}]
""",
    "conf/eval/late_half.yaml": """
# recurgolf eval=late_half
# Half a window of context in front of every target.
defaults: [/schema/eval/late_half@_here_, _self_]
""",
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """A copy of the repository with the new files, and with README's schedule beside it."""
    copy = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "recurgolf", copy / "recurgolf", ignore=ignored)
    shutil.copytree(conf_folder(), copy / "conf")
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("fixtures"))
    section = (ROOT / "README.md").read_text().split("\n## Adding a component\n")[1]
    blocks = re.findall(
        r"```(?:python|yaml)\n# (\S+?\.(?:py|yaml))\b[^\n]*\n(.*?)```", section, re.S
    )
    assert [path for path, _ in blocks[:2]] == ["my_loops.py", "my_conf/looping/last_again.yaml"]
    for path, text in [*blocks[:2], *NEW.items()]:
        place = copy / path
        assert not place.exists(), "a new component needs no edit of a file that is there"
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(text.lstrip("\n"))
    return copy


def run(copy: Path, *command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": str(copy)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(copy) -> Path:
    """A run of a few steps with all five at once."""
    chosen = ["looping=last_again", "looping.passes=3", "model/mixer=previous", "eval=late_half"]
    chosen += ["artifact/codec=inverted", "quant=int4_twice_mean", "lora.targets=[v_proj]"]
    line = ["--config-dir", "my_conf", *small(*chosen), "trainer.steps=4", "eval.passes=[1,3]"]
    run(copy, "-m", "recurgolf", *line, "hydra.run.dir=trained")
    return copy / "trained"


def test_five_new_components_train_pack_and_score_together(trained):
    described = json.loads((trained / "run.json").read_text())
    assert described["looping"] == {"kind": "last_again", "passes": 3}
    assert described["plugins"] == ["my_loops"]
    summary = json.loads((trained / "summary.json").read_text())
    assert set(summary["by_passes"]) == {"1", "3"}
    assert '"inverted"' in (trained / "ledger.json").read_text()


def test_the_packed_program_scores_their_file_alone_with_the_same_digits(trained, tmp_path):
    own = RunFolder(trained, Ended(0, "", ""))
    assert scored_alone(own, tmp_path)["late_half"]["val_bpb"] == own.summary["val_bpb"]


def test_the_tests_over_the_registry_and_over_conf_try_them_unasked(copy):
    names = ["previous", "inverted", "int4_twice_mean", "late_half", "every_registered_option"]
    tests = ["tests/test_conf.py", "tests/artifact/test_codecs.py", "-k", " or ".join(names)]
    out = run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests)
    passed = re.search(r"(\d+) passed", out)
    # Three tests over every YAML, and one over every option.
    assert passed is not None and int(passed.group(1)) >= 13, out
