"""`Ingest()` in a crew whose device's workers embed: its embed steps go to them."""

from pathlib import Path
from typing import Any

import pytest

from agentmesh import Crew, DeviceQueue, Queue
from agentmesh.definitions.queue import BaseQueue
from agentmesh.mesh import Mesh
from agentmesh.rag.ingest import Ingest
from agentmesh.rag.ingestion.steps import compare_embedder, embed_batch, index_batch, parse_pack
from agentmesh.retriever import Retriever
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing.tiny_models import save_encoder

CREW = str(Path(__file__).parent / "embedding.py")
WAIT_S, DOCUMENTS = 60, 5


def test_the_device_embeds_for_an_ingest_of_its_own_crew(
    device: str, valkey: Any, tmp_path: Path, working: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = save_encoder(tmp_path / "bert")
    monkeypatch.setenv("EMBEDDING_ENCODER", str(encoder))
    docs = tmp_path / "docs"
    docs.mkdir()
    for i in range(DOCUMENTS):
        (docs / f"{i}.md").write_text("word " * (i + 1))
    with working(valkey, tmp_path, crews=[CREW]) as work:
        mesh = Mesh(load_crew(CREW), config=work.mesh.config)
        batches = encoder / "batches"  # written in the device's process alone
        before = batches.stat().st_size
        told = mesh.start(mesh.crew.lead, 4)
        agent, asked = Retriever.open(tmp_path / "store", embed=f"local:{encoder}").ingest(docs)
        added = mesh.run(agent, asked, timeout_s=WAIT_S)
        assert told.result(timeout_s=WAIT_S) == 4
        mesh.close()
    assert (added.documents, added.failed) == (DOCUMENTS, [])
    assert batches.stat().st_size >= before + 2  # the documents and, where it was not yet, the probe
    assert work.log.count("Call embed_batch done") == 1


def test_embed_steps_go_where_somebody_embeds() -> None:
    def embeds(name: str, **more: Any) -> DeviceQueue:
        return DeviceQueue(name, model="m", embed="local:e", **more)

    def queue_of(step: Any, *queues: BaseQueue) -> str:
        return Crew(Ingest(), queues=[Queue("main"), *queues]).queues.of(step)

    embed, check = embed_batch.on("s", "p", "b", "local:e"), compare_embedder.on("s", "local:e")
    assert queue_of(embed) == queue_of(embed, DeviceQueue("gpu", model="m")) == "main"
    assert queue_of(embed, embeds("gpu")) == queue_of(check, embeds("gpu")) == "gpu"
    assert queue_of(embed, embeds("talk", lane="realtime"), embeds("gpu"), embeds("high")) == "gpu"
    assert queue_of(embed, embeds("talk", lane="realtime"), embeds("gpu"), embeds("night", lane="low")) == "night"
    assert queue_of(embed, embeds("gpu"), Queue("embed")) == "embed"  # a crew's own queue of that name
    others = parse_pack.on("s", "p", "x", {}), index_batch.on("s", "p", "b", "v", "", [])
    assert [queue_of(step, embeds("gpu")) for step in others] == ["main", "main"]
