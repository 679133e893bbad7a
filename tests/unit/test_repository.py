"""What huggingface_hub knows is used: its cache, its login, and that this machine is to stay offline."""

import errno
import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agentmesh.errors import ConfigError, ExtraMissing, ServiceDown
from agentmesh.hub import pull as pull_module
from agentmesh.hub.cache import model_folder
from agentmesh.hub.pull import pull

pytestmark = pytest.mark.usefixtures("models_elsewhere")


@pytest.fixture
def hub_cache(tmp_path: Path, web: Any) -> Path:
    """The model as `hf download org/tiny` leaves it: blobs by their digest, a snapshot of links to them."""
    folder = tmp_path / "hf" / "hub" / "models--org--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("c0ffee")
    for name, content in web.made.items():
        large = name.endswith(".safetensors")
        digest = hashlib.sha256(content) if large else hashlib.sha1(b"blob %d\0" % len(content) + content)
        blob, link = folder / "blobs" / digest.hexdigest(), folder / "snapshots" / "c0ffee" / name
        for file in (blob, link):
            file.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        link.symlink_to(blob)
    return folder


def test_what_the_hub_s_cache_holds_is_not_fetched_again(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, web: Any
) -> None:
    with web.serving(web.hub_of("org/tiny", web.made)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        folder = pull("org/tiny")
    assert [path for path, _, _ in hub.call_from_json] == ["/api/models/org/tiny/revision/main"]
    assert (folder / "model.safetensors").read_bytes() == web.weights
    assert (folder / "model.safetensors").samefile(hub_cache / "blobs" / web.sha)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_what_is_damaged_in_the_hub_s_cache_is_fetched(
    file: str, hub_cache: Path, monkeypatch: pytest.MonkeyPatch, web: Any
) -> None:
    (hub_cache / "snapshots" / "c0ffee" / file).write_bytes(b"x" * len(web.made[file]))
    with web.serving(web.hub_of("org/tiny", web.made)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        folder = pull("org/tiny")
    assert [path for path, _, _ in hub.call_from_json[1:]] == [f"/org/tiny/resolve/c0ffee/{file}"]
    assert (folder / file).read_bytes() == web.made[file]


def test_offline_a_model_comes_out_of_the_hub_s_cache(
    hub_cache: Path, monkeypatch: pytest.MonkeyPatch, web: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with web.serving(web.hub_of("org/tiny", web.made)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        folder = pull("org/tiny")
        assert hub.call_from_json == []
    assert {f.name for f in folder.iterdir()} == {
        "config.json",
        "tokenizer.json",
        "model.safetensors",
        "agentmesh.json",
    }
    assert (folder / "model.safetensors").read_bytes() == web.weights


def test_offline_what_is_nowhere_is_said_without_a_request(monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with web.serving(web.hub_of("org/tiny", web.made)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ServiceDown, match=r"HF_HUB_OFFLINE is set, and .* has no 'org/tiny'; unset HF_HUB_OFFLINE"):
            pull("org/tiny")
        assert hub.call_from_json == []


def test_offline_what_is_damaged_is_not_fetched(hub_cache: Path, monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (hub_cache / "blobs" / web.sha).write_bytes(b"other")
    with web.serving(web.hub_of("org/tiny", web.made)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        with pytest.raises(ConfigError, match="model.safetensors of the hub's cache is damaged or missing"):
            pull("org/tiny")
        assert hub.call_from_json == []


def test_a_hub_s_cache_on_another_disk_is_copied(hub_cache: Path, monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    def no_link(source: str, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr("os.link", no_link)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = pull("org/tiny")
    assert (folder / "model.safetensors").read_bytes() == web.weights
    assert (hub_cache / "blobs" / web.sha).read_bytes() == web.weights


def test_a_login_of_the_hub_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, web: Any) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("hf_of_the_login\n")
    hub = web.hub_of("org/tiny", web.made)
    hub.key = "hf_of_the_login"
    with web.serving(hub):
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        pull("org/tiny")
        hub.key = "hf_new"
        with pytest.raises(ConfigError, match=r"the hub rejects the token of `hf auth login` \(401\)"):
            pull("org/other")


def test_without_its_extra_a_model_of_the_hub_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "agentmesh.hub.repository", raising=False)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ExtraMissing, match=r"need huggingface_hub, which is not installed; pip install .*\[local\]"):
        pull("org/tiny")


def test_removing_a_model_loads_nothing_of_the_hub() -> None:
    code = f"import sys, {pull_module.__name__}; print('huggingface_hub' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True, timeout=60) == "False\n"
    assert model_folder("org/tiny").name == "org--tiny"
