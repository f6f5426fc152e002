"""Every JSON file, and every answer that is JSON, passes through one writer of strict JSON; files
that a user may have damaged, through one reader."""

import ast

from source_code import modules_with

ELSEWHERE = {
    "disk.py": "the writer itself",
    "record.py": "turns NaN into words that it reads back, and allows none in JSON",
    "run.py": "a Run, whose limits let only finite numbers in; digests",
    "wandb_tracker.py": "a pipe between two processes of this program",
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


def of_json(node, *names):
    """Whether this is `json.<name>`."""
    return (
        isinstance(node, ast.Attribute)
        and node.attr in names
        and isinstance(node.value, ast.Name)
        and node.value.id == "json"
    )


def reads_a_file(node):
    """Whether this is `json.loads(path.read_text())` or its like."""
    return (
        isinstance(node, ast.Call)
        and of_json(node.func, "load", "loads")
        and any(
            isinstance(inner, ast.Attribute) and inner.attr.startswith("read_")
            for inner in ast.walk(node)
        )
    )


def test_nothing_else_writes_json():
    assert modules_with(lambda node: of_json(node, "dump", "dumps")) == set(ELSEWHERE)


def test_nothing_else_reads_a_json_file():
    assert modules_with(reads_a_file) == set(READ_ELSEWHERE)
