"""The queues of a crew: which one a step goes to, which ones a worker serves, and what the broker calls them."""

from collections.abc import Iterable, Sequence
from itertools import combinations
from typing import Any

from agentmesh.definitions.queue import (
    EMBED_QUEUE,
    LANES,
    BaseQueue,
    DeviceQueue,
    Queue,
    ServerQueue,
    Servers,
    Suspects,
    WorkerKind,
)
from agentmesh.definitions.step import Step
from agentmesh.errors import DefinitionError, NameTaken, UnknownName, did_you_mean
from agentmesh.model import Model

DEFAULT_QUEUE = "main"


class CrewQueues(dict[str, BaseQueue]):
    """The queues of a crew by name; the first is where steps go that name none.

    Args:
        crew: the crew's name.
        queues: `Queue("main")` when there are none.
        model: of agents that name none.

    Raises:
        NameTaken: two queues of one name.
        DefinitionError: two queues that the same processes, or the same servers, serve contradict each other.
    """

    def __init__(self, crew: str, queues: Sequence[BaseQueue], model: Model | str | None = None) -> None:
        if not isinstance(queues, list | tuple):
            raise DefinitionError(f"crew {crew!r}: queues is {queues!r}, not a list", hint="write queues=[…]")
        for queue in queues:
            if not isinstance(queue, BaseQueue):
                name = queue if isinstance(queue, str) else "NAME"
                raise DefinitionError(
                    f"crew {crew!r}: queues has {queue!r}, which is not a queue", hint=f"write Queue({name!r})"
                )
        super().__init__({q.name: q for q in queues} or {DEFAULT_QUEUE: Queue(DEFAULT_QUEUE)})
        self._crew, self._model = crew, model
        if len(self) < len(queues):
            raise NameTaken(
                f"crew {crew!r} has several queues with the same name: {', '.join(q.name for q in queues)}",
                hint="rename one",
            )
        self._check_devices()

    @property
    def first(self) -> str:
        """The first queue: where steps go that name none."""
        return next(iter(self))

    def of(self, step: Step[Any], default: Model | str | None = None) -> str:
        """The crew's queue for a step: its own, its model's, or the first; for embed steps of an ingest one with an encoder.

        Args:
            default: the model of agents that name none, in a crew that names none.
        """
        own: str = step.policy().queue
        if own in self:
            return own
        if own == EMBED_QUEUE and (embed_queues := [q for q in self.on_devices() if q.embed]):
            return max(embed_queues, key=lambda q: LANES.index(q.lane)).name  # the least urgent
        model = getattr(step, "model", None) or self._model or default
        if step.target == "model" and isinstance(model, str):
            for queue in self.values():
                if queue.serves_model(model):
                    return queue.name
        return self.first

    def servers_of(self, step: Step[Any], default: Model | str | None = None) -> Servers | None:
        """The model servers that answer the asks of a step's queue, or None.

        Args:
            default: the model of agents that name none, in a crew that names none.
        """
        model = getattr(step, "model", None) or self._model
        if step.target != "model" or hasattr(model, "ask"):
            return None
        queue = self[self.of(step, default)]
        return queue.servers if isinstance(queue, ServerQueue) else None

    def served_by(self, worker: WorkerKind, only: Iterable[str] = ()) -> list[str]:
        """Of these queues, or of all, the names of those that this kind of worker process serves."""
        selected = list(only) or self
        return [name for name, queue in self.items() if name in selected and queue.worker_kind == worker]

    def on_devices(self, only: Iterable[str] = ()) -> list[DeviceQueue]:
        """Of these queues, or of all, those whose workers load a model."""
        selected = list(only) or self
        return [q for name, q in self.items() if name in selected and isinstance(q, DeviceQueue)]

    def worker_groups(self, only: Iterable[str] = ()) -> list[list[str]]:
        """These queues, or all, grouped by the places in a worker that they share: queues of the same servers share theirs.

        Raises:
            UnknownName: the crew has no such queue.
        """
        groups: dict[Any, list[str]] = {}
        for name in list(only) or self:
            self.check(f"crew {self._crew!r}: --queue", name)
            queue = self[name]
            groups.setdefault(queue.shared_places if isinstance(queue, ServerQueue) else None, []).append(name)
        return list(groups.values())

    def broker_name(self, queue: str) -> str:
        """The broker's name of a queue."""
        return f"agentmesh.{self._crew}.{queue}"

    def broker_names(self, only: Iterable[str] = (), *, suspects: Suspects = "include") -> list[str]:
        """The broker's names of these queues, or of all, each with the queue of its suspects.

        Args:
            suspects: `exclude` leaves out the suspects that run in a separate process, `only` all but those.

        Raises:
            UnknownName: the crew has no such queue.
        """
        for queue in only:
            self.check(f"crew {self._crew!r}: --queue", queue)
        selected = list(only) or list(self)
        names = [self.broker_name(q) for q in selected if suspects != "only"]
        isolated = [q for q in selected if suspects == "include" or self.isolates_suspects(q) == (suspects == "only")]
        return [*names, *[f"{self.broker_name(q)}.suspects" for q in isolated]]

    def isolates_suspects(self, queue: str) -> bool:
        """Whether this queue's suspects have a process of their own: not where that would load a model once more."""
        return queue in self and self[queue].isolates_suspects

    def _check_devices(self) -> None:
        """Nothing, where the queues that the same processes or servers serve agree.

        Raises:
            DefinitionError: two of them contradict each other.
        """
        first: dict[str, DeviceQueue] = {}
        encoders: dict[str, DeviceQueue] = {}
        for queue in self.on_devices():
            other = first.setdefault(queue.model, queue)
            if queue.devices != other.devices:
                raise DefinitionError(
                    f"crew {self._crew!r}: queues {other.name!r} and {queue.name!r} of model {queue.model!r} have devices="
                    f"{other.devices!r} and {queue.devices!r}",
                    hint="write the same in each: the same processes serve both",
                )
            beside = encoders.setdefault(queue.model, queue) if queue.embed else queue
            if queue.embed != beside.embed:
                raise DefinitionError(
                    f"crew {self._crew!r}: queues {beside.name!r} and {queue.name!r} of model {queue.model!r} have embed="
                    f"{beside.embed!r} and {queue.embed!r}",
                    hint="name one encoder: the same processes serve both",
                )
        for one, two in combinations([q for q in self.values() if isinstance(q, ServerQueue)], 2):
            shared = sorted({*one.urls} & {*two.urls})
            if shared and {*one.urls} != {*two.urls} and one.lane != two.lane:
                raise DefinitionError(
                    f"crew {self._crew!r}: queues {one.name!r} and {two.name!r} are lanes ({one.lane}, {two.lane}) that share "
                    f"{', '.join(shared)}, but not all servers",
                    hint="write the same urls in each: lanes share their places",
                )

    def check(self, who: str, queue: str) -> None:
        """Nothing, where there is such a queue, or `queue` is "".

        Raises:
            UnknownName: there is none.
        """
        if queue and queue not in self:
            names = ", ".join(repr(q) for q in self)
            raise UnknownName(
                f"{who} names the unknown queue {queue!r}",
                hint=f"use one of: {names}.{did_you_mean(queue, self)}",
            )
