"""How a process ends: exit codes, errors as an `error:` and a `help:` line, and Ctrl-C."""

import atexit
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from agentmesh.errors import (
    ConfigError,
    DefinitionError,
    LimitReached,
    MeshError,
    RunCancelledError,
    RunError,
    RunFailedError,
)

DONE, FAILED, WRONG_USE, WAITING, ENVIRONMENT, INTERRUPTED = 0, 1, 2, 3, 4, 130


def exit_code(error: BaseException) -> int:
    """The exit code of a command that ends with this error."""
    if isinstance(error, ConfigError):
        return ENVIRONMENT
    if isinstance(error, DefinitionError):
        return WRONG_USE
    return WRONG_USE if isinstance(error, RunError) and type(error) is RunError else FAILED


def print_error(error: MeshError) -> None:
    """`error:` what happened, `help:` what to do."""
    hint = error.hint
    if isinstance(error, RunFailedError | RunCancelledError | LimitReached) and error.run_id:
        retry = f"agentmesh runs retry {error.run_id.partition('/')[0]}"
        hint = f"{hint}, then: {retry}" if hint else retry
    print(f"error: {error.message}", file=sys.stderr)
    if hint:
        print(f"help: {hint}", file=sys.stderr)


def skip_final_collection() -> None:
    """Skip the collector's last pass at exit: 0.3 s in a worker, 2 s with torch."""
    atexit.register(gc.freeze)


# ---- Ctrl-C ------------------------------------------------------------------------------------
def exit_at_once(number: int, frame: FrameType | None) -> None:
    """The handler of SIGINT while there is nothing to clean up, such as during imports.

    Python's own raises KeyboardInterrupt in whatever runs. In the middle of an import that may be the callback of a weak
    reference, which drops the exception and leaves the import lock held: the command then never ends.
    """
    with suppress(Exception):
        sys.stdout.flush()
    os._exit(INTERRUPTED)


@contextmanager
def interruptible() -> Iterator[None]:
    """Within, Ctrl-C is a KeyboardInterrupt: there is something to print or to clean up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
