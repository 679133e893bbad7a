"""`agentmesh run`, `agentmesh runs resume` and `runs retry`: a supervised worker, the run, and a view of it until it ends."""

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
from agentmesh.cli.run_view import View, answer, follow, make_view
from agentmesh.cli.runs import JournalAccess
from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config, load
from agentmesh.definitions.crew import Crew
from agentmesh.engine.run import Run
from agentmesh.errors import DefinitionError, MeshError, RunError, ServiceDown
from agentmesh.mesh import Mesh
from agentmesh.models.registry import ModelRegistry
from agentmesh.runtime.bootstrap import check_models, resolve_servers
from agentmesh.runtime.crew_file import load_crew
from agentmesh.runtime.process_exit import DONE, FAILED, INTERRUPTED, WAITING, exit_code, interruptible, print_error
from agentmesh.runtime.valkey import EmbeddedValkey
from agentmesh.schema import from_json
from agentmesh.worker.asyncio_worker import SPEC_ENV, worker_commands
from agentmesh.worker.embed_queues import consumed_queues
from agentmesh.worker.standby import fallback_workers, queues_left_to_others, standby_workers
from agentmesh.worker.supervisor import Supervisor

READY_S = 60.0
MODEL_READY_S = 900.0  # where a worker loads a model first
STUCK_LOOKS = 3
STDERR = 2  # of workers too: the answer alone goes to the output
DRAIN_S = 3.0  # a worker with a model in it takes two to leave; twice that where processes of a pool end too


def run_crew(
    path: str, task: str, *, broker: str, model: str, run_id: str, detach: bool, as_json: bool, file: Path | None
) -> int:
    """Begin a run and see it to its end."""
    crew = load_crew(path)
    config_ = load(file=file, broker=broker or None, model=model or None)
    check_models(crew, config_)
    task_ = _task(crew, task)
    config, valkey = resolve_servers(config_)
    try:
        mesh = Mesh(crew, config=config, models=ModelRegistry())
        mesh.check()
        run = mesh.start(crew.lead, task_, id=run_id, stream=not detach, origin=origin_of(path))
        if detach:
            _leave_a_worker(path, config_, run.id)
            print(run.id)
            return DONE
        return follow_run(run, mesh, path, config, as_json=as_json)
    finally:
        _leave(valkey)


def resume_run(
    run_id: str, *, crew: str, limits: list[str], broker: str, model: str, as_json: bool, file: Path | None
) -> int:
    """Go on with a run: with the crew file it was begun from, unless another is named."""
    access = JournalAccess.open(broker=broker, model=model, file=file)
    try:
        run = access.run(run_id)
        path = crew or _crew_file(access, run_id, "resume")
        loaded = load_crew(path)
        if limits:
            run.raise_limits(_limits(limits))
        for item in run.waiting_for:
            if item.why.startswith("replay"):
                run.revive(item)
        mesh = Mesh(loaded, config=access.config, models=ModelRegistry())
        return follow_run(mesh.get(run_id), mesh, path, access.config, as_json=as_json)
    finally:
        access.close()


def retry_run(
    run_id: str, *, crew: str, limits: list[str], detach: bool, broker: str, model: str, as_json: bool, file: Path | None
) -> int:  # fmt: skip
    """Do the failed steps of an ended run again, in a run that begins with the others, and see it to its end."""
    raised = _limits(limits)
    access = JournalAccess.open(broker=broker, model=model, file=file)
    try:
        access.run(run_id)
        path = crew or _crew_file(access, run_id, "retry")
        loaded = load_crew(path)
        check_models(loaded, access.config)
        mesh = Mesh(loaded, config=access.config, models=ModelRegistry())
        run = mesh.get(run_id).retry()
        print(f"{run_id} goes on as {run.id}", file=sys.stderr)
        if raised:
            run.raise_limits(raised)
        if detach:
            _leave_a_worker(path, load(file=file, broker=broker or None, model=model or None), run.id)
            print(run.id)
            return DONE
        return follow_run(run, mesh, path, access.config, as_json=as_json)
    finally:
        access.close()


def _crew_file(found: JournalAccess, run_id: str, verb: str) -> str:
    """The file that the run was begun from."""
    started = run_sync(found.journal.events(run_id.partition("/")[0]))[0]
    path = getattr(started, "origin", "")
    if not path:
        raise DefinitionError(
            f"run {run_id} was not begun from a crew file", hint=f"name one: agentmesh runs {verb} {run_id} crew.py"
        )
    return str(path)


@interruptible()
def follow_run(
    run: Run[Any], mesh: Mesh, path: str, config: Config, *, as_json: bool, view: View | None = None,
    say: Callable[..., int | None] = answer, queues: Sequence[str] = (),
) -> int:  # fmt: skip
    """A worker of our own under supervision, and the view, until the run ends or waits for a person.

    Args:
        say: what is done with the run's value; it may answer the exit code.
        queues: those that our worker serves; all when left out, but for what workers elsewhere do.
    """
    quiet = sys.stderr.isatty() and not as_json
    supervisor, drain_s = _supervisor(mesh.crew, path, config, queues, quiet=quiet)
    supervisor.start()
    view = view or make_view(as_json=as_json)
    try:
        ready_s = MODEL_READY_S if mesh.crew.queues.of_pool("device") else READY_S
        if run_sync(run.head()).status == "open" and not supervisor.wait_ready(ready_s):
            raise ServiceDown(
                f"the worker was not ready within {ready_s:.0f} s", hint=f"find out why with: agentmesh worker {path}"
            )
        waits = asyncio.run(_show(run, view))
        view.close()
        if waits:
            return _print_waiting(run)
        return say(run.result(timeout_s=10), as_json=as_json) or DONE
    except KeyboardInterrupt:
        view.close()
        print(f"\ninterrupted; resume the run with: agentmesh runs resume {run.id}", file=sys.stderr)
        return INTERRUPTED
    except RunError as e:
        view.close()
        print_error(e)
        return FAILED
    finally:
        view.close()
        supervisor.stop(quiet=True)  # of a worker that is killed now nobody needs to know
        supervisor.join(drain_s + 3)  # what does not drain is killed, and given back
        mesh.close()


def _supervisor(
    crew: Crew, path: str, config: Config, queues: Sequence[str], *, quiet: bool
) -> tuple[Supervisor, float]:
    """Of our own workers, and of those for the case that workers elsewhere are gone; and how long they may drain."""
    away = queues_left_to_others(config, path, crew, queues)
    served = [queue for queue in crew.queues if queue not in away]
    commands = worker_commands(config, {path: crew}, queues=served, suspects="exclude")
    drain_s = DRAIN_S if len(commands) == 1 else 2 * DRAIN_S
    spares = standby_workers(config, {path: crew}, queues=served)
    spares += fallback_workers(config, path, crew, away, start=not queues)
    supervisor = Supervisor(
        commands, spares=spares, drain_s=drain_s, on_death=release_on_death(config, consumed_queues([crew])),
        output=subprocess.DEVNULL if quiet else STDERR,
    )  # fmt: skip
    return supervisor, drain_s


async def _show(run: Run[Any], view: View) -> bool:
    """Events and tokens into the view; True when only people, or another worker, could move the run."""

    async def events() -> None:
        async for member, event in follow(run._journal, run.id):
            view.event(member, event)

    async def tokens() -> None:
        async for token in run.live():
            view.token(token)

    async def stuck() -> None:
        looks = 0
        while looks < STUCK_LOOKS:  # between two entries nothing may seem to move for a moment
            await asyncio.sleep(0.5)
            looks = looks + 1 if await run.stuck() else 0

    watching = [asyncio.create_task(work()) for work in (events, stuck)]
    talking = asyncio.create_task(tokens())
    try:
        done, _ = await asyncio.wait(watching, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        return watching[0] not in done
    finally:
        for task in (*watching, talking):
            task.cancel()
        await asyncio.gather(*watching, talking, return_exceptions=True)
        await run._journal.close()  # this loop's connections


def _print_waiting(run: Run[Any]) -> int:
    for item in run.waiting_for:
        what = f"{item.name} {json.dumps(dict(item.args), ensure_ascii=False)}" if item.args else item.name
        print(f"waiting ({item.why}): run {item.run_id}, step {item.n}: {what}", file=sys.stderr)
        if item.why == "approve":
            print(
                f"  agentmesh runs approve {item.run_id} {item.n}   or   agentmesh runs deny {item.run_id} {item.n}",
                file=sys.stderr,
            )
        elif item.why in ("in_doubt", "quarantined"):
            print(f"  agentmesh runs resolve {item.run_id} {item.n} done|failed|retry", file=sys.stderr)
    print(f"then: agentmesh runs resume {run.id.partition('/')[0]}", file=sys.stderr)
    return WAITING


def _leave_a_worker(path: str, config: Config, run_id: str) -> None:
    """A process of its own that keeps a supervised worker up while the run is open; it joins the embedded Valkey itself."""
    spec = {"crew": path, "run": run_id, "config": config.model_dump(mode="json")}
    env = {**os.environ, SPEC_ENV: json.dumps(spec)}  # a command line is for everybody to read
    config.home.mkdir(parents=True, exist_ok=True)
    with (config.home / "detached.log").open("ab") as log:
        subprocess.Popen(
            [sys.executable, "-m", "agentmesh.cli.detached"], env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


def keep_worker(spec: dict[str, Any]) -> int:
    """Supervise a worker until the run has ended or waits for a person; what `--detach` leaves behind."""
    config, valkey = resolve_servers(Config(**spec["config"]))
    try:
        crew = load_crew(spec["crew"])
        mesh = Mesh(crew, config=config, models=ModelRegistry())
        supervisor = Supervisor(
            worker_commands(config, {spec["crew"]: crew}, suspects="exclude"), drain_s=config.drain_s,
            spares=standby_workers(config, {spec["crew"]: crew}), on_death=release_on_death(config, consumed_queues([crew])),
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
        _leave(valkey)


def _leave(valkey: EmbeddedValkey | None) -> None:
    if valkey is not None:
        valkey.leave()


def origin_of(path: str) -> str:
    """The crew file as `runs resume` can find it from any folder."""
    file, _, name = path.partition(":")
    if not os.path.isfile(file):
        return path  # a module
    return os.path.abspath(file) + (f":{name}" if name else "")


def _task(crew: Crew, task: str) -> Any:
    """The task as the leading agent takes it: text, or JSON for any other type."""
    task_type = crew.lead.task_type
    if task_type is str:
        return task
    try:
        return from_json(json.loads(task), task_type)
    except ValueError as e:
        raise DefinitionError(
            f"agent `{crew.lead.name}` takes a {getattr(task_type, '__name__', task_type)}",
            hint=f"the task {task!r} is not one: {e}",
        ) from None


def _limits(given: list[str]) -> dict[str, float]:
    limits = {}
    for text in given:
        name, _, value = text.partition("=")
        if name not in ("turns", "tokens", "cost_usd", "seconds"):
            raise DefinitionError(f"--limit {text!r} must be turns=…, tokens=…, cost_usd=… or seconds=…")
        try:
            limits[name] = float(value)
        except ValueError:
            raise DefinitionError(f"--limit {text!r}: {value!r} is not a number") from None
    return limits
