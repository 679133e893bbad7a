"""`DeviceQueue("gpu", model=…, embed=…)`: the device's worker takes the embed steps of ingests too, and may be killed at them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentmesh import ConfigError, Crew, DefinitionError, DeviceQueue
from agentmesh.celery.broker import consumer_count
from agentmesh.cli.worker import release_on_death
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.rag import embedders as embed
from agentmesh.rag.embedders.encoder import Encoder
from agentmesh.rag.store.faiss_store import FaissStore
from agentmesh.retriever import Retriever
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import FakeMesh
from agentmesh.testing.tiny_models import save_encoder, save_model
from agentmesh.worker.asyncio_worker import worker_commands
from agentmesh.worker.embed_queues import RAG, consumed_queues, embed_queues, encoder_name, prepare_encoder
from agentmesh.worker.standby import standby_workers
from agentmesh.worker.supervisor import Supervisor

CREW = str(Path(__file__).parent / "embedding.py")
WAIT_S, DOCUMENTS = 60, 100  # two packs


@pytest.fixture
def encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Its name."""
    monkeypatch.setenv("EMBEDDING_ENCODER", str(save_encoder(tmp_path / "bert")))
    return f"local:{tmp_path / 'bert'}"


def contents(folder: Path) -> dict[str, Any]:
    store = FaissStore(folder)
    found = [c for batch in store.iterate() for c in batch]
    assert len({c.id for c in found}) == len(found)  # nothing is there twice
    return {c.id: (c.text, c.source) for c in found}


def test_a_killed_device_worker_loses_no_vector_and_no_answer(
    device: str, valkey: Any, tmp_path: Path, encoder: str, eventually: Any
) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    for i in range(DOCUMENTS):
        words = (f"{chr(97 + i % 26)} {chr(97 + i // 26)} {'word ' * (i % 7)}{chr(97 + j)}" for j in range(6))
        (docs / f"{i:03}.md").write_text("\n\n".join(words))
    quiet = Retriever.open(tmp_path / "quiet", embed=encoder)
    agent, asked = quiet.ingest(docs, size=40, overlap=0)
    assert FakeMesh(Crew(agent)).run(asked).documents == DOCUMENTS

    config = Config(broker=valkey.broker_url, journal=valkey.url, lease_s=20.0, sweep_s=0.2, drain_s=3)
    crew = load_crew(CREW)
    mesh, log = Mesh(crew, config=config), tmp_path / "worker.log"
    env = {"AGENTMESH_CACHE": str(save_model(tmp_path / "cache")), "OMP_NUM_THREADS": "1"}
    with log.open("wb") as out:
        supervisor = Supervisor(
            worker_commands(config, {CREW: crew}, suspects="exclude", log="text"), drain_s=4, output=out, env=env,
            on_death=release_on_death(config, consumed_queues([crew])),
        )  # fmt: skip
        supervisor.start()
        try:
            assert supervisor.wait_ready(WAIT_S)
            assert consumer_count(mesh.app, "agentmesh.rag.embed") == 1
            _, pid = supervisor.pids.values()
            batches = tmp_path / "bert" / "batches"
            before = batches.stat().st_size
            adding = _adding(config, docs, tmp_path / "store", encoder)
            eventually(lambda: batches.stat().st_size > before + 1)  # the first one is the probe
            told = mesh.start(crew.lead, 6, stream=True)
            next(told.tokens())
            assert log.read_text().count("Call embed_batch done") < 2
            os.kill(pid, signal.SIGKILL)
            out_text, err = adding.communicate(timeout=WAIT_S)
            assert adding.returncode == 0, err
            assert told.result(timeout_s=WAIT_S) == 6
            assert pid not in supervisor.pids.values()
        except BaseException:
            print(log.read_text())
            raise
        finally:
            supervisor.stop(now=True)
            supervisor.join(10)
            mesh.close()
    events = [json.loads(line) for line in out_text.splitlines()]
    (added,) = (e["value"] for e in events if e["e"] == "RunDone" and "/" not in e["run"])
    assert (added["documents"], added["failed"]) == (DOCUMENTS, [])
    assert contents(tmp_path / "store") == contents(tmp_path / "quiet")
    ids = sorted(contents(tmp_path / "store"))
    ours, theirs = (FaissStore(tmp_path / s).vectors(ids) for s in ("store", "quiet"))
    assert (np.einsum("nd,nd->n", ours, theirs) > 0.999).all()
    embedded = [e for e in events if e["e"] == "StepDone" and "by" in (e.get("value") or ())]
    assert len(embedded) == 2  # once for each pack
    assert log.read_text().count("for the embed steps of ingests") == 2


def _adding(config: Config, docs: Path, store: Path, encoder: str) -> "subprocess.Popen[str]":
    argv = ["rag", "add", str(docs), "--store", str(store), "--embed", encoder, "--size", "40", "--overlap", "0"]
    own = ["--json", "--broker", config.broker, "--queue", "index", "--queue", "parse"]
    env = {**os.environ, "AGENTMESH_JOURNAL": config.journal, "AGENTMESH_LEASE_S": "20", "AGENTMESH_SWEEP_S": "0.2"}
    return subprocess.Popen(
        [sys.executable, "-m", "agentmesh.cli.main", *argv, *own], env=env, text=True, cwd=docs.parent,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_what_dies_at_an_embed_step_is_given_back_and_its_suspects_run_elsewhere(encoder: str) -> None:
    config = Config(broker="redis://localhost:1", journal="redis://localhost:1")
    crew = load_crew(CREW)
    assert embed_queues([crew], ["main"]) == []
    assert embed_queues([crew], ["gpu"]) == ["agentmesh.rag.embed", "agentmesh.rag.embed.suspects"]
    assert set(consumed_queues([crew])) > {
        "agentmesh.embedding.gpu",
        "agentmesh.rag.embed",
        "agentmesh.rag.embed.suspects",
    }
    (spare,) = standby_workers(config, {CREW: crew}, queues=["gpu"])
    spec = json.loads(spare.command.env["AGENTMESH_WORKER_SPEC"])
    assert (spec["crews"], spec["queues"], spec["suspects"]) == ([RAG], ["embed"], "only")
    assert spare.command.env["CUDA_VISIBLE_DEVICES"] == ""
    assert spare._queues == ["agentmesh.rag.embed.suspects"]


def test_only_the_named_encoder_has_the_device(encoder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(embed, "_single_process", False)
    monkeypatch.setattr(Encoder, "prepare", lambda self, **given: None)
    for name in ("earlier", "later"):
        (tmp_path / name).symlink_to(tmp_path / "bert")

    def device_of(name: str) -> str:
        made: Any = embed.embedder(name)
        return str(made._device)

    assert device_of(f"local:{tmp_path / 'earlier'}") == "cuda"
    (served,) = prepare_encoder([DeviceQueue("gpu", model="m", embed=encoder)], lambda error: None)
    assert served.name == "rag"
    assert device_of(f"local:{tmp_path / 'later'}") == "cpu"
    assert device_of(encoder) == "cuda"


def test_an_encoder_that_is_not_here_is_said_before_a_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "_single_process", False)
    with pytest.raises(ConfigError, match="'local:no-such/encoder' cannot be loaded .*agentmesh models pull"):
        prepare_encoder([DeviceQueue("gpu", model="m", embed="local:no-such/encoder")], lambda error: None)
    assert prepare_encoder([DeviceQueue("gpu", model="m")], lambda error: None) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"embed": "openai:e"}, "embed='openai:e' is not an encoder of this machine; write it like 'local:intfloat"),
        ({"embed": "wordllama"}, "is not an encoder of this machine"),
        ({"embed": "local:"}, "is not an encoder of this machine"),
    ],
)
def test_what_embeds_is_checked(options: dict[str, Any], told: str) -> None:
    with pytest.raises(DefinitionError, match=told):
        DeviceQueue("gpu", model="m", **options)


def test_queues_of_one_model_name_one_encoder(encoder: str) -> None:
    lead, plain = load_crew(CREW).lead, DeviceQueue("gpu", model="tiny")
    first, second = DeviceQueue("a", model="tiny", embed="local:e"), DeviceQueue("b", model="tiny", embed="local:f")
    assert encoder_name(Crew(lead, queues=[plain, first]).queues.values()) == "local:e"
    with pytest.raises(DefinitionError, match="queues 'a' and 'b' of model 'tiny' have embed='local:e' and 'local:f'"):
        Crew(lead, queues=[plain, first, second])
    with pytest.raises(ConfigError, match="name the encoders local:e, local:f"):  # of two crews
        encoder_name([first, second])
