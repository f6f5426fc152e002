"""Every JSON file, and every answer that is JSON, passes through one writer of strict JSON; files
that a user may have damaged, through one reader."""

import ast
from pathlib import Path

import recurgolf

PACKAGE = Path(recurgolf.__file__).parent
ELSEWHERE = {
    "disk.py": "the writer itself",
    "record.py": "turns NaN into words that it reads back, and allows none in JSON",
    "run.py": "a Run, whose limits let only finite numbers in; digests",
    "wandb_tracker.py": "a pipe between two processes of this program",
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

READ_ELSEWHERE = {
    "disk.py": "the reader itself",
    "adapters/files.py": "of another program, named where it is none",
    "data/corpus.py": "the embedded text",
    "data/cache.py": "a note that is passed over where it is damaged",
    "data/dataset.py": "a manifest, named where it is damaged",
    "data/export.py": "a manifest; a folder without one is made anew",
    "data/tokenizer.py": "a tokenizer, named where it is none",
    "training/checkpoint.py": "whole by its checksum, or damaged by its name",
    "training/finish.py": "written a moment ago; no byte to spare",
    "training/supervise.py": "notes between two processes of this program",
    "trust.py": "of an installed distribution",
    "verbs/import_checkpoint.py": "of another program, named where it is none",
}


def uses_in(path, *names):
    """What is called `json.<name>` in a module, with its call where it is one."""
    tree = ast.parse(path.read_text())
    calls = {node.func: node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return [
        calls.get(node, node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr in names
        and isinstance(node.value, ast.Name)
        and node.value.id == "json"
    ]


def test_nothing_else_writes_json():
    found = {
        str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*.py") if uses_in(p, "dump", "dumps")
    }
    assert found == set(ELSEWHERE)


def test_nothing_else_reads_a_json_file():
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for call in uses_in(path, "load", "loads")
        if any(
            isinstance(node, ast.Attribute) and node.attr.startswith("read_")
            for node in ast.walk(call)
        )
    }
    assert found == set(READ_ELSEWHERE)
