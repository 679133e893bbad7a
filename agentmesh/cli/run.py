"""`agentmesh run`, `agentmesh runs resume` and `runs retry`: a supervised worker, the run, and a view of it until it ends.

As a program, `python -m agentmesh.cli.run`, it is what `--detach` leaves running; its spec is in the environment.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from agentmesh.celery.event_loop import run_sync
from agentmesh.cli.run_view import View, answer, make_view
from agentmesh.cli.runs import JournalAccess
from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config, load_config
from agentmesh.definitions.crew import Crew, names_every_model
from agentmesh.engine.async_run import AsyncRun
from agentmesh.engine.run import Run
from agentmesh.errors import DefinitionError, MeshError, RunError, ServiceDown
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.runtime.bootstrap import check_models, resolve_servers
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.process_exit import (
    DONE,
    FAILED,
    INTERRUPTED,
    WAITING,
    exit_code,
    interruptible,
    print_error,
    skip_final_collection,
)
from agentmesh.runtime.valkey import EmbeddedValkey
from agentmesh.schema import from_json
from agentmesh.worker.asyncio_worker import SPEC_ENV, take_spec, worker_commands
from agentmesh.worker.embed_queues import consumed_queues
from agentmesh.worker.standby import fallback_workers, queues_left_to_others, standby_workers
from agentmesh.worker.supervisor import Supervisor

READY_TIMEOUT_S = 60.0
MODEL_READY_TIMEOUT_S = 900.0  # where a worker loads a model first
STUCK_POLL_S, STUCK_POLLS = 0.5, 3  # a run is stuck when so many polls in a row say so
STDERR = 2  # of workers too: only the answer goes to stdout
DRAIN_S = 3.0  # a worker that has loaded a model needs 2 s to exit; twice as long where processes of a pool end too


def run_crew(
    path: str, task: str, *, broker: str, model: str, run_id: str, detach: bool, as_json: bool, file: Path | None
) -> int:
    """Begin a run and follow it to its end."""
    crew = load_crew(path)
    settings = load_config(file=file, broker=broker or None, model=model or None)
    check_models(crew, settings)
    if model and names_every_model(crew):
        print(f"--model {model} is not used: every agent of the crew has a model of its own", file=sys.stderr)
    parsed_task = _task(crew, task)
    config, valkey = resolve_servers(settings)
    try:
        mesh = Mesh(crew, config=config, models=ModelRegistry())
        mesh.check()
        run = mesh.start(crew.lead, parsed_task, run_id=run_id, stream=not detach, origin=origin_of(path))
        if detach:
            _start_detached(path, settings, run.run_id)
            print(run.run_id)
            return DONE
        return follow_run(run, mesh, path, config, as_json=as_json)
    finally:
        _release(valkey)


def resume_run(
    run_id: str, *, crew: str, limits: list[str], broker: str, model: str, as_json: bool, file: Path | None
) -> int:
    """Resume a run with the crew file it was begun from, unless another is named."""
    access = JournalAccess.open(broker=broker, model=model, file=file)
    try:
        run = access.run(run_id)
        path = crew or _crew_file(access, run_id, "resume")
        loaded = load_crew(path)
        if limits:
            run.raise_limits(_limits(limits))
        for item in run.waiting_for():
            if item.why.startswith("replay"):
                run.revive(item)
        mesh = Mesh(loaded, config=access.config, models=ModelRegistry())
        return follow_run(mesh.get(run_id), mesh, path, access.config, as_json=as_json)
    finally:
        access.close()


def retry_run(
    run_id: str, *, crew: str, limits: list[str], detach: bool, broker: str, model: str, as_json: bool, file: Path | None
) -> int:  # fmt: skip
    """Retry the failed steps of an ended run, in a run that keeps the others, and follow it to its end."""
    raised_limits = _limits(limits)
    access = JournalAccess.open(broker=broker, model=model, file=file)
    try:
        access.run(run_id)
        path = crew or _crew_file(access, run_id, "retry")
        loaded = load_crew(path)
        check_models(loaded, access.config)
        mesh = Mesh(loaded, config=access.config, models=ModelRegistry())
        run = mesh.get(run_id).retry()
        print(f"run {run_id} is retried as {run.run_id}", file=sys.stderr)
        if raised_limits:
            run.raise_limits(raised_limits)
        if detach:
            _start_detached(path, load_config(file=file, broker=broker or None, model=model or None), run.run_id)
            print(run.run_id)
            return DONE
        return follow_run(run, mesh, path, access.config, as_json=as_json)
    finally:
        access.close()


def _crew_file(access: JournalAccess, run_id: str, verb: str) -> str:
    """The file that the run was begun from."""
    started = access.run(run_id.partition("/")[0]).events()[0]
    path = getattr(started, "origin", "")
    if not path:
        raise DefinitionError(
            f"run {run_id} was not begun from a crew file",
            hint=f"name the file: agentmesh runs {verb} {run_id} crew.py",
        )
    return str(path)


@interruptible()
def follow_run(
    run: Run[Any], mesh: Mesh, path: str, config: Config, *, as_json: bool, view: View | None = None,
    print_value: Callable[..., int | None] = answer, queues: Sequence[str] = (),
) -> int:  # fmt: skip
    """Supervise workers of our own and show the run, until it ends or waits for a person; the exit code.

    Args:
        print_value: what is done with the run's value; it may return the exit code.
        queues: those that our workers serve; all when left out, except what workers elsewhere serve.
    """
    quiet = sys.stderr.isatty() and not as_json
    supervisor, drain_s = _supervisor(mesh.crew, path, config, queues, quiet=quiet)
    supervisor.start()
    view = view or make_view(as_json=as_json)
    try:
        ready_timeout_s = MODEL_READY_TIMEOUT_S if mesh.crew.queues.on_devices() else READY_TIMEOUT_S
        if run.status() == "open" and not supervisor.wait_ready(ready_timeout_s):
            raise ServiceDown(
                f"the worker was not ready within {ready_timeout_s:.0f} s",
                hint=f"see its log with: agentmesh worker {path}",
            )
        waits = run_sync(_show(run.aio, view))
        view.close()
        if waits:
            return _print_waiting(run)
        return print_value(run.result(timeout_s=10), as_json=as_json) or DONE
    except KeyboardInterrupt:
        view.close()
        print(f"\ninterrupted; resume the run with: agentmesh runs resume {run.run_id}", file=sys.stderr)
        return INTERRUPTED
    except RunError as e:
        view.close()
        print_error(e)
        return FAILED
    finally:
        view.close()
        supervisor.stop(quiet=True)  # a kill at the end of this drain needs no message
        supervisor.join(drain_s + 3)  # what does not drain is killed, and its leases are released
        mesh.close()


def _supervisor(
    crew: Crew, path: str, config: Config, queues: Sequence[str], *, quiet: bool
) -> tuple[Supervisor, float]:
    """The supervisor of our own workers, with fallbacks for queues left to workers elsewhere; and how long it drains."""
    left_to_others = queues_left_to_others(config, path, crew, queues)
    served = [queue for queue in crew.queues if queue not in left_to_others]
    commands = worker_commands(config, {path: crew}, queues=served, suspects="exclude")
    drain_s = DRAIN_S if len(commands) == 1 else 2 * DRAIN_S
    standby = standby_workers(config, {path: crew}, queues=served)
    standby += fallback_workers(config, path, crew, left_to_others, start=not queues)
    supervisor = Supervisor(
        commands, standby=standby, drain_s=drain_s, on_death=release_on_death(config, consumed_queues([crew])),
        output=subprocess.DEVNULL if quiet else STDERR,
    )  # fmt: skip
    return supervisor, drain_s


async def _show(run: AsyncRun[Any], view: View) -> bool:
    """Show events and tokens until the run ends; True when only a person, or another worker, can continue it."""

    async def events() -> None:
        async for member, event in run.follow():
            view.event(member, event)

    async def tokens() -> None:
        async for token in run.live():
            view.token(token)

    async def stuck() -> None:
        polls = 0
        while polls < STUCK_POLLS:  # a run between two entries looks stuck for a moment
            await asyncio.sleep(STUCK_POLL_S)
            polls = polls + 1 if await run.blocked_on() else 0

    watchers = [asyncio.create_task(work()) for work in (events, stuck)]
    streaming = asyncio.create_task(tokens())
    try:
        done, _ = await asyncio.wait(watchers, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return watchers[0] not in done
    finally:
        for task in (*watchers, streaming):
            task.cancel()
        await asyncio.gather(*watchers, streaming, return_exceptions=True)


def _print_waiting(run: Run[Any]) -> int:
    for item in run.waiting_for():
        step = f"{item.name} {json.dumps(dict(item.args), ensure_ascii=False)}" if item.args else item.name
        print(f"waiting ({item.why}): run {item.run_id}, step {item.n}: {step}", file=sys.stderr)
        if item.why == "approve":
            print(
                f"  agentmesh runs approve {item.run_id} {item.n}   or   agentmesh runs deny {item.run_id} {item.n}",
                file=sys.stderr,
            )
        elif item.why in ("in_doubt", "quarantined"):
            print(f"  agentmesh runs resolve {item.run_id} {item.n} done|failed|retry", file=sys.stderr)
    print(f"then: agentmesh runs resume {run.run_id.partition('/')[0]}", file=sys.stderr)
    return WAITING


def _start_detached(path: str, config: Config, run_id: str) -> None:
    """Start a process that supervises a worker while the run is open; it connects to the embedded Valkey itself."""
    spec = {"crew": path, "run": run_id, "config": config.model_dump(mode="json")}
    env = {**os.environ, SPEC_ENV: json.dumps(spec)}  # every user of the machine can read a command line
    config.home.mkdir(parents=True, exist_ok=True)
    with (config.home / "detached.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "agentmesh.cli.run"], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def keep_worker(spec: dict[str, Any]) -> int:
    """Supervise a worker until the run has ended or waits for a person: what `--detach` leaves running."""
    config, valkey = resolve_servers(Config(**spec["config"]))
    try:
        crew = load_crew(spec["crew"])
        mesh = Mesh(crew, config=config, models=ModelRegistry())
        supervisor = Supervisor(
            worker_commands(config, {spec["crew"]: crew}, suspects="exclude"), drain_s=config.drain_s,
            standby=standby_workers(config, {spec["crew"]: crew}), on_death=release_on_death(config, consumed_queues([crew])),
        )  # fmt: skip
        signal.signal(signal.SIGTERM, lambda *_: supervisor.stop())
        supervisor.start()
        with suppress(MeshError):
            mesh.get(spec["run"]).result()
        supervisor.stop()
        supervisor.join(config.drain_s + 5)
        mesh.close()
        return DONE
    except MeshError as e:
        print_error(e)
        return exit_code(e)
    finally:
        _release(valkey)


def _release(valkey: EmbeddedValkey | None) -> None:
    if valkey is not None:
        valkey.leave()


def origin_of(path: str) -> str:
    """The crew file as `runs resume` can find it from any folder."""
    file, _, name = path.partition(":")
    if not os.path.isfile(file):
        return path  # a module
    return os.path.abspath(file) + (f":{name}" if name else "")


def _task(crew: Crew, task: str) -> Any:
    """The task as the first agent takes it: text, or JSON for any other type."""
    task_type = crew.lead.task_type
    if task_type is str:
        return task
    try:
        return from_json(json.loads(task), task_type)
    except ValueError as e:
        raise DefinitionError(
            f"the task {task!r} is not a {getattr(task_type, '__name__', task_type)}, which agent `{crew.lead.name}` takes ({e})",
            hint="write the task as JSON",
        ) from None


def _limits(options: list[str]) -> dict[str, float]:
    limits = {}
    for text in options:
        name, _, value = text.partition("=")
        if name not in ("turns", "tokens", "cost_usd", "seconds"):
            raise DefinitionError(
                f"unknown limit in --limit {text!r}", hint="write turns=…, tokens=…, cost_usd=… or seconds=…"
            )
        try:
            limits[name] = float(value)
        except ValueError:
            raise DefinitionError(
                f"--limit {text!r}: {value!r} is not a number", hint=f"write a number, such as {name}=50"
            ) from None
    return limits


if __name__ == "__main__":
    skip_final_collection()
    sys.exit(keep_worker(take_spec()))
