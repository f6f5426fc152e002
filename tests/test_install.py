"""An installed package works from any folder: the YAML and the typing mark travel in the wheel."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from command_line import recurgolf_process

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.skipif(not importlib.util.find_spec("hatchling"), reason="the build needs hatchling")
def test_the_wheel_brings_its_yaml_and_works_without_the_checkout(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", tmp_path, ROOT], check=True, cwd=tmp_path, capture_output=True)
    (wheel,) = tmp_path.glob("recurgolf-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert "recurgolf/py.typed" in archive.namelist()
        packed = {name for name in archive.namelist() if name.endswith(".yaml")}
        archive.extractall(tmp_path / "site")
    assert packed == {
        f"recurgolf/conf/{path.relative_to(ROOT / 'conf')}"
        for path in (ROOT / "conf").rglob("*.yaml")
    }
    away = tmp_path / "away"
    away.mkdir()
    where = "import recurgolf.cli as c; print(c.conf_folder())"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    shown = subprocess.run(
        [sys.executable, "-c", where], env=env, cwd=away, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == str(tmp_path / "site" / "recurgolf" / "conf")
    ended = recurgolf_process("plan", "experiment=smoke", cwd=away, env=env)
    assert "headroom" in ended.finished().out


def test_the_module_and_the_script_are_the_same_command(tmp_path):
    script = Path(sys.executable).with_name("recurgolf")
    if not script.exists():
        pytest.skip("not installed as a package")
    by_script = recurgolf_process("--help", start=[str(script)], cwd=tmp_path).finished()
    assert by_script.out == recurgolf_process("--help", cwd=tmp_path).finished().out
