"""README and docs/: short enough, no dead link, and Python that runs."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from smoke_runs import small

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_readme_is_for_a_newcomer():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 1200
    headings = re.findall(r"^## (.*)", text, re.M)
    assert headings.index("Two commands") == 0
    assert {"Use from Python", "Adding a component"} <= set(headings[:5])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()) if "://" not in link]
    for link in links:
        file, _, heading = link.partition("#")
        target = page.parent / file
        assert target.exists(), link
        titles = re.findall(r"^#+ (.*)", target.read_text(), re.M) if heading else []
        assert not heading or heading in [t.lower().replace(" ", "-") for t in titles], link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_commands_may_be_typed_into_zsh(page, tmp_path):
    """Which takes a # for a word, and refuses a * or [ that matches no file."""
    if shutil.which("zsh") is None:
        pytest.skip("there is no zsh: commands of the documents are not typed into it")
    blocks = re.findall(r"^```\n(.*?)```", page.read_text(), re.S | re.M)
    lines = [line for block in blocks for line in block.splitlines()]
    lines = [line for line in lines if re.match(r"(recurgolf|make) (?! )", line)]
    (tmp_path / "outputs/sweeps/rank").mkdir(parents=True)
    stubs = 'recurgolf() { print -r -- "<$*>" }; make() { print -r -- "<$*>" }\n'
    typed = stubs + "B=(b) L=(l)\n" + "\n".join(lines) + "\nexit\n"
    done = subprocess.run(
        ["zsh", "-f", "-i", "-s"], input=typed, capture_output=True, text=True, cwd=tmp_path
    )
    assert "no matches found" not in done.stderr
    assert len(done.stdout.splitlines()) == len(lines), done.stderr
    assert " # " not in done.stdout


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_its_python_runs(page, tmp_path, monkeypatch):
    """The first blocks of a page, in order, on a text that is trained on in a moment."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / page).read_text()
    blocks = [b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "recurgolf." in b]
    program = "".join(block for block in blocks if not block.startswith("# "))
    quick = shlex.join(small("looping=cycle", "looping.passes=3", "trainer.steps=2"))
    program = program.replace('"experiment=smoke lora.rank=2"', repr(quick))
    program = program.replace("trainer.steps = 200", "trainer.steps = 2")
    names: dict = {}
    exec(compile(program, page, "exec"), names)
    assert names["model"].evaluate().val_bpb == names["summary"].val_bpb
