"""The retriever: search in each mode, bound filters, evaluation, the tool, a script without servers."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentmesh import Agent, Crew, DefinitionError, MeshError, StoreError
from agentmesh.rag.ingestion.options import check_paths
from agentmesh.rag.ingestion.plan import IngestRequest
from agentmesh.rag.search import Passage
from agentmesh.retriever import Retriever
from agentmesh.testing import FakeMesh, says, uses

TEXTS = {
    "leave.md": "# Leave\n\nParents have sixteen weeks of paid leave.\n\n## Sick\n\nWho is sick calls before nine.",
    "pay.md": "# Pay\n\nWages are paid on the last working day.",
    "tea.md": "# Tea\n\nTea is made in the kitchen at four.",
    "tea2.md": "# Tea\n\nTea is made in the kitchen at four o'clock.",
}


@pytest.fixture
def handbook(tmp_path: Path, write: Any, by_words: Any) -> Retriever:
    """Four documents, two of which are near-duplicates."""
    retriever = Retriever.open(tmp_path / "kb", embed=by_words)
    for tenant, names in {"a": ["leave.md", "pay.md"], "b": ["tea.md", "tea2.md"]}.items():
        docs = write(tenant, {name: TEXTS[name] for name in names})
        agent, request = retriever.ingest(docs, metadata={"tenant": tenant})
        assert FakeMesh(Crew(agent)).run(request).failed == []
    return retriever


def test_opening_does_no_io(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Retriever.open("kb").path == str(tmp_path / "kb")
    assert list(tmp_path.iterdir()) == []
    assert Retriever.open("kb").search("anything", mode="text") == []
    assert Retriever.open("kb").count() == 0


@pytest.mark.parametrize("mode", ["hybrid", "dense", "text"])
def test_each_mode_finds_the_passage_with_its_place(handbook: Retriever, mode: Any) -> None:
    best = handbook.search("weeks of paid leave for parents", 2, mode=mode)[0]
    assert (best.source, best.heading) == ("a/leave.md", ("Leave",))
    assert TEXTS["leave.md"][best.start : best.end] == best.text
    assert 0 < best.score <= 1


def test_invalid_arguments_of_a_search(handbook: Retriever) -> None:
    assert len(handbook.search("tea", 100, mode="dense")) == handbook.count()
    with pytest.raises(DefinitionError, match=r"search\(k=0\) has a k below 1"):
        handbook.search("tea", 0)
    with pytest.raises(DefinitionError, match="unknown mode .*; use one of: hybrid, dense, text"):
        handbook.search("tea", mode="fuzzy")  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match="diverse=2"):
        handbook.search("tea", diverse=2)


def test_an_unknown_filter_is_an_error(handbook: Retriever) -> None:
    with pytest.raises(StoreError, match="tenat"):
        handbook.search("tea", where={"tenat": "a"})
    with pytest.raises(StoreError, match=r"\$near"):
        handbook.search("tea", where={"tenant": {"$near": 1}})


def test_diverse_demotes_near_duplicates(handbook: Retriever) -> None:
    nearest = [h.source for h in handbook.search("tea in the kitchen at four", 2)]
    assert nearest == ["b/tea.md", "b/tea2.md"] or nearest == ["b/tea2.md", "b/tea.md"]
    diverse = [h.source for h in handbook.search("tea in the kitchen at four", 2, diverse=0.9)]
    assert len({s.partition("/")[0] for s in diverse}) == 2


def test_a_bound_filter_is_hidden_and_cannot_be_widened(handbook: Retriever) -> None:
    bound = handbook.where(tenant="a")
    assert {h.source for h in bound.search("tea in the kitchen", 10)} <= {"a/leave.md", "a/pay.md"}
    assert bound.search("tea", 10, where={"tenant": "b"}) == []
    assert bound.search("tea", 10, where={"$or": [{"tenant": "a"}, {"tenant": "b"}]}) == bound.search("tea", 10)
    assert bound.where(tenant="b").search("tea", 10) == []
    assert bound.count() < handbook.count()
    hidden = next(h.id for h in handbook.search("tea", 10) if h.source.startswith("b/"))
    assert bound.get([hidden]) == [None]
    with pytest.raises(DefinitionError, match="a retriever with a filter only searches"):
        bound.ingest("docs")
    tool = bound.tool(k=10)
    assert list(tool.spec.parameters["properties"]) == ["query"]
    assert {p.source for p in tool("tea in the kitchen")} <= {"a/leave.md", "a/pay.md"}


def test_a_model_that_asks_nothing_is_told_so(handbook: Retriever) -> None:
    class HelpDesk(Agent):
        tools = (handbook.tool(),)

    handle = FakeMesh(HelpDesk(), model=[uses("search", query=""), says("What do you want to know?")]).start("")
    assert handle.result() == "What do you want to know?"
    assert any("query: String should have at least 1 character; call search again" in m.text for m in handle.messages())


def test_an_agent_uses_the_tool(handbook: Retriever) -> None:
    class HelpDesk(Agent):
        tools = (handbook.tool(k=1, about="the handbook"),)

    passages: list[Passage] = []

    def answer(prompt: Any) -> Any:
        last = prompt.messages[-1]
        if last.role == "user":
            assert prompt.tools[0].description == "Find passages of the handbook that bear on a question."
            return uses("search", query="when are wages paid")
        passages.extend(Passage(**p) for p in json.loads(last.text))
        return says("On the last working day.")

    assert FakeMesh(HelpDesk(), model=answer).run("when?") == "On the last working day."
    assert [(p.source, p.heading) for p in passages] == [("a/pay.md", "Pay")]


def test_evaluation_counts_relevant_passages(handbook: Retriever, tmp_path: Path) -> None:
    questions = [
        {"question": "when are wages paid", "source": "a/pay.md"},
        {"question": "where is tea made", "sources": ["b/tea.md", "b/tea2.md"], "contains": "kitchen"},
        {"question": "weeks of paid leave", "source": "a/nothing.md"},
    ]
    scores = handbook.evaluate(questions, k=(1, 3))
    assert (scores.questions, scores.recall, scores.missed) == (3, {1: 2 / 3, 3: 2 / 3}, ["weeks of paid leave"])
    assert scores.mrr == pytest.approx(2 / 3)
    file = tmp_path / "q.jsonl"
    file.write_text("\n".join(json.dumps(q) for q in questions))
    assert handbook.evaluate(file, k=(1, 3)) == scores
    file.write_text("{}")
    with pytest.raises(DefinitionError, match="give it `question` and `source`"):
        handbook.evaluate(file)
    with pytest.raises(DefinitionError, match="cannot be read"):
        handbook.evaluate(tmp_path / "none.jsonl")


def test_documents_are_removed_by_name(handbook: Retriever) -> None:
    assert handbook.remove("b/tea2.md") == 1
    assert sorted(handbook.sources()) == ["a/leave.md", "a/pay.md", "b/tea.md"]


def test_another_embedder_is_refused_until_the_store_is_reembedded(handbook: Retriever, by_words: Any) -> None:
    other = type(by_words)(32)
    with pytest.raises(MeshError, match="reembed"):
        Retriever.open(handbook.path, embed=other).search("tea")
    reembedded = handbook.reembed(other)
    assert reembedded.search("weeks of paid leave", 1)[0].source == "a/leave.md"
    with pytest.raises(MeshError, match="reembed"):
        handbook.search("tea")
    assert reembedded.reembed(type(by_words)(16)).count() == len(TEXTS)
    with pytest.raises(StoreError, match="read-only"):
        handbook.where(tenant="a").reembed(other)


def test_invalid_arguments_of_an_ingest(handbook: Retriever, tmp_path: Path) -> None:
    for invalid in ({"size": 0}, {"overlap": -1}, {"size": 10, "overlap": 10}, {"window": 0}):
        with pytest.raises(DefinitionError):
            handbook.ingest(tmp_path, **invalid)
    with pytest.raises(DefinitionError, match="there is no folder or file '/nowhere'"):
        handbook.add("/nowhere")
    with pytest.raises(DefinitionError, match="is a file; name its folder"):
        check_paths(IngestRequest(paths=[str(tmp_path / "a" / "pay.md")], sync=True))
    with pytest.raises(MeshError, match="unknown embedder 'wordlama'"):
        Retriever.open(handbook.path, embed="wordlama").search("x")


SCRIPT = """
import sys
from agentmesh.retriever import Retriever
from agentmesh import RunFailedError

class Mine:  # an embedder of one's own
    name, remote, d = "", False, 2
    def documents(self, texts):
        import numpy as np
        rows = np.array([[1.0, len(t) % 7] for t in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1)[:, None]
    def query(self, text):
        return self.documents([text])[0]
    @property
    def identity(self):
        from agentmesh.rag.embedders.base import Identity
        return Identity("mine", d=2)

by_words, by_mine = Retriever.open("words"), Retriever.open("mine", embed=Mine())
print(by_words.add("docs"), by_words.add("docs"))
print(by_mine.add(["docs"], size=30, overlap=0).documents)
print(by_words.search("when are wages paid", 1)[0].source)
try:
    by_words.add("nothing")
except RunFailedError as e:
    print(e.message)
"""


def test_a_script_needs_no_server(tmp_path: Path, write: Any) -> None:
    write("docs", dict(TEXTS))
    write("nothing", {"a.bin": b"\0"})
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    first, second, third, fourth = done.stdout.splitlines()
    assert first.startswith("documents=4 chunks=4 skipped=0 removed=0 failed=[] documents=0 chunks=0 skipped=4"), (
        done.stderr
    )
    assert (second, third) == ("4", "docs/pay.md")
    assert fourth.startswith("there is no document in ")
