"""Pulling: a hub and an index on loopback, a model of a few kilobytes, and everything that goes wrong on the way."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from agentmesh.errors import ConfigError, ServiceDown
from agentmesh.models import cache
from agentmesh.models.cache import building, installed, is_installed, model_folder
from agentmesh.models.fetch import fetch, shown
from agentmesh.models.index import settings, wheel_url
from agentmesh.models.pull import pull

WEIGHTS = bytes(range(256)) * 400
SHA = hashlib.sha256(WEIGHTS).hexdigest()


@dataclass
class Site:
    """What the server serves: path (without query) to content; `cut` paths break off after so many bytes, once."""

    files: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # path, Range, Authorization
    url: str = ""


@contextmanager
def serving(site: Site) -> Iterator[Site]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            wanted = self.headers.get("Range") or ""
            site.asked.append((path, wanted, self.headers.get("Authorization") or ""))
            content = site.files.get(path)
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
            self.wfile.write(content[start : site.cut.pop(path, None)])

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    site.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def hub_of(name: str, files: dict[str, bytes], *, sha256: str = SHA) -> Site:
    siblings = [{"rfilename": f, **({"lfs": {"sha256": sha256}} if f.endswith(".safetensors") else {})} for f in files]
    about = {"sha": "c0ffee", "siblings": siblings}
    served = {f"/{name}/resolve/c0ffee/{f}": content for f, content in files.items()}
    return Site({f"/api/models/{name}/revision/main": json.dumps(about).encode(), **served})


MADE = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"a pickle",
    "modeling_evil.py": b"import os",
    "consolidated.safetensors": WEIGHTS,
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AGENTMESH_CACHE", str(tmp_path / "cache"))
    for name in ("INDEX_URL", "EXTRA_INDEX_URL", "FIND_LINKS"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_model_comes_from_the_hub_without_pickles_and_code(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(hub_of("org/tiny", MADE)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        told: list[tuple[str, int, int]] = []
        folder = pull("org/tiny", progress=lambda *t: told.append(t))
        assert {f.name for f in folder.iterdir()} == {
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "agentmesh.json",
        }
        assert (folder / "model.safetensors").read_bytes() == WEIGHTS
        assert ("model.safetensors", len(WEIGHTS), len(WEIGHTS)) in told
        assert json.loads((folder / "agentmesh.json").read_text())["sha256"]["model.safetensors"] == SHA
        before = len(hub.asked)
        assert pull("org/tiny") == folder
        assert len(hub.asked) == before
    (only,) = installed()
    assert (only.name, only.source) == ("org/tiny", f"{hub.url} c0ffee")
    assert only.bytes > len(WEIGHTS)


def test_a_broken_off_pull_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_of("org/tiny", MADE)
    path = "/org/tiny/resolve/c0ffee/model.safetensors"
    hub.cut[path] = 1000
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ServiceDown, match="broke off at 1000 of 102400 bytes"):
            pull("org/tiny")
        assert not is_installed("org/tiny")
        assert installed() == []
        folder = pull("org/tiny")
    assert [r for p, r, _ in hub.asked if p == path] == ["", "bytes=1000-"]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert not list((cache.cache_folder() / "downloads").rglob("*.part"))


def test_weights_that_are_not_the_expected_ones_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(hub_of("org/tiny", MADE, sha256="0" * 64)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match="should have 000000000000"):
            pull("org/tiny")
    assert not is_installed("org/tiny")


def test_a_foreign_part_is_begun_anew(tmp_path: Path) -> None:
    part = tmp_path / "w.bin.part"
    for wrong in (b"x" * 100, WEIGHTS + b"more"):
        part.write_bytes(wrong)
        with serving(Site({"/w.bin": WEIGHTS})) as site:
            assert fetch(f"{site.url}/w.bin", tmp_path / "w.bin", sha256=SHA) == SHA
        assert (tmp_path / "w.bin").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "no safetensors"),
        ({"model.safetensors": WEIGHTS}, "no config.json"),
    ],
)
def test_what_cannot_be_loaded_safely_is_refused(
    files: dict[str, bytes], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(hub_of("org/tiny", files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match=said):
            pull("org/tiny")


def test_sharded_weights_come_with_their_index(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"model-0000{i}-of-00002.safetensors": WEIGHTS for i in (1, 2)}
    files = {"config.json": b"{}", "model.safetensors.index.json": b"{}", **parts}
    with serving(hub_of("org/tiny", files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert {f.name for f in pull("org/tiny").iterdir()} == {*files, "agentmesh.json"}


@pytest.mark.parametrize("name", ["nobody", "no/such"])
def test_no_such_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Site()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match=name if "/" not in name else "answered 404"):
            pull(name)


@pytest.mark.parametrize("name", ["", "../up", "a/b/c", "/etc", "a/../b", "-x"])
def test_a_name_cannot_leave_the_cache(name: str) -> None:
    with pytest.raises(ConfigError, match="must be like"):
        model_folder(name)


def test_nobody_there_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Site()) as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.url)
    with pytest.raises(ServiceDown, match="point AGENTMESH_CACHE at"):
        pull("org/tiny")


def test_no_room_is_said_before_it_is_filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with serving(Site({"/w.bin": WEIGHTS})) as site, pytest.raises(ConfigError, match=r"has 0 MB free: make room"):
        fetch(f"{site.url}/w.bin", tmp_path / "w.bin")


def test_a_failed_build_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError), building("org/tiny", "here") as folder:
        (folder / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert not list(model_folder("org/tiny").parent.iterdir())


def test_of_two_builders_the_first_stays() -> None:
    with building("org/tiny", "slow") as slow, building("org/tiny", "fast") as fast:
        (slow / "who").write_text("slow")
        (fast / "who").write_text("fast")
    assert (model_folder("org/tiny") / "who").read_text() == "fast"
    assert [m.source for m in installed()] == ["fast"]


WHEEL = "some_model-1.0-py3-none-any.whl"
HTML = (
    f'<html><body><a href="../../files/{WHEEL}.metadata">m</a> <a data-x="1" href="../../files/{WHEEL}#sha256=ab">w</a>'
)
JSON = json.dumps({"files": [{"url": "other.whl"}, {"url": f"/files/{WHEEL}"}]})


@pytest.mark.parametrize("page", [HTML, JSON])
def test_the_wheel_is_found_on_the_index_that_pip_is_set_up_for(page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(Site({"/simple/some-model/": page.encode()})) as index:
        monkeypatch.setenv("PIP_INDEX_URL", f"{index.url.replace('//', '//me:s%20cret@')}/simple")
        found = wheel_url("some-model", "1.0")
        assert shown(found).partition("#")[0] == f"{index.url}/files/{WHEEL}"
        assert index.asked == [("/simple/some-model/", "", "Basic bWU6cyBjcmV0")]
        with pytest.raises(ConfigError, match=r"has no some_model-2\.0") as e:
            wheel_url("some-model", "2.0")
        assert "cret" not in str(e.value)


def test_the_extra_index_and_links_are_asked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with serving(Site()) as empty, serving(Site({"/some-model/": JSON.encode()})) as extra:
        monkeypatch.setenv("PIP_INDEX_URL", empty.url)
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", f"{empty.url}/other {extra.url}/")
        assert wheel_url("some-model", "1.0") == f"{extra.url}/files/{WHEEL}"
    (tmp_path / WHEEL).write_bytes(b"")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert wheel_url("some-model", "1.0") == (tmp_path / WHEEL).as_uri()


def test_pip_s_own_configuration_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "pip.conf"
    file.write_text("[global]\nindex-url = http://mirror.example/simple\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    assert settings("index-url") == ["http://mirror.example/simple"]
    monkeypatch.setenv("PIP_INDEX_URL", "http://nearer.example/simple")
    assert settings("index-url") == ["http://nearer.example/simple"]
