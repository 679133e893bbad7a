"""Agents inside a user's own Celery canvas, on the user's app with its own stock Redis backend."""

import gc
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery, chain, chord, group
from celery.exceptions import ChordError

from agentmesh import Agent, ConfigError, Context, Crew, tool
from agentmesh.celery.embedded import EmbeddedWorker
from agentmesh.mesh import Mesh
from agentmesh.testing import ScriptedModel, says

pytestmark = [
    # Celery's Redis backend calls a command that redis-py 8 calls deprecated
    pytest.mark.filterwarnings("ignore:.*setex.*:DeprecationWarning"),
    # and leaves its connections to the collector
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Echo(Agent):
    """Says what it is told."""


class Failing(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        raise ValueError(f"not {task}")


@tool(approve=True)
def refund(order: int) -> str:
    """Refunds.

    Args:
        order: its number.
    """
    return f"refunded {order}"


class Desk(Agent):
    """Waits for a yes."""

    def flow(self, task: str, ctx: Context) -> str:
        return ctx.do(refund.on(7))


class Scene:
    def __init__(self, valkey: Any, **conf: Any) -> None:
        self.app = Celery("theirs", broker=valkey.broker_url, backend=valkey.broker_url, set_as_current=False)
        self.app.conf.update(conf)
        self.app.conf.task_default_queue = "theirs"
        self.conf = _settings(self.app)
        self.join = self.app.task(_join, name="theirs.join", shared=False)
        self.shout = self.app.task(_shout, name="theirs.shout", shared=False)
        model = ScriptedModel(lambda p: says(f"<{p.messages[-1].text}>"))
        self.mesh = Mesh(Crew(Echo(), Failing(), Desk(), name="inside", model=model), app=self.app, journal=valkey.url)


def _settings(app: Celery) -> dict[str, Any]:
    """Without `include`, in which Celery's own worker notes the modules it has loaded."""
    app.finalize()
    return {k: v for k, v in dict(app.conf).items() if k != "include"}


def _join(words: list[str]) -> str:
    return " + ".join(words)


def _shout(word: str) -> str:
    return word.upper()


@pytest.fixture
def scene(valkey: Any, request: pytest.FixtureRequest) -> Iterator[Scene]:
    it = Scene(valkey, **getattr(request, "param", {}))
    theirs = EmbeddedWorker(it.app, queues=["theirs"])
    with it.mesh.worker():
        theirs.start()
        yield it
        theirs.stop()
    it.mesh.close()
    gc.collect()  # Celery's results unsubscribe when they are collected, and want the server for that
    it.app.backend.result_consumer.stop()
    it.app.backend.client.close()
    it.app.close()


def test_two_agents_in_a_users_chord(scene: Scene) -> None:
    result = chord([scene.mesh.s(Echo(), "a"), scene.mesh.s(Echo(), "b")])(scene.join.s())
    assert result.get(timeout=15) == "<a> + <b>"


def test_agents_in_chain_group_and_as_body(scene: Scene) -> None:
    s = scene.mesh.s
    assert s(Echo(), "a").delay().get(timeout=15) == "<a>"
    assert chain(scene.shout.s("z"), s(Echo()), scene.shout.s())().get(timeout=15) == "<Z>"
    assert group(s(Echo(), "a"), s(Echo(), "b"))().get(timeout=15) == ["<a>", "<b>"]
    assert chord([s(Echo(), "a"), scene.shout.s("q")])(s(Echo())).get(timeout=15) == '<["<a>","Q"]>'


def test_a_failing_agent_fails_its_task(scene: Scene) -> None:
    result = scene.mesh.s(Failing(), "x").delay()
    with pytest.raises(RuntimeError, match="ValueError: not x"):
        result.get(timeout=15)
    with pytest.raises(Exception, match="not y"):
        chord([scene.mesh.s(Echo(), "a"), scene.mesh.s(Failing(), "y")])(scene.join.s()).get(timeout=15)


def test_the_run_has_the_tasks_id_and_nothing_is_left_over(scene: Scene) -> None:
    result = scene.mesh.s(Echo(), "a").delay()
    assert result.get(timeout=15) == "<a>"
    assert scene.mesh.get(result.id).result(timeout_s=5) == "<a>"
    assert _settings(scene.app) == scene.conf


def test_two_meshes_on_one_app_do_not_take_each_others_runs(scene: Scene, valkey: Any) -> None:
    other = Mesh(
        Crew(Echo(), name="other", model=ScriptedModel(lambda p: says("other"))), app=scene.app, journal=valkey.url
    )  # fmt: skip
    with other.worker():
        assert other.run(Echo(), "x", timeout_s=15) == "other"
        assert scene.mesh.run(Echo(), "x", timeout_s=15) == "<x>"
    other.close()


def test_a_broker_that_cannot_hold_the_journal() -> None:
    with pytest.raises(ConfigError, match="cannot hold the journal"):
        Mesh(Crew(Echo(), name="x"), broker="amqp://localhost")


@pytest.mark.parametrize("scene", [{"result_chord_expires": 1}], indirect=True)
def test_a_chord_that_was_forgotten_meanwhile_fails(scene: Any, valkey: Any, eventually: Any) -> None:
    """Before, its body never came."""
    said: list[str] = []

    def note(request: Any, error: Any, traceback: Any) -> None:
        said.append(str(error))

    body = scene.join.s().on_error(scene.app.task(note, name="theirs.note", shared=False).s())
    backend, s = scene.app.backend, scene.mesh.s
    joined = chord([s(Desk(), "x"), s(Echo(), "a")])(body)
    waiting, other = joined.parent.results
    assert other.get(timeout=15) == "<a>"
    size = backend.get_key_for_group(joined.parent.id, ".s")
    eventually(lambda: not backend.client.exists(size))
    run = scene.mesh.get(waiting.id)
    run.approve(run.waiting_for()[0], by="ana")
    with pytest.raises(ChordError, match="Celery forgets a chord 1 s after"):
        joined.get(timeout=15)
    eventually(lambda: backend.client.hget(f"agentmesh:st:{waiting.id}", "f") == b"E0")
    assert len(said) == 1
    assert "result_chord_expires" in said[0]
