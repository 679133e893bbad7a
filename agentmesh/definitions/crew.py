"""The agents of one program with their queues and limits; all names are checked here, once."""

import hashlib
import inspect
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Generic

from typing_extensions import TypeVar

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew_queues import CrewQueues
from agentmesh.definitions.limits import Limits
from agentmesh.definitions.passthrough import Passthrough
from agentmesh.definitions.queue import BaseQueue
from agentmesh.definitions.schedule import Schedule
from agentmesh.definitions.tool import Tool
from agentmesh.errors import DefinitionError, NameTaken, UnknownName, did_you_mean
from agentmesh.model import Model

CREW_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
Out_co = TypeVar("Out_co", default=Any, covariant=True)


class Crew(Generic[Out_co]):
    """What a program declares: its agents (the first one leads), closed over `team`.

    `Crew[Verdict]` is a crew whose lead gives a Verdict: what a run of the crew gives.

    Args:
        lead: the agent that a run of the crew begins with.
        agents: those that flows delegate to, or that are started by name; members of a `team` need not be listed.
        name: of the broker queues `agentmesh.NAME.QUEUE`; the file's stem when left out.
        model: for agents that name none.
        queues: steps that name no queue go to the first; `Queue("main")` when left out.
        schedules: runs begun at set times, where `--beat` or `celery beat` runs.
        version: a worker claims only steps of runs begun with its own version.
        deps: given to tools as `ToolContext.deps`.
        extensible: agents that a flow delegates to are added; for a crew whose steps all run in one process.

    Raises:
        NameTaken: two different agents, or two tools, of one name.
        UnknownName: an agent or tool names a queue that the crew does not have.
    """

    def __init__(
        self, lead: Agent[Out_co, Any], *agents: Agent[Any, Any], name: str = "", model: Model | str | None = None,
        queues: Sequence[BaseQueue] = (), limits: Limits | None = None, schedules: Sequence[Schedule] = (), version: str = "",
        deps: Any = None, extensible: bool = False,
    ) -> None:  # fmt: skip
        self.lead: Agent[Out_co, Any] = lead
        self.model, self.version, self.deps, self._extensible = model, version, deps, extensible
        self.limits = limits or Limits()
        self._file = _caller_file(inspect.currentframe())
        self.name = name or _default_name(self._file)
        if not CREW_NAME.fullmatch(self.name):
            raise DefinitionError(
                f"crew name {self.name!r} is not allowed",
                hint="use letters, digits, `_` and `-`, at most 64 characters",
            )
        self.queues = CrewQueues(self.name, queues, model)
        self.agents: dict[str, Agent[Any, Any]] = {}
        self._tools: dict[str, Tool[..., Any]] = {}
        for agent in (lead, *agents, *(s.agent for s in schedules)):
            self._add(agent)
        self.schedules = {s.name: s for s in schedules}
        if len(self.schedules) < len(schedules):
            raise NameTaken(
                f"crew {self.name!r} has several schedules with the same name", hint="set `name` in one of them"
            )

    def _add(self, agent: Agent[Any, Any]) -> None:
        if isinstance(agent, type):
            raise DefinitionError(
                f"crew {self.name!r} was given the class {agent.__name__}", hint=f"write `{agent.__name__}()`"
            )
        if not isinstance(agent, Agent):
            raise DefinitionError(
                f"crew {self.name!r} was given {agent!r}, which is not an Agent", hint="pass instances of Agent classes"
            )
        if agent.name == Passthrough.name:
            raise NameTaken(
                f"crew {self.name!r} has an agent named {agent.name!r}, which is reserved", hint="choose another name"
            )
        existing = self.agents.get(agent.name)
        if existing is not None and type(existing) is not type(agent) and not _is_redefinition(existing, agent):
            raise NameTaken(
                f"two agents are named {agent.name!r} ({_defined_at(existing)} and {_defined_at(agent)})",
                hint="set `name` in one of them",
            )
        self.agents[agent.name] = agent
        if existing is not None and type(existing) is type(agent):
            return
        self.queues.check(f"agent `{agent.name}`", agent.queue)
        self._check_model(agent)
        for tool in agent.tools:
            same = self._tools.setdefault(tool.name, tool)
            if same is not tool and same.func.__qualname__ != tool.func.__qualname__:
                raise NameTaken(
                    f"two tools are named {tool.name!r}", hint="give one of them another with `@tool(name=…)`"
                )
            self.queues.check(f"tool `{tool.name}`", tool.queue)
        for member in agent.team:
            self._add(member)

    def _check_model(self, agent: Agent[Any, Any]) -> None:
        model = agent.model or self.model
        if isinstance(model, str) and ":" not in model:
            raise DefinitionError(
                f"agent `{agent.name}` has model {model!r}, which names no provider",
                hint="write `provider:name`, such as 'openai:gpt-5-mini' or 'local:smollm2'",
            )
        if model is not None and not isinstance(model, str) and not hasattr(model, "ask"):
            is_langchain = type(model).__module__.startswith("langchain")
            raise DefinitionError(
                f"agent `{agent.name}` has model {model!r}, which is not a model",
                hint="write `agentmesh.langchain.as_model(it)`"
                if is_langchain
                else "give it an `async def ask(prompt, on_token)`",
            )

    def _absorb(self, other: "Crew[Any]") -> None:
        """Add another crew's agents; of two classes of one name the newer one stays (a notebook's cell that was run again)."""
        self.agents.update(other.agents)
        self._tools.update(other._tools)

    def _register_delegate(self, agent: Agent[Any, Any]) -> None:
        """Add an agent that a flow delegates to, where the crew is extensible."""
        if self._extensible and agent.name not in self.agents:
            self._add(agent)

    def agent(self, name: str, fields: Mapping[str, Any] | None = None) -> Agent[Any, Any]:
        """The agent of this name, with these fields.

        Raises:
            UnknownName: the crew has none.
        """
        if name == Passthrough.name:
            return Passthrough()
        if name not in self.agents:
            names = ", ".join(self.agents)
            raise UnknownName(
                f"crew {self.name!r} has no agent {name!r}: it has {names}.{did_you_mean(name, self.agents)}",
                hint="list it in Crew(...), or in an agent's team",
            )
        agent = self.agents[name]
        return type(agent)(**fields) if fields else agent


def models_of(crew: "Crew[Any]", default: str) -> list[str]:
    """The names of the models that the crew or its agents name; `default` stands for those of agents that name none."""
    names = [m for m in (crew.model, *(a.model for a in crew.agents.values())) if isinstance(m, str)]
    if crew.model is None and any(a.model is None and type(a).flow is Agent.flow for a in crew.agents.values()):
        names.append(default)
    return list(dict.fromkeys(names))


def names_every_model(crew: "Crew[Any]") -> bool:
    """Whether no agent is left that would ask the settings' model."""
    return crew.model is not None or all(agent.model for agent in crew.agents.values())


def _caller_file(frame: FrameType | None) -> str:
    while frame is not None and frame.f_globals.get("__name__", "").startswith("agentmesh."):
        frame = frame.f_back
    return "" if frame is None else str(frame.f_globals.get("__file__") or "")


def _default_name(file: str) -> str:
    if file:
        return re.sub(r"[^A-Za-z0-9_-]", "-", Path(file).stem)[:64]
    # a notebook or a prompt: a name for each kernel, so that two do not claim each other's steps
    return f"kernel-{hashlib.blake2b(f'{os.getpid()}{sys.argv}'.encode(), digest_size=4).hexdigest()}"


def _defined_at(agent: Agent[Any, Any]) -> str:
    return f"{type(agent).__module__}.{type(agent).__qualname__}"


def _is_redefinition(old: Agent[Any, Any], new: Agent[Any, Any]) -> bool:
    """Whether both are one class of a notebook's cell that was run again, or of a script's."""
    return _defined_at(old) == _defined_at(new) and type(new).__module__ == "__main__"
