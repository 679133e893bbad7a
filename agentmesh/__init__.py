"""agentmesh: multi-agent crews on Celery. Every LLM step and tool call is a task; a journal is the only truth.

The names below are the whole public face. Each is loaded when it is first used (PEP 562): a command that only says what
it can do loads none, an agent's definition loads pydantic, and `run`, `start` and `Mesh` bring Celery and Redis.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentmesh.agent import Agent
    from agentmesh.boot import run, start
    from agentmesh.config import Config
    from agentmesh.crew import Crew
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
        RunCancelled,
        RunError,
        RunFailed,
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
    from agentmesh.limits import Limits
    from agentmesh.mesh import Mesh
    from agentmesh.queue import Queue
    from agentmesh.retriever import Retriever
    from agentmesh.run import Run
    from agentmesh.schedule import Schedule
    from agentmesh.step import Approve, Context, Sleep, ToolContext
    from agentmesh.tool import NotDone, Tool, Unknown, tool

__version__ = "0.3.0.dev0"
__all__ = [
    "Agent",
    "ApprovalDenied",
    "Approve",
    "Config",
    "ConfigError",
    "Context",
    "ContextTooLong",
    "Crew",
    "DefinitionError",
    "DelegateFailed",
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
    "RunCancelled",
    "RunError",
    "RunFailed",
    "Schedule",
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
    "run",
    "start",
    "tool",
]

# Where each name is; those left out are errors.
_HOME = {
    "Agent": "agent",
    "Approve": "step",
    "Config": "config",
    "Context": "step",
    "Crew": "crew",
    "Limits": "limits",
    "Mesh": "mesh",
    "NotDone": "tool",
    "Queue": "queue",
    "Retriever": "retriever",
    "Run": "run",
    "Schedule": "schedule",
    "Sleep": "step",
    "Tool": "tool",
    "ToolContext": "step",
    "Unknown": "tool",
    "run": "boot",
    "start": "boot",
    "tool": "tool",
}


def __getattr__(name: str) -> Any:
    if name in __all__:
        found = getattr(import_module(f"agentmesh.{_HOME.get(name, 'errors')}"), name)
        globals()[name] = found
        return found
    raise AttributeError(f"module 'agentmesh' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Face(ModuleType):
    """`run` and `tool` are functions of this package and modules in it; an import of a module must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in __all__ or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Face
