"""Runs started by others: two nodes under torchrun, jobs of a Slurm cluster, and the GPU check."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from command_line import recurgolf, recurgolf_process
from processes import on_ranks
from safetensors.torch import load_file
from smoke_runs import RunFolder, small, train
from torch.testing import assert_close

from recurgolf.conf import conf_folder
from recurgolf.config import ConfigError
from recurgolf.training import checkpoint, launch
from recurgolf.training.distributed import file_ranks

EXACT = ("optimizer.ns_dtype=float32", "trainer.steps=8", "trainer.log_every=1")
SCRIPTS = Path(__file__).parents[2] / "scripts"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def weights(run: RunFolder) -> dict:
    found = load_file(checkpoint.newest(run.path / "checkpoints") / checkpoint.TENSORS)
    return {name: tensor for name, tensor in found.items() if name.startswith("model/")}


@pytest.mark.slow
def test_two_nodes_that_meet_by_rendezvous_match_one_rank(tmp_path):
    """Two launchers on this machine, each with a rank of its own."""
    port = free_port()
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1"),
        *("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--rdzv_id=golf"),
        *("-m", "recurgolf", *small(*EXACT, "trainer.devices=2"), "hydra.run.dir=two_nodes"),
    ]
    nodes = [
        subprocess.Popen(
            [*command[:3], f"--node_rank={number}", "--local_addr=127.0.0.1", *command[3:]],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in (0, 1)
    ]
    said = [node.communicate(timeout=280)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    two, one = RunFolder(tmp_path / "two_nodes", None), train(*EXACT)
    assert two.losses == pytest.approx(one.losses, abs=1e-5)
    for name, tensor in weights(one).items():
        assert_close(weights(two)[name], tensor, rtol=0, atol=1e-5)
    assert two.summary["environment"]["ranks"] == 2


def on_a_disk_of_its_own(rank: int, count: int, place: str) -> None:
    launch.SHARED_SECONDS = 0.2
    with file_ranks("gloo", f"{place}/rendezvous", rank, count, 60) as ranks:
        shared, own = Path(place, "shared"), Path(place, f"node{rank}")
        for folder in (shared, own):
            folder.mkdir(exist_ok=True)
        launch.check_shared(shared, ranks)
        with pytest.raises(ConfigError, match=f"another folder on {socket.gethostname()}"):
            launch.check_shared(own, ranks)
        ranks.barrier()
        assert not [*shared.iterdir(), *own.iterdir()]


def test_nodes_that_do_not_share_the_run_folder_are_refused(tmp_path):
    on_ranks(2, on_a_disk_of_its_own, str(tmp_path))


def test_the_slurm_launcher_has_the_plugin_s_own_keys():
    conf = pytest.importorskip("hydra_plugins.hydra_submitit_launcher.config")
    for name, own in (("slurm", conf.SlurmQueueConf), ("slurm_here", conf.LocalQueueConf)):
        ours = yaml.safe_load((conf_folder() / "hydra" / "launcher" / f"{name}.yaml").read_text())
        assert ours["_target_"] == own._target_
        assert set(ours) - {"_target_"} <= set(own.__dataclass_fields__)


@pytest.mark.slow
def test_a_sweep_by_submitit_ends_in_the_same_table(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    asked = ["-m", "hydra/launcher=slurm_here", *small("seed=1,2", "trainer.steps=4")]
    ended = recurgolf_process(*asked, "hydra.sweep.dir=sweep", cwd=tmp_path)
    assert ended.code == 0, ended.err
    found = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [job["status"] for job in found["jobs"]] == ["finished", "finished"]
    assert found["groups"][0]["seeds"] == [1, 2]
    submitit = tmp_path / "sweep" / ".submitit"
    assert submitit.is_dir() and not [p for p in submitit.rglob("*") if "%" in p.name]


def test_slurm_on_a_machine_without_it_is_refused_in_a_line(tmp_path):
    asked = ["-m", "hydra/launcher=slurm", *small("seed=1,2")]
    message = recurgolf(*asked, cwd=tmp_path, env={"PATH": str(tmp_path)}).refused()
    assert "has no srun" in message and "slurm_here" in message
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_the_gpu_check_runs_its_path_on_a_cpu(tmp_path):
    data = [word for word in small() if word.startswith("data")]
    done = subprocess.run(
        [
            *(sys.executable, SCRIPTS / "gpu_check.py", "--device", "cpu", "--minutes", "0.03"),
            *("--backend", "eager", "--json", tmp_path / "found.json", *data),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert all(case["passed"] for case in found["parity"].values())
    assert any(case["bfloat16"] != 0 for case in found["parity"].values())
    for speed in found["speed"].values():
        assert speed["steps"] >= 1
        assert speed["recompiled"] == 0
        assert speed["graphs"] >= 1
        assert speed["tokens_per_second"] > 0
    assert "ms/step" in done.stdout
