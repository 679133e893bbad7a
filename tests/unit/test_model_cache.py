"""The folder of pulled models: names stay in it, builders put whole models there, removing leaves nothing."""

import json
import mmap
from typing import Any

import pytest

from agentmesh.cli.models import remove_model
from agentmesh.errors import ConfigError
from agentmesh.hub import cache
from agentmesh.hub.cache import build_model_folder, installed_models, model_folder
from agentmesh.hub.pull import pull, remove_cached

pytestmark = pytest.mark.usefixtures("models_elsewhere")


def test_removing_takes_the_model_and_what_is_left_of_pulls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], web: Any
) -> None:
    hub = web.hub_of("org/tiny", web.made)
    with web.serving(hub):
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
        assert mapped[:] == web.weights
    assert json.loads(capsys.readouterr().out)["bytes"] > len(web.weights)
    assert [f.name for f in folder.parent.iterdir()] == [".org--tiny-chat-abcdefgh"]
    assert installed_models() == []
    with pytest.raises(ConfigError, match="the cache has no model 'org/tiny'. Did you mean 'org/tiny-chat'?"):
        remove_cached("org/tiny")
    assert remove_cached("org/tiny-chat") > 0  # which never came to be whole
    assert not list(folder.parent.iterdir())
    assert not list((cache.cache_folder() / "downloads").iterdir())


@pytest.mark.parametrize("name", ["", "../up", "a/b/c", "/etc", "a/../b", "-x"])
def test_a_name_cannot_leave_the_cache(name: str) -> None:
    with pytest.raises(ConfigError, match="must be like"):
        model_folder(name)


def test_a_failed_build_leaves_nothing() -> None:
    with pytest.raises(ZeroDivisionError), build_model_folder("org/tiny", "here") as folder:
        (folder / "config.json").write_text("{}")
        raise ZeroDivisionError
    assert not list(model_folder("org/tiny").parent.iterdir())


def test_of_two_builders_the_first_stays() -> None:
    with build_model_folder("org/tiny", "slow") as slow, build_model_folder("org/tiny", "fast") as fast:
        (slow / "who").write_text("slow")
        (fast / "who").write_text("fast")
    assert (model_folder("org/tiny") / "who").read_text() == "fast"
    assert [m.source for m in installed_models()] == ["fast"]
