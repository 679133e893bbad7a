"""What wants to see steps and runs go by: spans, counters, logs. The engine knows none of them; this is their one door."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

from agentmesh.doing import Attempt, Charge, Doing
from agentmesh.event import Event
from agentmesh.replay import History
from agentmesh.step import Step

Told = Callable[[Event], None]


class Sight(Protocol):
    """Looks on and changes nothing; what it raises would be the step's, so it raises nothing."""

    def step(self, step: Step[Any], at: Attempt, model: str) -> AbstractContextManager[Told] | None:
        """Entered around one attempt and told its end; an attempt that is cut off tells none. None: it does not look.

        Args:
            model: the model an Ask goes to, as `provider:name`.
        """
        ...

    def ended(self, history: History, end: Event) -> None:
        """A run ended by this process's hand."""
        ...


class Watched:
    """A Doer with onlookers.

    Args:
        model: asked by agents that name none.
    """

    def __init__(self, doer: Doing, sights: Iterable[Sight], model: Any = "") -> None:
        self._doer, self._sights, self._model = doer, tuple(sights), model

    async def do(self, step: Step[Any], at: Attempt) -> tuple[Event, Charge]:
        """See doing.Doing."""
        model = self._named(step)
        views = [view for sight in self._sights if (view := sight.step(step, at, model)) is not None]
        if not views:
            return await self._doer.do(step, at)
        with ExitStack() as stack:
            told = [stack.enter_context(view) for view in views]
            event, charge = await self._doer.do(step, at)
            for tell in told:
                tell(event)
        return event, charge

    def ended(self, history: History, end: Event) -> None:
        """A run ended; the engine's hook."""
        for sight in self._sights:
            sight.ended(history, end)

    def _named(self, step: Step[Any]) -> str:
        if step.kind != "Ask":
            return ""
        model = getattr(step, "model", "") or self._model
        return type(model).__name__ if hasattr(model, "ask") else str(model)
