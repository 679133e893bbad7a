"""`local:NAME`: a model of the cache through transformers and torch, in this process; one request at a time."""

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from agentmesh.errors import ConfigError, ContextTooLong, GpuOutOfMemory
from agentmesh.message import Message, Usage
from agentmesh.models.cache import is_installed, model_folder
from agentmesh.models.hermes import calls_of, conversation
from agentmesh.ports import Answer, Prompt

MAX_TOKENS = 256
HALF_CHARACTER = "\ufffd"  # what the first bytes of a character decode to


class _Loaded(NamedTuple):
    model: Any
    tokenizer: Any
    context_tokens: int


def best_dtype(device: str) -> torch.dtype:
    """bfloat16 where the processor multiplies it in hardware, else float32."""
    if device == "cuda":
        return torch.bfloat16
    # torch names the best vector unit, not AMX or AVX512_BF16: ask for those by their own name
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    return torch.bfloat16 if probe() or amx() else torch.float32


class LocalModel:
    """A Model in this process.

    Args:
        name: as it was pulled: `smollm2`, `Qwen/Qwen3-0.6B`.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._loaded: _Loaded | None = None
        self._lock = threading.Lock()
        self._thread = self._new_thread()

    def _new_thread(self) -> ThreadPoolExecutor:
        # its own: asks that wait for their turn must not sit in the threads of everybody else's to_thread
        return ThreadPoolExecutor(1, thread_name_prefix=f"agentmesh-{self.name}")

    def check(self, name: str = "") -> None:
        """Whether the model is here.

        Raises:
            ConfigError: it is not.
        """
        if not is_installed(self.name):
            folder = str(model_folder(self.name).parent)
            raise ConfigError(f"local model {self.name!r} is not here ({folder!r}); agentmesh models pull {self.name}")

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """See ports.Model."""
        loop, over = asyncio.get_running_loop(), threading.Event()

        def tell(text: str) -> None:
            if on_token is not None and text and not over.is_set():
                loop.call_soon_threadsafe(on_token, text)

        try:
            asked = loop.run_in_executor(self._thread, self._answer, prompt, over, tell if on_token else None)
            return await asked
        finally:
            over.set()  # a cancelled asker: the thread stops at its next token

    async def close(self) -> None:
        """Let go of the weights; another ask would load them again."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._thread, self._loaded = self._new_thread(), None

    @property
    def context_tokens(self) -> int:
        """How many tokens prompt and answer may have together."""
        return self._load().context_tokens

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        return len(self._load().tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def fits(self, prompt: Prompt) -> bool:
        """Whether prompt and answer have room in the model's context."""
        loaded = self._load()
        return len(_encoded(loaded.tokenizer, prompt)) + _wanted(prompt) <= loaded.context_tokens

    # ---- parts ---------------------------------------------------------------------------------
    def _load(self) -> _Loaded:
        with self._lock:
            if self._loaded is None:
                self.check()
                transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
                folder = str(model_folder(self.name))
                device = "cuda" if torch.cuda.is_available() else "cpu"
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
                model: Any = AutoModelForCausalLM.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, dtype=best_dtype(device)
                )
                room = int(model.config.get_text_config().max_position_embeddings)
                self._loaded = _Loaded(model.to(device).eval(), tokenizer, room)
            return self._loaded

    def _answer(self, prompt: Prompt, over: threading.Event, tell: Callable[[str], None] | None) -> Answer:
        loaded = self._load()
        ids, wanted = _encoded(loaded.tokenizer, prompt), _wanted(prompt)
        if len(ids) + wanted > loaded.context_tokens:
            raise ContextTooLong(
                f"the prompt has {len(ids)} tokens and asks for {wanted} more; "
                f"{self.name!r} takes {loaded.context_tokens} together: send less"
            )
        if over.is_set():  # nobody waits for what would be said
            raise asyncio.CancelledError
        stop = _Stop(loaded.tokenizer, len(ids), over, tell, _strings(prompt.options.get("stop")))
        try:
            said = _generate(loaded, ids, wanted, prompt.options, stop)
        except torch.OutOfMemoryError as e:
            raise GpuOutOfMemory(f"no room on the device for {len(ids)} + {wanted} tokens: {e}; send less") from None
        text, calls = calls_of(stop.end(said), prompt.tools, turn=len(prompt.messages))
        usage = Usage(len(ids), len(said))
        if calls:
            return Answer(Message("assistant", text, calls), usage, "tool_calls")
        return Answer(Message("assistant", text), usage, "stop" if stop.ended or len(said) < wanted else "length")


def _wanted(prompt: Prompt) -> int:
    return int(prompt.options.get("max_tokens") or MAX_TOKENS)


def _strings(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())


def _encoded(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The prompt as token ids, by the model's own chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(
            f"model {prompt.model!r} has no chat template: choose one that was trained to chat (-Instruct)"
        )
    messages, tools = conversation(prompt, template=str(tokenizer.chat_template))
    text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True)
    # verbose: a prompt that is too long is our error to raise, not the tokenizer's to warn about
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _generate(loaded: _Loaded, ids: list[int], wanted: int, options: Mapping[str, Any], stop: "_Stop") -> list[int]:
    temperature = float(options.get("temperature") or 0.0)
    how: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature > 0:
        how = {"do_sample": True, "temperature": temperature, "top_p": float(options.get("top_p") or 1.0), "top_k": 0}
        if options.get("seed") is not None:
            torch.manual_seed(int(options["seed"]))
    given = torch.tensor([ids], device=loaded.model.device)  # (1, t)
    with torch.inference_mode():
        out = loaded.model.generate(
            given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=wanted,
            stopping_criteria=StoppingCriteriaList([stop]),
            pad_token_id=loaded.tokenizer.eos_token_id,
            **how,
        )
    said: list[int] = out[0, len(ids) :].tolist()
    return said


class _Stop(StoppingCriteria):
    """Looks at each new token: passes its text on, and ends on a stop string or when nobody waits any more."""

    def __init__(
        self,
        tokenizer: Any,
        start: int,
        over: threading.Event,
        tell: Callable[[str], None] | None,
        stops: Sequence[str],
    ) -> None:
        self._tokenizer, self._start, self._over = tokenizer, start, over
        self._tell, self._stops, self._told = tell, stops, 0
        self.ended = False  # on a stop string

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        if self._tell is not None or self._stops:
            text = self._text(input_ids[0, self._start :].tolist())
            self._pass_on(text[: len(text) - self._held(text)])
        ended = self.ended or self._over.is_set()
        return torch.full((input_ids.shape[0],), ended, dtype=torch.bool, device=input_ids.device)

    def end(self, ids: list[int]) -> str:
        """What was said, up to the first stop string; all of it is passed on now."""
        text = self._text(ids)
        self._pass_on(text)
        return text

    def _text(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        for stop in self._stops:
            text, found, _ = text.partition(stop)
            self.ended = self.ended or bool(found)
        return text

    def _held(self, text: str) -> int:
        """How many characters at the end may still become a stop string, or are half of one character."""
        if self.ended:
            return 0
        held = [n for stop in self._stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
        return max([*held, len(text) - len(text.rstrip(HALF_CHARACTER))])

    def _pass_on(self, text: str) -> None:
        if self._tell is not None and len(text) > self._told:
            self._tell(text[self._told :])
            self._told = len(text)
