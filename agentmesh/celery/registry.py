"""The crews of an app: its tasks, workers and beat find them here by their names."""

from celery import Celery

from agentmesh.celery.beat import add_schedules
from agentmesh.celery.bootstep import add_bootstep
from agentmesh.celery.canvas import register_canvas
from agentmesh.celery.mesh_runtime import MeshRuntime
from agentmesh.celery.tasks import register_tasks
from agentmesh.errors import UnknownName


def register(runtime: MeshRuntime) -> MeshRuntime:
    """Put our tasks on the runtime's app, if they are not there, and its crew where they look; answers the runtime.

    Of two runtimes of one crew the tasks see the newer one.
    """
    app, crew = runtime.app, runtime.crew
    runtimes = register_tasks(app)
    register_canvas(app, runtimes)
    add_bootstep(app)
    runtimes[crew.name] = runtime
    if crew.schedules:
        add_schedules(app, runtimes, crew.name, list(crew.schedules.values()))
    return runtime


def runtime_of(app: Celery, crew: str) -> MeshRuntime:
    """The runtime of a crew on this app.

    Raises:
        UnknownName: no mesh of this crew was made on the app in this process.
    """
    runtimes = register_tasks(app)
    if crew not in runtimes:
        raise UnknownName(
            f"no mesh of crew {crew!r} was made on this app in this process", hint="import the module that creates it"
        )
    return runtimes[crew]
