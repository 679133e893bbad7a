"""Documents in, passages out: a store, an embedder and an ingest behind one name. Adding documents is a run like any other."""

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from agentmesh import aio
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.tool import Tool, tool
from agentmesh.engine.async_run import AsyncRun
from agentmesh.engine.blocking import waits
from agentmesh.engine.run import Run
from agentmesh.errors import DefinitionError, MeshError
from agentmesh.rag.direct_ingest import add_directly
from agentmesh.rag.documents import Chunk, Hit
from agentmesh.rag.embedders import embedder as make_embedder
from agentmesh.rag.embedders.base import DEFAULT_EMBEDDER, Embedder
from agentmesh.rag.evaluation import Scores, evaluate
from agentmesh.rag.ingest import QUEUES, Added, Ingest
from agentmesh.rag.ingestion.options import AddOptions, Paths, check_paths, read_options
from agentmesh.rag.ingestion.plan import IngestRequest
from agentmesh.rag.process_cache import (
    LOCAL_PREFIX,
    embedder_for,
    embedder_of,
    named_store,
    register_embedder,
    store_of,
)
from agentmesh.rag.search import Mode, Passage, Query, Where, check_search, search
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.rag.vector_store import StoreView, VectorStore, store_name
from agentmesh.runtime.local import start

Questions = str | Path | Iterable[Mapping[str, Any]]


class Retriever:
    """A store of passages: `add` documents, `search` them, give agents its `tool`.

    Opening reads nothing; each process loads the store and the embedder at their first use.

    Args:
        path: the store's folder, or `NAME:TEXT` of a plugin.
        store: an object in its place, with the words of `agentmesh.rag.vector_store.VectorStore`.
        bound: filters that every search goes through.
    """

    def __init__(
        self, path: str | Path = "", *, embed: Any = "", bound: Sequence[Where] = (), store: VectorStore | None = None
    ) -> None:  # fmt: skip
        if isinstance(store, FaissStore):
            path, store = store.path, None
        self._object, self._named = store, "" if store is not None else store_name(path)
        if self._named == "faiss":
            path, self._named = str(path).partition(":")[2], ""
        is_folder = store is None and not self._named
        self.path = os.path.abspath(path) if is_folder else str(path or type(store).__name__)
        self._embed, self._bound = embed, tuple(bound)

    @classmethod
    def open(cls, path: str | Path, *, embed: Any = "") -> "Retriever":
        """The store in a folder, which need not exist yet; or `NAME:TEXT`, a store of a plugin.

        Args:
            embed: `wordllama` (offline), `local:NAME`, `openai:NAME`, a server's URL, or an object: LangChain's
                `Embeddings` or your own. Empty, it is the store's own, and in a new store `wordllama`.
        """
        return cls(path, embed=embed)

    def __repr__(self) -> str:
        return f"Retriever({self.path!r})"

    @property
    def aio(self) -> "AsyncRetriever":
        """The same retriever with the same words to await."""
        return AsyncRetriever(self)

    # ---- in ------------------------------------------------------------------------------------
    @waits("retriever")
    def add(
        self, paths: Paths, *, run_id: str = "", timeout_s: float | None = None, **options: Unpack[AddOptions]
    ) -> Added:
        """Index what is new or changed in folders and files, as Celery steps; returns when the run has ended.

        Args:
            run_id: of the run; the same id takes up the run that is there.
            options: see AddOptions.

        Raises:
            DefinitionError: a path does not exist, or an argument is out of range.
            RunFailedError: nothing was done; it says why. What cannot be read is in `Added.failed`.
        """
        if self.other_store is not None:  # of a plugin: it takes no ingest run, and is filled in this process
            self._check_unbound()
            request, chunking, _ = read_options(paths, **options)
            check_paths(request)
            return add_directly(self.other_store, self.embedder(), request, chunking)
        return self.start_adding(paths, run_id=run_id, **options).result(timeout_s=timeout_s)

    @waits("retriever")
    def start_adding(self, paths: Paths, *, run_id: str = "", **options: Unpack[AddOptions]) -> Run[Added]:
        """`add` without waiting: a handle to its run."""
        crew, request = self._ingest_crew(paths, options)
        check_paths(request)
        return start(crew, request, run_id=run_id)

    def _ingest_crew(self, paths: Paths, options: AddOptions) -> tuple[Crew, IngestRequest]:
        agent, request = self.ingest(paths, **options)
        name = "rag" if not agent.embed.startswith(LOCAL_PREFIX) else f"rag-{agent.embed.removeprefix(LOCAL_PREFIX)}"
        return Crew(agent, name=name, queues=QUEUES), request

    def ingest(self, paths: Paths, **options: Unpack[AddOptions]) -> tuple[Ingest, IngestRequest]:
        """The agent and its task that `add` runs, for a flow of your own: `ctx.do(agent.on(task))`. Touches no disk.

        Raises:
            DefinitionError: an argument is out of range.
        """
        if self.other_store is not None:
            raise DefinitionError(
                f"the store {self.path!r} takes no ingest run", hint="use `add`, which fills it directly"
            )
        self._check_unbound()
        request, chunking, window = read_options(paths, **options)
        return Ingest(store=self.path, embed=self._embed_name(), how=chunking, window=window), request

    def _check_unbound(self) -> None:
        if self._bound:
            raise DefinitionError(
                "a retriever with a filter only searches", hint="add through the one without, with metadata={…}"
            )

    @waits("retriever")
    def sync(
        self, paths: Paths, *, run_id: str = "", timeout_s: float | None = None, **options: Unpack[AddOptions]
    ) -> Added:
        """`add`, and remove documents that vanished from these folders."""
        options["sync"] = True
        return self.add(paths, run_id=run_id, timeout_s=timeout_s, **options)

    @waits("retriever")
    def remove(self, sources: str | Iterable[str]) -> int:
        """Remove documents by their sources' names; the number of passages removed."""
        names = [sources] if isinstance(sources, str) else list(sources)
        removed = self._store().remove(names)
        return removed if isinstance(removed, int) else removed.removed

    # ---- out -----------------------------------------------------------------------------------
    @waits("retriever")
    def search(
        self, text: str, k: int = 5, *, mode: Mode = "hybrid", where: Where | None = None, diverse: float = 0.0
    ) -> list[Hit]:  # fmt: skip
        """The k best passages, best first; fewer only where fewer pass the filter.

        Args:
            k: at least 1.
            mode: `dense` by meaning, `text` by words, `hybrid` by both.
            where: a filter over metadata and `source` in Mongo's operators: `{"year": {"$gte": 2024}}`.
            diverse: 0 to 1: how strongly passages that repeat each other are demoted (maximal marginal relevance).

        Raises:
            DefinitionError: an argument is out of range.
            StoreError: an unknown filter, a damaged file, or another embedder than the store's.
        """
        check_search(k, mode, diverse)
        if not self.count(where):
            return []
        embedder = self.embedder()
        return search(self._store(embedder), embedder, text, k, mode=mode, where=where, diverse=diverse)

    def where(self, where: Where | None = None, **equal: Any) -> "Retriever":
        """The same store behind a filter that its user can neither see nor widen: `where(tenant="a")`."""
        bound = *self._bound, {**(where or {}), **equal}
        return Retriever(self.path, embed=self._embed, bound=bound, store=self._object)

    def tool(
        self, *, k: int = 5, name: str = "search", about: str = "", mode: Mode = "hybrid"
    ) -> Tool[[str], list[Passage]]:
        """A tool for agents: a question in, the k best passages out; a model that asks "" is told to ask again.

        Args:
            about: what the documents are, told to the model: "the staff handbook".
        """

        def find(query: Query) -> list[Passage]:
            return [Passage.of(hit) for hit in self.search(query, k, mode=mode)]

        find.__doc__ = f"Find passages of {about or 'the documents'} that bear on a question.\n\nArgs:\n    query: what to look for."
        return tool(name=name)(find)

    @waits("retriever")
    def get(self, ids: Sequence[str]) -> list[Chunk | None]:
        """Passages by id; None for an unknown id."""
        return self._store().get(ids)

    @waits("retriever")
    def count(self, where: Where | None = None) -> int:
        """The number of passages, or of those that pass the filter."""
        return self._store().count(where)

    @waits("retriever")
    def sources(self) -> Mapping[str, Any]:
        """By source: a document's digest, its number of passages, its metadata."""
        return self._store().sources()

    @waits("retriever")
    def embedder(self) -> Embedder:
        """What embeds questions; loaded at its first use."""
        if not isinstance(self._embed, str):
            return make_embedder(self._embed)
        if self.other_store is not None:  # which remembers no embedder
            return embedder_of(self._embed or DEFAULT_EMBEDDER)
        return embedder_for(self.path, self._embed)

    @property
    def other_store(self) -> VectorStore | None:
        """The store, where it is an object or a plugin's; None for a folder."""
        return named_store(self.path) if self._named else self._object

    # ---- upkeep --------------------------------------------------------------------------------
    @waits("retriever")
    def reembed(self, embed: Any, *, progress: Callable[[int, int], None] | None = None) -> "Retriever":
        """Give the passages the vectors of another embedder, made in this process; returns the retriever for them.

        Searches and ingests use the old vectors until all new ones are made. A call after an interruption continues.

        Args:
            progress: called with the number of passages that are done, and of all.
        """
        if self.other_store is not None:
            raise DefinitionError(
                f"the store {self.path!r} is not a folder", hint="add the documents again, with embed="
            )
        other = Retriever(self.path, embed=embed)
        by = other.embedder()
        # a store of its own: afterwards it expects the new embedder
        store = FaissStore(self.path)
        for where in self._bound:
            store = store.bound(where)
        store.reembed(by.documents, identity=by.identity, progress=progress)
        return other

    @waits("retriever")
    def evaluate(self, questions: Questions, *, k: Sequence[int] = (1, 3, 5, 10), mode: Mode = "hybrid") -> Scores:
        """How often questions find the passage that answers them.

        Args:
            questions: a file with one JSON object a line, or such objects: `question`, and `source` (or `sources`: any
                of them), with `contains` where the passage must hold these words.
            k: ranks to count recall at.

        Raises:
            DefinitionError: a line lacks one of these.
        """
        return evaluate(lambda text, most: self.search(text, most, mode=mode), questions, k)

    # ---- parts ---------------------------------------------------------------------------------
    def _embed_name(self) -> str:
        """The embedder's name for a worker; an object is registered for workers of this process."""
        if isinstance(self._embed, str):
            return self._embed
        return make_embedder(self._embed).name or register_embedder(self._embed)

    def _store(self, by: Embedder | None = None) -> FaissStore | StoreView:
        other, identity = self.other_store, by.identity if by is not None else None
        store = store_of(self.path, identity) if other is None else StoreView(other, self.path)
        for where in self._bound:
            store = store.bound(where)
        return store


class AsyncRetriever:
    """A retriever for code on an event loop: Retriever's words to await. `retriever.aio` is one.

    Stores and embedders are libraries that wait; each call has a thread of its own.
    """

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever

    def __repr__(self) -> str:
        return f"AsyncRetriever({self._retriever.path!r})"

    async def add(
        self, paths: Paths, *, run_id: str = "", timeout_s: float | None = None, **options: Unpack[AddOptions]
    ) -> Added:
        """See Retriever."""
        if self._retriever.other_store is not None:
            return await asyncio.to_thread(self._retriever.add, paths, **options)
        started = await self.start_adding(paths, run_id=run_id, **options)
        return await started.result(timeout_s=timeout_s)

    async def start_adding(self, paths: Paths, *, run_id: str = "", **options: Unpack[AddOptions]) -> AsyncRun[Added]:
        """See Retriever."""
        crew, request = self._retriever._ingest_crew(paths, options)
        await asyncio.to_thread(check_paths, request)
        return await aio.start(crew, request, run_id=run_id)

    async def sync(
        self, paths: Paths, *, run_id: str = "", timeout_s: float | None = None, **options: Unpack[AddOptions]
    ) -> Added:
        """See Retriever."""
        options["sync"] = True
        return await self.add(paths, run_id=run_id, timeout_s=timeout_s, **options)

    async def remove(self, sources: str | Iterable[str]) -> int:
        """See Retriever."""
        return await asyncio.to_thread(self._retriever.remove, sources)

    async def search(
        self, text: str, k: int = 5, *, mode: Mode = "hybrid", where: Where | None = None, diverse: float = 0.0
    ) -> list[Hit]:  # fmt: skip
        """See Retriever."""
        return await asyncio.to_thread(self._retriever.search, text, k, mode=mode, where=where, diverse=diverse)

    def where(self, where: Where | None = None, **equal: Any) -> "AsyncRetriever":
        """See Retriever."""
        return self._retriever.where(where, **equal).aio

    async def get(self, ids: Sequence[str]) -> list[Chunk | None]:
        """See Retriever."""
        return await asyncio.to_thread(self._retriever.get, ids)

    async def count(self, where: Where | None = None) -> int:
        """See Retriever."""
        return await asyncio.to_thread(self._retriever.count, where)

    async def sources(self) -> Mapping[str, Any]:
        """See Retriever."""
        return await asyncio.to_thread(self._retriever.sources)

    async def embedder(self) -> Embedder:
        """See Retriever."""
        return await asyncio.to_thread(self._retriever.embedder)

    async def reembed(self, embed: Any, *, progress: Callable[[int, int], None] | None = None) -> "AsyncRetriever":
        """See Retriever."""
        return (await asyncio.to_thread(self._retriever.reembed, embed, progress=progress)).aio

    async def evaluate(
        self, questions: Questions, *, k: Sequence[int] = (1, 3, 5, 10), mode: Mode = "hybrid"
    ) -> Scores:
        """See Retriever."""
        return await asyncio.to_thread(self._retriever.evaluate, questions, k=k, mode=mode)


__all__ = ["Added", "Hit", "MeshError", "Mode", "Passage", "Retriever", "Scores"]
