"""The state of a device worker's engine: a small file, written by the worker and read by its supervisor. Without torch."""

import contextlib
import json
import os
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path

STATUS_FOLDER_ENV = "AGENTMESH_REPORTS_IN"  # the environment variable that names the folder
UNHEALTHY_AFTER_S = 10.0  # without a step while there is work, or without a report
PREFIX = "engine-"


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """One observation of an engine. Means are of the last ten seconds, counts since its process began.

    Args:
        worker: the process's name under its supervisor.
        device: `cpu`, or `cuda:` and what CUDA_VISIBLE_DEVICES says.
        at_s: when, in the machine's monotonic time.
        in_flight: steps of the engine's queues that this process has claimed; `places` is how many it may have at most.
        running: requests in the batch of the last step. waiting: submitted and not yet in a batch.
        batch_requests: new tokens a step.
        cached_share: the part of the prompts' tokens that was in the cache.
        free_pages: of the cache, held by no request.
        used_bytes: of the machine's memory, by the process; free_bytes, all_bytes: of a GPU's memory, 0 on a CPU.
        stuck_s: for how long there has been work and no step.
        deaths: how often the engine's loop ended by an error.
        batch_tokens: new tokens of one step at most; halved when the device had no memory for so many.
    """

    worker: str
    pid: int
    model: str
    device: str
    at_s: float
    in_flight: int = 0
    places: int = 0
    running: int = 0
    waiting: int = 0
    batch_requests: float = 0.0
    new_tokens_per_s: float = 0.0
    cached_share: float = 0.0
    free_pages: int = 0
    pages: int = 0
    used_bytes: int = 0
    free_bytes: int = 0
    all_bytes: int = 0
    stuck_s: float = 0.0
    deaths: int = 0
    batch_tokens: int = 0
    steps: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0

    def unhealthy_reason(self, now_s: float) -> str:
        """Why it is not healthy; "" where it is.

        Args:
            now_s: the machine's monotonic time.
        """
        where = f"the worker of {self.model!r} on {self.device}"
        if (silent := now_s - self.at_s) > UNHEALTHY_AFTER_S:
            return f"{where} has not reported for {silent:.0f} s"
        if self.stuck_s > UNHEALTHY_AFTER_S:
            return f"{where} has {self.in_flight} steps in flight and its engine has made no progress for {self.stuck_s:.0f} s"
        return ""


def write_status(folder: str, report: EngineStatus) -> None:
    """Write a report in one rename; a process has one file.

    Raises:
        OSError: the folder is gone, or the disk is full.
    """
    target = Path(folder) / f"{PREFIX}{report.pid}.json"
    fresh = target.with_suffix(".new")
    fresh.write_text(json.dumps(asdict(report)))
    fresh.replace(target)


def read_statuses(folder: str, workers: Collection[str]) -> list[EngineStatus]:
    """The reports of these workers, by model and device; those of other workers are removed."""
    reports = []
    for file in Path(folder).glob(f"{PREFIX}*.json"):
        with contextlib.suppress(FileNotFoundError):  # another reader removed it
            report = _read(file)
            if report.worker in workers:
                reports.append(report)
            else:
                os.unlink(file)
    return sorted(reports, key=lambda s: (s.model, s.device, s.worker))


def _read(file: Path) -> EngineStatus:
    """During an update a worker may be of another version than its supervisor: unknown fields are dropped."""
    report = json.loads(file.read_text())
    if "in_hand" in report:  # as older workers write it
        report.setdefault("in_flight", report["in_hand"])
    field_names = {f.name for f in fields(EngineStatus)}
    return EngineStatus(**{name: value for name, value in report.items() if name in field_names})
