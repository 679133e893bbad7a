"""The table of plugins: what is found by a name, what is not, and that a broken package does not affect others."""

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from agentmesh import Agent, ConfigError, Crew, DefinitionError, DeviceQueue, Queue, plugins
from agentmesh.cli.run_view import describe_event
from agentmesh.definitions.step import Ask
from agentmesh.engine.executor import Attempt, LocalExecutor
from agentmesh.journal.events import StepDone
from agentmesh.message import Usage, assistant
from agentmesh.model import Answer, Model, Prompt, model_name
from agentmesh.models.registry import ModelRegistry
from agentmesh.observability.logs import LogObserver
from agentmesh.observability.observer import ObservedExecutor
from agentmesh.testing import FakeMesh, ScriptedModel

ECHO = """
from agentmesh.message import assistant
from agentmesh.model import Answer, Model
made = []
class Echo(Model):
    def __init__(self, name):
        super().__init__(name)
        made.append(name)
    async def ask(self, prompt, on_token=None):
        return Answer(assistant(f"{prompt.model}: {prompt.messages[-1].text}"))
class Odd(Model):
    def __init__(self):
        super().__init__()
    async def ask(self, prompt, on_token=None): ...
"""
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """`install("echo-model", models={"echo": "echo_of_test:Echo"}, module=ECHO)`: a package as pip leaves it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def install(name: str, *, module: str = "", **groups: dict[str, str]) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-0.1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        sections = [f"[agentmesh.{g}]\n" + "\n".join(f"{k} = {v}" for k, v in e.items()) for g, e in groups.items()]
        (folder / "entry_points.txt").write_text("\n\n".join(sections))
        if module:
            (tmp_path / f"{name.replace('-', '_')}.py").write_text(module)
        plugins._installed.cache_clear()

    yield install
    plugins._installed.cache_clear()
    for name in ("echo_model", "broken_model"):
        sys.modules.pop(name, None)


def test_a_package_brings_a_name(install: Install) -> None:
    install("echo-model", module=ECHO, models={"echo": "echo_model:Echo"})
    models = ModelRegistry()
    model, name = models("echo:any")
    assert (type(model).__name__, model.name, name) == ("Echo", "any", "any")
    assert models("echo:any")[0] is model
    assert models("echo:other")[0] is not model
    assert sys.modules["echo_model"].made == ["any", "other"]
    assert plugins.names("models") == ["echo", "local", "openai"]
    assert FakeMesh(Crew(Parrot(), model="echo:any"), model=model).run("hello") == "echo:any: hello"


class Parrot(Agent):
    """Repeats."""


def test_an_unknown_name_lists_what_there_is(install: Install) -> None:
    install("echo-model", module=ECHO, models={"echo": "echo_model:Echo"})
    with pytest.raises(ConfigError) as unknown:
        ModelRegistry()("ecco:any")
    assert unknown.value.message == "unknown model provider 'ecco'"
    assert unknown.value.hint.startswith("use one of: echo, local, openai. Did you mean 'echo'?")
    with pytest.raises(ConfigError, match="unknown journal scheme 'postgres'; use one of: redis, redis.socket, rediss"):
        plugins.load_plugin("journals", "postgres")


def test_a_package_that_cannot_be_imported_breaks_no_other(install: Install) -> None:
    install("echo-model", module=ECHO, models={"echo": "echo_model:Echo", "gone": "echo_model:Gone"})
    install("broken-model", module="import no_such_module\n", models={"broken": "broken_model:Broken"})
    with pytest.raises(ConfigError) as broken:
        ModelRegistry()("broken:any")
    assert broken.value.message == (
        "the model provider 'broken' of package broken-model 0.1 cannot be imported: "
        "ModuleNotFoundError: No module named 'no_such_module'"
    )
    assert broken.value.hint == "correct 'broken_model:Broken', or uninstall the package"
    with pytest.raises(ConfigError, match="AttributeError: module 'echo_model' has no attribute 'Gone'"):
        plugins.load_plugin("models", "gone")
    install("ending-model", module="import sys; sys.exit(3)\n", models={"ending": "ending_model:Ending"})
    with pytest.raises(ConfigError, match="'ending' of package ending-model 0.1 cannot be imported: SystemExit: 3"):
        plugins.load_plugin("models", "ending")
    assert ModelRegistry()("echo:any")[1] == "any"
    assert "broken" in plugins.names("models")


def test_a_name_of_ours_is_not_taken_over(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("evil-model", models={"openai": "evil_model:Evil"})
    assert plugins.load_plugin("models", "openai").__module__ == "agentmesh.models.http"
    with caplog.at_level(logging.WARNING, "agentmesh.plugins"):
        plugins.names("models")
    assert caplog.messages == [
        "the model provider 'openai' of package evil-model 0.1 is not used: agentmesh has one of this name"
    ]
    assert [plugins.package_of(entry) for entry in plugins.installed_plugins("models")] == ["evil-model 0.1"]


def test_two_packages_of_one_name_are_both_named(install: Install) -> None:
    install("echo-model", module=ECHO, models={"echo": "echo_model:Echo", "odd": "echo_model:Odd"})
    install("echo-again", models={"echo": "echo_again:Echo"})
    with pytest.raises(
        ConfigError, match=r"several packages declare the model provider 'echo': echo-.* 0.1, echo-.* 0.1"
    ):
        plugins.load_plugin("models", "echo")
    assert plugins.load_plugin("models", "odd").__name__ == "Odd"


def test_a_constructor_that_raises_is_told(install: Install) -> None:
    install("echo-model", module=ECHO, models={"odd": "echo_model:Odd", "text": "echo_model:made.copy"})
    with pytest.raises(ConfigError, match="the model provider 'odd' cannot be made: Odd raised TypeError"):
        ModelRegistry()("odd:any")
    with pytest.raises(ConfigError, match="the model provider 'text' cannot be made: copy raised TypeError"):
        ModelRegistry()("text:any")


def test_what_is_not_a_model_is_refused(install: Install) -> None:
    install("echo-model", module=ECHO, models={"text": "builtins:str"})
    with pytest.raises(ConfigError, match="model provider 'text' makes a str, which has no `ask`"):
        ModelRegistry()("text:any")


def test_packages_are_looked_through_only_for_a_name_that_is_not_ours() -> None:
    code = (
        "import importlib.metadata as m\n"
        "def refuse(**how): raise AssertionError(how)\n"
        "m.entry_points = refuse\n"
        "from agentmesh import plugins\n"
        "assert plugins.load_plugin('models', 'openai').__name__ == 'HttpModel'\n"
        "assert plugins.load_plugin('journals', 'redis').__name__ == 'RedisJournal'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ours_without_its_extra_says_which() -> None:
    code = (
        "import sys\nsys.modules['torch'] = None\n"
        "from agentmesh import ExtraMissing, plugins\n"
        "try: plugins.load_plugin('models', 'local')\n"
        "except ExtraMissing as e: print(e)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == (
        "the model provider 'local' needs torch, which is not installed; run: pip install 'agentmesh-celery[local]'\n"
    )


# ---- names ---------------------------------------------------------------------------------------
class Named(Model):
    """Answers."""

    async def ask(self, prompt: Prompt, on_token: Any = None) -> Answer:
        return Answer(assistant(prompt.model), Usage(3, 2))


class Duck:
    """A model that is not a subclass."""

    async def ask(self, prompt: Prompt, on_token: Any = None) -> Answer:
        return Answer(assistant(prompt.model), Usage(3, 2))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (Named("mine"), "mine"),
        (Named(), "Named"),
        (Duck(), "Duck"),
        (ScriptedModel(lambda prompt: prompt.model, name="script"), "script"),
    ],
)
def test_an_object_is_called_by_its_name_everywhere(model: Any, name: str, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[str] = []

    class Watch:
        def step(self, step: Any, at: Attempt, model: str) -> Any:
            seen.append(model)

        def ended(self, history: Any, end: Any) -> None: ...

    for own, default in ((model, "local:smollm2"), ("", model)):  # the agent's, or what stands in for agents without
        executor = LocalExecutor(model_of=ModelRegistry(), model=default)
        watched = ObservedExecutor(executor, [Watch(), LogObserver()], default)
        with caplog.at_level(logging.INFO, "agentmesh.step"):
            event, _ = asyncio.run(watched.do(Ask("Bird", own, ()), Attempt("r", 1, 1)))
        executor.close()
        assert isinstance(event, StepDone)
        assert (event.model, event.value["text"]) == (name, name)
        assert f" by {name}" in caplog.messages[-1]
        assert event.model in describe_event("r", event)
    assert seen == [name, name]
    assert model_name(model) == name


def test_a_queue_takes_the_steps_of_its_model() -> None:
    queues = [Queue("main"), Queue("slow", model="echo:any", rate="5/s"), DeviceQueue("gpu", model="local:tiny")]
    crew = Crew(Parrot(), model="echo:any", queues=queues)
    assert crew.queues.of(Ask("Parrot", "")) == "slow"
    assert crew.queues.of(Ask("Parrot", "echo:other")) == "main"
    assert crew.queues.of(Ask("Parrot", "local:tiny")) == "gpu"
    assert crew.queues.served_by("device") == ["gpu"]
    assert crew.queues["slow"].worker_kind == "asyncio"
    with pytest.raises(DefinitionError, match="Queue has no parameter `lane`"):
        Queue("slow", model="echo:any", lane="low")
