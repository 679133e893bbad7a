"""agentmesh: multi-agent crews on Celery. Every LLM step and tool call is a task; a journal is the only truth.

The names below are the whole public face. Each is loaded when it is first used (PEP 562): a command that only says what
it can do loads none, an agent's definition loads pydantic, and `run`, `start` and `Mesh` bring Celery and Redis.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentmesh import aio
    from agentmesh.config import Config
    from agentmesh.definitions.agent import Agent
    from agentmesh.definitions.context import Context
    from agentmesh.definitions.crew import Crew
    from agentmesh.definitions.limits import Limits
    from agentmesh.definitions.queue import DeviceQueue, Queue, ServerQueue
    from agentmesh.definitions.schedule import Schedule
    from agentmesh.definitions.step import Approve, Sleep, ToolContext
    from agentmesh.definitions.tool import NotDone, Tool, Unknown, tool
    from agentmesh.engine.async_run import AsyncRun
    from agentmesh.engine.run import Run
    from agentmesh.errors import (
        ApprovalDenied,
        ConfigError,
        ContextTooLong,
        DefinitionError,
        DelegateFailed,
        DocumentError,
        EmbedderError,
        EmbedderMismatch,
        ExtraMissing,
        FilterInvalid,
        GpuOutOfMemory,
        JournalError,
        JournalVersion,
        LimitReached,
        MeshError,
        ModelError,
        ModelRefused,
        NameTaken,
        OutputInvalid,
        QuorumMissed,
        ReplayError,
        RunCancelledError,
        RunError,
        RunFailedError,
        ServiceDown,
        StepError,
        StepRefused,
        StepTimeout,
        StoreConflict,
        StoreDamaged,
        StoreError,
        StoreFull,
        StoreVersion,
        ToolError,
        ToolSignatureError,
        TryAgain,
        UnknownName,
    )
    from agentmesh.mesh import Mesh
    from agentmesh.retriever import Retriever
    from agentmesh.runtime.local import run, start

__version__ = "0.3.0.dev0"
__all__ = [
    "Agent",
    "ApprovalDenied",
    "Approve",
    "AsyncRun",
    "Config",
    "ConfigError",
    "Context",
    "ContextTooLong",
    "Crew",
    "DefinitionError",
    "DelegateFailed",
    "DeviceQueue",
    "DocumentError",
    "EmbedderError",
    "EmbedderMismatch",
    "ExtraMissing",
    "FilterInvalid",
    "GpuOutOfMemory",
    "JournalError",
    "JournalVersion",
    "LimitReached",
    "Limits",
    "Mesh",
    "MeshError",
    "ModelError",
    "ModelRefused",
    "NameTaken",
    "NotDone",
    "OutputInvalid",
    "Queue",
    "QuorumMissed",
    "ReplayError",
    "Retriever",
    "Run",
    "RunCancelledError",
    "RunError",
    "RunFailedError",
    "Schedule",
    "ServerQueue",
    "ServiceDown",
    "Sleep",
    "StepError",
    "StepRefused",
    "StepTimeout",
    "StoreConflict",
    "StoreDamaged",
    "StoreError",
    "StoreFull",
    "StoreVersion",
    "Tool",
    "ToolContext",
    "ToolError",
    "ToolSignatureError",
    "TryAgain",
    "Unknown",
    "UnknownName",
    "aio",
    "run",
    "start",
    "tool",
]

# Where each name is; those left out are errors.
_HOME = {
    "Agent": "definitions.agent",
    "Approve": "definitions.step",
    "AsyncRun": "engine.async_run",
    "Config": "config",
    "Context": "definitions.context",
    "Crew": "definitions.crew",
    "DeviceQueue": "definitions.queue",
    "Limits": "definitions.limits",
    "Mesh": "mesh",
    "NotDone": "definitions.tool",
    "Queue": "definitions.queue",
    "Retriever": "retriever",
    "Run": "engine.run",
    "Schedule": "definitions.schedule",
    "ServerQueue": "definitions.queue",
    "Sleep": "definitions.step",
    "Tool": "definitions.tool",
    "ToolContext": "definitions.step",
    "Unknown": "definitions.tool",
    "run": "runtime.local",
    "start": "runtime.local",
    "tool": "definitions.tool",
}


def __getattr__(name: str) -> Any:
    if name == "aio":  # a module, whose import also sets it here
        return import_module("agentmesh.aio")
    if name in __all__:
        value = getattr(import_module(f"agentmesh.{_HOME.get(name, 'errors')}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'agentmesh' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
