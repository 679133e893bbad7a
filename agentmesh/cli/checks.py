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
from typing import Any, NamedTuple, Self

from agentmesh.definitions.crew import Crew
from agentmesh.errors import ConfigError, MeshError
from agentmesh.hub.cache import is_installed
from agentmesh.runtime.process_exit import DONE, ENVIRONMENT
from agentmesh.worker.gpus import CPU, devices_of, nvidia_smi


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: as in an error, what is so and one thing to do about it.

    With `ok` the hint is only for those who need it.
    """

    ok: bool
    message: str
    hint: str = ""

    @classmethod
    def of_error(cls, error: MeshError, *, where: str = "") -> Self:
        """A failed check with an error's message and hint."""
        return cls(False, f"{where}: {error.message}" if where else error.message, error.hint)


def print_checks(checks: Iterable[Check]) -> int:
    """Print each as it comes, with its `help:` line; 0 when all are ok, else 4."""
    all_ok = True
    for check in checks:
        all_ok = all_ok and check.ok
        print(f"{'ok' if check.ok else 'error':<5} {check.message}")
        if check.hint:
            print(f"      help: {check.hint}")
        sys.stdout.flush()
    return DONE if all_ok else ENVIRONMENT


# ---- GPUs ----------------------------------------------------------------------------------------

PROBE_S = 60.0
TORCH_CUDAS = ((11, 8), (12, 6), (12, 8), (13, 0))  # torch's own indexes, oldest first
TORCH_INDEX = "https://download.pytorch.org/whl/"
BFLOAT16_FROM = 8.0  # compute capability
MIB_A_GB = 2**20 / 1e9


class Gpu(NamedTuple):
    """A GPU as the driver reports it; memory in MiB, `capability` is "" where an old driver does not report it."""

    number: str
    name: str
    total: str
    free: str
    capability: str


class Driver(NamedTuple):
    """The driver and its GPUs.

    Args:
        cuda: the newest version of CUDA that it supports, "" where it does not say.
        fails: why nvidia-smi finds no GPU.
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
    """The driver and its GPUs."""
    if at is None:
        yield Check(True, "GPUs: none (nvidia-smi not found); local models run on the CPU")
        return
    if at.fails:
        yield Check(False, f"nvidia-smi finds no GPU: {at.fails}",
                    "load or reinstall NVIDIA's driver, or let local models run on the CPU")  # fmt: skip
        return
    supports = f", which supports CUDA up to {at.cuda}" if at.cuda else ""
    yield Check(True, f"GPU driver {at.version}{supports}")
    for card in at.cards:
        old = re.fullmatch(r"\d+\.\d+", card.capability) and float(card.capability) < BFLOAT16_FROM
        yield Check(
            True, f"GPU {card.number}: {card.name}, {_gb(card.free)} GB of {_gb(card.total)} free"
            + (f", compute capability {card.capability}" if card.capability else "")
            + (": slow, because it has no bfloat16 in hardware" if old else ""),
        )  # fmt: skip
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        yield Check(True, f"CUDA_VISIBLE_DEVICES={visible!r}: queues can use only these GPUs")


def _gb(mib: str) -> str:
    return f"{int(mib) * MIB_A_GB:.1f}" if mib.isdigit() else "?"


# ---- torch -------------------------------------------------------------------------------------
def check_torch(at: Driver | None, *, needed: bool) -> Iterator[Check]:
    """Whether torch works and sees the GPUs. Torch is loaded in a process of its own, and only where it is needed.

    Args:
        needed: a local model is to be used.
    """
    cards = at.cards if at is not None else ()
    if importlib.util.find_spec("torch") is None or not (cards or needed):
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


def _judge_probe(probe: dict[str, Any], at: Driver) -> Iterator[Check]:
    """What torch reports (see inference.probe), beside the driver's GPUs."""
    build = f"torch {probe['torch']}"
    if at.cards and not probe["cuda"]:
        yield Check(
            False, f"{build} is a build for CPUs, and there {'is a GPU' if len(at.cards) == 1 else 'are GPUs'} here",
            f"pip uninstall torch, then: pip install torch --index-url {_torch_index(at.cuda)}",
        )  # fmt: skip
    elif at.cards and not probe["gpus"]:
        yield Check(
            False, f"{build}, made for CUDA {probe['cuda']}, sees no GPU" + (f": {probe['complaint']}" if probe["complaint"] else ""),
            f"update the driver to one that supports CUDA {probe['cuda']}, or install an older build: pip uninstall torch, then: "
            f"pip install torch --index-url {_torch_index(at.cuda)}",
        )  # fmt: skip
    elif at.cards:
        yield Check(True, f"{build}, made for CUDA {probe['cuda']}, sees {len(probe['gpus'])} of {len(at.cards)} GPUs")
    else:
        kind = "bfloat16" if probe["bfloat16"] else "float32, because the processor has no bfloat16"
        yield Check(True, f"{build}, for the CPU: weights in {kind}; {_best_kernel(probe['attention'])}")
    for number, gpu in enumerate(probe["gpus"] if at.cards else ()):
        if gpu["fails"]:
            yield Check(
                False, f"{build} cannot compute on {gpu['name']}, its GPU {number} of compute capability {gpu['capability']}: "
                f"{gpu['fails']}", f"use the build for it: pip uninstall torch; pip install torch --index-url {_torch_index(at.cuda)}",
            )  # fmt: skip
            continue
        works = not all(gpu["attention"].values())
        yield Check(works, f"{gpu['name']}, torch's GPU {number}: {_best_kernel(gpu['attention'])}",
                      "" if works else "install another build of torch, or use a ServerQueue")  # fmt: skip


def _best_kernel(kernels: dict[str, str]) -> str:
    """The first kernel that passed, and what is wrong with the faster ones before it."""
    best = next((f"attention {name}" for name, fault in kernels.items() if not fault), "no attention works")
    faults = "; ".join(f"{name}: {fault}" for name, fault in kernels.items() if fault)
    return f"{best}{f' ({faults})' if faults else ''}"


def _torch_index(cuda: str) -> str:
    """Torch's newest index that a driver with this version of CUDA can run; it runs any build of its own major version."""
    supported = tuple(int(part) for part in cuda.split(".")[:2]) if cuda else TORCH_CUDAS[-1]
    same_major = [build for build in TORCH_CUDAS if build[0] == supported[0]]
    fitting = (
        [build for build in same_major or TORCH_CUDAS if build <= supported] or same_major or list(TORCH_CUDAS[:1])
    )
    return "{}cu{}{}".format(TORCH_INDEX, *fitting[-1 if fitting[-1] <= supported else 0])


# ---- queues ------------------------------------------------------------------------------------
def check_queues(crew: Crew) -> Iterator[Check]:
    """Whether the models of device queues are here, and where their workers would run."""
    for queue in crew.queues.on_devices():
        try:
            devices = devices_of(queue)
        except ConfigError as e:
            yield Check.of_error(e)
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
    with suppress(ConfigError):  # not a valid name
        return is_installed(model)
    return False
