"""An agent's `options` as a local model takes them, checked before anything is computed."""

import secrets
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from agentmesh.errors import ModelError
from agentmesh.model import Prompt


class Options(BaseModel):
    """What of the options is a local model's; the rest is for servers and overlooked.

    Args:
        top_k: below 1 it is all.
        top_p: 0 is the likeliest alone.
        stop: strings that end the answer, one or several.
        tool_choice: `auto`, `required`, `none`, or the name of the tool that must be called, which OpenAI writes
            `{"type": "function", "function": {"name": ...}}`.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    max_tokens: int = Field(256, ge=1)
    temperature: float = Field(0.0, ge=0, allow_inf_nan=False)
    top_k: int = 0
    top_p: float = Field(1.0, ge=0, le=1)
    seed: int = Field(default_factory=lambda: secrets.randbits(63))
    stop: tuple[str, ...] = ()
    tool_choice: str = "auto"
    ignore_eos: bool = False

    @classmethod
    def of(cls, prompt: Prompt) -> "Options":
        """Those of a prompt.

        Raises:
            ModelError: one is no such value, or wants a tool that is not among the prompt's.
        """
        try:
            found = cls(**prompt.options)
        except ValidationError as e:
            first = e.errors()[0]
            raise ModelError(f"option `{first['loc'][0]}` is {first['input']!r}: {first['msg']}") from None
        names = [t.name for t in prompt.tools]  # where there are none, there is no choice
        if names and found.tool_choice not in ("auto", "none", "required", *names):
            raise ModelError(f"option `tool_choice` is {found.tool_choice!r}; the tools are {', '.join(names)}")
        return found

    @model_validator(mode="before")
    @classmethod
    def _given(cls, options: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in options.items() if v is not None}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _name(cls, choice: Any) -> Any:
        function = choice.get("function") if isinstance(choice, dict) else None
        return function.get("name", choice) if isinstance(function, dict) else choice
