"""Files are written beside their place, synced and renamed by one writer; nobody else opens any."""

import ast

from source_code import modules_with

OTHERS = {
    "disk.py": "the writer itself",
    "audit/isolated.py": "a temporary folder",
    "audit/scoring_process.py": "a temporary folder",
    "compare/pictures.py": "in memory",
    "compare/search.py": "the console of a trial, while it runs",
    "data/cache.py": "notes under a name of each process's own, renamed; passed over if damaged",
    "eval/several.py": "in memory",
    "log.py": "lines that are added to a log",
    "record.py": "lines that are added to metrics.jsonl, each in one write",
    "standalone/code.py": "the exported program's copy of itself, with no byte to spare",
    "streams.py": "the null device",
    "training/checkpoint.py": "in a draft of the folder, synced and renamed as a whole",
    "training/launch.py": "an empty mark that a run was begun",
    "training/supervise.py": "notes between processes of one run, in a temporary folder",
    "tracker.py": "an empty mark that a run id is taken",
    "wandb_tracker.py": "the null device",
}
WRITERS = {
    "write_text",
    "write_bytes",
    "touch",
    "savez",
    "savez_compressed",
    "save_file",
    "savefig",
}
WRITERS |= {"copy", "copyfile", "copy2", "copytree", "copyfileobj", "tofile", "to_csv"}
MODULES = {"shutil", "np", "torch"}
"""Whose `copy` and `save` write; those of tensors and dicts do not."""


def writes(call: ast.Call) -> bool:
    """Whether a call makes or changes a file."""
    function = call.func
    name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
    owner = getattr(getattr(function, "value", None), "id", "")
    told = [n.value for n in ast.walk(call) if isinstance(n, ast.Constant)]
    flags = {getattr(n, "attr", "") for n in ast.walk(call)}
    if name == "open":
        modes = [text for text in told if isinstance(text, str) and set(text) <= set("rwaxbt+")]
        return any(set(mode) & set("wax+") for mode in modes) or bool(
            flags & {"O_WRONLY", "O_RDWR", "O_CREAT"}
        )
    if name in ("copy", "save", "dump"):
        return owner in MODULES or name == "dump"
    return name in WRITERS


def test_nobody_else_opens_a_file_for_writing():
    assert modules_with(lambda node: isinstance(node, ast.Call) and writes(node)) == set(OTHERS)


def test_the_search_knows_the_ways_of_writing():
    """Each of these would be found."""
    for line in (
        *("open(path, 'w')", "path.open('ab')", "open(p, mode='r+')", "path.write_text(t)"),
        *("shutil.copyfile(a, b)", "np.savez(p, a=a)", "json.dump(a, file)", "torch.save(a, p)"),
        "os.open(p, os.O_WRONLY | os.O_CREAT)",
    ):
        assert writes(ast.parse(line, mode="eval").body), line
    for line in ("open(path)", "path.open('rb')", "os.open(p, os.O_RDONLY)", "words.copy()"):
        assert not writes(ast.parse(line, mode="eval").body), line
