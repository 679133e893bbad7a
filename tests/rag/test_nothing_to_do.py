"""`agentmesh rag add` over a folder that did not change: a look, and no run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from agentmesh import Crew
from agentmesh.cli.rag_add import add_documents
from agentmesh.errors import ServiceDown
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.retriever import Retriever
from agentmesh.testing import FakeMesh

NOWHERE = "redis://127.0.0.1:1"


@pytest.fixture
def docs(write: Any, tmp_path: Path) -> Path:
    """A folder whose documents are in the store `kb`."""
    folder: Path = write("docs", {"a.md": "tea", "b.md": "coffee", "sub/c.md": "milk"})
    agent, asked = Retriever.open(tmp_path / "kb").ingest(folder)
    assert FakeMesh(Crew(agent)).run(asked).documents == 3
    return folder


def add(docs: Path, **how: Any) -> int:
    """Its exit code. There is no broker."""
    given = {"size": 1000, "overlap": 150, "run_id": "", "as_json": False, **how}
    return add_documents(
        [str(docs)], store=docs.parent / "kb", embed="", glob="", label="", meta=[], broker=NOWHERE, file=None, **given
    )


def test_nothing_to_do_needs_no_run_and_no_broker(docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = FaissStore(docs.parent / "kb").version
    for sync in (False, True):
        assert add(docs, sync=sync) == 0
        assert capsys.readouterr().out == "0 documents added, 0 passages · 3 unchanged\n"
    assert add(docs, as_json=True) == 0
    (line,) = capsys.readouterr().out.splitlines()
    told = json.loads(line)
    assert (told["run"], told["e"]) == ("", "RunDone")
    assert told["value"] == {"documents": 0, "chunks": 0, "skipped": 3, "removed": 0, "failed": []}
    (docs / "b.md").unlink()
    assert add(docs) == 0
    assert FaissStore(docs.parent / "kb").version == version


def test_what_cannot_be_listed_is_told_of(
    docs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def shut(folder: Any) -> Any:  # for root no folder is shut
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", shut)
    code, (out, err) = add(docs), capsys.readouterr()
    assert (code, out) == (1, "0 documents added, 0 passages · 2 unchanged · 1 not added\n")
    assert err == "not added: docs/sub/: the folder cannot be listed (Permission denied)\n"


@pytest.mark.parametrize("how", [{"run_id": "r1"}, {"size": 5, "overlap": 0}, {"changed": "a.md"}, {"gone": "a.md"}])
def test_whatever_there_is_to_do_needs_one(docs: Path, how: dict[str, Any]) -> None:
    if "changed" in how:
        (docs / how.pop("changed")).write_text("more tea")
    elif "gone" in how:
        (docs / how.pop("gone")).unlink()
        how = {"sync": True}
    with pytest.raises(ServiceDown, match="no broker responds at redis://127.0.0.1:1"):
        add(docs, **how)
