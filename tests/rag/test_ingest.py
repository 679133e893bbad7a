"""An ingest from its plan to its commits: over the memory journal, with the real steps and a real store."""

import os
from pathlib import Path
from typing import Any

import pytest

from agentmesh import Agent, Context, Crew, EmbedderError, RunFailedError, ToolContext
from agentmesh.journal.events import StepPlanned
from agentmesh.rag.ingest import Added, Ingest
from agentmesh.rag.ingestion import steps
from agentmesh.rag.ingestion.plan import ChunkOptions, IngestRequest
from agentmesh.rag.ingestion.scratch import Indexed
from agentmesh.rag.ingestion.steps import clean_up, embed_batch, index_batch, parse_pack, plan_ingest
from agentmesh.rag.process_cache import register_embedder, store_of
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.retriever import Retriever
from agentmesh.testing import FakeMesh


class Ingestion:
    """A store, an embedder of this process, and a mesh without servers."""

    def __init__(self, folder: Path, embedder: Any) -> None:
        self.retriever = Retriever.open(folder / "store", embed=embedder)
        self.store = FaissStore(folder / "store")

    def add(self, *paths: Path, **options: Any) -> Added:
        agent, request = self.retriever.ingest(paths, **options)
        self.run = FakeMesh(Crew(agent)).start(request)
        added = self.run.result(timeout_s=0)
        assert isinstance(added, Added)
        return added

    def sources(self) -> dict[str, int]:
        return {source: facts.chunks for source, facts in self.store.sources().items()}

    def texts(self) -> dict[str, str]:
        return {chunk.source: chunk.text for chunks in self.store.iterate() for chunk in chunks}


@pytest.fixture
def ingestion(tmp_path: Path, by_words: Any) -> Ingestion:
    return Ingestion(tmp_path, by_words)


def counts(added: Added) -> tuple[int, int, int, int]:
    return added.documents, added.skipped, added.removed, len(added.failed)


def test_what_is_new_or_changed_is_added_and_the_rest_is_skipped(
    ingestion: Ingestion, write: Any, by_words: Any
) -> None:
    docs = write("docs", {"a.md": "# Tea\n\nHot.", "b/c.txt": "cold milk", "d.bin": b"\0\1"})
    assert counts(ingestion.add(docs)) == (2, 0, 0, 0)
    assert ingestion.sources() == {"docs/a.md": 1, "docs/b/c.txt": 1}
    embedded = len(by_words.calls)
    assert counts(ingestion.add(docs)) == (0, 2, 0, 0)
    assert len(by_words.calls) == embedded  # nothing was embedded
    write("docs", {"a.md": "# Tea\n\nLukewarm."})
    assert counts(ingestion.add(docs)) == (1, 1, 0, 0)
    assert "Lukewarm" in ingestion.texts()["docs/a.md"]
    assert ingestion.sources() == {"docs/a.md": 1, "docs/b/c.txt": 1}
    assert counts(ingestion.add(docs, size=5, overlap=0)) == (2, 0, 0, 0)  # other options: all documents again
    assert ingestion.sources()["docs/b/c.txt"] == 2
    assert list((ingestion.store.path / "parts").iterdir()) == []


def test_a_document_that_cannot_be_read_is_named_and_does_not_stop_the_others(ingestion: Ingestion, write: Any) -> None:
    docs = write("docs", {"a.md": "tea", "bad.md": b"\xff\xfe\xff", "blank.md": " \n", "z.md": "milk"})
    added = ingestion.add(docs)
    assert (added.documents, sorted(ingestion.sources())) == (2, ["docs/a.md", "docs/z.md"])
    assert {f.source: f.why for f in added.failed} == {
        "docs/bad.md": added.failed[0].why,
        "docs/blank.md": "'blank.md' holds no text",
    }
    assert "bad.md" in added.failed[0].why


def test_a_file_that_was_removed_after_the_planning_is_named(ingestion: Ingestion, write: Any, tmp_path: Path) -> None:
    docs, store = write("docs", {"a.md": "tea"}), str(tmp_path / "store")
    options = ChunkOptions()
    planned = plan_ingest(store, IngestRequest(paths=[str(docs)]), options, ToolContext(key="r/1"))
    (docs / "a.md").unlink()
    parsed = parse_pack(store, planned.parts, planned.packs[0], options)
    assert (parsed.batches, [f.why for f in parsed.failed]) == (
        [],
        ["the file cannot be read (No such file or directory)"],
    )


def test_sync_removes_only_what_vanished_below_the_root(ingestion: Ingestion, write: Any) -> None:
    docs = write("docs", {f"{i}.md": f"text {i}" for i in range(5)})
    other = write("other", {"z.md": "kept"})
    ingestion.add(docs, other)
    (docs / "0.md").unlink()
    assert counts(ingestion.add(docs)) == (0, 4, 0, 0)
    assert "docs/0.md" in ingestion.sources()
    assert counts(ingestion.add(docs, sync=True)) == (0, 4, 1, 0)
    assert sorted(ingestion.sources()) == ["docs/1.md", "docs/2.md", "docs/3.md", "docs/4.md", "other/z.md"]


def test_sync_refuses_when_most_or_all_of_a_folder_vanished(ingestion: Ingestion, write: Any) -> None:
    docs = write("docs", {f"{i}.md": f"text {i}" for i in range(5)})
    ingestion.add(docs)
    for i in range(3):
        (docs / f"{i}.md").unlink()
    with pytest.raises(RunFailedError, match="nothing was removed: 3 of 5 documents vanished from .*; sync with force"):
        ingestion.add(docs, sync=True)
    for i in range(3, 5):
        (docs / f"{i}.md").unlink()
    with pytest.raises(
        RunFailedError, match="nothing was removed: .*docs has no documents now, and the store has 5 from it"
    ):
        ingestion.add(docs, sync=True)
    assert len(ingestion.sources()) == 5
    assert counts(ingestion.add(docs, sync=True, force=True)) == (0, 0, 5, 0)
    assert ingestion.sources() == {}


def test_an_ingest_without_documents_or_with_a_taken_label_is_refused(
    ingestion: Ingestion, write: Any, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFailedError, match="there is no document in .*empty that a loader can read"):
        ingestion.add(tmp_path / "empty")
    docs = write("docs", {"a.md": "tea"})
    with pytest.raises(RunFailedError, match=r"there is no document in .*docs that matches '\*.pdf'"):
        ingestion.add(docs, glob="*.pdf")
    with pytest.raises(RunFailedError, match="there is no folder or file '/nowhere' here"):
        ingestion.add(Path("/nowhere"))
    ingestion.add(docs)
    with pytest.raises(
        RunFailedError, match="'docs/a.md' is in this store from .*give this folder another label"
    ) as caught:
        ingestion.add(write("else/docs", {"a.md": "other tea"}))
    assert caught.value.hint == "give this folder another label, such as label='mine'"
    assert counts(ingestion.add(tmp_path / "else/docs", label="mine")) == (1, 0, 0, 0)


def test_another_embedder_is_refused_before_anything_is_parsed(
    ingestion: Ingestion, write: Any, tmp_path: Path, by_words: Any
) -> None:
    ingestion.add(write("docs", {"a.md": "tea"}))
    write("docs", {"b.md": "milk"})
    other = Ingestion(tmp_path, type(by_words)(32))
    with pytest.raises(RunFailedError, match="reembed"):
        other.add(tmp_path / "docs")
    assert [e.name for e in other.run.events() if isinstance(e, StepPlanned)] == [
        "plan_ingest",
        "check_embedder",
        "clean_up",
    ]
    assert list((ingestion.store.path / "parts").iterdir()) == []
    assert sorted(ingestion.sources()) == ["docs/a.md"]


def test_every_chunk_has_the_metadata(ingestion: Ingestion, write: Any) -> None:
    ingestion.add(write("docs", {"a.md": "tea"}), metadata={"tenant": "a", "tags": ["x"]})
    assert ingestion.store.count({"tenant": "a"}) == 1
    assert ingestion.store.count({"tenant": "b"}) == 0
    assert counts(ingestion.add(ingestion.store.path.parent / "docs", metadata={"tenant": "b"})) == (1, 0, 0, 0)
    assert ingestion.store.count({"tenant": "b"}) == 1


def test_a_large_document_is_indexed_in_several_commits(
    ingestion: Ingestion, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "BATCH_CHUNKS", 4)
    docs = write(
        "docs", {"a.md": "one", "big.md": "\n\n".join(f"paragraph {i} of it" for i in range(10)), "c.md": "two"}
    )
    added = ingestion.add(docs, size=20, overlap=0)
    assert (added.documents, added.failed) == (3, [])
    assert ingestion.sources()["docs/big.md"] == added.chunks - 2 == 10
    assert ingestion.store.version > 2
    assert ingestion.store.count() == 12


def test_packs_in_flight_are_bounded_by_the_window(
    ingestion: Ingestion, write: Any, monkeypatch: pytest.MonkeyPatch, by_words: Any
) -> None:
    monkeypatch.setattr("agentmesh.rag.ingestion.plan.PACK_DOCUMENTS", 3)
    docs = write("docs", {f"{i:02}.md": f"text number {i}" for i in range(20)})
    assert counts(ingestion.add(docs, window=2)) == (20, 0, 0, 0)
    assert len(ingestion.sources()) == 20
    assert max(by_words.calls) <= 6  # what two packs hold


class Flaky:
    """An embedder that always fails for one word, and once for another."""

    name, remote = "", False

    def __init__(self, inner: Any) -> None:
        self._inner, self.identity, self.d = inner, inner.identity, inner.d
        self.failed = False

    def documents(self, texts: Any) -> Any:
        if any("poison" in t for t in texts):
            raise EmbedderError("no vector for it")
        if any("later" in t for t in texts) and not self.failed:
            self.failed = True
            raise EmbedderError("too many requests", after_s=0.01)
        return self._inner.documents(texts)

    def query(self, text: str) -> Any:
        return self._inner.query(text)


def test_a_text_that_the_embedder_refuses_fails_only_its_document(tmp_path: Path, write: Any, by_words: Any) -> None:
    ingestion = Ingestion(tmp_path, Flaky(by_words))
    added = ingestion.add(write("docs", {"a.md": "tea", "b.md": "poison", "c.md": "milk later"}))
    assert (added.documents, [(f.source, f.why) for f in added.failed]) == (2, [("docs/b.md", "no vector for it")])
    assert sorted(ingestion.sources()) == ["docs/a.md", "docs/c.md"]
    alone = Ingestion(tmp_path / "2", Flaky(by_words))
    assert [f.source for f in alone.add(write("2/docs", {"b.md": "poison"})).failed] == ["docs/b.md"]


def test_a_chunk_without_a_known_word_gets_the_direction_of_its_document(ingestion: Ingestion, write: Any) -> None:
    added = ingestion.add(write("docs", {"a.txt": "cold tea\n\n" + "=" * 16, "b.txt": "====="}), size=20, overlap=0)
    assert (added.documents, added.chunks) == (1, 2)
    assert [(f.source, f.why) for f in added.failed] == [("docs/b.txt", "the embedder knows none of its words")]
    first, second = ingestion.store.vectors(ingestion.store.ids())
    assert first @ second > 0.999


# ---- repeated and late steps ---------------------------------------------------------------------
class EmbeddedBatch:
    """One document, embedded and ready to be indexed."""

    def __init__(self, docs: Path, store: Path, by_words: Any, key: str) -> None:
        self.store, self.embed, self.key = str(store), register_embedder(by_words), key
        options = ChunkOptions()
        planned = plan_ingest(self.store, IngestRequest(paths=[str(docs)]), options, ToolContext(key=f"{key}/1"))
        self.parts = planned.parts
        (self.batch,) = parse_pack(self.store, self.parts, planned.packs[0], options).batches
        self.embedded = embed_batch(self.store, self.parts, self.batch.part, self.embed)

    def index(self) -> Indexed:
        context = ToolContext(key=f"{self.key}/3/3")
        return index_batch(self.store, self.parts, self.batch.part, self.embedded.part, self.embedded.by, [], context)


def test_a_repeated_index_step_changes_nothing(tmp_path: Path, write: Any, by_words: Any) -> None:
    batched = EmbeddedBatch(write("docs", {"a.md": "tea"}), tmp_path / "store", by_words, "r1")
    assert batched.index() == batched.index() == Indexed(documents=1, chunks=1)
    assert store_of(batched.store).version == 1
    clean_up(batched.store, batched.parts)
    assert os.listdir(tmp_path / "store" / "parts") == []


def test_an_index_step_needs_no_embedder(
    tmp_path: Path, write: Any, by_words: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batched = EmbeddedBatch(write("docs", {"a.md": "tea"}), tmp_path / "store", by_words, "r1")
    monkeypatch.setattr(steps, "batcher_for", None)
    assert batched.index().documents == 1
    assert FaissStore(batched.store).identity == by_words.identity


def test_a_late_index_step_does_not_overwrite_newer_text(tmp_path: Path, write: Any, by_words: Any) -> None:
    docs = write("docs", {"a.md": "old tea"})
    late = EmbeddedBatch(docs, tmp_path / "store", by_words, "r1")
    write("docs", {"a.md": "new tea, hot"})
    newer = EmbeddedBatch(docs, tmp_path / "store", by_words, "r2")
    assert newer.index().documents == 1
    indexed = late.index()
    assert (indexed.documents, indexed.chunks) == (0, 0)
    assert [f.source for f in indexed.failed] == ["docs/a.md"]
    (chunks,) = FaissStore(tmp_path / "store").iterate()
    assert [c.text for c in chunks] == ["new tea, hot"]


def test_two_ingests_of_one_folder_do_not_conflict(tmp_path: Path, write: Any, by_words: Any) -> None:
    docs = write("docs", {"a.md": "tea"})
    first, second = (EmbeddedBatch(docs, tmp_path / "store", by_words, key) for key in ("r1", "r2"))
    assert first.index().documents == 1
    assert second.index().failed == []
    assert FaissStore(tmp_path / "store").count() == 1


def test_an_ingest_is_a_step_of_a_users_own_flow(tmp_path: Path, write: Any, by_words: Any) -> None:
    docs, retriever = write("docs", {"a.md": "tea"}), Retriever.open(tmp_path / "store", embed=by_words)

    class Nightly(Agent[int]):
        def flow(self, task: str, ctx: Context) -> int:
            ingest, request = retriever.ingest(task)
            return ctx.do(ingest.on(request)).documents

    assert FakeMesh(Crew(Nightly(), Ingest())).run(str(docs)) == 1
