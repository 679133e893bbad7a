"""How a command ends: exit codes, and errors as an `error:` and a `help:` line."""

import typer

from agentmesh.errors import ConfigError, DefinitionError, LimitReached, MeshError, RunCancelled, RunError, RunFailed

DONE, FAILED, WRONG_USE, WAITING, SURROUNDINGS, INTERRUPTED = 0, 1, 2, 3, 4, 130


def exit_code(error: BaseException) -> int:
    """What a command ends with after this error."""
    if isinstance(error, ConfigError):
        return SURROUNDINGS
    if isinstance(error, DefinitionError):
        return WRONG_USE
    return WRONG_USE if isinstance(error, RunError) and type(error) is RunError else FAILED


def say_error(error: MeshError) -> None:
    """`error:` what happened, `help:` what to do."""
    happened, _, mend = error.message.partition("; ")
    typer.echo(f"error: {happened}", err=True)
    if isinstance(error, RunFailed | RunCancelled | LimitReached) and error.run_id:
        again = f"agentmesh runs retry {error.run_id.partition('/')[0]}"
        happened, mend = (
            (happened, f"{mend}, then: {again}") if isinstance(error, LimitReached) else (error.message, again)
        )
    if mend:
        typer.echo(f"help: {mend}", err=True)
