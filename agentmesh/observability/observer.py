"""The interface of observers of steps and runs: spans, counters, logs. The engine knows none of them."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from typing import Any, Protocol

from agentmesh.definitions.step import Step
from agentmesh.engine.executor import Attempt, Charge, StepExecutor
from agentmesh.engine.replay import History
from agentmesh.journal.events import Event
from agentmesh.model import model_name

OnStepEnd = Callable[[Event], None]


class Observer(Protocol):
    """Observes and changes nothing; an exception would become the step's, so it raises none."""

    def step(self, step: Step[Any], at: Attempt, model: str) -> AbstractContextManager[OnStepEnd] | None:
        """Entered around one attempt and told its end; an attempt that is cut off tells none. None: it does not look.

        Args:
            model: the model an Ask goes to, as `provider:name`.
        """
        ...

    def ended(self, history: History, end: Event) -> None:
        """A run was ended by this process."""
        ...


class ObservedExecutor:
    """An executor with observers.

    Args:
        model: asked by agents that name none.
    """

    def __init__(self, executor: StepExecutor, observers: Iterable[Observer], model: Any = "") -> None:
        self._executor, self._observers, self._model = executor, tuple(observers), model

    async def do(self, step: Step[Any], at: Attempt) -> tuple[Event, Charge]:
        """See StepExecutor."""
        model = self._model_name(step)
        views = [view for observer in self._observers if (view := observer.step(step, at, model)) is not None]
        if not views:
            return await self._executor.do(step, at)
        with ExitStack() as stack:
            callbacks = [stack.enter_context(view) for view in views]
            event, charge = await self._executor.do(step, at)
            for on_end in callbacks:
                on_end(event)
        return event, charge

    def ended(self, history: History, end: Event) -> None:
        """A run ended; the engine's hook."""
        for observer in self._observers:
            observer.ended(history, end)

    def _model_name(self, step: Step[Any]) -> str:
        if step.target != "model":
            return ""
        return model_name(getattr(step, "model", "") or self._model)
