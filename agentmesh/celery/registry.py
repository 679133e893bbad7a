"""The meshes of an app by crew name, for its tasks, workers and beat."""

from celery import Celery

from agentmesh.celery.beat import add_schedules
from agentmesh.celery.bootstep import add_bootstep
from agentmesh.celery.canvas import register_canvas
from agentmesh.celery.mesh_runtime import MeshRuntime
from agentmesh.celery.tasks import register_tasks
from agentmesh.errors import UnknownName


def register(runtime: MeshRuntime) -> MeshRuntime:
    """Register our tasks on the runtime's app, and the runtime under its crew's name; returns the runtime.

    A newer runtime of the same crew replaces an older one.
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
            f"no mesh of crew {crew!r} was made on this app in this process",
            hint="make one when the app is imported: Mesh(crew, app)",
        )
    return runtimes[crew]
