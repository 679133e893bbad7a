"""`agentmesh rag` as a user runs it: an embedded Valkey in the test's folder, real worker processes."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from agentmesh import Crew, DefinitionError
from agentmesh.cli.main import main
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.retriever import Retriever
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import FakeMesh

DOCS = {
    "leave.md": "# Leave\n\nParents have sixteen weeks of paid leave.\n",
    "sub/pay.md": "# Pay\n\nWages are paid on the last working day.\n",
    "tea.txt": "Tea is made in the kitchen at four.",
    "bad.md": b"\xff\xfe\xff",
}


def test_add_search_and_sync(shell: Any, write: Any) -> None:
    write("docs", DOCS)
    assert shell("rag", "add", "docs", code=1) == "3 documents added, 3 passages · 0 unchanged · 1 not added\n"
    assert "3/4 documents · 3 passages" in shell.err
    assert "· 1 failed" in shell.err
    assert "not added: docs/bad.md: 'bad.md'" in shell.err
    out = shell("rag", "search", "when are wages paid", "-k", "1")
    assert out.splitlines()[0].endswith("docs/sub/pay.md:0  Pay")
    assert "Wages are paid on the last working day." in out
    for name in ("bad.md", "tea.txt"):
        (shell.folder / "docs" / name).unlink()
    events = [json.loads(line) for line in shell("rag", "sync", "docs", "--json").splitlines()]
    assert events[-1]["value"] == {"documents": 0, "chunks": 0, "skipped": 2, "removed": 1, "failed": []}


@pytest.fixture
def in_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """`in_process("rag", …, code=2)` runs a command that needs no worker in this process and returns what it prints."""
    monkeypatch.chdir(tmp_path)

    def command(*args: str, code: int) -> str:
        monkeypatch.setattr(sys, "argv", ["agentmesh", *args])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert ended.value.code == code, err
        return str(out + err)

    return command


def test_errors_of_the_commands(in_process: Any, write: Any, tmp_path: Path) -> None:
    no_store = "error: there is no store in '.agentmesh/rag'\nhelp: make one: agentmesh rag add FOLDER\n"
    for command in (["search", "x"], ["stats"], ["verify"], ["compact"], ["reembed", "--embed", "x"], ["eval", "q"]):
        assert in_process("rag", *command, code=2) == no_store
    assert "there is no folder or file" in in_process("rag", "add", "nowhere", code=2)
    docs = write("docs", {"a.md": "tea"})
    assert "is a file" in in_process("rag", "sync", "docs/a.md", code=2)
    assert "--meta 'year' is not NAME=VALUE" in in_process("rag", "add", "docs", "--meta", "year", code=2)
    assert "use a size of at least 1 and a smaller overlap" in in_process(
        "rag", "add", "docs", "--size", "5", "--overlap", "9", code=2
    )
    assert "add --trust-pickle" in in_process("rag", "import-langchain", "docs", code=2)
    agent, request = Retriever.open(tmp_path / "kb").ingest(docs, metadata={"year": 2026})
    FakeMesh(Crew(agent)).run(request)
    search = ("rag", "search", "tea", "--store", "kb")
    assert "search(k=0) has a k below 1" in in_process(*search, "-k", "0", code=2)
    assert "is not JSON" in in_process(*search, "--where", "{", code=2)
    assert "is not a JSON object" in in_process(*search, "--where", "[]", code=2)
    assert "yaer" in in_process(*search, "--where", '{"yaer": 2026}', code=1)
    assert "$near" in in_process(*search, "--where", '{"year": {"$near": 1}}', code=1)
    assert "unknown mode 'fuzzy'\nhelp: use one of: hybrid, dense, text" in in_process(
        *search, "--mode", "fuzzy", code=2
    )
    assert "unknown embedder 'wordlama'" in in_process(*search, "--embed", "wordlama", code=4)
    assert "no passage was found" in in_process(*search, "--where", '{"year": 2025}', code=1)
    assert "docs/a.md:0" in in_process(*search, "--where", '{"year": 2026}', code=0)


def test_ctrl_c_leaves_an_ingest_resumable(shell: Any, write: Any) -> None:
    write("docs", {f"{i:03}.md": f"text number {i}. " * 1200 for i in range(200)})  # some seconds of work
    process = shell.start("rag", "add", "docs", "--id", "c1", "--json")
    assert process.stdout is not None
    assert "RunStarted" in process.stdout.readline()
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "agentmesh runs resume c1" in err
    assert json.loads(shell("runs", "resume", "c1"))["documents"] == 200
    assert len(FaissStore(shell.folder / ".agentmesh" / "rag").sources()) == 200


def test_stats_verify_compact_reembed_and_eval(in_process: Any, write: Any, tmp_path: Path) -> None:
    agent, request = Retriever.open(tmp_path / ".agentmesh" / "rag").ingest(write("docs", dict(list(DOCS.items())[:3])))
    FakeMesh(Crew(agent)).run(request)
    assert json.loads(in_process("rag", "stats", "--json", code=0))["chunks"] == 3
    assert in_process("rag", "verify", code=0) == "no file is damaged\n"
    assert "chunks" in in_process("rag", "compact", code=0)
    assert "3 passages now have the vectors of wordllama\n" in in_process(
        "rag", "reembed", "--embed", "wordllama", code=0
    )
    lines = in_process("rag", "search", "tea", "--json", "--mode", "text", code=0).splitlines()
    assert [json.loads(line)["source"] for line in lines] == ["docs/tea.txt"]
    (tmp_path / "q.jsonl").write_text('{"question": "when are wages paid", "source": "docs/sub/pay.md"}\n')
    assert in_process("rag", "eval", "q.jsonl", "-k", "1", code=0) == "1 questions · recall@1 1.000 · MRR 1.000\n"
    segment = sorted((tmp_path / ".agentmesh" / "rag").glob("g*/*.seg"))[-1]
    segment.write_bytes(segment.read_bytes()[:-9])
    assert segment.name in in_process("rag", "verify", code=1)


def test_each_command_has_help(in_process: Any) -> None:
    for command in ([], ["add"], ["sync"], ["search"], ["stats"], ["eval"], ["import-langchain"]):
        assert "Usage:" in in_process("rag", *command, "--help", code=0)


def test_an_installed_module_is_a_crew_file_too() -> None:
    assert load_crew("agentmesh.rag.ingest").name == "rag"
    assert list(load_crew("agentmesh.rag.ingest:crew").agents) == ["Ingest", "Pack"]
    for missing in ("agentmesh.rag.nothing", "no.such.module", "crew", "agentmesh.rag.ingest.py"):
        with pytest.raises(DefinitionError, match=f"file '{missing}' does not exist"):
            load_crew(missing)
