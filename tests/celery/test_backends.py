"""Agents in a user's canvas report through the user's result backend, whichever it is."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from celery import Celery, chain, chord, group, xmap

from agentmesh import Agent, Context, Crew
from agentmesh.celery.embedded import EmbeddedWorker
from agentmesh.config import Config
from agentmesh.mesh import Mesh
from agentmesh.testing import ScriptedModel, says

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*setex.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


class Echo(Agent):
    """Says what it is told."""


class Failing(Agent):
    """Fails."""

    def flow(self, task: str, ctx: Context) -> str:
        raise ValueError(f"not {task}")


def _join(words: list[str]) -> str:
    return " + ".join(words)


def _shout(word: str) -> str:
    return word.upper()


class Scene:
    def __init__(self, valkey: Any, backend: str) -> None:
        self.app = Celery("theirs", broker=valkey.broker_url, backend=backend, set_as_current=False)
        self.app.conf.task_default_queue = "theirs"
        self.app.conf.result_chord_retry_interval = 0.1
        self.join = self.app.task(_join, name="theirs.join", shared=False)
        self.shout = self.app.task(_shout, name="theirs.shout", shared=False)
        crew = Crew(Echo(), Failing(), name="inside", model=ScriptedModel(lambda p: says(f"<{p.messages[-1].text}>")))
        self.mesh = Mesh(crew, app=self.app, journal=valkey.url, config=Config(sweep_s=0.2))


@pytest.fixture(params=["redis", "rpc", "sqlite", "file"])
def scene(request: pytest.FixtureRequest, valkey: Any, tmp_path: Path) -> Iterator[Scene]:
    (tmp_path / "results").mkdir()
    url = {
        "redis": valkey.broker_url, "rpc": "rpc://", "sqlite": f"db+sqlite:///{tmp_path}/results.db",
        "file": f"file://{tmp_path}/results",
    }[request.param]  # fmt: skip
    it = Scene(valkey, url)
    it.joins = request.param != "rpc"  # type: ignore[attr-defined]  # Celery has no chords on rpc://
    theirs = EmbeddedWorker(it.app, queues=["theirs"])
    with it.mesh.worker():
        theirs.start()
        yield it
        theirs.stop()
    it.mesh.close()
    gc.collect()
    consumer = getattr(it.app.backend, "result_consumer", None)
    if consumer is not None:
        consumer.stop()
    it.app.close()


def test_a_canvas_on_every_backend(scene: Any) -> None:
    s = scene.mesh.s
    assert s(Echo(), "a").delay().get(timeout=15) == "<a>"
    assert chain(scene.shout.s("z"), s(Echo()), scene.shout.s())().get(timeout=15) == "<Z>"
    assert scene.mesh.map(Echo(), ["a", "b", "c"])().get(timeout=15) == ["<a>", "<b>", "<c>"]
    with pytest.raises(RuntimeError, match="not x"):
        s(Failing(), "x").delay().get(timeout=15)
    with pytest.raises(Exception, match=r"write `mesh\.map\(agent, tasks\)`"):
        xmap(s(Echo()), ["a", "b"], app=scene.app).apply_async(queue="theirs").get(timeout=15)
    if scene.joins:
        nested = chord([s(Echo(), "a"), chain(scene.shout.s("q"), s(Echo()))])(scene.join.s())
        assert nested.get(timeout=15) == "<a> + <Q>"
        assert chord(group([s(Echo(), "a"), scene.shout.s("q")]))(s(Echo())).get(timeout=15) == '<["<a>","Q"]>'
