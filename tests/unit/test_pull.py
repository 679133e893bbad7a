"""Pulling: a hub and an index on loopback, a model of a few kilobytes, and everything that goes wrong on the way."""

import contextlib
import hashlib
import http.server
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from agentmesh.cli.models import remove_model
from agentmesh.errors import ConfigError, ServiceDown
from agentmesh.models import cache
from agentmesh.models.cache import building, installed, is_installed, model_folder
from agentmesh.models.fetch import fetch, shown
from agentmesh.models.index import settings, wheel_url
from agentmesh.models.pull import pull
from agentmesh.models.remove import remove

WEIGHTS = bytes(range(256)) * 400
SHA = hashlib.sha256(WEIGHTS).hexdigest()


@dataclass
class Site:
    """What the server serves: path (without query) to content; `cut` paths break off after so many bytes, once."""

    files: dict[str, bytes] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)  # path to the address where it is
    drips: int = 0  # so many bytes of weights at a time
    key: str = ""  # who asks must show it
    code: int = 401  # else it hears this
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
            if not (site.drips and path.endswith(".safetensors")):
                self.wfile.write(content)
                return
            with contextlib.suppress(ConnectionError):  # whoever asked was killed
                for at in range(0, len(content), site.drips):
                    self.wfile.write(content[at : at + site.drips])
                    time.sleep(0.02)

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


def blob_of(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def hub_of(name: str, files: dict[str, bytes], *, sha256: str = SHA) -> Site:
    siblings = [
        {"rfilename": f, "size": len(content), "blobId": blob_of(content)}
        | ({"lfs": {"sha256": sha256}} if f.endswith(".safetensors") else {})
        for f, content in files.items()
    ]
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
    monkeypatch.delenv("HF_TOKEN", raising=False)
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


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("cut", [0, 1, 7, -1])
def test_a_pull_goes_on_after_a_cut_at_any_byte(file: str, cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_of("org/tiny", MADE)
    hub.cut[f"/org/tiny/resolve/c0ffee/{file}"] = cut % len(MADE[file])
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ServiceDown, match="pull again to go on there"):
            pull("org/tiny")
        folder = pull("org/tiny")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (folder / name).read_bytes() == MADE[name]


def pulling(hub: Site, before: str = "", **env: str) -> "subprocess.Popen[str]":
    """`agentmesh models pull org/tiny` in a process of its own."""
    argv = ["bash", "-c", f"{before} exec {sys.executable} -m agentmesh.cli.main models pull org/tiny"]
    all_env = {**os.environ, "HF_ENDPOINT": hub.url, **env}
    return subprocess.Popen(argv, env=all_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_pull_one_model_and_the_first_is_killed(tmp_path: Path) -> None:
    weights = WEIGHTS * 40  # it is written down in blocks of a mebibyte
    hub = hub_of("org/tiny", MADE | {"model.safetensors": weights}, sha256=hashlib.sha256(weights).hexdigest())
    path, hub.drips = "/org/tiny/resolve/c0ffee/model.safetensors", 20_000
    part = tmp_path / "cache" / "downloads" / "org--tiny" / "c0ffee" / "model.safetensors.part"
    with serving(hub):
        first = pulling(hub)
        until(lambda: part.is_file() and part.stat().st_size >= 1 << 20, first)
        second, third = pulling(hub), pulling(hub)
        with pytest.raises(ConfigError, match="another process is pulling model 'org/tiny'"):
            remove("org/tiny")
        for waiter in (second, third):
            until(lambda: at_lock(waiter.pid), waiter)
        assert [p for p, _, _ in hub.asked].count(path) == 1
        first.kill()
        first.communicate()
        hub.drips = 0
        for process in (second, third):
            out, err = process.communicate(timeout=30)
            assert (process.returncode, out) == (0, f"org/tiny: {model_folder('org/tiny')}\n"), err
    asked = [r for p, r, _ in hub.asked if p == path]
    assert len(asked) == 2
    assert int(asked[1].removeprefix("bytes=").removesuffix("-")) >= 1 << 20
    assert (model_folder("org/tiny") / "model.safetensors").read_bytes() == weights
    assert not list((tmp_path / "cache" / "downloads").iterdir())


def at_lock(pid: int) -> bool:
    """Whether a process has a lock's file open."""
    opened = []
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            opened.append(os.readlink(handle))
    return any(name.endswith(".lock") for name in opened)


def until(condition: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_disk_that_fills_on_the_way_is_said_and_gone_on_with(tmp_path: Path) -> None:
    with serving(hub_of("org/tiny", MADE)) as hub:
        limited = pulling(hub, "ulimit -f 32;")  # blocks of 1,024 bytes
        _, err = limited.communicate(timeout=30)
        assert limited.returncode == 4
        assert "cannot be written (File too large): make room, then pull again to go on there" in " ".join(err.split())
        again = pulling(hub)
        _, err = again.communicate(timeout=30)
        assert again.returncode == 0, err
    assert hub.asked[-1][1] == "bytes=32768-"
    assert (model_folder("org/tiny") / "model.safetensors").read_bytes() == WEIGHTS


def test_a_model_that_has_no_room_as_a_whole_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": len(WEIGHTS)}))
    with serving(hub_of("org/tiny", MADE)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match="org--tiny needs 0 MB"):
            pull("org/tiny")
        assert len(hub.asked) == 1


TOKEN = "hf_only_for_the_hub"


@pytest.mark.parametrize(
    ("token", "code", "said"),
    [
        (
            "",
            401,
            "to nobody it does not know (401): it is private, wants its terms accepted, or does not exist; look at",
        ),
        ("hf_old", 401, "the hub does not accept the token in HF_TOKEN (401)"),
        (
            "hf_other",
            403,
            "the account of the token in HF_TOKEN may not have 'org/tiny' (403); ask for it, or accept its terms",
        ),
        ("hf two\nlines", 401, "HF_TOKEN has blanks or letters that no token has"),
    ],
)
def test_a_gated_model_names_the_variable_and_the_page(
    token: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub = hub_of("org/tiny", MADE)
    hub.key, hub.code = TOKEN, code
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError) as refused:
            pull("org/tiny")
    assert said in str(refused.value)
    assert "HF_TOKEN" in str(refused.value)
    assert " " in token or f"{hub.url}/org/tiny" in str(refused.value)
    assert not token or token not in str(refused.value)


def test_the_token_is_for_the_hub_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    hub, path = hub_of("org/tiny", MADE), "/org/tiny/resolve/c0ffee/model.safetensors"
    hub.key = TOKEN
    with serving(hub), serving(Site({"/far": WEIGHTS})) as far:
        hub.moved[path] = f"{far.url.replace('127.0.0.1', 'localhost')}/far"  # as the hub sends on to its storage
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        folder = pull("org/tiny")
        assert far.asked == [("/far", "", "")]
        assert {login for _, _, login in hub.asked} == {f"Bearer {TOKEN}"}
    assert TOKEN not in (folder / "agentmesh.json").read_text()


def test_a_small_file_that_is_not_the_expected_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = hub_of("org/tiny", MADE)
    hub.files["/org/tiny/resolve/c0ffee/config.json"] = b'{"model_type": "other"}'
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match=r"config.json has sha256 .* should have git's name"):
            pull("org/tiny")


def test_removing_takes_the_model_and_what_is_left_of_pulls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = hub_of("org/tiny", MADE)
    with serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        folder = pull("org/tiny")
        hub.files["/api/models/org/tiny-chat/revision/main"] = hub.files["/api/models/org/tiny/revision/main"]
        with pytest.raises(ConfigError, match="answered 404"):
            pull("org/tiny-chat")
    for name in (".org--tiny-abcdefgh", ".org--tiny-chat-abcdefgh"):  # of a killed pull; of one of another model
        (folder.parent / name).mkdir()
        (folder.parent / name / "half").write_bytes(b"xx")
    weights = (folder / "model.safetensors").open("rb")
    with weights, mmap.mmap(weights.fileno(), 0, access=mmap.ACCESS_READ) as mapped:  # as a worker that has loaded it
        assert remove_model("org/tiny", as_json=True) == 0
        assert mapped[:] == WEIGHTS
    assert json.loads(capsys.readouterr().out)["bytes"] > len(WEIGHTS)
    assert [f.name for f in folder.parent.iterdir()] == [".org--tiny-chat-abcdefgh"]
    assert installed() == []
    with pytest.raises(ConfigError, match="the cache has no model 'org/tiny'. Did you mean 'org/tiny-chat'?"):
        remove("org/tiny")
    assert remove("org/tiny-chat") > 0  # which never came to be whole
    assert not list(folder.parent.iterdir())
    assert not list((cache.cache_folder() / "downloads").iterdir())


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


def test_an_encoder_comes_with_what_says_how_its_vectors_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
        "config_sentence_transformers.json": b'{"prompts": {"query": "query: "}}',
        "sentence_bert_config.json": b'{"max_seq_length": 512}',
    }
    with serving(hub_of("org/tiny", MADE | said)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        folder = pull("org/tiny")
    for name, content in said.items():
        assert (folder / name).read_bytes() == content
    (only,) = installed()
    assert only.bytes > len(WEIGHTS) + sum(map(len, said.values()))
    assert remove("org/tiny") >= only.bytes


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


def test_a_cache_that_cannot_be_written_names_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGENTMESH_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\); set AGENTMESH_CACHE"):
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
