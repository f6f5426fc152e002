"""Files of a finished run that were edited, exchanged or added to: each is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from command_line import recurgolf
from smoke_runs import train

from recurgolf import seal
from recurgolf.artifact import StoreCodec, load, pack
from recurgolf.audit.accounts import limits_check
from recurgolf.audit.finished_run import _kept_scores, _limits, files_check, rescored_check
from recurgolf.audit.isolated import Rescored, _is_installed, rescore
from recurgolf.audit.scorer import Scored
from recurgolf.audit.scoring_process import Scoring
from recurgolf.budget import Budget
from recurgolf.quant.quantized_tensor import dequantize_state
from recurgolf.run import Run


@pytest.fixture
def folder(tmp_path):
    """A copy of a finished run."""
    return Path(shutil.copytree(train().path, tmp_path / "run"))


@pytest.fixture(scope="module")
def scoring():
    return Scoring(train().path)


@pytest.fixture(scope="module")
def facts(scoring):
    return scoring.facts()


@pytest.fixture(scope="module")
def again(facts):
    """What the counted files give alone."""
    return alone(train().path, facts)


def alone(folder, facts) -> Rescored:
    data, tokenizer = Path(facts["data"]), Path(facts["tokenizer"])
    return rescore(folder, facts["code"], data, tokenizer, facts["kind"])


def edit(path: Path, **changes) -> None:
    """Set values of a JSON file; a dotted name leads into it."""
    content = json.loads(path.read_text())
    for name, value in changes.items():
        node = content
        *parents, last = name.split("__")
        for parent in parents:
            node = node[parent]
        node[last] = value
    path.write_text(json.dumps(content))


def files_of(folder, scoring, facts):
    read = {name: json.loads((folder / f"{name}.json").read_text()) for name in ("run", "summary")}
    own = Run.read(folder).fingerprint
    facts = {**facts, "fingerprint": own}
    return files_check(folder, read["run"], read["summary"], facts, scoring.dataset)


def figures_of(folder, again, facts):
    path = folder / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else {}
    return rescored_check(summary, again, {}, facts, json.loads((folder / "run.json").read_text()))


def test_untouched_files_pass(folder, scoring, facts, again):
    assert files_of(folder, scoring, facts).verdict == "pass"
    found = figures_of(folder, again, facts)
    assert (found.verdict, found.number) == ("pass", 0.0)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("summary.json", {"val_bpb": 1.0}, "summary.json was changed"),
        ("summary.json", {"seconds__training": 0.1}, "summary.json was changed"),
        ("run.json", {"budget__artifact_bytes": 16_000_000}, "run.json was changed"),
        ("run.json", {"seed": 7}, "run.json was changed"),
        ("run.json", {"eval__seq_len": 32}, "run.json was changed"),
        ("ledger.json", {"code": {}}, "ledger.json was changed"),
    ],
)
def test_an_edited_file_breaks_the_seal(folder, scoring, facts, file, changes, words):
    edit(folder / file, **changes)
    found = files_of(folder, scoring, facts)
    assert found.verdict == "fail" and words in found.line
    if file == "run.json":
        assert "artifact.bin is of run" in found.line or "budget_bytes" in found.line
    # An evaluation behind an edit does not make it good.
    with seal.resealing(folder):
        (folder / "scores" / "other.npz").write_bytes(b"")
    assert words in files_of(folder, scoring, facts).line


def test_exchanged_removed_and_added_files(folder, scoring, facts):
    (folder / "artifact.bin").write_bytes((folder / "artifact.bin").read_bytes() + b"x")
    (folder / "score.py").unlink()
    (folder / "weights.bin").write_bytes(bytes(1_000_000))
    (folder / "scores" / "plain.npz").write_bytes(b"")
    line = files_of(folder, scoring, facts).line
    assert "artifact.bin was changed" in line and "score.py is gone" in line
    assert "scores/plain.npz was changed" in line and "weights.bin (1,000,000 bytes)" in line


def test_a_checkpoint_of_another_run(folder, scoring, facts):
    state = next((folder / "checkpoints").glob("step_*/state.json"))
    edit(state, step=0)
    assert "is not the one that the run ended on" in files_of(folder, scoring, facts).line
    shutil.rmtree(folder / "checkpoints")
    assert files_of(folder, scoring, facts).verdict == "pass"


def test_a_seal_that_was_taken_away_or_edited(folder, scoring, facts):
    edit(folder / "seal.json", signature="0" * 64)
    assert "signature" in files_of(folder, scoring, facts).line
    (folder / "seal.json").unlink()
    found = files_of(folder, scoring, facts)
    assert found.verdict == "fail" and "no seal.json" in found.line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"val_bpb": 1.0}, "val_bpb is 1.0"),
        ({"evals__plain__val_bpb": 1.0}, "summary.json says 1.0"),
        ({"evals__plain__tokens": 5000}, "summary.json says 5000"),
        ({"evals__plain__bytes": 10**6}, "summary.json says 1000000"),
        ({"val_tokens": 5000}, "val_tokens is 5000"),
    ],
)
def test_figures_that_the_counted_files_do_not_give(folder, facts, again, changes, words):
    """Sealed again by whoever edited them: scoring again is what proves a number."""
    edit(folder / "summary.json", **changes)
    seal.seal(folder)
    found = figures_of(folder, again, facts)
    assert found.verdict == "fail" and words in found.line


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("summary.json", {"val_bpb_raw": 1.0}, "says val_bpb_raw=1.0"),
        ("summary.json", {"evals__plain__val_bpb_raw": 1.0}, "says evals.plain.val_bpb_raw=1.0"),
        ("summary.json", {"bytes_model": 5}, "says bytes_model=5"),
        ("summary.json", {"bytes_code": 5}, "says bytes_code=5"),
        ("summary.json", {"within_budget": False}, "says within_budget=False"),
        ("summary.json", {"budget_bytes": 10**7}, "says budget_bytes=10000000"),
        ("summary.json", {"seed": 7}, "says seed=7"),
        ("summary.json", {"text__fingerprint": "0"}, "another validation text"),
        ("summary.json", {"fingerprint": "0"}, "summary.json is of run 0"),
        ("run.json", {"seed": 7}, "artifact.bin is of run"),
        ("run.json", {"eval__seq_len": 32}, "artifact.bin is of run"),
        ("run.json", {"budget__artifact_bytes": 10**7}, "says budget_bytes="),
        ("ledger.json", {"actual_bytes": 5}, "ledger.json says actual_bytes=5"),
    ],
)
def test_edits_under_a_new_seal(folder, scoring, facts, file, changes, words):
    """Whoever edits may also seal: what follows from other files does not follow any more."""
    edit(folder / file, **changes)
    seal.seal(folder)
    found = files_of(folder, scoring, facts)
    assert found.verdict == "fail" and words in found.line and "was changed" not in found.line


def test_scores_of_documents_that_were_not_measured(folder, scoring):
    """By them runs are compared."""
    text = scoring.scorers["plain"].text
    measured = {"plain": scoring.scorers["plain"].score(np.array(text.tokens))}
    assert not _kept_scores(folder, scoring.dataset, text, measured)
    with np.load(folder / "scores" / "plain.npz") as kept:
        arrays = dict(kept)
    arrays["nats"][3] -= 1
    np.savez(folder / "scores" / "plain.npz", **arrays)
    seal.seal(folder)
    assert "other sums than" in _kept_scores(folder, scoring.dataset, text, measured)[0]


def test_no_summary(folder, facts, again):
    (folder / "summary.json").unlink()
    found = figures_of(folder, again, facts)
    assert found.verdict == "fail" and "no summary.json" in found.line
    config = json.loads((folder / "run.json").read_text())
    assert _limits(folder, config, {}, "score").verdict == "fail"


def test_a_trial_that_scores_otherwise_than_the_counted_program(folder, facts, again):
    """A protocol that tells the audit's process from its own scoring."""
    summary = json.loads((folder / "summary.json").read_text())
    entry = {**summary["evals"]["plain"], "val_bpb": summary["val_bpb"] + 1e-12}
    one = Scored(np.zeros(1), np.ones(1), np.ones(1), entry)
    config = json.loads((folder / "run.json").read_text())
    found = rescored_check(summary, again, {"plain": one}, facts, config)
    assert found.verdict == "fail" and "plain: val_bpb is" in found.line


NEEDS = """
import socket
def tried(what):
    try:
        what()
    except Exception as error:
        return str(error)
needs = [
    lambda: __import__("tables"),
    lambda: open({path!r}).read(),
    lambda: __import__("recurgolf"),
    lambda: socket.create_connection(("127.0.0.1", 9)),
]
raise SystemExit(" | ".join(map(str, map(tried, needs))))
"""


def test_a_program_that_needs_what_is_not_counted(folder, facts):
    """A module beside it, a file elsewhere, the package itself, the network."""
    (folder / "tables.py").write_text("TABLE = 1")
    (folder / "score.py").write_text(NEEDS.format(path=str(folder / "tables.py")))
    module, file, package, network = alone(folder, facts).error.split(" | ")
    assert "No module named 'tables'" in module
    assert "tables.py, which is not counted" in file
    assert "No module named 'recurgolf'" in package
    assert "network" in network
    said = _is_installed("No module named 'hydra.x'")
    assert "copy into the plugin what it uses of hydra" in said
    assert _is_installed("No module named 'tables'") == ""


def test_an_artifact_behind_a_link_is_counted_in_full(folder):
    path = folder / "artifact.bin"
    path.rename(folder.parent / "elsewhere.bin")
    path.symlink_to(folder.parent / "elsewhere.bin")
    with (folder.parent / "elsewhere.bin").open("ab") as file:
        file.write(bytes(10**6))
    assert "over the budget" in limits_of(folder).line


def limits_of(folder):
    config = json.loads((folder / "run.json").read_text())
    return _limits(folder, config, json.loads((folder / "summary.json").read_text()), "score")


@pytest.mark.slow
def test_a_score_that_is_no_number_is_printed_by_no_program(folder, facts):
    """Weights that are finite, and whose products are not."""
    held = load(folder / "artifact.bin")
    name = "blocks.0.mixer.o_proj.weight"
    tensors = {**held.tensors, name: dequantize_state(held.tensors)[name].sign() * 3e38}
    pack(folder / "artifact.bin", held.metadata, tensors, StoreCodec())
    found = alone(folder, facts)
    assert not found.entry and "not JSON compliant" in found.error
    ended = recurgolf("evaluate", folder, "--json", cwd=folder)
    assert ended.code == 1 and "NaN" not in ended.out
    ended = recurgolf("audit", folder, cwd=folder)
    assert ended.code == 1 and "Traceback" not in ended.out + ended.err


def test_an_honest_ledger_passes(folder):
    found = limits_of(folder)
    assert found.verdict == "pass" and found.number is not None and 0 < found.number < 1


def test_calibration_behind_the_clock(folder):
    cap = Run.read(folder).budget.train_seconds
    assert cap is not None
    edit(folder / "summary.json", seconds__training=cap - 9, seconds__calibration=5.0)
    assert limits_of(folder).verdict == "pass"
    edit(folder / "summary.json", seconds__training=cap)
    late = limits_of(folder)
    assert late.verdict == "fail" and "calibration 5.0" in late.line


def test_training_beyond_its_cap(folder):
    cap = Run.read(folder).budget.train_seconds
    edit(folder / "summary.json", seconds__training=cap + 30)
    assert limits_of(folder).verdict == "fail"


def test_an_artifact_over_the_budget_or_exchanged_since(folder):
    with (folder / "artifact.bin").open("ab") as file:
        file.write(bytes(10))
    found = limits_of(folder)
    assert found.verdict == "fail" and "summary.json says" in found.line
    edit(folder / "run.json", budget__artifact_bytes=1000)
    assert "over the budget" in limits_of(folder).line
    sizes = {"artifact.bin": folder / "artifact.bin"}
    assert limits_check(Budget(artifact_bytes=1000), {}, 1.0, sizes, {}).verdict == "fail"


def test_a_packed_folder_is_sealed_and_an_evaluation_keeps_the_seal(tmp_path):
    recurgolf("pack", train().path, tmp_path / "packed", cwd=tmp_path).finished()
    before = seal.signature_of(tmp_path / "packed")
    assert before is not None
    recurgolf("evaluate", tmp_path / "packed", "eval=sliding", cwd=tmp_path).finished()
    assert seal.signature_of(tmp_path / "packed") not in (None, before)


def test_what_is_known_of_a_run_s_audit(folder):
    assert seal.audit_state(folder) == "not audited"
    signature = seal.signature_of(folder)
    checks = {"bytes": {"verdict": "pass"}}
    told = {"passed": True, "checks": checks, "signature": signature}
    (folder / "audit.json").write_text(json.dumps(told))
    assert seal.audit_state(folder) == "passed"
    edit(folder / "summary.json", val_bpb=1.0)
    assert seal.audit_state(folder).startswith("not audited as it is now: summary.json")
    edit(folder / "audit.json", checks__bytes__verdict="fail", passed=False)
    assert seal.audit_state(folder) == "failed: bytes"


def test_an_evaluation_leaves_the_audited_score_audited(folder):
    """It adds a score beside, or measures one again; an edit is an edit all the same."""
    told = {"passed": True, "checks": {}, "signature": None, "audited": seal.audited(folder)}
    (folder / "audit.json").write_text(json.dumps(told))
    assert seal.audit_state(folder) == "passed"
    recurgolf("evaluate", folder, "eval=plain", "eval=sliding", cwd=folder).finished()
    assert "sliding" in json.loads((folder / "summary.json").read_text())["evals"]
    assert seal.audit_state(folder) == "passed"
    edit(folder / "summary.json", evals__plain__val_loss=1.0)
    assert "summary.json was changed" in seal.audit_state(folder)
    seal.seal(folder)
    assert seal.audit_state(folder) == "not audited as it is now"


def test_the_command_says_what_failed_and_ends_with_1(folder):
    edit(folder / "summary.json", val_bpb=1.0, seconds__training=1e6)
    ended = recurgolf("audit", folder, "--positions", "1", cwd=folder.parent)
    assert ended.code == 1, (ended.out, ended.err)
    assert "failed: limits, rescored, files" in ended.out
    written = json.loads((folder / "audit.json").read_text())
    assert not written["passed"] and written["checks"]["limits"]["verdict"] == "fail"
    assert seal.audit_state(folder) == "failed: limits, rescored, files"


@pytest.mark.slow
def test_an_audit_that_cannot_be_kept_is_shown_all_the_same(folder):
    """A folder stands where the file would go, so that the system itself refuses the write."""
    (folder / "audit.json").mkdir()
    ended = recurgolf("audit", folder, cwd=folder.parent)
    assert ended.code == 0, ended.out + ended.err
    assert "audit: passed" in ended.out
    assert f"audit.json is not kept in {folder}" in " ".join(ended.out.split())


def test_a_program_of_another_version_and_foreign_plugins_need_trust(folder):
    program = (folder / "score.py").read_bytes()
    # One byte of another value: as long as before.
    (folder / "score.py").write_bytes(program[:-2] + bytes([program[-2] ^ 1]) + program[-1:])
    seal.seal(folder)
    ended = recurgolf("audit", folder, "--positions", "1", "--json", cwd=folder.parent)
    checks = json.loads(ended.out.splitlines()[-1])["checks"]
    assert ended.code == 1 and "run only with --trust" in checks["rescored"]["line"]
    (folder / "sneaky.py").write_text("open('ran', 'w').close()\n")
    edit(folder / "run.json", plugins=["sneaky"])
    why = recurgolf("audit", ".", cwd=folder).refused()
    assert "sneaky" in why and "--trust" in why and not (folder / "ran").exists()
