"""The public test kit: scripted models, a mesh without servers, a fake OpenAI server, chaos."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentmesh.testing.broker_faults import DisturbMessages
    from agentmesh.testing.chaos import Chaos, DisturbLinks, KillHost, KillServer, KillWorker, StopWorker
    from agentmesh.testing.fake_mesh import FakeMesh
    from agentmesh.testing.fake_openai import FakeOpenAI, Fault
    from agentmesh.testing.hosts import Host, WorkerProcess
    from agentmesh.testing.proxy import Proxy
    from agentmesh.testing.scripted import Reply, ScriptedModel, says, uses
    from agentmesh.testing.servers import RabbitServer, ValkeyServer

__all__ = [
    "Chaos", "DisturbLinks", "DisturbMessages", "FakeMesh", "FakeOpenAI", "Fault", "Host", "KillHost", "KillServer",
    "KillWorker", "Proxy", "RabbitServer", "Reply", "ScriptedModel", "StopWorker", "ValkeyServer", "WorkerProcess",
    "says", "uses",
]  # fmt: skip
_CHAOS = ["Chaos", "DisturbLinks", "KillHost", "KillServer", "KillWorker", "StopWorker"]
_SCRIPTED = "agentmesh.testing.scripted"
_LAZY = {
    **dict.fromkeys(["Reply", "ScriptedModel", "says", "uses"], _SCRIPTED),
    **dict.fromkeys(["FakeOpenAI", "Fault"], "agentmesh.testing.fake_openai"),
    **dict.fromkeys(["RabbitServer", "ValkeyServer"], "agentmesh.testing.servers"),
    **dict.fromkeys(_CHAOS, "agentmesh.testing.chaos"),
    **dict.fromkeys(["Host", "WorkerProcess"], "agentmesh.testing.hosts"),
    "DisturbMessages": "agentmesh.testing.broker_faults",
    "FakeMesh": "agentmesh.testing.fake_mesh",
    "Proxy": "agentmesh.testing.proxy",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:  # lazily, so that `python -m agentmesh.testing.fake_openai` loads that module once
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'agentmesh.testing' has no attribute {name!r}")
