"""agentmesh: multi-agent crews on Celery. Every LLM step and tool call is a task; a journal is the only truth.

The names below are the whole public face. Importing them loads the standard library and pydantic alone;
`run`, `start` and `Mesh` bring Celery and Redis when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from agentmesh.agent import Agent
from agentmesh.boot import run, start
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
from agentmesh.queue import Queue
from agentmesh.run import Run
from agentmesh.schedule import Schedule
from agentmesh.step import Approve, Context, Sleep, ToolContext
from agentmesh.tool import NotDone, Tool, Unknown, tool

if TYPE_CHECKING:
    from agentmesh.config import Config
    from agentmesh.mesh import Mesh
    from agentmesh.retriever import Retriever

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
_LAZY = {"Config": "config", "Mesh": "mesh", "Retriever": "retriever"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"agentmesh.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'agentmesh' has no attribute {name!r}")
