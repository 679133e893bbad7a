"""Bad input gets a sentence that names the value and the fix; no partial state is left behind."""

import pickle
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from agentmesh import Approve, Schedule, errors, tool
from agentmesh.config import load_config
from agentmesh.definitions.agent import Agent
from agentmesh.definitions.context import Context
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.limits import Limits
from agentmesh.definitions.queue import Queue
from agentmesh.errors import (
    ConfigError,
    DefinitionError,
    MeshError,
    NameTaken,
    QuorumMissed,
    StepError,
    ToolSignatureError,
    UnknownName,
    error_from_json,
    error_to_json,
)
from agentmesh.models.registry import ModelRegistry
from agentmesh.runtime.crew_file import load_crew
from agentmesh.testing import FakeMesh


def test_agents() -> None:
    with pytest.raises(DefinitionError, match="Agent itself cannot be made; write a subclass"):
        Agent()
    with pytest.raises(DefinitionError, match=r"`Boss`: team has the class Worker; write `Worker\(\)`"):

        class Worker(Agent):
            pass

        class Boss(Agent):
            team = (Worker,)

    with pytest.raises(DefinitionError, match="not a tool; write `@tool` above `def plain`"):

        def plain(x: int) -> int:
            return x

        class A(Agent):
            tools = (plain,)  # type: ignore[assignment]

    with pytest.raises(DefinitionError, match="its flow is not a plain `def`; wait with ctx.do"):

        class B(Agent):
            async def flow(self, task: str, ctx: Context) -> str:  # type: ignore[override]
                return ""

    with pytest.raises(DefinitionError, match=r"its flow takes .*; write `def flow\(self, task, ctx\)`"):

        class C(Agent):
            def flow(self, task: str) -> str:  # type: ignore[override]
                return ""

    with pytest.raises(DefinitionError, match="has no JSON Schema"):

        class Opaque:
            pass

        class D(Agent[Opaque]):
            pass


def test_agents_have_no_state_and_take_known_fields() -> None:
    class A(Agent):
        city: str

    with pytest.raises(AttributeError, match="has no state"):
        A(city="Lima").city = "Rome"
    with pytest.raises(DefinitionError, match="city: Field required"):
        A()  # type: ignore[call-arg]
    with pytest.raises(DefinitionError, match="town: Extra inputs are not permitted"):
        A(city="Lima", town="x")  # type: ignore[call-arg]
    with pytest.raises(DefinitionError, match="agent `A` takes text, not dict"):
        A(city="Lima").on({"a": 1})


def test_tools() -> None:
    with pytest.raises(ToolSignatureError, match="tool `f`: parameter `x` has no type; write `x: str`"):

        @tool
        def f(x):  # type: ignore[no-untyped-def]
            return x

    with pytest.raises(ToolSignatureError, match="tool `g`"):

        @tool
        def g(x: object()) -> int:  # type: ignore[valid-type]
            return 1

    with pytest.raises(ToolSignatureError, match="has no fixed form"):

        @tool
        def h(*x: int) -> int:
            return 1

    with pytest.raises(ToolSignatureError, match="tool `stream` is an asynchronous generator; return a list"):

        @tool
        async def stream(x: int) -> AsyncIterator[int]:
            yield x

    with pytest.raises(DefinitionError, match="is at_most_once and has retries=2"):

        @tool(delivery="at_most_once", retries=2)
        def pay() -> str:
            return ""

    class Desk:
        def read(self, x: int) -> int:
            return x

        def __call__(self, x: int) -> int:
            return x

    with pytest.raises(ToolSignatureError, match="tool `read`: it is a method, .*; make a tool of the bound one"):
        tool(Desk.read)
    assert tool(Desk().read).on(1).arguments == {"x": 1}
    for other in (Desk(), partial(Desk().read, 1), "read"):
        with pytest.raises(ToolSignatureError, match="is not a function; wrap it in a `def`"):
            tool(other)  # type: ignore[call-overload]  # one of them is the mistake
    for name in ("model_config", "_x", "model_dump"):
        space: dict[str, Any] = {}
        exec(f"def f({name}: int) -> int: return 1", space)
        with pytest.raises(ToolSignatureError, match="tool `f`: .*; rename "):
            tool(space["f"])

    @tool
    def ok(n: int) -> int:
        return n

    with pytest.raises(ToolSignatureError, match="tool `ok`: missing a required argument: 'n'"):
        ok.on()  # type: ignore[call-arg]
    with pytest.raises(ToolSignatureError, match="valid integer"):
        ok.on("x")  # type: ignore[arg-type]


def test_crews() -> None:
    class Editor(Agent):
        queue = "gpus"

    with pytest.raises(
        UnknownName,
        match="agent `Editor` names the unknown queue 'gpus'; use one of: 'gpu', 'web'. Did you mean 'gpu'?",
    ):
        Crew(Editor(), queues=[Queue("gpu"), Queue("web")])

    def another() -> type[Agent]:
        class Editor(Agent):
            pass

        Editor.__module__ = "exclude"
        return Editor

    with pytest.raises(NameTaken, match="two agents are named 'Editor'"):
        Crew(Editor(), another()(), queues=[Queue("gpus")])
    with pytest.raises(DefinitionError, match="model 'gpt-5', which names no provider; write `provider:name`"):
        Crew(another()(), model="gpt-5")
    with pytest.raises(DefinitionError, match="which is not a model"):
        Crew(another()(), model=42)
    with pytest.raises(NameTaken, match="several queues with the same name"):
        Crew(another()(), queues=[Queue("a"), Queue("a")])
    with pytest.raises(UnknownName, match="has no agent 'Edtor': it has Editor. Did you mean 'Editor'?"):
        Crew(another()()).agent("Edtor")
    with pytest.raises(DefinitionError, match="write `Editor\\(\\)`"):
        Crew(another())  # type: ignore[arg-type]
    with pytest.raises(DefinitionError, match=r"rate='fast' is not a number per"):
        Queue("a", rate="fast")
    with pytest.raises(DefinitionError, match=r"Limits\(turns=0\) must be a number above 0"):
        Limits(turns=0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("x = 1", "defines no Crew; add `crew = Crew"),
        (
            "from agentmesh import *\nclass A(Agent): pass\na=Crew(A())\nb=Crew(A())",
            "defines 2 crews (a, b); choose one",
        ),
        ("\n1/0", "line 2: ZeroDivisionError: division by zero"),
        ("import nowhere_to_be_found", "ModuleNotFoundError"),
        ("x = 1\ndef f(:\n    pass", "bad_crew.py, line 2: SyntaxError: invalid syntax"),
        ("import sys\n\nsys.exit(3)", "bad_crew.py, line 3: SystemExit: 3"),
    ],
)
def test_crew_files(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "bad_crew.py"
    file.write_text(text)
    with pytest.raises(DefinitionError) as e:
        load_crew(str(file))
    assert said in str(e.value)
    with pytest.raises(DefinitionError, match="does not exist"):
        load_crew(str(tmp_path / "none.py"))


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "agentmesh.toml"
    file.write_text("borker = 'redis://x'")
    with pytest.raises(ConfigError, match="unknown setting 'borker'; use one of: .* Did you mean 'broker'?"):
        load_config(file=file)
    file.write_text("lease_s = 'long'")
    with pytest.raises(ConfigError, match="setting 'lease_s' is 'long'"):
        load_config(file=file)
    file.write_text("lease_s = 3.0\nbroker='redis://file'")
    monkeypatch.setenv("AGENTMESH_BROKER", "redis://env")
    assert (load_config(file=file).lease_s, load_config(file=file).broker, load_config(file=file, broker="redis://arg").broker) == (
        3.0, "redis://env", "redis://arg",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [("lease_s", 0.5), ("lease_s", float("nan")), ("sweep_s", 0), ("drain_s", -1), ("retain_days", 0)],
)
def test_settings_have_bounds(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"setting '{name}' is {value}: Input should be"):
        load_config(**{name: value})


def test_a_project_without_settings_hides_none_above_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "agentmesh.toml").write_text("model = 'openai:above'")
    below = tmp_path / "package"
    below.mkdir()
    (below / "pyproject.toml").write_text("[project]\nname = 'package'\n")
    monkeypatch.chdir(below)
    assert load_config().model == "openai:above"


def test_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(
        ConfigError, match="unknown model provider 'opnai'; use one of: local, openai. Did you mean 'openai'?"
    ):
        ModelRegistry()("opnai:gpt")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        ModelRegistry()("openai:gpt")


def every_error() -> list[type[MeshError]]:
    return [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, MeshError)]


@pytest.mark.parametrize("cls", every_error(), ids=lambda c: c.__name__)
def test_errors_survive_pickle_and_the_journal(cls: type[MeshError]) -> None:
    given: dict[str, Any] = {f: 1 if f in ("n", "attempts") else "x" for f in cls.fields if f != "errors"}
    error = cls("what happened", hint="do this", **given)
    assert str(error) == "what happened; do this"
    for again in (pickle.loads(pickle.dumps(error)), error_from_json(error_to_json(error))):
        assert (type(again), again.message, again.hint, again._given()) == (cls, "what happened", "do this", given)


def test_an_error_without_a_hint_is_its_message_alone() -> None:
    error = error_from_json({"type": "ToolError", "message": "as a journal of an earlier version has it"})
    assert (str(error), error.hint) == ("as a journal of an earlier version has it", "")
    assert "hint" not in error_to_json(error)


def test_nested_errors_survive_too() -> None:
    error = QuorumMissed("1 of 2", errors=[StepError("a", n=1)])
    again = error_from_json(error_to_json(error))
    assert isinstance(again, QuorumMissed)
    assert [(e.message, e.n) for e in again.errors or []] == [("a", 1)]


def test_a_variable_that_looks_misspelt_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AGENTMESH_LEASES_S", "5")
    monkeypatch.setenv("AGENTMESH_KEY", "of somebody's server")
    load_config()
    load_config()
    (said,) = caplog.messages
    assert said == "the environment variable AGENTMESH_LEASES_S is not a setting. Did you mean AGENTMESH_LEASE_S?"


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"turn": 5}, "unknown limit 'turn'; use one of: turns, tokens, cost_usd, seconds"),
        ({"turns": "many"}, r"Limits\(turns='many'\) must be a number above 0"),
        ({"seconds": float("nan")}, r"Limits\(seconds=nan\) must be a number above 0"),
        ({"cost_usd": -1}, r"Limits\(cost_usd=-1\) must be a number above 0"),
    ],
)
def test_limits_that_cannot_be_raised_to(limits: Any, sentence: str) -> None:
    class Asks(Agent):
        def flow(self, task: str, ctx: Context) -> str:
            ctx.do(Approve("go on?"))
            return "done"

    handle = FakeMesh(Asks()).start("x")
    with pytest.raises(DefinitionError, match=sentence):
        handle.raise_limits(limits)
    handle.approve(handle.waiting_for()[0])
    assert handle.result() == "done"


@pytest.mark.parametrize("when", [None, float("nan"), float("inf"), 10**12, 0])
def test_intervals_that_cannot_be(when: Any) -> None:
    class Asks(Agent):
        """Of the clock."""

    with pytest.raises(DefinitionError, match=f"schedule {when!r}: an interval is at least 1 second, and at most"):
        Schedule(when, Asks())


class Echo(Agent):
    def flow(self, task: str, ctx: Context) -> str:
        return task


class Stranger(Echo):
    pass


@pytest.mark.parametrize("run_id", ["a b", "a~2", "a/1", "é", "x" * 65])
def test_ids_that_a_run_cannot_have(run_id: str) -> None:
    mesh = FakeMesh(Crew(Echo()))
    with pytest.raises(DefinitionError, match="is not a run id; use 1 to 64 of"):
        mesh.start("hi", run_id=run_id)
    assert mesh.runs() == []


def test_a_run_of_an_agent_that_the_crew_does_not_have() -> None:
    with pytest.raises(UnknownName, match="Stranger"):
        FakeMesh(Crew(Echo())).start(Stranger(), "hi")
