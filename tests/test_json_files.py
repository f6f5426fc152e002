"""Every JSON file, and every answer that is JSON, passes through one writer of strict JSON."""

import ast
from pathlib import Path

import recurgolf

PACKAGE = Path(recurgolf.__file__).parent
ELSEWHERE = {
    "disk.py": "the writer itself",
    "record.py": "turns NaN into words that it reads back, and allows none in JSON",
    "run.py": "a Run, whose limits let only finite numbers in; digests",
    "tracker.py": "a pipe between two processes of this program",
    "wandb_keeper.py": "the other end of that pipe",
    "seal.py": "digests",
    "artifact/container.py": "allows no NaN in a header",
    "artifact/ledger.py": "counted to the byte",
    "artifact/score.py": "prints, with no byte to spare",
    "audit/scoring_process.py": "a pipe between two processes of this program",
    "compare/board.py": "allows no NaN",
    "compare/runs.py": "a setting, shown",
    "counted/code.py": "names of modules",
    "data/cache.py": "keys and counts; digests",
    "data/export.py": "digests",
    "eval/several.py": "settings of a protocol, as a Run's",
    "training/checkpoint.py": "what the writer has made strict",
    "training/scoring.py": "a key",
    "training/supervise.py": "words",
}


def dumps_in(path):
    tree = ast.parse(path.read_text())
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in ("dump", "dumps")
        and isinstance(node.value, ast.Name)
        and node.value.id == "json"
    ]


def test_nothing_else_writes_json():
    found = {str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if dumps_in(p)}
    assert found == set(ELSEWHERE)
