"""A retriever over a store that is no folder of ours: an object, or a plugin's by name."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from agentmesh import ConfigError, DefinitionError, RunFailedError, plugins
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.retriever import Retriever

EXAMPLE = Path(__file__).resolve().parents[2] / "docs/examples/plugins/json_store/json_store.py"
TEXTS = {
    "leave.md": "# Leave\n\nParents have sixteen weeks of paid leave.",
    "pay.md": "# Pay\n\nWages are paid on the last working day.",
    "tea.md": "# Tea\n\nTea is made in the kitchen at four.",
    "odd.csv": b"\0\0\0",
}


@pytest.fixture
def json_store() -> Any:
    spec = importlib.util.spec_from_file_location("json_store", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.JsonStore


@pytest.fixture
def by_name(json_store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`json:` stands for the example, as if its package were installed."""
    monkeypatch.setitem(plugins.BUILT_IN["stores"], "json", "builtins:dict")  # type: ignore[index]
    monkeypatch.setattr(plugins, "make_plugin", lambda group, name, rest: json_store(rest))


@pytest.fixture
def handbook(json_store: Any, tmp_path: Path, write: Any, by_words: Any) -> Retriever:
    retriever = Retriever(store=json_store(tmp_path / "kb.json"), embed=by_words)
    for tenant, names in {"a": ["leave.md", "pay.md", "odd.csv"], "b": ["tea.md"]}.items():
        docs = write(tenant, {name: TEXTS[name] for name in names})
        added = retriever.add(docs, metadata={"tenant": tenant})
        assert (added.documents, [f.source for f in added.failed]) == {
            "a": (2, ["a/odd.csv"]), "b": (1, []),
        }[tenant]  # fmt: skip
    return retriever


@pytest.mark.parametrize("mode", ["hybrid", "dense", "text"])
def test_each_mode_finds_the_passage_with_its_place(handbook: Retriever, mode: Any) -> None:
    best = handbook.search("weeks of paid leave for parents", 2, mode=mode)[0]
    assert (best.source, best.heading) == ("a/leave.md", ("Leave",))
    assert best.text in str(TEXTS["leave.md"])


def test_filters_are_kept(handbook: Retriever) -> None:
    only = handbook.where(tenant="a")
    assert {hit.source for hit in only.search("tea in the kitchen", 9)} == {"a/leave.md", "a/pay.md"}
    assert {hit.source for hit in only.search("paid", 9, where={"source": "a/pay.md"})} == {"a/pay.md"}
    assert only.search("tea", 9, where={"tenant": "b"}) == []
    assert (only.count(), handbook.count(), set(only.sources())) == (2, 3, {"a/leave.md", "a/pay.md"})
    with pytest.raises(DefinitionError, match="a retriever with a filter only searches"):
        only.add(".")


def test_diverse_passages_and_the_tool(handbook: Retriever) -> None:
    assert len(handbook.search("paid", 2, diverse=0.5)) == 2
    passages = handbook.tool(k=1).func("weeks of paid leave")
    assert [p.source for p in passages] == ["a/leave.md"]
    scores = handbook.evaluate([{"question": "who makes tea in the kitchen", "source": "b/tea.md"}], k=[1])
    assert scores.recall[1] == 1.0


def test_documents_are_replaced_and_leave(handbook: Retriever, write: Any) -> None:
    docs = write("a", {"pay.md": "# Pay\n\nWages are paid on Monday."})
    assert handbook.add(docs / "pay.md", label="a").documents == 1
    assert "Monday" in handbook.search("wages paid", 1)[0].text
    assert handbook.count() == 3
    (docs / "pay.md").unlink()
    assert handbook.sync(docs, label="a").removed == 1
    (docs / "leave.md").rename(docs / "odd")
    with pytest.raises(RunFailedError, match="1 of 1 documents vanished from .*a, and nothing was removed; check that"):
        handbook.sync(docs, label="a")
    (docs / "odd").rename(docs / "leave.md")
    assert set(handbook.sources()) == {"a/leave.md", "b/tea.md"}
    assert handbook.remove("b/tea.md") == 1
    assert handbook.remove("b/tea.md") == 0


def test_what_only_a_folder_can_do_is_refused(handbook: Retriever, tmp_path: Path) -> None:
    with pytest.raises(DefinitionError, match="the store 'JsonStore' takes no ingest run; use `add`"):
        handbook.ingest(".")
    with pytest.raises(DefinitionError, match="the store 'JsonStore' is not a folder"):
        handbook.reembed("wordllama")
    with pytest.raises(DefinitionError, match="the store 'JsonStore' has no `get`"):
        handbook.get(["a"])
    with pytest.raises(DefinitionError, match="there is no folder or file"):
        handbook.add("nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunFailedError, match="there is no document in .*empty; name its files, or give a glob"):
        handbook.add(tmp_path / "empty")


def test_a_name_is_a_store_a_folder_or_an_error(
    by_name: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, by_words: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    one = Retriever.open("json:kb.json", embed=by_words)
    assert one.add(write("docs", {"tea.md": TEXTS["tea.md"]})).chunks == 1
    assert one.where(source="docs/tea.md").search("tea", 1)[0].source == "docs/tea.md"
    assert Retriever.open("json:kb.json", embed=by_words).count() == 1
    with pytest.raises(
        ConfigError, match="unknown store 'jsno' in 'jsno:kb'; use one of: faiss, json. Did you mean 'json'"
    ):
        Retriever.open("jsno:kb")
    (tmp_path / "notes:2026").mkdir()
    for folder in ("notes:2026", "./jsno:kb", "kb", tmp_path / "x:y", "C:x"):
        assert Retriever.open(folder).other_store is None
    for ours in (Retriever(store=FaissStore("kb")), Retriever.open("faiss:kb")):
        assert (ours.path, ours.other_store) == (str(tmp_path / "kb"), None)
