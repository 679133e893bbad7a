"""`agentmesh rag`, but for adding: searching, counting, checking, compacting, measuring a store."""

import json
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from agentmesh.config import load
from agentmesh.errors import DefinitionError, ExtraMissing
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.retriever import Mode, Retriever
from agentmesh.runtime.process_exit import DONE, FAILED, interruptible

MAX_SHOWN_CHARS = 400


def retriever(store: str | None, embed: str, file: Path | None) -> Retriever:
    """The store of this folder or plugin, or the one in agentmesh's own folder."""
    return Retriever.open(store or load(file=file).home / "rag", embed=embed)


def _store(store: str | None, file: Path | None) -> FaissStore:
    """The folder's, where there is one.

    Raises:
        DefinitionError: there is none.
    """
    path = Path(store or load(file=file).home / "rag")
    if not path.is_dir():
        raise DefinitionError(f"there is no store in {str(path)!r}", hint="make one: agentmesh rag add FOLDER")
    return FaissStore(path)


def search(
    text: str, *, k: int, mode: str, where: str, diverse: float, store: str | None, embed: str, as_json: bool,
    file: Path | None,
) -> int:  # fmt: skip
    """Print the passages that fit best; 1 where there is none."""
    if retriever(store, embed, file).other_store is None:
        _store(store, file)
    hits = retriever(store, embed, file).search(text, k, mode=cast(Mode, mode), where=_filter(where), diverse=diverse)
    for hit in hits:
        if as_json:
            print(json.dumps({**asdict(hit), "metadata": dict(hit.metadata)}, ensure_ascii=False, default=str))
            continue
        heading = f"  {' > '.join(hit.heading)}" if hit.heading else ""
        words = " ".join(hit.text.split())
        excerpt = words if len(words) <= MAX_SHOWN_CHARS else f"{words[:MAX_SHOWN_CHARS]}…"
        print(f"{hit.score:.3f}  {hit.source}:{hit.start}{heading}\n       {excerpt}")
    if not hits and not as_json:
        print("nothing was found")
    return DONE if hits else FAILED


def _filter(where: str) -> dict[str, Any] | None:
    if not where:
        return None
    try:
        parsed = json.loads(where)
    except ValueError as e:
        raise DefinitionError(f"--where {where!r} is not JSON: {e}") from None
    if not isinstance(parsed, dict):
        raise DefinitionError(f'--where {where!r} must be an object, such as {{"year": 2026}}')
    return parsed


def stats(*, store: str | None, as_json: bool, file: Path | None) -> int:
    """Print how much there is."""
    numbers = asdict(_store(store, file).stats())
    if as_json:
        print(json.dumps(numbers, default=str))
        return DONE
    width = max(len(name) for name in numbers)
    for name, value in numbers.items():
        print(f"{name:<{width}}  {value}")
    return DONE


def verify(*, store: str | None, file: Path | None) -> int:
    """Print what is wrong with the files; 1 where something is."""
    problems = _store(store, file).verify()
    for problem in problems:
        print(problem)
    if not problems:
        print("every file is whole")
    return FAILED if problems else DONE


def compact(*, store: str | None, file: Path | None) -> int:
    """Merge segments, and print what there is then."""
    _store(store, file).compact()
    return stats(store=store, as_json=False, file=file)


def reembed(embed: str, *, store: str | None, file: Path | None) -> int:
    """New vectors for the stored passages."""
    _store(store, file)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with interruptible(), Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None)
        done = retriever(store, "", file).reembed(embed, progress=lambda n, of: bar.update(task, completed=n, total=of))
    print(f"{done.count()} passages now have the vectors of {embed}")
    return DONE


def evaluate(
    questions: Path, *, k: list[int], mode: str, store: str | None, embed: str, as_json: bool, file: Path | None
) -> int:
    """Print recall and mean reciprocal rank."""
    _store(store, file)
    scores = retriever(store, embed, file).evaluate(questions, k=k, mode=cast(Mode, mode))
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
    """Take over an old folder."""
    if not trust_pickle:
        raise DefinitionError(
            f"{folder / name}.pkl is a pickle, which can hold code",
            hint="if you trust whoever made it, add --trust-pickle",
        )
    try:
        take_over = import_module("agentmesh.langchain").import_folder
    except ImportError as e:
        raise ExtraMissing(
            f"import-langchain needs {e.name}, which is not installed: pip install 'agentmesh-celery[langchain]'"
        ) from None
    path = Path(store or load(file=file).home / "rag")
    store_ = take_over(folder, path, embedding=embed or None, trust_pickle=True, index_name=name)
    print(f"{store_.count()} passages in {path}")
    return DONE
