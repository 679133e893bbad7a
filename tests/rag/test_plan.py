"""The plan of an ingest: listing, skipping, packs, vanished documents. And scratch files, and batches that steps share."""

import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentmesh.errors import StoreDamaged
from agentmesh.rag.embedders.batcher import EmbeddingBatcher
from agentmesh.rag.ingestion.plan import (
    ChunkOptions,
    Listing,
    PendingDocument,
    content_digest,
    label_conflict,
    list_documents,
    matcher,
    pending_documents,
    removal_refusal,
    split_into_packs,
    unchanged,
    vanished_sources,
)
from agentmesh.rag.ingestion.scratch import ScratchFiles, metadata_from_json, metadata_to_json, remove_abandoned


@dataclass(frozen=True)
class Stored:
    digest: str
    facts: dict[str, Any] = field(default_factory=dict)


def everything(path: str) -> bool:
    return True


def listed(*paths: Path, label: str = "", accepts: Any = everything, exclude: Sequence[Path] = ()) -> Listing:
    return list_documents([str(p) for p in paths], accepts=accepts, label=label, exclude=[str(e) for e in exclude])


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def as_stored(listing: Listing, mark: str = "h") -> dict[str, Stored]:
    """What a store would hold of the listed documents."""
    return {
        s: Stored(
            content_digest(Path(f.path).read_bytes(), mark),
            {"size": f.size, "mtime_ns": f.mtime_ns, "how": mark, "root": f.root},
        )
        for s, f in listing.documents.items()
    }


@pytest.mark.parametrize(
    ("glob", "yes", "no"),
    [
        ("*.md", ["a.md", "x/y/a.md"], ["a.mdx", "a.txt"]),
        ("**/*.md", ["a.md", "x/y/a.md"], ["a.txt"]),
        ("guides/*.md", ["guides/a.md"], ["a.md", "guides/x/a.md", "x/guides/a.md"]),
        ("guides/**/*.m?", ["guides/a.md", "guides/x/y/a.ml"], ["guides/a.txt"]),
        ("a+b.(md)", ["a+b.(md)", "x/a+b.(md)"], ["aab.md"]),
    ],
)
def test_patterns(glob: str, yes: list[str], no: list[str]) -> None:
    fits = matcher(glob)
    assert [p for p in yes + no if fits(p)] == yes


def test_a_listing_names_documents_by_label_and_path(tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a_md="a", x__b_md="b", empty_md="")
    for hidden in (".hidden.md", ".git/a.md", "node_modules/c.md"):
        (docs / hidden).parent.mkdir(exist_ok=True)
        (docs / hidden).write_text("h")
    store = write(docs / "store", s_md="mine")
    (docs / "out.md").symlink_to(write(tmp_path / "else", o_md="o") / "o.md")
    (docs / "in.md").symlink_to(docs / "a.md")
    (docs / "loop").symlink_to(docs)
    listing = listed(docs, exclude=[store])
    assert list(listing.documents) == ["docs/a.md", "docs/in.md", "docs/x/b.md"]
    assert listing.roots == {"docs": str(docs)}
    assert list(listed(docs / "x" / "b.md", label="mine").documents) == ["mine/b.md"]
    assert list(listed(docs / "a.md").documents) == [
        "docs/a.md"
    ]  # a single file is named as in a listing of its folder


def test_what_is_unchanged_is_skipped_by_size_and_time_then_by_its_bytes(tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a_md="one", b_md="two", c_md="three")
    before = listed(docs)
    stored = as_stored(before)
    assert list(pending_documents(before, stored, "h")) == []
    assert [p.source for p in pending_documents(before, stored, "other")] == list(stored)  # other options: all of them
    os.utime(docs / "a.md", ns=(1, 1))  # touched, the bytes are the same
    write(docs, b_md="TWO")
    os.utime(docs / "b.md", ns=(1, 1))
    write(docs, d_md="four")
    after = list(pending_documents(listed(docs), stored, "h"))
    assert [(p.source, p.expects) for p in after] == [("docs/b.md", stored["docs/b.md"].digest), ("docs/d.md", "")]
    assert not unchanged(listed(docs).documents["docs/d.md"], None, "h")


def test_packs_are_bounded_by_number_and_by_size() -> None:
    def one(i: int, size: int) -> PendingDocument:
        return PendingDocument(source=str(i), path=str(i), root="", size=size, mtime_ns=0)

    assert [len(p) for p in split_into_packs([one(i, 10) for i in range(130)])] == [64, 64, 2]
    assert [len(p) for p in split_into_packs([one(i, 400_000) for i in range(5)])] == [2, 2, 1]
    assert [len(p) for p in split_into_packs([one(0, 10), one(1, 50 << 20), one(2, 10)])] == [1, 1, 1]
    assert split_into_packs([]) == []


def test_vanished_documents_are_listed_and_removing_most_of_a_folder_is_refused(tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a_md="a", b_md="b", c_md="c", d_txt="d")
    other = write(tmp_path / "other", z_md="z")
    stored = as_stored(listed(docs, other))
    (docs / "a.md").unlink()
    now = listed(docs)
    assert list(vanished_sources(now, stored, everything)) == ["docs/a.md"]  # nothing of the other folder
    assert removal_refusal(now, stored, {"docs/a.md": ""}) is None
    assert list(vanished_sources(listed(docs, accepts=matcher("*.txt")), stored, matcher("*.txt"))) == []
    for name in ("b.md", "c.md"):
        (docs / name).unlink()
    now = listed(docs)
    refusal = removal_refusal(now, stored, vanished_sources(now, stored, everything))
    assert refusal is not None
    assert refusal.message == f"nothing was removed: 3 of 4 documents vanished from {docs}"
    (docs / "d.txt").unlink()
    now = listed(docs)
    refusal = removal_refusal(now, stored, vanished_sources(now, stored, everything))
    assert refusal is not None
    assert "has no documents now" in refusal.message


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every folder")
def test_documents_in_a_folder_without_permission_have_not_vanished(tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a_md="a", x__b_md="b")
    stored = as_stored(listed(docs))
    (docs / "x").chmod(0)
    try:
        now = listed(docs)
        assert vanished_sources(now, stored, everything) == {}
        assert list(now.unreadable) == ["docs/x/"]
    finally:
        (docs / "x").chmod(0o700)


def test_two_folders_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1" / "docs", a_md="a"), write(tmp_path / "2" / "docs", a_md="other")
    stored = as_stored(listed(first))
    documents = list(listed(second).documents.values())
    refusal = label_conflict(documents, stored, os.path.isdir)
    assert refusal is not None
    assert "give this folder another label" in refusal.hint
    assert (
        label_conflict(documents, stored, lambda path: False) is None
    )  # the first does not exist: the folder was moved


# ---- scratch files -----------------------------------------------------------------------------
def test_scratch_files_are_named_by_their_content(tmp_path: Path) -> None:
    scratch = ScratchFiles(tmp_path, "r1/2")
    name = scratch.put_json({"a": "ü"})
    assert scratch.put_json({"a": "ü"}) == name
    assert scratch.get_json(name) == {"a": "ü"}
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert (scratch.get_vectors(scratch.put_vectors(rows)) == rows).all()
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["r1_2"]
    (scratch.folder / name).write_text("{}")
    with pytest.raises(StoreDamaged, match="is damaged; add the documents again"):
        scratch.get(name)
    remove_abandoned(tmp_path)
    assert scratch.folder.exists()
    os.utime(scratch.folder, (1, 1))
    remove_abandoned(tmp_path)
    assert not scratch.folder.exists()


def test_metadata_keeps_its_types() -> None:
    metadata = {"at": datetime(2026, 1, 2, tzinfo=UTC), "n": 1, "tags": ["a"]}
    assert metadata_from_json(metadata_to_json(metadata)) == metadata
    assert ChunkOptions(size=9).mark() != ChunkOptions(size=10).mark()


# ---- shared batches ----------------------------------------------------------------------------
class Counting:
    """One number a text; counts its calls, and can be made to wait or to fail."""

    remote = False

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.gate = threading.Event()
        self.gate.set()

    def documents(self, texts: Sequence[str]) -> Any:
        self.calls.append(list(texts))
        self.gate.wait(10)
        if "bad" in texts:
            raise ValueError("bad text")
        return np.array([[float(len(t))] for t in texts], np.float32)


def in_threads(batcher: EmbeddingBatcher, requests: Sequence[Sequence[str]], embedder: Counting) -> list[Any]:
    """The results of requests by as many threads; the first is in flight when the others arrive."""
    results: list[Any] = [None] * len(requests)

    def embed(i: int) -> None:
        try:
            results[i] = batcher.documents(requests[i]).ravel().tolist()
        except ValueError as e:
            results[i] = str(e)

    threads = [threading.Thread(target=embed, args=(i,)) for i in range(len(requests))]
    embedder.gate.clear()
    threads[0].start()
    while not embedder.calls:
        time.sleep(0.001)
    for thread in threads[1:]:
        thread.start()
    while len(batcher._waiting) < len(requests) - 1:
        time.sleep(0.001)
    embedder.gate.set()
    for thread in threads:
        thread.join(10)
    return results


def test_requests_that_wait_together_are_embedded_together() -> None:
    embedder = Counting()
    assert in_threads(EmbeddingBatcher(embedder), [["a"], ["bb", "ccc"], ["dddd"]], embedder) == [[1], [2, 3], [4]]
    assert [len(c) for c in embedder.calls] == [1, 3]


def test_a_large_request_goes_in_several_calls_and_reports_its_progress() -> None:
    embedder, progress = Counting(), list[int]()
    texts = ["x" * i for i in range(10)]
    assert EmbeddingBatcher(embedder, max_texts=4).documents(texts, progress.append).ravel().tolist() == list(range(10))
    assert progress == [4, 8, 10]
    assert EmbeddingBatcher(embedder).documents([]).shape == (0, 0)


def test_one_bad_text_fails_only_its_own_step() -> None:
    embedder = Counting()
    assert in_threads(EmbeddingBatcher(embedder), [["a"], ["bad"], ["dddd"]], embedder) == [[1], "bad text", [4]]
