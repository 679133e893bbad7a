"""The crew that ingests documents: plan, then packs in parallel, each parsed, embedded and indexed; every step is durable.

`agentmesh worker agentmesh.rag.ingest` serves these steps; with `--queue embed` on the host with the GPU.
"""

from pydantic import BaseModel

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.context import Context
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import Queue
from agentmesh.errors import RunFailedError, StepError
from agentmesh.rag.ingestion.options import WINDOW
from agentmesh.rag.ingestion.plan import ChunkOptions, IngestRequest
from agentmesh.rag.ingestion.scratch import Batch, Failure
from agentmesh.rag.ingestion.steps import (
    clean_up,
    compact,
    compare_embedder,
    embed_batch,
    failures_of,
    index_batch,
    parse_pack,
    plan_ingest,
    remove_vanished,
)


class Packed(BaseModel):
    """The result of one pack."""

    documents: int = 0
    chunks: int = 0
    bytes: int = 0
    failed: list[Failure] = []


class Added(BaseModel):
    """The result of an ingest.

    Args:
        documents: the number indexed, new or changed.
        chunks: the number indexed.
        skipped: the number of unchanged documents.
        removed: with `sync`, the number that vanished and were removed.
        failed: the documents whose version on disk is not in the store, each with the reason.
    """

    documents: int = 0
    chunks: int = 0
    skipped: int = 0
    removed: int = 0
    failed: list[Failure] = []


class Pack(Agent[Packed]):
    """One pack of documents: parse, then embed and index batch by batch."""

    store: str = ""
    embed: str = ""
    parts: str = ""
    how: ChunkOptions = ChunkOptions()

    def flow(self, task: str, ctx: Context) -> Packed:
        """Index a pack; a failure of one batch is reported and does not stop the others."""
        try:
            parsed = ctx.do(parse_pack.on(self.store, self.parts, task, self.how))
        except StepError as e:
            failed = ctx.do(failures_of.on(self.store, self.parts, task, str(e)))
            return Packed(failed=failed)
        packed = Packed(bytes=parsed.bytes, failed=parsed.failed)
        for batch in parsed.batches:
            try:
                self._index(batch, packed, ctx)
            except StepError as e:
                failed = ctx.do(failures_of.on(self.store, self.parts, batch.part, str(e)))
                packed.failed += failed
        return packed

    def _index(self, batch: Batch, packed: Packed, ctx: Context) -> None:
        embedded = ctx.do(embed_batch.on(self.store, self.parts, batch.part, self.embed))
        exclude = [failure.source for failure in embedded.failed]
        indexed = ctx.do(index_batch.on(self.store, self.parts, batch.part, embedded.part, embedded.by, exclude))
        packed.documents += indexed.documents
        packed.chunks += indexed.chunks
        packed.failed += [*embedded.failed, *indexed.failed]


class Ingest(Agent[Added, IngestRequest]):
    """Adds new and changed documents to a store, without asking a model.

    Args:
        store: the store's folder, absolute.
        embed: the embedder's name; "" is the store's own, and in a new store `wordllama`.
        how: how documents become chunks.
        window: packs in flight at once.
    """

    team = (Pack(),)
    store: str = ""
    embed: str = ""
    how: ChunkOptions = ChunkOptions()
    window: int = WINDOW

    def flow(self, task: IngestRequest, ctx: Context) -> Added:
        """Plan, index the packs, then remove what vanished."""
        planned = ctx.do(plan_ingest.on(self.store, task, self.how))
        if planned.refused:
            raise RunFailedError(planned.refused, hint=planned.hint)
        if planned.packs:
            refusal = ctx.do(compare_embedder.on(self.store, self.embed))
            if refusal:
                ctx.do(clean_up.on(self.store, planned.parts))
                raise RunFailedError(refusal.message, hint=refusal.hint)
        pack = Pack(store=self.store, embed=self.embed, parts=planned.parts, how=self.how)
        results = ctx.gather([pack.on(name) for name in planned.packs], window=self.window, errors=True)
        added = Added(skipped=planned.skipped, failed=planned.failed)
        for name, packed in zip(planned.packs, results, strict=True):
            if isinstance(packed, StepError):
                added.failed.append(Failure(source=f"pack {name}", why=str(packed)))
                continue
            added.documents += packed.documents
            added.chunks += packed.chunks
            added.failed += packed.failed
        if planned.vanished:
            added.removed = ctx.do(remove_vanished.on(self.store, planned.parts, planned.vanished))
        if planned.packs or planned.vanished:
            ctx.do(clean_up.on(self.store, planned.parts))
            try:
                ctx.do(compact.on(self.store))
            except StepError:  # the store works without it, and the next ingest compacts again
                return added
        return added


QUEUES = (Queue("index"), Queue("parse", pool="prefork"), Queue("embed", concurrency=16))
crew = Crew(Ingest(), name="rag", queues=QUEUES)
