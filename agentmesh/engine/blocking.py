"""Plain calls that wait: where they must not be made, and what to write there."""

import asyncio
import functools
import inspect
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, ParamSpec, TypeVar

from agentmesh.definitions.step import RUNNING_INSIDE
from agentmesh.errors import MeshError

P = ParamSpec("P")
T = TypeVar("T")


def refuse_inside_step(verb: str) -> None:
    """Nothing outside of flows and tools; a run that a step waits for would hold the step's worker.

    Raises:
        MeshError: a flow or a tool called `run` or `start`.
    """
    if inside := RUNNING_INSIDE.get():
        hint = (
            "write `ctx.do(Researcher().on(task))`"
            if "flow" in inside
            else "make it an agent's flow, or a member of the team"
        )
        raise MeshError(f"`{verb}()` inside {inside} would block a worker while it waits", hint=hint)


def refuse_on_event_loop(call: str, line: str) -> None:
    """Nothing where the caller may wait; a cell of a notebook may, although its kernel's loop runs in this thread.

    Args:
        call: what was called: `mesh.start()`.
        line: what to write instead: `await mesh.begin(…)`.

    Raises:
        MeshError: an event loop runs in this thread.
    """
    if asyncio._get_running_loop() is None or _in_notebook_cell():
        return
    inside = RUNNING_INSIDE.get()
    if "flow" in inside:  # it is replayed, and cannot await
        raise MeshError(f"`{call}` inside {inside} would run again at each replay", hint="call it in a tool")
    raise MeshError(f"`{call}` would block the event loop that runs in this thread", hint=f"write `{line}`")


def waits(owner: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Marks a plain method that has a twin to await in `owner.aio`."""

    def mark(method: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(method)
        def checked(*args: P.args, **kwargs: P.kwargs) -> T:
            if asyncio._get_running_loop() is not None:
                name, arguments = method.__name__, "…" if len(args) > 1 or kwargs else ""
                refuse_on_event_loop(f"{owner}.{name}()", f"await {owner}.aio.{name}({arguments})")
            return method(*args, **kwargs)

        return checked

    return mark


def refuse_method(owner: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """`refuse_on_event_loop`, for a plain method that mirrors this one of `owner.aio`."""
    if asyncio._get_running_loop() is not None:
        name, arguments = method.__name__, "…" if args or any(kwargs.values()) else ""
        prefix = "async for … in" if inspect.isasyncgenfunction(method) else "await"
        refuse_on_event_loop(f"{owner}.{name}()", f"{prefix} {owner}.aio.{name}({arguments})")


def _in_notebook_cell() -> bool:
    """Whether the call comes from a cell's own lines, or from a plain function that they call."""
    ipython = sys.modules.get("IPython")
    if ipython is None or ipython.get_ipython() is None:
        return False
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_name != "<module>":  # a cell's, also of one that awaits
        if frame.f_code.co_flags & inspect.CO_COROUTINE:
            return False
        frame = frame.f_back
    return frame is not None
