"""Documents into a store, as steps that survive their workers: plan, then packs side by side, each parse, embed, index.

`agentmesh worker agentmesh.rag.ingest` serves these steps; `--queue embed` where the GPU is.
"""

from pydantic import BaseModel

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.context import Context
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import Queue
from agentmesh.errors import RunFailed, StepError
from agentmesh.rag.ingestion.plan import ChunkOptions, IngestRequest
from agentmesh.rag.ingestion.scratch import Batch, Failure
from agentmesh.rag.ingestion.steps import (
    check_embedder,
    clean_up,
    compact,
    embed_batch,
    failures_of,
    index_batch,
    parse_pack,
    plan_ingest,
    remove_vanished,
)

WINDOW = 8  # packs in flight: what lies in parts at once


class Packed(BaseModel):
    """What became of one pack."""

    documents: int = 0
    chunks: int = 0
    bytes: int = 0
    failed: list[Failure] = []


class Added(BaseModel):
    """What became of an ingest.

    Args:
        documents: indexed now, new or changed.
        skipped: those that the store had as they are.
        removed: those that vanished, with `sync`.
        failed: those that are not in the store as they are on disk, each with its reason.
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
        """What fails is told and stops nothing else."""
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
        without = [failure.source for failure in embedded.failed]
        indexed = ctx.do(index_batch.on(self.store, self.parts, batch.part, embedded.part, embedded.by, without))
        packed.documents += indexed.documents
        packed.chunks += indexed.chunks
        packed.failed += [*embedded.failed, *indexed.failed]


class Ingest(Agent[Added, IngestRequest]):
    """Adds what is new or changed to a store; a model is not asked.

    Args:
        store: the store's folder, absolute.
        embed: the embedder's name; the store's own when left out, and in a new store `wordllama`.
        window: packs in flight at once.
    """

    team = (Pack(),)
    store: str = ""
    embed: str = ""
    how: ChunkOptions = ChunkOptions()
    window: int = WINDOW

    def flow(self, task: IngestRequest, ctx: Context) -> Added:
        """Plan; packs in a window; then what vanished."""
        planned = ctx.do(plan_ingest.on(self.store, task, self.how))
        if planned.packs:
            planned.refused = ctx.do(check_embedder.on(self.store, self.embed))
            if planned.refused:
                ctx.do(clean_up.on(self.store, planned.parts))
        if planned.refused:
            raise RunFailed(planned.refused)
        pack = Pack(store=self.store, embed=self.embed, parts=planned.parts, how=self.how)
        ended = ctx.gather([pack.on(name) for name in planned.packs], window=self.window, errors=True)
        added = Added(skipped=planned.skipped, failed=planned.failed)
        for name, one in zip(planned.packs, ended, strict=True):
            if isinstance(one, StepError):
                added.failed.append(Failure(source=f"pack {name}", why=str(one)))
                continue
            added.documents += one.documents
            added.chunks += one.chunks
            added.failed += one.failed
        if planned.vanished:
            added.removed = ctx.do(remove_vanished.on(self.store, planned.parts, planned.vanished))
        if planned.packs or planned.vanished:
            ctx.do(clean_up.on(self.store, planned.parts))
            try:
                ctx.do(compact.on(self.store))
            except StepError:  # a store searches as well without; the next ingest tries again
                return added
        return added


QUEUES = (Queue("index"), Queue("parse", pool="prefork"), Queue("embed", concurrency=16))
crew = Crew(Ingest(), name="rag", queues=QUEUES)
