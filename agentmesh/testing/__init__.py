"""The public test kit: scripted models, a mesh without servers, a fake OpenAI server, chaos. Our tests use nothing else."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentmesh.models.scripted import Reply, ScriptedModel, says, uses
    from agentmesh.testing.chaos import Chaos, DisturbLinks, KillHost, KillServer, KillWorker, StopWorker
    from agentmesh.testing.hosts import Host, WorkerProcess
    from agentmesh.testing.messages import DisturbMessages
    from agentmesh.testing.proxy import Proxy
    from agentmesh.testing.server import FakeOpenAI, Fault
    from agentmesh.testing.servers import RabbitServer, ValkeyServer
    from agentmesh.testing.world import FakeMesh

__all__ = [
    "Chaos", "DisturbLinks", "DisturbMessages", "FakeMesh", "FakeOpenAI", "Fault", "Host", "KillHost", "KillServer",
    "KillWorker", "Proxy", "RabbitServer", "Reply", "ScriptedModel", "StopWorker", "ValkeyServer", "WorkerProcess",
    "says", "uses",
]  # fmt: skip
_CHAOS = ["Chaos", "DisturbLinks", "KillHost", "KillServer", "KillWorker", "StopWorker"]
_SCRIPTED = "agentmesh.models.scripted"
_LAZY = {
    **dict.fromkeys(["Reply", "ScriptedModel", "says", "uses"], _SCRIPTED),
    **dict.fromkeys(["FakeOpenAI", "Fault"], "agentmesh.testing.server"),
    **dict.fromkeys(["RabbitServer", "ValkeyServer"], "agentmesh.testing.servers"),
    **dict.fromkeys(_CHAOS, "agentmesh.testing.chaos"),
    **dict.fromkeys(["Host", "WorkerProcess"], "agentmesh.testing.hosts"),
    "DisturbMessages": "agentmesh.testing.messages",
    "FakeMesh": "agentmesh.testing.world",
    "Proxy": "agentmesh.testing.proxy",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:  # lazily, so that `python -m agentmesh.testing.server` loads that module once
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'agentmesh.testing' has no attribute {name!r}")
