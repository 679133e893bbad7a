"""Schedules through Celery Beat: beat's process computes the due time, and a run's id is made of schedule and due time."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from celery import Celery, Task
from celery.beat import Service
from celery.schedules import BaseSchedule, schedstate

from agentmesh.celery.event_loop import NativeThread
from agentmesh.celery.mesh_runtime import MeshRuntime
from agentmesh.definitions.schedule import Recurrence, Schedule


class BeatSchedule(BaseSchedule):  # type: ignore[misc]  # celery is untyped
    """A Recurrence as a schedule of Celery."""

    def __init__(self, times: Recurrence, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.times = times

    def is_due(self, last_run_at: datetime) -> Any:
        """Whether a due time has passed since `last_run_at`, and the seconds until the next one."""
        now = datetime.now(UTC)
        return schedstate(self.times.last(now) > last_run_at, max(0.0, (self.times.next(now) - now).total_seconds()))

    def remaining_estimate(self, last_run_at: datetime) -> Any:
        """The time until the next due time."""
        now = datetime.now(UTC)
        return self.times.next(now) - now

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BeatSchedule) and other.times == self.times

    def __hash__(self) -> int:
        return hash(self.times)

    def __repr__(self) -> str:
        return f"<{self.times.when} {self.times.timezone}>"

    def __reduce__(self) -> Any:
        return BeatSchedule, (self.times,)


class ScheduleTask(Task):  # type: ignore[misc]  # celery is untyped
    """The task of a schedule: beat's process begins the run itself, and nothing is sent to the broker."""

    name = "agentmesh.schedule"
    ignore_result = True
    meshes: dict[str, MeshRuntime]

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Begin the run that is due."""
        return self.run(*args)

    def run(self, crew: str, name: str) -> str:
        return self.meshes[crew].begin_scheduled(name, datetime.now(UTC))


def add_schedules(app: Celery, meshes: dict[str, MeshRuntime], crew: str, schedules: Sequence[Schedule]) -> None:
    """Add a crew's schedules to the app's `beat_schedule`, the only setting of an app that agentmesh writes."""
    if ScheduleTask.name not in app.tasks:
        task = ScheduleTask()
        task.meshes = meshes
        app.register_task(task)
    for schedule in schedules:
        app.add_periodic_task(
            BeatSchedule(schedule.times),
            app.tasks[ScheduleTask.name].si(crew, schedule.name),
            name=f"agentmesh.{crew}.{schedule.name}",
        )


def start_beat(app: Celery) -> NativeThread:
    """Start beat in a thread, without a schedule file: times that pass while beat is not running are not made up for."""
    service = Service(app, scheduler_cls="celery.beat:Scheduler")
    thread = NativeThread(service.start, "agentmesh-beat")
    thread.start()
    return thread
