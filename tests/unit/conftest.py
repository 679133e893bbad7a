"""Servers of files on this machine, for what fetches models."""

import contextlib
import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest


@dataclass
class Site:
    """What the server serves: path (without query) to content; `cut` paths break off after so many bytes, once."""

    files: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)  # path to the address where it is
    holds: int = 0  # so many bytes of weights come, and no more until `let_go` is set
    let_go: threading.Event = field(default_factory=threading.Event)
    key: str = ""  # who asks must show it
    code: int = 401  # else it hears this
    call_from_json: list[tuple[str, str, str]] = field(default_factory=list)  # path, Range, Authorization
    url: str = ""


class Web:
    """Makes sites, serves them, and has a model as the hub has it."""

    weights = bytes(range(256)) * 400
    sha = hashlib.sha256(weights).hexdigest()
    made = {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}",
        "model.safetensors": weights,
        "pytorch_model.bin": b"a pickle",
        "modeling_evil.py": b"import os",
        "consolidated.safetensors": weights,
    }
    process_state = Site

    @staticmethod
    @contextmanager
    def serving(site: Site) -> Iterator[Site]:
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                wanted = self.headers.get("Range") or ""
                site.call_from_json.append((path, wanted, self.headers.get("Authorization") or ""))
                content = site.files.get(path)
                if site.key and self.headers.get("Authorization") != f"Bearer {site.key}":
                    self.send_error(site.code)
                    return
                if path in site.moved:
                    self.send_response(302)
                    self.send_header("Location", site.moved[path])
                    self.end_headers()
                    return
                if content is None:
                    self.send_error(404)
                    return
                start = int(wanted.removeprefix("bytes=").removesuffix("-") or 0)
                if start and start >= len(content):
                    self.send_error(416)
                    return
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(content) - start))
                self.end_headers()
                content = content[start : site.cut.pop(path, None)]
                held = site.holds if path.endswith(".safetensors") else 0
                with contextlib.suppress(ConnectionError):  # the client was killed
                    self.wfile.write(content[: held or None])
                    if held:
                        site.let_go.wait(60)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        site.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield site
        finally:
            site.let_go.set()
            server.shutdown()
            server.server_close()
            thread.join()

    def hub_of(self, name: str, files: dict[str, bytes], *, sha256: str = sha) -> Site:
        siblings = [
            {"rfilename": f, "size": len(content), "blobId": _blob_of(content)}
            | ({"lfs": {"sha256": sha256}} if f.endswith(".safetensors") else {})
            for f, content in files.items()
        ]
        about = {"sha": "c0ffee", "siblings": siblings}
        served = {f"/{name}/resolve/c0ffee/{f}": content for f, content in files.items()}
        return Site({f"/api/models/{name}/revision/main": json.dumps(about).encode(), **served})


def _blob_of(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@pytest.fixture
def web() -> Web:
    """`with web.serving(web.hub_of("org/tiny", web.made)) as hub:` a hub at `hub.url`."""
    return Web()


@pytest.fixture
def models_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache in the test's folder, an empty one of the hub's own; no setting of pip's, no token, nobody logged in."""
    monkeypatch.setenv("AGENTMESH_CACHE", str(tmp_path / "cache"))
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "hf" / "token"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
