"""What every test shares: one thread, one data cache, no writing outside its own folder."""

import os
import signal

import pytest
import torch
from workers import shared_folder, turn

torch.set_num_threads(1)
# Under nohup or a service SIGHUP is ignored, which runs respect; tests that send it start here.
signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item):
    """Tests marked `serial` have the machine to themselves, fixtures included."""
    folder = shared_folder(item.config._tmp_path_factory)
    with turn(folder, alone=item.get_closest_marker("serial") is not None):
        return (yield)


@pytest.fixture(autouse=True)
def own_folders(tmp_path_factory, monkeypatch):
    """W&B and matplotlib keep their files inside the test session's temporary folder."""
    base = tmp_path_factory.getbasetemp() / "home"
    for name in (
        "WANDB_DIR",
        "WANDB_DATA_DIR",
        "WANDB_CACHE_DIR",
        "WANDB_CONFIG_DIR",
        "MPLCONFIGDIR",
    ):
        folder = base / name.lower()
        folder.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory):
    """One data cache for the whole session and all of its workers, empty at its start."""
    before = os.environ.get("RECURGOLF_CACHE")
    cache = shared_folder(tmp_path_factory) / "cache"
    cache.mkdir(exist_ok=True)
    os.environ["RECURGOLF_CACHE"] = str(cache)
    yield
    if before is None:
        del os.environ["RECURGOLF_CACHE"]
    else:
        os.environ["RECURGOLF_CACHE"] = before
