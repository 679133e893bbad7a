"""Pulling: a hub and an index on loopback, a model of a few kilobytes, and everything that goes wrong on the way."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentmesh.errors import ConfigError, ServiceDown
from agentmesh.hub import cache
from agentmesh.hub.cache import installed_models, is_installed, model_folder
from agentmesh.hub.download import download
from agentmesh.hub.pull import pull, remove_cached

pytestmark = pytest.mark.usefixtures("models_elsewhere")


def test_a_model_comes_from_the_hub_without_pickles_and_code(monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    with web.serving(web.hub_of("org/tiny", web.made)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        told: list[tuple[str, int, int]] = []
        folder = pull("org/tiny", progress=lambda *t: told.append(t))
        assert {f.name for f in folder.iterdir()} == {
            "config.json",
            "tokenizer.json",
            "model.safetensors",
            "agentmesh.json",
        }
        assert (folder / "model.safetensors").read_bytes() == web.weights
        assert ("model.safetensors", len(web.weights), len(web.weights)) in told
        assert json.loads((folder / "agentmesh.json").read_text())["sha256"]["model.safetensors"] == web.sha
        before = len(hub.call_from_json)
        assert pull("org/tiny") == folder
        assert len(hub.call_from_json) == before
    (only,) = installed_models()
    assert (only.name, only.source) == ("org/tiny", f"{hub.url} c0ffee")
    assert only.bytes > len(web.weights)


def test_a_broken_off_pull_goes_on_where_it_was(monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    hub = web.hub_of("org/tiny", web.made)
    path = "/org/tiny/resolve/c0ffee/model.safetensors"
    hub.cut[path] = 1000
    with web.serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ServiceDown, match="broke off at 1000 of 102400 bytes"):
            pull("org/tiny")
        assert not is_installed("org/tiny")
        assert installed_models() == []
        folder = pull("org/tiny")
    assert [r for p, r, _ in hub.call_from_json if p == path] == ["", "bytes=1000-"]
    assert (folder / "model.safetensors").read_bytes() == web.weights
    assert not list((cache.cache_folder() / "downloads").rglob("*.part"))


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("cut", [0, 1, 7, -1])
def test_a_pull_goes_on_after_a_cut_at_any_byte(file: str, cut: int, monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    hub = web.hub_of("org/tiny", web.made)
    hub.cut[f"/org/tiny/resolve/c0ffee/{file}"] = cut % len(web.made[file])
    with web.serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ServiceDown, match="pull again to resume"):
            pull("org/tiny")
        folder = pull("org/tiny")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (folder / name).read_bytes() == web.made[name]


def pulling(hub: Any, before: str = "", **env: str) -> "subprocess.Popen[str]":
    """`agentmesh models pull org/tiny` in a process of its own."""
    argv = ["bash", "-c", f"{before} exec {sys.executable} -m agentmesh.cli.main models pull org/tiny"]
    all_env = {**os.environ, "HF_ENDPOINT": hub.url, **env}
    return subprocess.Popen(argv, env=all_env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_processes_pull_one_model_and_the_first_is_killed(tmp_path: Path, eventually: Any, web: Any) -> None:
    weights = web.weights * 40  # it is written down in blocks of a mebibyte
    hub = web.hub_of("org/tiny", web.made | {"model.safetensors": weights}, sha256=hashlib.sha256(weights).hexdigest())
    path, hub.holds = "/org/tiny/resolve/c0ffee/model.safetensors", (1 << 20) + 1
    part = tmp_path / "cache" / "downloads" / "org--tiny" / "c0ffee" / "model.safetensors.part"
    with web.serving(hub):
        first = pulling(hub)
        eventually(lambda: runs(first) and part.is_file() and part.stat().st_size >= 1 << 20, timeout_s=30)
        second, third = pulling(hub), pulling(hub)
        with pytest.raises(ConfigError, match="another process is pulling model 'org/tiny'"):
            remove_cached("org/tiny")
        for waiter in (second, third):
            eventually(lambda waiter=waiter: runs(waiter) and at_lock(waiter.pid), timeout_s=30)
        assert [p for p, _, _ in hub.call_from_json].count(path) == 1
        hub.holds = 0
        first.kill()
        first.communicate()
        hub.let_go.set()
        for process in (second, third):
            out, err = process.communicate(timeout=30)
            assert (process.returncode, out) == (0, f"org/tiny: {model_folder('org/tiny')}\n"), err
    asked = [r for p, r, _ in hub.call_from_json if p == path]
    assert len(asked) == 2
    assert int(asked[1].removeprefix("bytes=").removesuffix("-")) >= 1 << 20
    assert (model_folder("org/tiny") / "model.safetensors").read_bytes() == weights
    assert not list((tmp_path / "cache" / "downloads").iterdir())


def runs(process: "subprocess.Popen[str]") -> bool:
    assert process.poll() is None, process.communicate()
    return True


def at_lock(pid: int) -> bool:
    """Whether a process has a lock's file open."""
    opened = []
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            opened.append(os.readlink(handle))
    return any(name.endswith(".lock") for name in opened)


def test_a_disk_that_fills_on_the_way_is_said_and_gone_on_with(tmp_path: Path, web: Any) -> None:
    with web.serving(web.hub_of("org/tiny", web.made)) as hub:
        limited = pulling(hub, "ulimit -f 32;")  # blocks of 1,024 bytes
        _, err = limited.communicate(timeout=30)
        assert limited.returncode == 4
        assert "cannot be written (File too large) help: make room, then pull again to resume" in " ".join(err.split())
        again = pulling(hub)
        _, err = again.communicate(timeout=30)
        assert again.returncode == 0, err
    assert hub.call_from_json[-1][1] == "bytes=32768-"
    assert (model_folder("org/tiny") / "model.safetensors").read_bytes() == web.weights


def test_a_model_that_has_no_room_as_a_whole_is_not_begun(monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": len(web.weights)}))
    with web.serving(web.hub_of("org/tiny", web.made)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match="org--tiny needs 0 MB"):
            pull("org/tiny")
        assert len(hub.call_from_json) == 1


TOKEN = "hf_only_for_the_hub"


@pytest.mark.parametrize(
    ("token", "code", "said"),
    [
        (
            "",
            401,
            "without a token (401): it is private, gated, or does not exist; see",
        ),
        ("hf_old", 401, "the hub rejects the token in HF_TOKEN (401)"),
        (
            "hf_other",
            403,
            "the account of the token in HF_TOKEN has no access to 'org/tiny' (403); request it, or accept the terms",
        ),
        ("hf two\nlines", 401, "HF_TOKEN contains characters that no token has"),
    ],
)
def test_a_gated_model_names_the_variable_and_the_page(
    token: str, code: int, said: str, monkeypatch: pytest.MonkeyPatch, web: Any
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    hub = web.hub_of("org/tiny", web.made)
    hub.key, hub.code = TOKEN, code
    with web.serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError) as refused:
            pull("org/tiny")
    assert said in str(refused.value)
    assert "HF_TOKEN" in str(refused.value)
    assert " " in token or f"{hub.url}/org/tiny" in str(refused.value)
    assert not token or token not in str(refused.value)


def test_the_token_is_for_the_hub_alone(monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    hub, path = web.hub_of("org/tiny", web.made), "/org/tiny/resolve/c0ffee/model.safetensors"
    hub.key = TOKEN
    with web.serving(hub), web.serving(web.process_state({"/far": web.weights})) as far:
        hub.moved[path] = f"{far.url.replace('127.0.0.1', 'localhost')}/far"  # as the hub sends on to its storage
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", f"{TOKEN}\n")
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
        folder = pull("org/tiny")
        assert far.call_from_json == [("/far", "", "")]
        assert {login for _, _, login in hub.call_from_json} == {f"Bearer {TOKEN}"}
    assert TOKEN not in (folder / "agentmesh.json").read_text()


def test_a_small_file_that_is_not_the_expected_one_is_refused(monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    hub = web.hub_of("org/tiny", web.made)
    hub.files["/org/tiny/resolve/c0ffee/config.json"] = b'{"model_type": "other"}'
    with web.serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match=r"config.json has sha256 .* should have git's name"):
            pull("org/tiny")


def test_weights_that_are_not_the_expected_ones_are_refused(monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    with web.serving(web.hub_of("org/tiny", web.made, sha256="0" * 64)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match="should have 000000000000"):
            pull("org/tiny")
    assert not is_installed("org/tiny")


def test_a_foreign_part_is_begun_anew(tmp_path: Path, web: Any) -> None:
    part = tmp_path / "w.bin.part"
    for wrong in (b"x" * 100, web.weights + b"more"):
        part.write_bytes(wrong)
        with web.serving(web.process_state({"/w.bin": web.weights})) as site:
            assert download(f"{site.url}/w.bin", tmp_path / "w.bin", sha256=web.sha) == web.sha
        assert (tmp_path / "w.bin").read_bytes() == web.weights


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "no safetensors"),
        ({"model.safetensors": b"weights"}, "no config.json"),
    ],
)
def test_what_cannot_be_loaded_safely_is_refused(
    files: dict[str, bytes], said: str, monkeypatch: pytest.MonkeyPatch, web: Any
) -> None:
    with web.serving(web.hub_of("org/tiny", files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match=said):
            pull("org/tiny")


def test_sharded_weights_come_with_their_index(monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    parts = {f"model-0000{i}-of-00002.safetensors": web.weights for i in (1, 2)}
    files = {"config.json": b"{}", "model.safetensors.index.json": b"{}", **parts}
    with web.serving(web.hub_of("org/tiny", files)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        assert {f.name for f in pull("org/tiny").iterdir()} == {*files, "agentmesh.json"}


def test_an_encoder_comes_with_what_says_how_its_vectors_are_made(monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    said = {
        "1_Pooling/config.json": b'{"pooling_mode_cls_token": true}',
        "config_sentence_transformers.json": b'{"prompts": {"query": "query: "}}',
        "sentence_bert_config.json": b'{"max_seq_length": 512}',
    }
    with web.serving(web.hub_of("org/tiny", web.made | said)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        folder = pull("org/tiny")
    for name, content in said.items():
        assert (folder / name).read_bytes() == content
    (only,) = installed_models()
    assert only.bytes > len(web.weights) + sum(map(len, said.values()))
    assert remove_cached("org/tiny") >= only.bytes


@pytest.mark.parametrize("name", ["nobody", "no/such"])
def test_no_such_model(name: str, monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    with web.serving(web.process_state()) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match=name if "/" not in name else "answered 404"):
            pull(name)


def test_nobody_there_says_what_to_do(monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    with web.serving(web.process_state()) as gone:
        pass
    monkeypatch.setenv("HF_ENDPOINT", gone.url)
    with pytest.raises(ServiceDown, match="point AGENTMESH_CACHE at"):
        pull("org/tiny")


def test_a_cache_that_cannot_be_written_names_its_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AGENTMESH_CACHE", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"cannot be written \(Not a directory\); set AGENTMESH_CACHE"):
        pull("org/tiny")


def test_no_room_is_said_before_it_is_filled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, web: Any) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10}))
    with (
        web.serving(web.process_state({"/w.bin": web.weights})) as site,
        pytest.raises(ConfigError, match=r"has 0 MB free; make room"),
    ):
        download(f"{site.url}/w.bin", tmp_path / "w.bin")
