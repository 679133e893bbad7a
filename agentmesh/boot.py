"""Names in settings become objects: models, meshes, crew files. The only room with imports inside its functions.

`run()` and `start()` bring up what they need, in this process: an embedded Valkey shared with whoever else uses the
folder, and a worker thread.
"""

import atexit
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from agentmesh.agent import Agent
from agentmesh.crew import Crew
from agentmesh.errors import ConfigError, DefinitionError, ExtraMissing, MeshError, did_you_mean
from agentmesh.journal import Journal
from agentmesh.message import Message
from agentmesh.models.named import Models, findable
from agentmesh.run import Run
from agentmesh.step import INSIDE, Ask

if TYPE_CHECKING:
    from agentmesh.celery.inprocess import InProcess
    from agentmesh.celery.valkey import EmbeddedValkey
    from agentmesh.config import Config
    from agentmesh.mesh import Mesh
    from agentmesh.ports import Counts
    from agentmesh.report import EngineReport
    from agentmesh.serve.listen import Listener
    from agentmesh.sight import Sight

Out = TypeVar("Out")


def check_models(crew: Crew, config: "Config") -> None:
    """Look after every model the crew names, so that what is missing is said before a run begins.

    Raises:
        ConfigError: a provider, a key, a package or a model's files are missing.
    """
    models = Models()
    asking = [
        (a, crew.servers_of(Ask(a.name, a.model or "", queue=a.queue), config.model))
        for a in crew.agents.values()
        if _asks(a, crew)
    ]
    for servers in {s for _, s in asking if s is not None}:
        models.check(servers)
    for wanted in {str(a.model or crew.model or config.model) for a, servers in asking if servers is None}:
        models.check(wanted)


def _asks(agent: Agent[Any], crew: Crew) -> bool:
    """Whether the agent may ask a model that is named by text; a flow of its own may ask none."""
    return type(agent).flow is Agent.flow and not hasattr(agent.model or crew.model, "ask")


# ---- sight -------------------------------------------------------------------------------------
COUNTS_IN = "PROMETHEUS_MULTIPROC_DIR"  # prometheus_client's own name for the folder that processes count in


def counting() -> "list[Sight]":
    """The Sight that counts for Prometheus, where this process was started to count."""
    if not os.environ.get(COUNTS_IN):
        return []
    from agentmesh.metrics import Counting

    return [Counting()]


def metrics_page(
    folder: str, counts: "Callable[[], Counts | None]", workers: Callable[[], tuple[int, int]],
    engines: "Callable[[], Sequence[EngineReport]]",
) -> Callable[[], bytes]:  # fmt: skip
    """What makes the page for Prometheus, from what workers count in a folder, what the journal holds and engines tell.

    Raises:
        ExtraMissing: prometheus_client is not installed.
    """
    try:
        from agentmesh.metrics import exposition
    except ImportError as e:
        raise ExtraMissing(
            f"--metrics needs {e.name}, which is not installed: pip install 'agentmesh-celery[metrics]'"
        ) from None
    return exposition(folder, counts, workers, engines)


def listener(host: str, port: int, key_env: str) -> "Listener":
    """What serves a mesh over HTTP at this address.

    Raises:
        ExtraMissing: starlette or uvicorn are not installed.
        ConfigError: the address cannot be had, or needs a key.
    """
    try:
        from agentmesh.serve.listen import Listener
    except ImportError as e:
        raise ExtraMissing(
            f"`agentmesh serve` needs {e.name}, which is not installed: pip install 'agentmesh-celery[serve]'"
        ) from None
    return Listener(host, port, key_env)


def export_traces() -> None:
    """Set OpenTelemetry's SDK up as its own variables say, unless this process has done so or they say nothing.

    Raises:
        ExtraMissing: traces are asked for and the SDK is not installed.
        ConfigError: there is no exporter of that name.
    """
    named = os.environ.get("OTEL_TRACES_EXPORTER", "otlp" if os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT") else "none")
    if named == "none" or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    try:
        from opentelemetry import trace
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as e:
        raise ExtraMissing(
            f"OTEL_TRACES_EXPORTER needs {e.name}, which is not installed: pip install 'agentmesh-celery[otel]'"
        ) from None
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    provider = TracerProvider()  # resource, sampler and limits it reads from OTEL_* by itself; it flushes at exit
    for name in named.split(","):
        exporters = importlib.metadata.entry_points(group="opentelemetry_traces_exporter", name=_exporter(name.strip()))
        if not exporters:
            raise ConfigError(
                f"there is no OpenTelemetry exporter {name!r} here; for `otlp` install opentelemetry-exporter-otlp-proto-http"
            )
        provider.add_span_processor(BatchSpanProcessor(next(iter(exporters)).load()()))
    trace.set_tracer_provider(provider)


def _exporter(name: str) -> str:
    """`otlp` by its protocol; the SDK's console exporter has its own entry."""
    if name != "otlp":
        return name
    protocol = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", ""))
    return "otlp_proto_grpc" if protocol == "grpc" else "otlp_proto_http"


# ---- crew files --------------------------------------------------------------------------------
def load_crew(path: str) -> Crew:
    """The crew of a file, `crew.py`, or of an installed module, `package.module`; with `:name` where it has several.

    Raises:
        DefinitionError: no file, no crew or two in it, or an exception in it.
    """
    file, _, name = path.partition(":")
    source = Path(file)
    if not source.is_file():
        if source.suffix != ".py" and "." in file and file.replace(".", "").isidentifier() and findable(file):
            return _crew_in(vars(importlib.import_module(file)), file, name)
        raise DefinitionError(f"there is no file {file!r}; give the path of a Python file that makes a Crew")
    folder = str(source.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(source.stem, source)
    if spec is None or spec.loader is None:
        raise DefinitionError(f"{file!r} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.stem] = module
    try:
        spec.loader.exec_module(module)
    except MeshError:
        raise
    except SyntaxError as e:
        raise DefinitionError(f"{e.filename or file}, line {e.lineno}: {type(e).__name__}: {e.msg}") from e
    except (Exception, SystemExit) as e:  # a program that ends itself would end ours, with a code of its own
        line = next(
            (f.lineno for f in reversed(traceback.extract_tb(e.__traceback__)) if Path(f.filename).name == source.name),
            "?",
        )
        raise DefinitionError(f"{file}, line {line}: {type(e).__name__}: {e}") from e
    return _crew_in(vars(module), file, name)


def _crew_in(names: dict[str, Any], file: str, name: str) -> Crew:
    crews = {k: v for k, v in names.items() if isinstance(v, Crew)}
    if name:
        if name not in crews:
            raise DefinitionError(
                f"{file} has no Crew {name!r}; it has {', '.join(crews) or 'none'}.{did_you_mean(name, crews)}"
            )
        return crews[name]
    if not crews:
        raise DefinitionError(f"{file} makes no Crew; add `crew = Crew(YourAgent())`")
    if len({id(c) for c in crews.values()}) > 1:
        raise DefinitionError(
            f"{file} makes {len(crews)} crews ({', '.join(crews)}); say which: {file}:{next(iter(crews))}"
        )
    return next(iter(crews.values()))


# ---- meshes ------------------------------------------------------------------------------------
def place(config: "Config") -> "tuple[Config, EmbeddedValkey | None]":
    """Settings that say where messages and journal are: what is not named is in the embedded Valkey, which is joined."""
    from agentmesh.celery.settings import is_amqp

    if config.broker and (config.journal or not is_amqp(config.broker)):
        return config, None
    from agentmesh.celery.valkey import EmbeddedValkey

    valkey = EmbeddedValkey.join(config.home)
    if config.broker:
        return config.model_copy(update={"journal": valkey.url}), valkey
    return config.model_copy(update={"broker": valkey.broker_url, "journal": config.journal or valkey.url}), valkey


def open_journal(config: "Config") -> "tuple[Config, Journal, EmbeddedValkey | None]":
    """The journal alone, for whoever only reads and tells; needs no crew."""
    from agentmesh.celery.app import make_app
    from agentmesh.mesh import make_journal

    config, valkey = place(config)
    return config, make_journal(config, make_app(config.broker)), valkey


def make_mesh(crew: Crew, config: "Config", *, worker: str = "") -> "tuple[Mesh, EmbeddedValkey | None]":
    """A mesh for a crew: on the configured servers, or on the embedded Valkey."""
    from agentmesh.mesh import Mesh

    config, valkey = place(config)
    return Mesh(crew, config=config, models=Models(), worker=worker), valkey


class _Here:
    """What `run()` and `start()` keep up in this process: one mesh and worker a crew."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str, tuple[Mesh, InProcess, EmbeddedValkey | None]] = {}
        self._pid = os.getpid()

    def mesh(self, agent: "Agent[Any] | Crew") -> "Mesh":
        from agentmesh.config import load

        crew = agent if isinstance(agent, Crew) else Crew(agent, open=True)
        with self._lock:
            if self._pid != os.getpid():  # a fork has neither our threads nor our sockets
                self._open, self._pid = {}, os.getpid()
            if crew.name in self._open:
                mesh = self._open[crew.name][0]
                mesh.crew.take_in(crew)
                return mesh
            config = load()
            check_models(crew, config)
            mesh, valkey = make_mesh(crew, config)
            worker = mesh.worker().start()
            if not self._open:
                atexit.register(self.close)
            self._open[crew.name] = mesh, worker, valkey
            return mesh

    def close(self) -> None:
        """Stop the workers and leave the embedded Valkey; open runs stay resumable."""
        with self._lock:
            for mesh, worker, valkey in self._open.values():
                worker.stop()
                mesh.close()
                if valkey is not None:
                    valkey.leave()
            self._open.clear()
            atexit.unregister(self.close)


_HERE = _Here()


def start(
    agent: "Agent[Out] | Crew", task: Any = "", *, id: str = "", history: Sequence[Message] = (), stream: bool = True
) -> Run[Out]:
    """Begin a run and come back at once with its handle; a script or notebook needs nothing else.

    Args:
        agent: an agent, or a Crew whose first agent leads.
        id: of the run; the same id with the same task answers the run that is there.
        history: messages to put before the task: `other_run.messages`.
        stream: whether `run.tokens()` has something to give.

    Raises:
        MeshError: called inside a flow or a tool.
        ConfigError: a broker, model, key or package is missing.
    """
    _outside("start")
    mesh = _HERE.mesh(agent)
    lead = agent.lead if isinstance(agent, Crew) else agent
    return mesh.start(lead, task, id=id, history=history, stream=stream)


def run(
    agent: "Agent[Out] | Crew",
    task: Any = "",
    *,
    id: str = "",
    history: Sequence[Message] = (),
    timeout_s: float | None = None,
) -> Out:
    """The agent's answer: `start` and its result.

    Raises:
        RunError: the run ended without a value.
        TimeoutError: it has not ended in `timeout_s`; it can be taken up again under its id.
    """
    _outside("run")
    handle: Run[Out] = start(agent, task, id=id, history=history, stream=False)
    return handle.result(timeout_s=timeout_s)


def stop() -> None:
    """Stop what `run` and `start` keep up in this process."""
    _HERE.close()


def _outside(verb: str) -> None:
    inside = INSIDE.get()
    if inside:
        mend = "write `ctx.do(Researcher().on(task))`" if "flow" in inside else "call it from an agent's flow as a step"
        raise MeshError(f"`{verb}()` inside {inside} would hold a worker while it waits: {mend}")
