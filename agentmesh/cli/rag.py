"""`agentmesh rag`: its commands, their options and help. The bodies are in `rag_add` and `rag_query`, imported late."""

from pathlib import Path
from typing import Annotated

import typer

from agentmesh.cli.options import Options

rag = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Documents in, passages out: a store that many processes share.",
    epilog="Examples:  agentmesh rag add docs/  ·  agentmesh rag search 'parental leave'  ·  agentmesh rag stats",
)  # fmt: skip

Store = Annotated[
    str | None,
    typer.Option(help="The store's folder, or NAME:TEXT of a plugin; defaults to .agentmesh/rag.", metavar="DIR"),
]
Embed = Annotated[
    str,
    typer.Option(
        help="wordllama, local:NAME, openai:NAME, a server's URL or a plugin's; defaults to the store's own.",
        metavar="NAME",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]
Paths = Annotated[list[str], typer.Argument(metavar="PATH...", help="Folders and files.")]
Glob = Annotated[str, typer.Option(help="Which files of the folders, such as '*.md' or 'guides/**/*.md'.")]
Label = Annotated[str, typer.Option(help="What the names of sources begin with; defaults to each folder's name.")]
Size = Annotated[int, typer.Option(help="The most characters in a passage.")]
Overlap = Annotated[int, typer.Option(help="The most characters that a passage shares with the one before.")]
Meta = Annotated[list[str] | None, typer.Option(help="Metadata of every passage, such as year=2026.", metavar="K=V")]
Mode = Annotated[str, typer.Option(help="hybrid, dense or text.")]
Where = Annotated[str, typer.Option(help='A filter as JSON, such as \'{"year": {"$gte": 2024}}\'.', metavar="JSON")]
Broker = Annotated[str, typer.Option(help="Celery broker URL; defaults to an embedded Valkey.", metavar="URL")]
RunId = Annotated[str, typer.Option("--id", help="The run's id; an existing run with this id is resumed.")]
Queues = Annotated[
    list[str] | None,
    typer.Option(
        "--queue",
        help="The queues that this command's own workers serve, of index, parse, embed; defaults to those without a worker.",
        metavar="NAME",
    ),
]
K = Annotated[int, typer.Option("-k", help="How many passages.")]


@rag.command("add", epilog="Examples:  agentmesh rag add docs/  ·  agentmesh rag add a.pdf notes/ --meta year=2026")
def rag_add(
    paths: Paths, store: Store = None, embed: Embed = "", glob: Glob = "", label: Label = "", size: Size = 1000,
    overlap: Overlap = 150, meta: Meta = None, broker: Broker = "", queue: Queues = None, run_id: RunId = "", json: Json = False,
) -> None:  # fmt: skip
    """Index new and changed documents. Ctrl-C leaves the run resumable."""
    from agentmesh.cli.rag_add import add_documents

    raise typer.Exit(add_documents(
        paths, store=store, embed=embed, glob=glob, label=label, size=size, overlap=overlap, meta=meta or [],
        broker=broker, queues=queue or [], run_id=run_id, as_json=json, file=Options.config,
    ))  # fmt: skip


@rag.command("sync", epilog="Examples:  agentmesh rag sync docs/  ·  agentmesh rag sync docs/ --force")
def rag_sync(
    paths: Paths, store: Store = None, embed: Embed = "", glob: Glob = "", label: Label = "", size: Size = 1000,
    overlap: Overlap = 150, meta: Meta = None, broker: Broker = "", queue: Queues = None, run_id: RunId = "", json: Json = False,
    force: Annotated[bool, typer.Option("--force", help="Remove documents even when more than half have vanished.")] = False,
) -> None:  # fmt: skip
    """`add`, and remove the documents that vanished from these folders."""
    from agentmesh.cli.rag_add import add_documents

    raise typer.Exit(add_documents(
        paths, store=store, embed=embed, glob=glob, label=label, size=size, overlap=overlap, meta=meta or [],
        broker=broker, queues=queue or [], run_id=run_id, as_json=json, file=Options.config, sync=True, force=force,
    ))  # fmt: skip


@rag.command(
    "search", epilog="Examples:  agentmesh rag search 'parental leave' -k 3  ·  agentmesh rag search C++ --mode text"
)
def rag_search(
    text: Annotated[str, typer.Argument(help="What to look for.")], k: K = 5, mode: Mode = "hybrid", where: Where = "",
    diverse: Annotated[float, typer.Option(help="0 to 1: how strongly near-duplicate passages are demoted.")] = 0.0,
    store: Store = None, embed: Embed = "", json: Json = False,
) -> None:  # fmt: skip
    """Print the passages that match a query best, best first."""
    from agentmesh.cli.rag_query import print_hits

    raise typer.Exit(print_hits(
        text, k=k, mode=mode, where=where, diverse=diverse, store=store, embed=embed, as_json=json, file=Options.config
    ))  # fmt: skip


@rag.command("stats")
def rag_stats(store: Store = None, json: Json = False) -> None:
    """Print what the store holds, and its embedder."""
    from agentmesh.cli.rag_query import print_stats

    raise typer.Exit(print_stats(store=store, as_json=json, file=Options.config))


@rag.command("verify")
def rag_verify(store: Store = None) -> None:
    """Read every file, compare its checksums, and name the damaged ones."""
    from agentmesh.cli.rag_query import verify_store

    raise typer.Exit(verify_store(store=store, file=Options.config))


@rag.command("compact")
def rag_compact(store: Store = None) -> None:
    """Merge small segments into large ones, as an ingest does at its end."""
    from agentmesh.cli.rag_query import compact_store

    raise typer.Exit(compact_store(store=store, file=Options.config))


@rag.command("reembed", epilog="Examples:  agentmesh rag reembed --embed local:BAAI/bge-small-en-v1.5")
def rag_reembed(
    embed: Annotated[str, typer.Option(help="The new embedder.", metavar="NAME")], store: Store = None
) -> None:
    """Replace the vectors of the stored passages by those of another embedder; searches continue meanwhile."""
    from agentmesh.cli.rag_query import reembed_store

    raise typer.Exit(reembed_store(embed, store=store, file=Options.config))


@rag.command(
    "eval",
    epilog='A line of the file:  {"question": "Who is paid?", "source": "handbook/pay.md", "contains": "all staff"}',
)
def rag_eval(
    questions: Annotated[Path, typer.Argument(help="One JSON object a line: question, source, contains.")],
    k: Annotated[list[int] | None, typer.Option("-k", help="Ranks to count recall at; defaults to 1 3 5 10.")] = None,
    mode: Mode = "hybrid", store: Store = None, embed: Embed = "", json: Json = False,
) -> None:  # fmt: skip
    """Print how often questions find the passage that answers them: recall and mean reciprocal rank."""
    from agentmesh.cli.rag_query import print_scores

    raise typer.Exit(print_scores(
        questions, k=k or [1, 3, 5, 10], mode=mode, store=store, embed=embed, as_json=json, file=Options.config
    ))  # fmt: skip


@rag.command("import-langchain", epilog="Examples:  agentmesh rag import-langchain old_index/ --trust-pickle")
def rag_import(
    folder: Annotated[Path, typer.Argument(help="A folder that LangChain's FAISS.save_local wrote.")],
    trust_pickle: Annotated[bool, typer.Option("--trust-pickle", help="Read its docstore, which is a pickle.")] = False,
    name: Annotated[str, typer.Option(help="The name of its files.")] = "index",
    store: Store = None, embed: Embed = "",
) -> None:  # fmt: skip
    """Import the passages and vectors of a LangChain folder."""
    from agentmesh.cli.rag_query import import_langchain

    raise typer.Exit(import_langchain(
        folder, name=name, trust_pickle=trust_pickle, store=store, embed=embed, file=Options.config
    ))  # fmt: skip
