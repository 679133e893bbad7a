"""What `agentmesh doctor` checks of this machine: GPUs, their driver, and what torch makes of them. Loads no torch."""

import importlib.metadata
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from agentmesh.definitions.crew import Crew
from agentmesh.errors import ConfigError
from agentmesh.hub.cache import is_installed
from agentmesh.runtime.process_exit import DONE, ENVIRONMENT
from agentmesh.worker.gpus import CPU, devices_of, nvidia_smi


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at; with `ok` a `mend` is only for those who need it."""

    ok: bool
    what: str
    fix: str = ""


def print_checks(findings: Iterable[Check]) -> int:
    """Print each as it comes; 0 when nothing needs mending."""
    all_ok = True
    for finding in findings:
        all_ok = all_ok and finding.ok
        mend = f"\n      -> {finding.fix}" if finding.fix else ""
        print(f"{'ok  ' if finding.ok else 'help'}  {finding.what}{mend}", flush=True)
    return DONE if all_ok else ENVIRONMENT


# ---- The doctor's look at GPUs ------------------------------------------------------------------

PROBE_S = 60.0
TORCH_CUDAS = ((11, 8), (12, 6), (12, 8), (13, 0))  # torch's own indexes, oldest first
TORCH_INDEX = "https://download.pytorch.org/whl/"
BFLOAT16_FROM = 8.0  # compute capability
MIB_A_GB = 2**20 / 1e9


class Gpu(NamedTuple):
    """A GPU as the driver knows it; `capability` is "" where an old driver does not tell."""

    number: str
    name: str
    total: str
    free: str
    capability: str


class Driver(NamedTuple):
    """The driver and its GPUs.

    Args:
        cuda: the newest version of CUDA that it knows, "" where it does not tell.
        fails: why it does not answer.
    """

    version: str = ""
    cuda: str = ""
    cards: Sequence[Gpu] = ()
    fails: str = ""


def query_driver() -> Driver | None:
    """What nvidia-smi says; None where there is none."""
    fields = "driver_version,index,name,memory.total,memory.free"
    done = nvidia_smi(f"--query-gpu={fields},compute_cap", "--format=csv,noheader,nounits")
    if done is not None and done.returncode == 2:  # a driver before 510 does not know compute_cap
        done = nvidia_smi(f"--query-gpu={fields}", "--format=csv,noheader,nounits")
    if done is None:
        return None
    out = done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split(",")] for line in out.splitlines() if line.count(",") >= 4]
    if done.returncode or not rows:
        return Driver(fails=" ".join(out.split()) or f"code {done.returncode}")
    summary = nvidia_smi()
    cuda_version = re.search(
        r"CUDA Version\s*:\s*([\d.]+)", summary.stdout + summary.stderr if summary is not None else ""
    )
    cards = [Gpu(row[1], row[2], row[3], row[4], row[5] if len(row) > 5 else "") for row in rows]
    return Driver(rows[0][0], cuda_version[1] if cuda_version else "", cards)


def check_gpus(at: Driver | None) -> Iterator[Check]:
    """The GPUs themselves."""
    if at is None:
        yield Check(True, "GPUs: none (nvidia-smi not found); local models run on the CPU")
        return
    if at.fails:
        yield Check(False, f"nvidia-smi finds no GPU: {at.fails}",
                      "load or reinstall NVIDIA's driver; without it local models run on the CPU")  # fmt: skip
        return
    knows = f", which supports CUDA up to {at.cuda}" if at.cuda else ""
    yield Check(True, f"GPU driver {at.version}{knows}")
    for card in at.cards:
        old = re.fullmatch(r"\d+\.\d+", card.capability) and float(card.capability) < BFLOAT16_FROM
        yield Check(
            True, f"GPU {card.number}: {card.name}, {_gb(card.free)} GB of {_gb(card.total)} free"
            + (f", compute capability {card.capability}" if card.capability else ""),
            "its hardware has no bfloat16, which the engine uses on GPUs: expect it to be slow" if old else "",
        )  # fmt: skip
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        yield Check(True, f"CUDA_VISIBLE_DEVICES={visible!r}: queues have no other GPUs than these")


def _gb(mib: str) -> str:
    return f"{int(mib) * MIB_A_GB:.1f}" if mib.isdigit() else "?"


# ---- torch -------------------------------------------------------------------------------------
def check_torch(at: Driver | None, *, wanted: bool) -> Iterator[Check]:
    """Whether torch and the GPUs know each other; torch is loaded, elsewhere, only where it matters.

    Args:
        wanted: a local model is to be used.
    """
    cards = at.cards if at is not None else ()
    if importlib.util.find_spec("torch") is None or not (cards or wanted):
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    try:
        done = subprocess.run(
            [sys.executable, "-m", "agentmesh.inference.probe"],
            capture_output=True,
            text=True,
            timeout=PROBE_S,
            check=True,
        )
        report: dict[str, Any] = json.loads(done.stdout)
    except (subprocess.SubprocessError, OSError, ValueError) as e:
        last = str(getattr(e, "stderr", "") or e).strip().splitlines()[-1:]
        yield Check(False, f"torch {importlib.metadata.version('torch')} does not work: {' '.join(last)}",
                      "pip install 'agentmesh-celery[local]' into a fresh environment")  # fmt: skip
        return
    yield from _judge_probe(report, at if at is not None and cards and not hidden else Driver())


def _judge_probe(said: dict[str, Any], at: Driver) -> Iterator[Check]:
    """What torch said (see gpu.probe), beside the driver's GPUs."""
    build = f"torch {said['torch']}"
    if at.cards and not said["cuda"]:
        yield Check(
            False, f"{build} is a build for CPUs, and there {'is a GPU' if len(at.cards) == 1 else 'are GPUs'} here",
            f"pip uninstall torch, then: pip install torch --index-url {_torch_index(at.cuda)}",
        )  # fmt: skip
    elif at.cards and not said["gpus"]:
        yield Check(
            False, f"{build}, made for CUDA {said['cuda']}, sees no GPU" + (f": {said['complaint']}" if said["complaint"] else ""),
            f"update the driver to one that supports CUDA {said['cuda']}, or take an older build: pip uninstall torch, then: "
            f"pip install torch --index-url {_torch_index(at.cuda)}",
        )  # fmt: skip
    elif at.cards:
        yield Check(True, f"{build}, made for CUDA {said['cuda']}, sees {len(said['gpus'])} of {len(at.cards)} GPUs")
    else:
        kind = "bfloat16" if said["bfloat16"] else "float32, because the processor has no bfloat16"
        yield Check(True, f"{build}, for the CPU: weights in {kind}; {_best_kernel(said['attention'])}")
    for number, gpu in enumerate(said["gpus"] if at.cards else ()):
        if gpu["fails"]:
            yield Check(
                False, f"{build} cannot compute on {gpu['name']}, its GPU {number} of compute capability {gpu['capability']}: "
                f"{gpu['fails']}", f"use the build for it: pip uninstall torch; pip install torch --index-url {_torch_index(at.cuda)}",
            )  # fmt: skip
            continue
        works = not all(gpu["attention"].values())
        yield Check(works, f"{gpu['name']}, torch's GPU {number}: {_best_kernel(gpu['attention'])}",
                      "" if works else "take another build of torch, or put a server behind the queue (url=)")  # fmt: skip


def _best_kernel(kernels: dict[str, str]) -> str:
    """The first kernel that passed, and what is wrong with better ones; the engine tries them with its model's own heads."""
    best = next((f"attention {name}" for name, fault in kernels.items() if not fault), "no attention works")
    faults = "; ".join(f"{name}: {fault}" for name, fault in kernels.items() if fault)
    return f"{best}{f' ({faults})' if faults else ''}"


def _torch_index(cuda: str) -> str:
    """Torch's newest index that a driver with this version of CUDA can run; it runs any build of its own major version."""
    knows = tuple(int(part) for part in cuda.split(".")[:2]) if cuda else TORCH_CUDAS[-1]
    of_its_own = [build for build in TORCH_CUDAS if build[0] == knows[0]]
    fitting = [build for build in of_its_own or TORCH_CUDAS if build <= knows] or of_its_own or list(TORCH_CUDAS[:1])
    return "{}cu{}{}".format(TORCH_INDEX, *fitting[-1 if fitting[-1] <= knows else 0])


# ---- queues ------------------------------------------------------------------------------------
def check_queues(crew: Crew) -> Iterator[Check]:
    """Where the workers of queues with a model would run."""
    for queue in crew.queues.values():
        if queue.on_device:
            try:
                devices = devices_of(queue)
            except ConfigError as e:
                yield Check(False, e.message, e.hint)
                continue
            if not _is_pulled(queue.model):
                yield Check(False, f"queue {queue.name!r}: model {queue.model!r} is not here",
                              f"agentmesh models pull {queue.model}")  # fmt: skip
            encoder = queue.embed.partition(":")[2]
            if encoder and not (Path(encoder).expanduser().is_dir() or _is_pulled(encoder)):
                yield Check(True, f"queue {queue.name!r}: encoder {encoder!r} is not here",
                              f"agentmesh models pull {encoder}, unless the hub's own cache has it")  # fmt: skip
            where = f"on each of GPU {', '.join(devices)}" if devices != [CPU] else "on the CPU"
            yield Check(True, f"queue {queue.name!r}: a worker with model {queue.model!r} {where}")


def _is_pulled(model: str) -> bool:
    with suppress(ConfigError):  # no such name can be
        return is_installed(model)
    return False
