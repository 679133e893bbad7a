"""The doctor's checks of GPUs, with a script in place of the driver's program, and with the torch that is installed."""

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from agentmesh import Agent, Crew, DeviceQueue, Queue
from agentmesh.cli import checks
from agentmesh.cli.checks import Check, Driver, Gpu, _judge_probe, check_gpus, check_queues, check_torch, query_driver
from agentmesh.worker import gpus as devices

L4 = Gpu("0", "NVIDIA L4", "23034", "22500", "8.9")
TABLE = "| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15      CUDA Version: 12.4     |"
SMI = f"""case "$1" in
--query-gpu=index) printf '0\\n1\\n' ;;
*compute_cap*) printf '550.54.15, 0, NVIDIA L4, 23034, 22500, 8.9\\n550.54.15, 1, Tesla T4, 15360, [N/A], 7.5\\n' ;;
*) echo '{TABLE}' ;;
esac"""
OLD = f"""case "$1" in
*compute_cap*) echo 'Field "compute_cap" is not a valid field to query.'; exit 2 ;;
--query*) echo '470.182.03, 0, NVIDIA A10, 22731, 22000' ;;
*) echo '{TABLE.replace("12.4", "11.4")}' ;;
esac"""
AWAY = 'echo "NVIDIA-SMI has failed because it couldn\'t communicate with the NVIDIA driver."; exit 9'


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts a script in the place of nvidia-smi."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(script: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


def told(findings: Iterable[Check]) -> list[str]:
    """Each finding as it is read."""
    return [f"{'ok' if f.ok else 'error'} {f.message}{' -> ' + f.hint if f.hint else ''}" for f in findings]


def test_the_cards_as_the_driver_tells_them(smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    smi(SMI)
    assert told(check_gpus(query_driver())) == [
        "ok GPU driver 550.54.15, which supports CUDA up to 12.4",
        "ok GPU 0: NVIDIA L4, 23.6 GB of 24.2 free, compute capability 8.9",
        "ok GPU 1: Tesla T4, ? GB of 16.1 free, compute capability 7.5: slow, because it has no bfloat16 in hardware",
    ]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert "CUDA_VISIBLE_DEVICES='1'" in told(check_gpus(query_driver()))[-1]


def test_an_old_driver_tells_less(smi: Callable[[str], None]) -> None:
    smi(OLD)
    assert query_driver() == Driver("470.182.03", "11.4", [Gpu("0", "NVIDIA A10", "22731", "22000", "")])


def test_a_driver_that_does_not_answer_is_a_finding(smi: Callable[[str], None]) -> None:
    smi(AWAY)
    (only,) = told(check_gpus(query_driver()))
    assert only.startswith("error nvidia-smi finds no GPU: NVIDIA-SMI has failed because it couldn't")
    assert "-> load or reinstall NVIDIA's driver" in only


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    assert told(check_gpus(query_driver())) == ["ok GPUs: none (nvidia-smi not found); local models run on the CPU"]
    monkeypatch.setattr(checks.subprocess, "run", lambda *args, **kwargs: pytest.fail("torch was loaded for nobody"))
    assert told(check_torch(None, needed=False)) == []


def test_what_this_torch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (only,) = told(check_torch(Driver("550", "12.4", [L4]), needed=True))
    assert only.endswith("; attention agentmesh_paged")
    assert only.startswith(f"ok torch {importlib.metadata.version('torch')}, for the CPU: weights in ")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setattr(checks.sys, "executable", "/bin/false")
    (only,) = told(check_torch(None, needed=True))
    assert only.startswith("error torch ")
    assert "does not work" in only


TRIED = {"flash_attention_2": "ImportError: no such symbol", "agentmesh_varlen": "", "agentmesh_paged": ""}
GPU = {"name": "NVIDIA L4", "capability": "8.9", "fails": "", "attention": TRIED}


def said(**other: Any) -> dict[str, Any]:
    """As gpu.probe says it, of a machine where all is well."""
    well = {"torch": "2.13.0", "cuda": "12.8", "complaint": "", "bfloat16": True, "attention": {"agentmesh_paged": ""}}
    return well | {"gpus": [GPU]} | other


@pytest.mark.parametrize(
    ("cuda", "index"),
    [("11.4", "cu118"), ("12.4", "cu126"), ("12.7", "cu126"), ("12.9", "cu128"), ("13.2", "cu130"), ("14.0", "cu130"), ("", "cu130")],
)  # fmt: skip
def test_a_cpu_build_beside_a_gpu_is_a_finding_that_names_the_index(cuda: str, index: str) -> None:
    (only,) = told(_judge_probe(said(torch="2.13.0+cpu", cuda="", gpus=[]), Driver("550", cuda, [L4])))
    assert only == (
        "error torch 2.13.0+cpu is a build for CPUs, and there is a GPU here -> pip uninstall torch, then: "
        f"pip install torch --index-url https://download.pytorch.org/whl/{index}"
    )


def test_what_torch_makes_of_the_cards() -> None:
    at = Driver("550", "12.8", [L4, L4._replace(number="1")])
    assert told(_judge_probe(said(), at)) == [
        "ok torch 2.13.0, made for CUDA 12.8, sees 1 of 2 GPUs",
        "ok NVIDIA L4, torch's GPU 0: attention agentmesh_varlen (flash_attention_2: ImportError: no such symbol)",
    ]
    (_, none) = told(_judge_probe(said(gpus=[GPU | {"attention": {"agentmesh_paged": "it is off by 1"}}]), at))
    assert none.startswith(
        "error NVIDIA L4, torch's GPU 0: no attention works (agentmesh_paged: it is off by 1) -> install"
    )
    (blind,) = told(_judge_probe(said(gpus=[], complaint="The NVIDIA driver on your system is too old"), at))
    assert blind.startswith(
        "error torch 2.13.0, made for CUDA 12.8, sees no GPU: The NVIDIA driver on your system is too"
    )
    assert "update the driver to one that supports CUDA 12.8" in blind
    gpu = GPU | {"name": "Tesla K80", "capability": "3.7", "fails": "RuntimeError: no kernel image is available"}
    assert told(_judge_probe(said(gpus=[gpu]), at))[1].startswith(
        "error torch 2.13.0 cannot compute on Tesla K80, its GPU 0 of compute capability 3.7: RuntimeError: no kernel image"
    )


def test_queues_whose_devices_or_models_are_not_here(
    smi: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AGENTMESH_CACHE", str(tmp_path))

    class Asker(Agent):
        """Asks."""

    def of(queue: Queue) -> list[str]:
        return told(check_queues(Crew(Asker(), queues=[Queue("main"), queue])))

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert of(DeviceQueue("gpu", model="m", devices=[3])) == [
        "error queue 'gpu' wants GPU 3 and this machine has none -> name GPUs of this machine, or write devices='all'"
    ]
    missing = "error queue 'gpu': model 'm' is not here -> agentmesh models pull m"
    assert of(DeviceQueue("gpu", model="m")) == [missing, "ok queue 'gpu': a worker with model 'm' on the CPU"]
    beside = "ok queue 'gpu': encoder 'e' is not here -> agentmesh models pull e, unless the hub's own cache has it"
    assert of(DeviceQueue("gpu", model="m", embed="local:e"))[1] == beside
    smi(SMI)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert of(DeviceQueue("gpu", model="m"))[1] == "ok queue 'gpu': a worker with model 'm' on each of GPU 0, 1"


def test_the_command(smi: Callable[[str], None], tmp_path: Path) -> None:
    smi(SMI)
    (tmp_path / "crew.py").write_text(
        "from agentmesh import *\nclass Asker(Agent):\n    'Asks.'\n    model = 'local:m'\n"
        "crew = Crew(Asker(), queues=[Queue('main'), DeviceQueue('gpu', model='m', devices=[2])])\n"
    )
    argv = [sys.executable, "-m", "agentmesh.cli.main", "doctor"]
    env = {**os.environ, "AGENTMESH_HOME": str(tmp_path / "home"), "AGENTMESH_CACHE": str(tmp_path / "cache")}
    env["AGENTMESH_MODEL"] = "openai:some"
    done = subprocess.run([*argv, "crew.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 4
    assert "ok    GPU 0: NVIDIA L4" in done.stdout
    assert f"torch {importlib.metadata.version('torch')}" in done.stdout
    assert "error queue 'gpu' wants GPU 2 and this machine has 2\n" in done.stdout
    smi(AWAY)
    argv[1:1] = ["-X", "importtime"]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, "| torch" in done.stderr) == (4, False)  # nobody needs it: it costs two seconds
