"""What an ingest would do, decided without doing it: listing, skipping, packing, what vanished, shared batches."""

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
    split_into_packs,
    unchanged,
    vanished,
    why_not_remove,
)
from agentmesh.rag.ingestion.scratch import ScratchFiles, metadata_from_json, metadata_to_json, remove_abandoned


@dataclass(frozen=True)
class Known:
    digest: str
    facts: dict[str, Any] = field(default_factory=dict)


def everything(path: str) -> bool:
    return True


def listed(*paths: Path, label: str = "", wanted: Any = everything, without: Sequence[Path] = ()) -> Listing:
    return list_documents([str(p) for p in paths], wanted=wanted, label=label, without=[str(w) for w in without])


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def known_of(listing: Listing, how: str = "h") -> dict[str, Known]:
    return {
        s: Known(
            content_digest(Path(f.path).read_bytes(), how),
            {"size": f.size, "mtime_ns": f.mtime_ns, "how": how, "root": f.root},
        )
        for s, f in listing.found.items()
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
    found = listed(docs, without=[store])
    assert list(found.found) == ["docs/a.md", "docs/in.md", "docs/x/b.md"]
    assert found.roots == {"docs": str(docs)}
    assert list(listed(docs / "x" / "b.md", label="mine").found) == ["mine/b.md"]
    assert list(listed(docs / "a.md").found) == ["docs/a.md"]  # a file alone has the name it has with its folder


def test_what_is_unchanged_is_skipped_by_size_and_time_then_by_its_bytes(tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a_md="one", b_md="two", c_md="three")
    before = listed(docs)
    known = known_of(before)
    assert list(pending_documents(before, known, "h")) == []
    assert [t.source for t in pending_documents(before, known, "other")] == list(known)  # cut in another way: anew
    os.utime(docs / "a.md", ns=(1, 1))  # touched, the bytes are the same
    write(docs, b_md="TWO")
    os.utime(docs / "b.md", ns=(1, 1))
    write(docs, d_md="four")
    after = list(pending_documents(listed(docs), known, "h"))
    assert [(t.source, t.expects) for t in after] == [("docs/b.md", known["docs/b.md"].digest), ("docs/d.md", "")]
    assert not unchanged(listed(docs).found["docs/d.md"], None, "h")


def test_packs_are_bounded_by_number_and_by_size() -> None:
    def one(i: int, size: int) -> PendingDocument:
        return PendingDocument(source=str(i), path=str(i), root="", size=size, mtime_ns=0)

    assert [len(p) for p in split_into_packs([one(i, 10) for i in range(130)])] == [64, 64, 2]
    assert [len(p) for p in split_into_packs([one(i, 400_000) for i in range(5)])] == [2, 2, 1]
    assert [len(p) for p in split_into_packs([one(0, 10), one(1, 50 << 20), one(2, 10)])] == [1, 1, 1]
    assert split_into_packs([]) == []


def test_what_vanished_is_told_and_too_much_is_refused(tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a_md="a", b_md="b", c_md="c", d_txt="d")
    other = write(tmp_path / "other", z_md="z")
    known = known_of(listed(docs, other))
    (docs / "a.md").unlink()
    now = listed(docs)
    assert list(vanished(now, known, everything)) == ["docs/a.md"]  # nothing of the other folder
    assert why_not_remove(now, known, {"docs/a.md": ""}) == ""
    assert list(vanished(listed(docs, wanted=matcher("*.txt")), known, matcher("*.txt"))) == []
    for name in ("b.md", "c.md"):
        (docs / name).unlink()
    now = listed(docs)
    assert why_not_remove(now, known, vanished(now, known, everything)).startswith(
        f"3 of 4 documents vanished from {docs}"
    )
    (docs / "d.txt").unlink()
    now = listed(docs)
    assert "holds no document any more" in why_not_remove(now, known, vanished(now, known, everything))


@pytest.mark.skipif(os.getuid() == 0, reason="root reads every folder")
def test_a_folder_that_is_shut_hides_nothing_as_vanished(tmp_path: Path) -> None:
    docs = write(tmp_path / "docs", a_md="a", x__b_md="b")
    known = known_of(listed(docs))
    (docs / "x").chmod(0)
    try:
        now = listed(docs)
        assert vanished(now, known, everything) == {}
        assert list(now.unread) == ["docs/x/"]
    finally:
        (docs / "x").chmod(0o700)


def test_two_folders_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    first, second = write(tmp_path / "1" / "docs", a_md="a"), write(tmp_path / "2" / "docs", a_md="other")
    known = known_of(listed(first))
    found = list(listed(second).found.values())
    assert "name this folder by another label" in label_conflict(found, known, os.path.isdir)
    assert label_conflict(found, known, lambda path: False) == ""  # the first is gone: the folder was moved


# ---- parts -------------------------------------------------------------------------------------
def test_parts_are_named_by_what_they_hold(tmp_path: Path) -> None:
    parts = ScratchFiles(tmp_path, "r1/2")
    name = parts.put_json({"a": "ü"})
    assert parts.put_json({"a": "ü"}) == name
    assert parts.get_json(name) == {"a": "ü"}
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert (parts.get_vectors(parts.put_vectors(rows)) == rows).all()
    assert [p.name for p in (tmp_path / "parts").iterdir()] == ["r1_2"]
    (parts.folder / name).write_text("{}")
    with pytest.raises(OSError, match="is damaged; add the documents again"):
        parts.get(name)
    remove_abandoned(tmp_path)
    assert parts.folder.exists()
    os.utime(parts.folder, (1, 1))
    remove_abandoned(tmp_path)
    assert not parts.folder.exists()


def test_metadata_keeps_its_types() -> None:
    given = {"at": datetime(2026, 1, 2, tzinfo=UTC), "n": 1, "tags": ["a"]}
    assert metadata_from_json(metadata_to_json(given)) == given
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


def in_threads(shared: EmbeddingBatcher, wishes: Sequence[Sequence[str]], held: Counting) -> list[Any]:
    """The first is in hand when the others come."""
    ended: list[Any] = [None] * len(wishes)

    def ask(i: int) -> None:
        try:
            ended[i] = shared.documents(wishes[i]).ravel().tolist()
        except ValueError as e:
            ended[i] = str(e)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(wishes))]
    held.gate.clear()
    threads[0].start()
    while not held.calls:
        time.sleep(0.001)
    for thread in threads[1:]:
        thread.start()
    while len(shared._waiting) < len(wishes) - 1:
        time.sleep(0.001)
    held.gate.set()
    for thread in threads:
        thread.join(10)
    return ended


def test_what_waits_together_is_embedded_together() -> None:
    held = Counting()
    assert in_threads(EmbeddingBatcher(held), [["a"], ["bb", "ccc"], ["dddd"]], held) == [[1], [2, 3], [4]]
    assert [len(c) for c in held.calls] == [1, 3]


def test_a_large_wish_goes_in_several_calls_and_tells_how_far_it_is() -> None:
    held, said = Counting(), list[int]()
    texts = ["x" * i for i in range(10)]
    assert EmbeddingBatcher(held, max_texts=4).documents(texts, said.append).ravel().tolist() == list(range(10))
    assert said == [4, 8, 10]
    assert EmbeddingBatcher(held).documents([]).shape == (0, 0)


def test_one_bad_text_fails_its_own_step_alone() -> None:
    held = Counting()
    assert in_threads(EmbeddingBatcher(held), [["a"], ["bad"], ["dddd"]], held) == [[1], "bad text", [4]]
