"""recurgolf in a real Jupyter kernel: what stands below a cell."""

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from smoke_runs import small

import recurgolf

manager = pytest.importorskip("jupyter_client.manager")
pytest.importorskip("ipykernel")


@dataclass
class Shown:
    """What a cell shows.

    Attributes:
        printed: all that was written to the standard streams.
        displays: id of a display -> what stood in it, one after another; None: those that no
            update can reach.
        value: of the cell's last line.
    """

    printed: str = ""
    displays: dict[str | None, list[str]] = field(default_factory=dict)
    value: str = ""

    def add(self, message: dict) -> None:
        content = message["content"]
        match message["msg_type"]:
            case "stream":
                self.printed += content["text"]
            case "display_data" | "update_display_data":
                place = self.displays.setdefault(content["transient"].get("display_id"), [])
                place.append(content["data"]["text/plain"])
            case "execute_result":
                self.value = content["data"]["text/plain"]
            case "error":
                raise AssertionError("\n".join(content["traceback"]))


class Notebook:
    """A kernel and its cells."""

    def __init__(self, client):
        self.client = client

    def cell(self, *lines: str) -> Shown:
        shown = Shown()
        self.client.execute_interactive("\n".join(lines), timeout=120, output_hook=shown.add)
        return shown

    def train(self, *overrides: str, quiet: bool = False) -> Shown:
        """A cell that trains a short run; afterwards `folder` is the run's."""
        return self.cell(
            f"run = recurgolf.compose({small('trainer.steps=8', *overrides)})",
            "run.trainer.val_every = 4",
            f"summary = recurgolf.train(run, quiet={quiet})",
            "summary.folder",
        )


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> Iterator[Notebook]:
    kernel = manager.KernelManager(kernel_name="python3")
    # The kernel of this very Python, whatever is installed for the user.
    kernel.kernel_spec.argv[0] = sys.executable
    paths = [str(Path(recurgolf.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    # In a test a kernel does not watch what its child processes write; in a notebook it does.
    environment.pop("PYTEST_CURRENT_TEST", None)
    kernel.start_kernel(cwd=str(tmp_path_factory.mktemp("notebook")), env=environment)
    client = kernel.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        running = Notebook(client)
        running.cell("import recurgolf", "from recurgolf import terminal")
        yield running
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)


def test_a_run_has_one_bar_that_is_updated_and_every_line_once(notebook):
    notebook.cell("terminal.SECONDS_BETWEEN_UPDATES = 0.0")
    shown = notebook.train()
    (place,) = shown.displays.values()
    assert place[0].split()[0] == "training" and place[0].endswith("0/8")
    steps = [text for text in place if text.startswith("training")]
    assert len(set(steps)) > 8 and "8/8" in steps[-1] and "loss" in steps[-1]
    assert any(text.startswith("scoring") for text in place)
    assert shown.printed.count("bytes by component") == 1
    assert shown.printed.count("everything in") == 1
    assert "\x1b" not in shown.printed and "\r" not in shown.printed


def test_quiet_shows_the_result_of_the_cell_alone_and_the_loaded_run_its_text(notebook):
    shown = notebook.train(quiet=True)
    assert shown == Shown(value=shown.value)
    assert "val_bpb" in notebook.cell(f"print(open({shown.value} + '/train.log').read())").printed
    shown = notebook.cell(
        "recurgolf.load(summary.folder).sample('The history of', tokens=12, seed=1)"
    )
    assert shown.value.startswith("'The history of") and len(shown.value) > len("'The history of'")
    assert not shown.printed and not shown.displays


@pytest.mark.slow
def test_several_ranks_write_lines_without_control_codes(notebook):
    shown = notebook.train("trainer.devices=2")
    assert not shown.displays
    assert "step     8/8" in shown.printed and "2 ranks" in shown.printed
    assert "\x1b" not in shown.printed and "\r" not in shown.printed
