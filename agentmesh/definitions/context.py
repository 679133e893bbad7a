"""How a flow asks for steps: one with `do`, several side by side with `gather`."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, Protocol, TypeVar, overload

from agentmesh.definitions.step import Step
from agentmesh.errors import StepError
from agentmesh.message import Message

T = TypeVar("T")
T1 = TypeVar("T1")
T2 = TypeVar("T2")
T3 = TypeVar("T3")
T4 = TypeVar("T4")
T5 = TypeVar("T5")
T6 = TypeVar("T6")


class Context(Protocol):
    """What a flow asks for steps. Between two steps a flow is plain code without clocks, randomness or I/O.

    Args:
        run_id: of this run.
        started_at: seconds since the epoch, by the clock of the journal's store; the same in every replay.
        history: messages of an earlier conversation, which the default flow puts before the task.
        messages: the flow puts its conversation here, for `run.messages`.
    """

    @property
    def run_id(self) -> str: ...
    @property
    def started_at(self) -> float: ...
    @property
    def history(self) -> Sequence[Message]: ...

    messages: list[Message]

    def do(self, step: Step[T]) -> T:
        """The step's value, from the journal; while it is not there, the flow is suspended here.

        Raises:
            StepError: the step failed for good.
        """
        ...

    # A tuple is an Iterable, so the overloads for tuples come first, and mypy calls what is meant an overlap.
    @overload
    def gather(self, steps: tuple[Step[T1], Step[T2]], *, window: int = 0) -> tuple[T1, T2]: ...  # type: ignore[overload-overlap]
    @overload
    def gather(self, steps: tuple[Step[T1], Step[T2], Step[T3]], *, window: int = 0) -> tuple[T1, T2, T3]: ...  # type: ignore[overload-overlap]
    @overload
    def gather(  # type: ignore[overload-overlap]
        self, steps: tuple[Step[T1], Step[T2], Step[T3], Step[T4]], *, window: int = 0
    ) -> tuple[T1, T2, T3, T4]: ...
    @overload
    def gather(  # type: ignore[overload-overlap]
        self, steps: tuple[Step[T1], Step[T2], Step[T3], Step[T4], Step[T5]], *, window: int = 0
    ) -> tuple[T1, T2, T3, T4, T5]: ...
    @overload
    def gather(  # type: ignore[overload-overlap]
        self, steps: tuple[Step[T1], Step[T2], Step[T3], Step[T4], Step[T5], Step[T6]], *, window: int = 0
    ) -> tuple[T1, T2, T3, T4, T5, T6]: ...
    @overload
    def gather(self, steps: tuple[Step[T], ...], *, window: int = 0) -> tuple[T, ...]: ...  # type: ignore[overload-overlap]
    @overload
    def gather(  # type: ignore[overload-overlap]
        self, steps: tuple[Step[T1], Step[T2]], *, errors: Literal[True], deadline_s: float | None = None,
        window: int = 0,
    ) -> tuple[T1 | StepError, T2 | StepError]: ...  # fmt: skip
    @overload
    def gather(  # type: ignore[overload-overlap]
        self, steps: tuple[Step[T1], Step[T2], Step[T3]], *, errors: Literal[True], deadline_s: float | None = None,
        window: int = 0,
    ) -> tuple[T1 | StepError, T2 | StepError, T3 | StepError]: ...  # fmt: skip
    @overload
    def gather(  # type: ignore[overload-overlap]
        self, steps: tuple[Step[T1], Step[T2], Step[T3], Step[T4]], *, errors: Literal[True],
        deadline_s: float | None = None, window: int = 0,
    ) -> tuple[T1 | StepError, T2 | StepError, T3 | StepError, T4 | StepError]: ...  # fmt: skip
    @overload
    def gather(  # type: ignore[overload-overlap]
        self, steps: tuple[Step[T1], Step[T2], Step[T3], Step[T4], Step[T5]], *, errors: Literal[True],
        deadline_s: float | None = None, window: int = 0,
    ) -> tuple[T1 | StepError, T2 | StepError, T3 | StepError, T4 | StepError, T5 | StepError]: ...  # fmt: skip
    @overload
    def gather(  # type: ignore[overload-overlap]
        self, steps: tuple[Step[T1], Step[T2], Step[T3], Step[T4], Step[T5], Step[T6]], *, errors: Literal[True],
        deadline_s: float | None = None, window: int = 0,
    ) -> tuple[T1 | StepError, T2 | StepError, T3 | StepError, T4 | StepError, T5 | StepError, T6 | StepError]: ...  # fmt: skip
    @overload
    def gather(  # type: ignore[overload-overlap]
        self, steps: tuple[Step[T], ...], *, errors: Literal[True], deadline_s: float | None = None, window: int = 0
    ) -> tuple[T | StepError, ...]: ...
    @overload
    def gather(
        self, steps: Iterable[Step[T]], *, need: float | None = None, deadline_s: float | None = None, window: int = 0
    ) -> list[T]: ...
    @overload
    def gather(
        self, steps: Iterable[Step[T]], *, errors: Literal[True], deadline_s: float | None = None, window: int = 0
    ) -> list[T | StepError]: ...
    def gather(
        self, steps: Iterable[Step[Any]], *, need: float | None = None, deadline_s: float | None = None,
        errors: bool = False, window: int = 0,
    ) -> Any:  # fmt: skip
        """The values of steps done side by side, in the order asked.

        Args:
            need: how many successes are enough: a count (int) or a fraction (float) of them, rounded up.
            deadline_s: the gather closes after so many seconds, with the members that have ended.
            errors: True gives each member's value or its StepError, once all have ended.
            window: how many members are in flight at once; 0 is all.

        Returns:
            All values: a tuple for a tuple of steps, so that `a, b = ctx.gather((x, y))` has the types of both, and a
            list for anything else. With `need`, or with `deadline_s` and not `errors`, a list of the values of the
            members that succeeded in time.

        Raises:
            StepError: the first member that failed (neither need nor deadline_s given).
            QuorumMissed: fewer than `need` succeeded.
        """
        ...
