"""`agentmesh`: the commands, their options and help. Each body is one call into its own module."""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from agentmesh.cli.options import Options
from agentmesh.cli.rag import rag
from agentmesh.errors import MeshError
from agentmesh.runtime.process_exit import INTERRUPTED, exit_at_once, exit_code, print_error, skip_final_collection

app = typer.Typer(
    name="agentmesh", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None,
    help="Run crews of agents on Celery. Every step is journaled, so runs survive the death of any process.",
    epilog="Examples:  agentmesh run crew.py 'write about tea'  ·  agentmesh worker crew.py  ·  agentmesh runs ls",
)  # fmt: skip
runs = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Inspect and control runs.",
                   epilog="Examples:  agentmesh runs show ID  ·  agentmesh runs approve ID 2  ·  agentmesh runs resume ID")  # fmt: skip
models = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Models on this machine.",
                     epilog="Examples:  agentmesh models pull smollm2  ·  agentmesh models ls  ·  agentmesh models rm smollm2")  # fmt: skip
app.add_typer(runs, name="runs")
app.add_typer(models, name="models")
app.add_typer(rag, name="rag")

Broker = Annotated[str, typer.Option(help="Celery broker URL; defaults to an embedded Valkey.", metavar="URL")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
RunId = Annotated[str, typer.Argument(metavar="ID", help="The run's id.")]
StepN = Annotated[int, typer.Argument(metavar="N", help="The step's number.")]
By = Annotated[str, typer.Option(help="Who decides; recorded in the journal.")]


def _print_version(requested: bool) -> None:
    if requested:
        from agentmesh import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    config: Annotated[
        Path | None, typer.Option(help="agentmesh.toml or pyproject.toml to read settings from.", metavar="FILE")
    ] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    Options.config, Options.debug = config, debug


@app.command(
    epilog="Examples:  agentmesh run crew.py 'write about tea'  ·  agentmesh run crew.py:night TASK --detach --id tea-7"
)
def run(
    crew: Annotated[
        str, typer.Argument(metavar="CREW", help="A Python file that defines a Crew: crew.py or crew.py:name.")
    ],
    task: Annotated[
        str,
        typer.Argument(
            metavar="TASK", help="The task of the crew's first agent: text, or JSON where it takes another type."
        ),
    ],
    broker: Broker = "",
    model: Annotated[
        str, typer.Option(help="Model for agents without one, such as openai:gpt-5-mini.", metavar="NAME")
    ] = "",
    run_id: Annotated[
        str, typer.Option("--id", help="The run's id; an existing run with the same id and task is resumed.")
    ] = "",
    detach: Annotated[bool, typer.Option("--detach", help="Print the run's id and leave it running.")] = False,
    json: Json = False,
) -> None:
    """Run a crew and show what it does. Ctrl-C leaves the run resumable."""
    from agentmesh.cli.run import run_crew

    raise typer.Exit(
        run_crew(
            crew, task, broker=broker, model=model, run_id=run_id, detach=detach, as_json=json, file=Options.config
        )
    )


@app.command(
    epilog="Examples:  agentmesh worker crew.py --queue web --concurrency 200  ·  agentmesh worker a.py b.py --processes 2"
)
def worker(
    crews: Annotated[list[str], typer.Argument(metavar="CREW...", help="Crew files; one worker may serve several.")],
    queue: Annotated[
        list[str] | None, typer.Option(help="A queue to serve, repeatable; defaults to all queues of the crews.")
    ] = None,
    concurrency: Annotated[int, typer.Option(help="Steps at once in a process; 0 is what the queues declare.")] = 0,
    processes: Annotated[int, typer.Option(help="Worker processes.", min=1)] = 1,
    metrics: Annotated[
        str, typer.Option(help="Serve /metrics and /health here: PORT on loopback, or HOST:PORT.", metavar="PORT")
    ] = "",
    log: Annotated[
        str, typer.Option(help="Log each step, as text or json; by default only warnings are logged.", metavar="FORM")
    ] = "",
    beat: Annotated[
        bool, typer.Option("--beat", help="Start the crews' scheduled runs; safe on any number of workers.")
    ] = False,
    events: Annotated[bool, typer.Option("--events", help="Send task events, for Flower.")] = False,
    broker: Broker = "",
    model: Annotated[str, typer.Option(help="Model for agents without one.", metavar="NAME")] = "",
) -> None:
    """Run supervised Celery workers: a process that dies is restarted, and its steps continue at once."""
    from agentmesh.cli.worker import run_workers

    raise typer.Exit(
        run_workers(
            crews, queues=queue or [], concurrency=concurrency, processes=processes, metrics=metrics, log=log, broker=broker,
            model=model, file=Options.config, beat=beat, events=events,
        )
    )  # fmt: skip


@app.command(
    epilog="Examples:  agentmesh serve crew.py  ·  agentmesh serve crew.py --host 0.0.0.0 --key-env AGENTMESH_KEY"
)
def serve(
    crew: Annotated[
        str, typer.Argument(metavar="CREW", help="A Python file that defines a Crew; its agents and models are served.")
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen on; any other than loopback needs --key-env.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port; 0 takes a free one.")] = 8000,
    key_env: Annotated[
        str, typer.Option(help="The environment variable that holds the key clients must send.", metavar="NAME")
    ] = "",
    embed: Annotated[
        list[str] | None,
        typer.Option(help="Also serve this embedder, such as wordllama or local:NAME; repeatable.", metavar="NAME"),
    ] = None,
    processes: Annotated[int, typer.Option(help="Worker processes; 0 where workers run elsewhere.", min=0)] = 1,
    broker: Broker = "",
    model: Annotated[str, typer.Option(help="Model for agents without one.", metavar="NAME")] = "",
) -> None:
    """Serve a crew's agents and models over OpenAI's API; each request is a run."""
    from agentmesh.cli.serve import serve_crew

    raise typer.Exit(
        serve_crew(
            crew, host=host, port=port, key_env=key_env, embed=embed or [], processes=processes, broker=broker, model=model,
            file=Options.config,
        )
    )  # fmt: skip


@app.command(epilog="Example:  agentmesh new shop")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The folder to create.")],
) -> None:
    """Create a folder with a small crew, its test and a README."""
    from agentmesh.cli.new import make_new

    raise typer.Exit(make_new(name))


@app.command(epilog="Examples:  agentmesh doctor  ·  agentmesh doctor crew.py")
def doctor(
    crew: Annotated[str, typer.Argument(metavar="CREW", help="Also check this crew file.")] = "", broker: Broker = ""
) -> None:
    """Check everything a run needs; every problem comes with one thing to do."""
    from agentmesh.cli.doctor import run_doctor

    raise typer.Exit(run_doctor(crew, broker=broker, file=Options.config))


@runs.command("ls", epilog="Example:  agentmesh runs ls --limit 5")
def runs_ls(
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1)] = 20,
    broker: Broker = "",
    json: Json = False,
) -> None:
    """List the newest runs: id, state, agent, start, turns, tokens, cost."""
    from agentmesh.cli.runs import list_runs

    raise typer.Exit(list_runs(limit, broker=broker, as_json=json, file=Options.config))


@runs.command("show", epilog="Example:  agentmesh runs show tea-7")
def runs_show(run_id: RunId, broker: Broker = "", json: Json = False) -> None:
    """Show a run's journal and what it is waiting for."""
    from agentmesh.cli.runs import show_run

    raise typer.Exit(show_run(run_id, broker=broker, as_json=json, file=Options.config))


@runs.command("tail", epilog="Example:  agentmesh runs tail tea-7")
def runs_tail(run_id: RunId, broker: Broker = "", json: Json = False) -> None:
    """Follow a run until it ends; starts no worker."""
    from agentmesh.cli.runs import tail_run

    raise typer.Exit(tail_run(run_id, broker=broker, as_json=json, file=Options.config))


@runs.command("approve", epilog="Example:  agentmesh runs approve tea-7 2 --by ana")
def runs_approve(run_id: RunId, n: StepN, by: By = "", broker: Broker = "") -> None:
    """Approve a step that is waiting for approval."""
    from agentmesh.cli.runs import decide

    raise typer.Exit(decide(run_id, "approve", n=n, by=by, broker=broker, file=Options.config))


@runs.command("deny", epilog="Example:  agentmesh runs deny tea-7 2 --reason 'too expensive'")
def runs_deny(
    run_id: RunId, n: StepN, by: By = "",
    reason: Annotated[str, typer.Option(help="Shown to the agent that asked, and to its model.")] = "", broker: Broker = "",
) -> None:  # fmt: skip
    """Deny a step that is waiting for approval."""
    from agentmesh.cli.runs import decide

    raise typer.Exit(decide(run_id, "deny", n=n, by=by, reason=reason, broker=broker, file=Options.config))


@runs.command("cancel", epilog="Example:  agentmesh runs cancel tea-7")
def runs_cancel(run_id: RunId, by: By = "", broker: Broker = "") -> None:
    """Cancel a run and all its sub-agents."""
    from agentmesh.cli.runs import decide

    raise typer.Exit(decide(run_id, "cancel", by=by, broker=broker, file=Options.config))


@runs.command("resolve", epilog="Example:  agentmesh runs resolve tea-7 2 done --value 42")
def runs_resolve(
    run_id: RunId, n: StepN,
    action: Annotated[str, typer.Argument(metavar="WHAT", help="done, failed or retry: the outcome of the step.")],
    value: Annotated[str, typer.Option(help="With done: the step's value as JSON, such as 42 or '\"text\"'.")] = "null",
    by: By = "", broker: Broker = "",
) -> None:  # fmt: skip
    """Resolve a step that is in doubt or quarantined."""
    from agentmesh.cli.runs import decide

    raise typer.Exit(
        decide(run_id, "resolve", n=n, action=action, value=value, by=by, broker=broker, file=Options.config)
    )


@runs.command("resume", epilog="Example:  agentmesh runs resume tea-7 --limit turns=50")
def runs_resume(
    run_id: RunId,
    crew: Annotated[
        str, typer.Argument(metavar="CREW", help="The crew file; defaults to the one the run was started from.")
    ] = "",
    limit: Annotated[list[str] | None, typer.Option(help="Raise a limit, such as turns=50; repeatable.")] = None,
    broker: Broker = "",
    model: Annotated[str, typer.Option(help="Model for agents without one.", metavar="NAME")] = "",
    json: Json = False,
) -> None:
    """Resume a run; finished steps are not repeated."""
    from agentmesh.cli.run import resume_run

    raise typer.Exit(
        resume_run(run_id, crew=crew, limits=limit or [], broker=broker, model=model, as_json=json, file=Options.config)
    )


@runs.command("retry", epilog="Example:  agentmesh runs retry tea-7")
def runs_retry(
    run_id: RunId,
    crew: Annotated[
        str, typer.Argument(metavar="CREW", help="The crew file; defaults to the one the run was started from.")
    ] = "",
    limit: Annotated[
        list[str] | None, typer.Option(help="A limit other than the crew's, such as turns=50; repeatable.")
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Print the new run's id and leave it running.")] = False,
    broker: Broker = "",
    model: Annotated[str, typer.Option(help="Model for agents without one.", metavar="NAME")] = "",
    json: Json = False,
) -> None:
    """Retry the failed steps of a finished run, as a run ID~2 that keeps all other steps."""
    from agentmesh.cli.run import retry_run

    options: dict[str, Any] = {"broker": broker, "model": model, "as_json": json, "file": Options.config}
    raise typer.Exit(retry_run(run_id, crew=crew, limits=limit or [], detach=detach, **options))


@models.command("pull", epilog="Example:  agentmesh models pull Qwen/Qwen3-0.6B")
def models_pull(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="smollm2, or a name from the hub such as Qwen/Qwen3-0.6B.")
    ],
) -> None:
    """Download a model into the cache."""
    from agentmesh.cli.models import pull_model

    raise typer.Exit(pull_model(name))


@models.command("rm", epilog="Example:  agentmesh models rm smollm2")
def models_rm(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="A name that `models ls` lists, or that of an unfinished pull.")
    ],
    json: Json = False,
) -> None:
    """Remove a model and its unfinished downloads; a process that has loaded it keeps working."""
    from agentmesh.cli.models import remove_model

    raise typer.Exit(remove_model(name, as_json=json))


@models.command("ls", epilog="Example:  agentmesh models ls --json")
def models_ls(json: Json = False) -> None:
    """List the models in the cache."""
    from agentmesh.cli.models import list_models

    raise typer.Exit(list_models(as_json=json))


def main() -> None:
    """The console script: errors become an `error:` and a `help:` line, and an exit code."""
    before = signal.signal(signal.SIGINT, exit_at_once)
    skip_final_collection()
    try:
        app()
    except MeshError as e:
        if Options.debug:
            raise
        print_error(e)
        sys.exit(exit_code(e))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    main()
