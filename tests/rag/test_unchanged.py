"""`agentmesh rag add` over an unchanged folder: the documents are listed, and no run begins."""

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
    agent, request = Retriever.open(tmp_path / "kb").ingest(folder)
    assert FakeMesh(Crew(agent)).run(request).documents == 3
    return folder


def add(docs: Path, **changes: Any) -> int:
    """The exit code of an `add` without a broker."""
    options = {"size": 1000, "overlap": 150, "run_id": "", "as_json": False, **changes}
    return add_documents(
        [str(docs)],
        store=docs.parent / "kb",
        embed="",
        glob="",
        label="",
        meta=[],
        broker=NOWHERE,
        file=None,
        **options,
    )


def test_nothing_to_do_needs_no_run_and_no_broker(docs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    version = FaissStore(docs.parent / "kb").version
    for sync in (False, True):
        assert add(docs, sync=sync) == 0
        assert capsys.readouterr().out == "0 documents added, 0 passages · 3 unchanged\n"
    assert add(docs, as_json=True) == 0
    (line,) = capsys.readouterr().out.splitlines()
    event = json.loads(line)
    assert (event["run"], event["e"]) == ("", "RunDone")
    assert event["value"] == {"documents": 0, "chunks": 0, "skipped": 3, "removed": 0, "failed": []}
    (docs / "b.md").unlink()
    assert add(docs) == 0
    assert FaissStore(docs.parent / "kb").version == version


def test_a_folder_that_cannot_be_listed_is_reported(
    docs: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scandir = os.scandir

    def denied(folder: Any) -> Any:  # root may list any folder
        if Path(folder).name == "sub":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", denied)
    code, (out, err) = add(docs), capsys.readouterr()
    assert (code, out) == (1, "0 documents added, 0 passages · 2 unchanged · 1 not added\n")
    assert err == "not added: docs/sub/: the folder cannot be listed (Permission denied)\n"


@pytest.mark.parametrize(
    "changes", [{"run_id": "r1"}, {"size": 5, "overlap": 0}, {"changed": "a.md"}, {"removed": "a.md"}]
)
def test_an_ingest_with_something_to_do_needs_a_broker(docs: Path, changes: dict[str, Any]) -> None:
    if "changed" in changes:
        (docs / changes["changed"]).write_text("more tea")
        changes = {}
    elif "removed" in changes:
        (docs / changes["removed"]).unlink()
        changes = {"sync": True}
    with pytest.raises(ServiceDown, match="no broker responds at redis://127.0.0.1:1"):
        add(docs, **changes)
