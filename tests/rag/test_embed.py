"""Embedders: offline word vectors, a made encoder, a server that misbehaves, LangChain's; and whether two are one."""

import itertools
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from langchain_core.embeddings import DeterministicFakeEmbedding
from transformers import BertModel, BertTokenizer

from agentmesh import ConfigError, EmbedderError, EmbedderMismatch
from agentmesh.rag.embedders import embedder
from agentmesh.rag.embedders.base import Identity, trained_prefixes
from agentmesh.rag.embedders.encoder import Encoder
from agentmesh.rag.embedders.http import HttpEmbedder
from agentmesh.testing.tiny_models import save_encoder

TEXTS = ["a cat sat", "leave for parents of young children, in weeks", "", "机器学习", "a cat sat on the mat " * 40]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A made BERT of two layers: random, but the same each time."""
    return save_encoder(tmp_path_factory.mktemp("bert"))


def test_word_vectors_work_offline_and_are_made_once() -> None:
    ours = embedder()
    assert ours is embedder("wordllama")
    assert not ours.remote
    vectors = ours.documents(TEXTS)
    assert vectors.shape == (5, ours.d)
    assert vectors.dtype == np.float32
    assert np.allclose(np.linalg.norm(vectors, axis=1), [1, 1, 0, 1, 1])  # nothing is known of an empty text
    near, far = ours.query("the cat is sitting") @ ours.documents(["a cat sat down", "the price of steel"]).T
    assert near > far
    assert ours.documents([]).shape == (0, ours.d)
    assert ours.query("half a \ud83d pair").shape == (ours.d,)


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_an_encoder_gives_in_sorted_batches_what_it_gives_one_by_one(bert: Path, pooling: str) -> None:
    ours = Encoder(str(bert), pooling=pooling)
    texts = [t or "a" for t in TEXTS] * 30
    together, alone = ours.documents(texts), np.concatenate([ours.documents([t]) for t in texts[:5]])
    assert together.shape == (150, 32)
    assert (np.einsum("nd,nd->n", together[:5], alone) > 0.999).all()
    # the plain way, in fp32
    model, words = BertModel.from_pretrained(bert).eval(), BertTokenizer.from_pretrained(bert)
    with torch.inference_mode():
        hidden = model(**words(texts[1], return_tensors="pt")).last_hidden_state[0]
    want = {"mean": hidden.mean(0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling]
    assert torch.cosine_similarity(want, torch.from_numpy(together[1]), dim=0) > 0.999


def test_an_encoder_reads_what_stands_beside_the_model(bert: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tiny-e5-small"
    folder.symlink_to(bert)
    assert embedder(f"local:{folder}").identity.prefixes == ("query: ", "passage: ")
    said = tmp_path / "said"
    (said / "1_Pooling").mkdir(parents=True)
    for file in bert.iterdir():
        (said / file.name).symlink_to(file)
    (said / "1_Pooling" / "config.json").write_text(
        '{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": false}'
    )
    (said / "config_sentence_transformers.json").write_text('{"prompts": {"query": "q: ", "document": ""}}')
    known = embedder(f"local:{said}").identity
    assert (known.pooling, known.prefixes, known.d) == ("cls", ("q: ", ""), 32)
    (said / "1_Pooling" / "config.json").write_text('{"pooling_mode_weightedmean_tokens": true}')
    with pytest.raises(ConfigError, match="pools by 'weightedmean'"):
        Encoder(str(said))


def test_two_are_one_when_they_say_the_same_of_a_sentence(bert: Path, tmp_path: Path) -> None:
    ours = Encoder(str(bert))
    elsewhere = tmp_path / "copy"
    elsewhere.symlink_to(bert)
    again = Identity.from_json(json.loads(json.dumps(ours.identity.to_json())))
    assert again == ours.identity
    again.check(Encoder(str(elsewhere)).identity)  # another name, the same vectors
    with pytest.raises(EmbedderMismatch, match="cosine of"):
        again.check(Encoder(str(bert), pooling="cls").identity)
    with pytest.raises(EmbedderMismatch, match="256"):
        again.check(embedder().identity)
    with pytest.raises(EmbedderMismatch, match="prefixes"):
        again.check(Identity("x", prefixes=("query: ", ""), d=32, probe=again.probe))
    with pytest.raises(EmbedderMismatch):
        again.check(Identity("x", d=32, probe=(float("nan"),) * 32))


class Server:
    """`/v1/embeddings` that answers what the test says next, then well."""

    def __init__(self) -> None:
        self.next: list[tuple[int, Any, dict[str, str]]] = []
        self.asked: list[dict[str, Any]] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append({**asked, "path": self.path, "key": self.headers["Authorization"]})
                data = [{"index": i, "embedding": [len(t) + 1.0, 1.0]} for i, t in enumerate(asked["input"])]
                status, said, headers = outer.next.pop(0) if outer.next else (200, {"data": data[::-1]}, {})
                if status == 0:  # the connection breaks off
                    self.close_connection = True
                    return
                body = said.encode() if isinstance(said, str) else json.dumps(said).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    made = Server()
    yield made
    made.http.shutdown()
    made.http.server_close()


def test_a_server_is_asked_in_batches_and_its_order_is_its_index(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = HttpEmbedder(f"{server.url}#org/some-e5-base")
    texts = ["x" * n for n in range(300)]
    vectors = ours.documents(texts)
    lengths = np.array([n + len("passage: ") + 1.0 for n in range(300)])
    assert np.allclose(vectors[:, 0] / vectors[:, 1], lengths, rtol=1e-4)
    assert [len(a["input"]) for a in server.asked] == [128, 128, 44]
    first = server.asked[0]
    assert (first["model"], first["path"]) == ("org/some-e5-base", "/v1/embeddings")
    assert first["key"] == "Bearer sk-secret"
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    theirs = embedder("openai:text-embedding-3-small")
    assert theirs.d == 2
    theirs.close()
    assert ours.query("q").shape == (2,)
    assert server.asked[-1]["input"] == ["query: q"]
    ours.close()


def test_what_passes_is_tried_again_and_what_does_not_is_told(server: Server) -> None:
    ours = HttpEmbedder(f"{server.url}#m")
    server.next = [(500, "busy", {}), (429, "slow down", {"Retry-After": "0.01"}), (0, "", {})]
    assert ours.documents(["a"]).shape == (1, 2)
    assert len(server.asked) == 4
    server.next = [(401, "no sk-secret", {})]
    with pytest.raises(EmbedderError, match="OPENAI_API_KEY") as refused:
        ours.query("a")
    assert "sk-secret" not in str(refused.value)
    assert refused.value.after_s is None
    for status, said, headers, sentence, after_s in (
        (404, "no m", {}, "has no embedding model 'm'", None),
        (200, "<html>", {}, "did not answer with embeddings", None),
        (400, "too long", {}, "refused the request", None),
        (429, "later", {"Retry-After": "60"}, "429", 60.0),  # too long to wait here: the caller's
        (200, {"data": []}, {}, "0 vectors for 1 texts", None),
        (200, {"data": [{"index": 0, "embedding": []}]}, {}, "several widths", None),
        (200, '{"data": [{"index": 0, "embedding": [NaN, 1]}]}', {}, "NaN", None),
    ):
        server.next = [(status, said, headers)]
        with pytest.raises(EmbedderError, match=sentence) as told:
            ours.query("a")
        assert told.value.after_s == after_s
        assert pickle.loads(pickle.dumps(told.value)).after_s == after_s
    ours.close()


def test_nobody_answers() -> None:
    ours = HttpEmbedder("http://127.0.0.1:9/v1#m", tries=1)
    with pytest.raises(EmbedderError, match="no embedding server responds at http://127.0.0.1:9/v1") as told:
        ours.query("a")
    assert told.value.after_s == 0.0


def test_langchains_embeddings_are_wrapped() -> None:
    ours = embedder(DeterministicFakeEmbedding(size=8))
    assert (ours.name, ours.d) == ("", 8)
    assert "DeterministicFakeEmbedding" in ours.identity.name
    assert np.allclose(ours.query("a"), ours.documents(["a"])[0])

    class Broken(DeterministicFakeEmbedding):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            raise TimeoutError("slow")

    with pytest.raises(EmbedderError, match="raised TimeoutError: slow"):
        embedder(Broken(size=8)).documents(["a"])


def test_a_name_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    for name, sentence in (
        ("wordlama", "Did you mean 'wordllama'"),
        ("wordllama:3", "unknown embedder"),
        ("local:", "names no model"),
        ("openai:", "names no model"),
        ("local:/no/such", "no folder '/no/such'"),
        ("openai:x", "OPENAI_API_KEY"),
        ("http://", "is not a URL"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            embedder(name)
    with pytest.raises(ConfigError, match="agentmesh models pull"):
        embedder("local:no-such/model").query("a")
    with pytest.raises(ConfigError, match="int is not an embedder"):
        embedder(3)


def test_queries_come_from_threads_while_documents_are_made() -> None:
    ours, wrong = embedder(), []
    want = ours.query("cat")

    def ask() -> None:
        for _ in range(50):
            if not np.allclose(ours.query("cat"), want, atol=1e-6):
                wrong.append(1)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for t in threads:
        t.start()
    for n in itertools.takewhile(lambda _: any(t.is_alive() for t in threads), range(1, 10_000)):
        ours.documents(["a b c " * (n % 50 + 1)] * 20)
    for t in threads:
        t.join()
    assert not wrong


def test_prefixes_follow_the_name() -> None:
    assert trained_prefixes("BAAI/bge-small-en-v1.5")[0].startswith("Represent")
    assert trained_prefixes("BAAI/bge-m3") == ("", "")
    assert trained_prefixes("intfloat/multilingual-e5-large-instruct")[0].startswith("Instruct")


def test_a_program_that_embeds_keeps_its_own_logging_and_forks() -> None:
    code = """
import logging, os, threading
from agentmesh.rag.embedders import embedder
ours = embedder()
want = ours.query("cat")
assert logging.getLogger().handlers == [] and logging.getLogger().level == logging.WARNING
held = threading.Thread(target=lambda: (ours._lock.acquire(), held_now.set()), daemon=True)
held_now = threading.Event()
held.start(); held_now.wait()  # another thread has the lock while we fork
pid = os.fork()
if not pid:
    os._exit(0 if (ours.query("cat") == want).all() and embedder() is ours else 1)
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=30)


def test_texts_of_all_lengths_come_back_in_order() -> None:
    ours = embedder()
    texts = ["word " * n for n in (3000, 1, 40, 1, 700)] + ["x" * 200_000, "a cat"] * 3
    together = ours.documents(texts)
    assert all(np.allclose(v, ours.documents([t])[0], atol=1e-5) for v, t in zip(together, texts, strict=True))


def test_torch_is_not_needed_for_word_vectors() -> None:
    code = (
        "import sys\nfrom agentmesh.rag.embedders import embedder\nembedder().query('a')\nprint('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
