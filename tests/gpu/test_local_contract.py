"""LocalModel keeps the public contract of models."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from agentmesh.message import Message, ToolSpec
from agentmesh.model import Answer, Model, Prompt
from agentmesh.models.local import LocalModel
from agentmesh.testing.contracts import ModelContract
from agentmesh.testing.tiny_models import save_model

pytestmark = pytest.mark.usefixtures("device")


class TestLocalModel(ModelContract):
    model_name = "tiny"
    calls_tools = False  # its weights are random

    @pytest.fixture(autouse=True)
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AGENTMESH_CACHE", str(save_model(tmp_path)))

    def make(self) -> Model:
        return LocalModel("tiny")

    def make_failing(self) -> Model:
        class Refusing(LocalModel):
            async def ask(self, prompt: Prompt, on_token: object = None) -> Answer:
                return await super().ask(replace(prompt, options={"max_tokens": 10**6}))

        return Refusing("tiny")

    def prompt(self, *messages: Message, tools: Sequence[ToolSpec] = ()) -> Prompt:
        return replace(super().prompt(*messages, tools=tools), options={"max_tokens": 4})
