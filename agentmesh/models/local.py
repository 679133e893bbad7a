"""`local:NAME`: a model on this machine, in this process; and which of an agent's `options` it takes."""

import asyncio
import logging
import secrets
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from agentmesh.errors import ConfigError, ContextTooLong, ModelError
from agentmesh.hub.cache import model_folder, must_be_installed
from agentmesh.inference.batching import Shape
from agentmesh.inference.engine import InferenceEngine
from agentmesh.inference.grammar import Constraint, grammar_of
from agentmesh.inference.loader import Loaded, load_model
from agentmesh.inference.request import Done, EngineDown, InferenceRequest
from agentmesh.inference.tokenization import THINK, AnswerPiece, AnswerStream, separate_special, token_ids
from agentmesh.message import Message, Usage
from agentmesh.model import Answer, Model, Prompt, RetryLater, Thought
from agentmesh.models.tool_call_parser import chat_turns, parse_tool_calls


class LocalOptions(BaseModel):
    """The options that a local model takes; others are for servers and are ignored.

    Args:
        top_k: below 1 is all tokens.
        top_p: 0 is the likeliest token alone.
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
    def of(cls, prompt: Prompt) -> "LocalOptions":
        """Those of a prompt.

        Raises:
            ModelError: a value is out of range, or `tool_choice` names a tool that the prompt does not have.
        """
        try:
            options = cls(**prompt.options)
        except ValidationError as e:
            first = e.errors()[0]
            raise ModelError(f"option `{first['loc'][0]}` is {first['input']!r}: {first['msg']}") from None
        names = [t.name for t in prompt.tools]
        choices = ("auto", "none", "required", *names)
        if names and options.tool_choice not in choices:  # without tools it says nothing
            raise ModelError(
                f"option `tool_choice` is {options.tool_choice!r}", hint=f"use one of: {', '.join(choices)}"
            )
        return options

    @model_validator(mode="before")
    @classmethod
    def _without_none(cls, options: dict[str, Any]) -> dict[str, Any]:
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


log = logging.getLogger("agentmesh.gpu")

RELOAD_S = 1.0


class LocalModel(Model):
    """A Model in this process; its weights are loaded by the first request.

    Args:
        name: as it was pulled: `smollm2`, `Qwen/Qwen3-0.6B`.
    """

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._loaded: Loaded | None = None
        self._shape: Shape | None = None
        self._on_fatal: Callable[[Exception], None] | None = None
        self._lock = threading.Lock()
        self._thread = self._new_thread()

    def _new_thread(self) -> ThreadPoolExecutor:
        # one of its own: requests that wait for the weights must not occupy the threads of `asyncio.to_thread`
        return ThreadPoolExecutor(1, thread_name_prefix=f"agentmesh-{self.name}")

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """See Model."""
        loop, ended = asyncio.get_running_loop(), threading.Event()

        def forward(piece: AnswerPiece) -> None:
            if on_token is not None and not ended.is_set():
                text = Thought(piece.text) if piece.kind == "thought" else piece.text
                loop.call_soon_threadsafe(on_token, text)

        try:
            loaded, request, stream = await loop.run_in_executor(self._thread, self._prepare_request, prompt, forward)
            streams = on_token is not None or bool(prompt.options.get("stop"))
            done = await asyncio.wrap_future(loaded.engine.submit(request, stream.feed if streams else None))
            stream.finish(done.tokens)
        except EngineDown as e:
            raise RetryLater(ModelError(f"the engine of {self.name!r} stopped: {e}"), RELOAD_S) from None
        finally:
            ended.set()  # after a cancellation `on_token` is not called any more
        return _answer(prompt, request, stream, done)

    def prepare(
        self, *, memory: float = 0.85, batch_tokens: int = 0, requests: int = 0,
        on_fatal: Callable[[Exception], None] | None = None,
    ) -> InferenceEngine:  # fmt: skip
        """Load it for a worker of its own and compute one token, so that the first step does not wait for that.

        Args:
            memory: the fraction of the device's free memory for prompts and answers.
            batch_tokens, requests: of one step of the engine; 0 is chosen by the device.
            on_fatal: called when the process must end and be started again.

        Raises:
            ConfigError: it is not installed, is damaged, or does not fit into memory.
        """
        self._shape = Shape(memory=memory, batch_tokens=batch_tokens, batch_requests=requests)
        self._on_fatal = on_fatal
        try:
            engine = self.load().engine
        except (MemoryError, ValueError) as e:
            raise ConfigError(
                f"not enough memory for model {self.name!r} and its prompts ({e})",
                hint="lower max_batch_tokens, raise gpu_memory_fraction, or use a smaller model",
            ) from None
        engine.submit(InferenceRequest((0,), 1)).result()
        return engine

    async def close(self) -> None:
        """Free the weights; another request loads them again."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        loaded, self._thread, self._loaded = self._loaded, self._new_thread(), None
        if loaded is not None:
            try:
                await asyncio.to_thread(loaded.engine.close)
            except RuntimeError:  # an interpreter at its end starts no threads; nothing else runs that this could block
                loaded.engine.close()

    @property
    def context_tokens(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self.load().context_tokens

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        return len(token_ids(self.load().tokenizer, text))

    def fits(self, prompt: Prompt) -> bool:
        """Whether prompt and answer have room in the model's context."""
        loaded = self.load()
        return len(encode_prompt(loaded, prompt)) + LocalOptions.of(prompt).max_tokens <= loaded.context_tokens

    def load(self) -> Loaded:
        """The model, loaded the first time it is needed.

        Raises:
            ConfigError: it is not installed, or damaged.
        """
        with self._lock:
            if self._loaded is None or not self._loaded.engine.alive:
                must_be_installed(self.name)
                if self._loaded is not None:
                    self._loaded.engine.close()  # frees its weights before they are loaded again
                    self._loaded = None
                self._loaded = load_model(model_folder(self.name), self.name, self._shape, on_fatal=self._on_fatal)
            return self._loaded

    def _prepare_request(
        self, prompt: Prompt, forward: Callable[[AnswerPiece], None]
    ) -> tuple[Loaded, InferenceRequest, AnswerStream]:
        loaded, options = self.load(), LocalOptions.of(prompt)
        text = render_prompt(loaded, prompt)
        ids, max_tokens = token_ids(loaded.tokenizer, text), options.max_tokens
        if len(ids) + max_tokens > loaded.context_tokens:
            raise ContextTooLong(
                f"the prompt has {len(ids)} tokens and asks for {max_tokens} more, and {self.name!r} takes "
                f"{loaded.context_tokens} together",
                hint="send less, or lower max_tokens",
            )
        thinking = text.rstrip().endswith(THINK)
        request = InferenceRequest(
            tuple(ids), max_tokens, frozenset() if options.ignore_eos else loaded.ends, options.temperature, options.top_k,
            options.top_p, constraint=_constraint(loaded, prompt, options.tool_choice, thinking=thinking), seed=options.seed,
        )  # fmt: skip
        return loaded, request, AnswerStream(loaded.tokenizer, stops=options.stop, thinking=thinking, tell=forward)


def render_prompt(loaded: Loaded, prompt: Prompt) -> str:
    """The prompt as the model's own chat template writes it, for `token_ids`."""
    template = str(loaded.tokenizer.chat_template)
    messages, tools = separate_special(
        chat_turns(prompt, template=template, takes_system=loaded.takes_system), loaded.special_tokens
    )
    text: str = loaded.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    return text


def encode_prompt(loaded: Loaded, prompt: Prompt) -> list[int]:
    """The prompt as token ids."""
    return token_ids(loaded.tokenizer, render_prompt(loaded, prompt))


def _constraint(loaded: Loaded, prompt: Prompt, choice: str, *, thinking: bool) -> Constraint | None:
    tags = loaded.grammars.tags_are_tokens
    grammar = grammar_of(prompt.tools, prompt.output, choice, tags_are_tokens=tags)
    if not grammar:
        return None
    try:
        return loaded.grammars.constraint(grammar, thinking=thinking)
    except ValueError as e:
        log.warning("this answer is not constrained to its schema, which is only in the prompt: %s", e)
        return None


def _answer(prompt: Prompt, request: InferenceRequest, stream: AnswerStream, done: Done) -> Answer:
    tools = () if prompt.options.get("tool_choice") == "none" else prompt.tools
    text, calls = parse_tool_calls(stream.text, tools, turn=len(prompt.messages))
    usage = Usage(len(request.tokens), len(done.tokens), done.cached_tokens, batch=done.batch)
    if calls:
        return Answer(Message("assistant", text, calls), usage, "length" if done.finish == "length" else "tool_calls")
    return Answer(Message("assistant", text), usage, "stop" if stream.ended else done.finish)
