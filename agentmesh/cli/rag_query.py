"""The `agentmesh rag` commands that add no documents: search, stats, verify, compact, reembed, eval, import-langchain.

Each function returns the exit code.
"""

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from agentmesh.config import load_config
from agentmesh.errors import DefinitionError, ExtraMissing
from agentmesh.rag.search import Mode
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.retriever import Retriever
from agentmesh.runtime.process_exit import DONE, FAILED, interruptible

MAX_SHOWN_CHARS = 400
WHERE_HINT = 'write one such as {"year": 2026}'


def open_retriever(store: str | None, embed: str, file: Path | None) -> Retriever:
    """The retriever of `--store`, a folder or a plugin's `NAME:TEXT`, or of the configured home's store."""
    return Retriever.open(store or _path(store, file), embed=embed)


def _path(store: str | None, file: Path | None) -> Path:
    return Path(store or load_config(file=file).home / "rag")


def _open_store(store: str | None, file: Path | None) -> FaissStore:
    """The store of `--store`, or of the configured home.

    Raises:
        DefinitionError: there is none.
    """
    path = _path(store, file)
    if not path.is_dir():
        raise DefinitionError(f"there is no store in {str(path)!r}", hint="make one: agentmesh rag add FOLDER")
    return FaissStore(path)


def print_hits(
    text: str, *, k: int, mode: str, where: str, diverse: float, store: str | None, embed: str, as_json: bool,
    file: Path | None,
) -> int:  # fmt: skip
    """Print the passages that match a query best; 1 where there is none."""
    retriever = open_retriever(store, embed, file)
    if retriever.other_store is None:
        _open_store(store, file)
    hits = retriever.search(text, k, mode=cast(Mode, mode), where=_parse_where(where), diverse=diverse)
    for hit in hits:
        if as_json:
            print(json.dumps({**asdict(hit), "metadata": dict(hit.metadata)}, ensure_ascii=False, default=str))
            continue
        heading = f"  {' > '.join(hit.heading)}" if hit.heading else ""
        words = " ".join(hit.text.split())
        excerpt = words if len(words) <= MAX_SHOWN_CHARS else f"{words[:MAX_SHOWN_CHARS]}…"
        print(f"{hit.score:.3f}  {hit.source}:{hit.start}{heading}\n       {excerpt}")
    if not hits and not as_json:
        print("no passage was found")
    return DONE if hits else FAILED


def _parse_where(where: str) -> dict[str, Any] | None:
    if not where:
        return None
    try:
        parsed = json.loads(where)
    except ValueError as e:
        raise DefinitionError(f"--where {where!r} is not JSON ({e})", hint=WHERE_HINT) from None
    if not isinstance(parsed, dict):
        raise DefinitionError(f"--where {where!r} is not a JSON object", hint=WHERE_HINT)
    return parsed


def print_stats(*, store: str | None, as_json: bool, file: Path | None) -> int:
    """Print what the store holds."""
    numbers = asdict(_open_store(store, file).stats())
    if as_json:
        print(json.dumps(numbers, default=str))
        return DONE
    width = max(len(name) for name in numbers)
    for name, value in numbers.items():
        print(f"{name:<{width}}  {value}")
    return DONE


def verify_store(*, store: str | None, file: Path | None) -> int:
    """Print the damaged files; 1 where there is one."""
    problems = _open_store(store, file).verify()
    for problem in problems:
        print(problem)
    if not problems:
        print("no file is damaged")
    return FAILED if problems else DONE


def compact_store(*, store: str | None, file: Path | None) -> int:
    """Merge segments, and print what the store holds then."""
    _open_store(store, file).compact()
    return print_stats(store=store, as_json=False, file=file)


def reembed_store(embed: str, *, store: str | None, file: Path | None) -> int:
    """Make new vectors for the stored passages."""
    _open_store(store, file)
    retriever = open_retriever(store, "", file)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with interruptible(), Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        reembedded = retriever.reembed(embed, progress=lambda n, of: bar.update(task, completed=n, total=of))
    print(f"{reembedded.count()} passages now have the vectors of {embed}")
    return DONE


def print_scores(
    questions: Path, *, k: list[int], mode: str, store: str | None, embed: str, as_json: bool, file: Path | None
) -> int:
    """Print recall and mean reciprocal rank."""
    _open_store(store, file)
    scores = open_retriever(store, embed, file).evaluate(questions, k=k, mode=cast(Mode, mode))
    if as_json:
        print(json.dumps(asdict(scores), ensure_ascii=False))
        return DONE
    recalls = " · ".join(f"recall@{n} {share:.3f}" for n, share in scores.recall.items())
    print(f"{scores.questions} questions · {recalls} · MRR {scores.mrr:.3f}")
    for question in scores.missed:
        print(f"missed: {question}")
    return DONE


def import_langchain(
    folder: Path, *, name: str, trust_pickle: bool, store: str | None, embed: str, file: Path | None
) -> int:
    """Import a LangChain folder, and print how many passages the store has then."""
    if not trust_pickle:
        raise DefinitionError(
            f"{folder / name}.pkl is a pickle, which can run code when it is read",
            hint="if you trust its author, add --trust-pickle",
        )
    try:
        import_folder = import_module("agentmesh.langchain").import_folder
    except ImportError as e:
        raise ExtraMissing(
            f"import-langchain needs {e.name}, which is not installed",
            hint="pip install 'agentmesh-celery[langchain]'",
        ) from None
    path = _path(store, file)
    imported = import_folder(folder, path, embedding=embed or None, trust_pickle=True, index_name=name)
    print(f"{imported.count()} passages in {path}")
    return DONE
