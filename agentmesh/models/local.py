"""`local:NAME`: a model of the cache through transformers and torch, in this process; one request at a time."""

import asyncio
import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging as transformers_logging

from agentmesh.errors import ConfigError, ContextTooLong
from agentmesh.message import Message, ToolCall, ToolSpec, Usage
from agentmesh.models.cache import is_installed, model_folder
from agentmesh.ports import Answer, Prompt
from agentmesh.schema import dumps

MAX_TOKENS = 256
CALL = re.compile(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", re.DOTALL)
TOOLS_TEXT = (
    "You may call these tools:\n{tools}\n"
    'To call one, answer with <tool_call>{{"name": NAME, "arguments": {{...}}}}</tool_call> and nothing else.'
)
OUTPUT_TEXT = "Answer with JSON alone that meets this JSON Schema:\n{schema}"


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
        self._model: Any = None
        self._tokenizer: Any = None
        self._load_lock, self._turn = threading.Lock(), threading.Lock()

    def check(self, name: str) -> None:
        """Whether the model is here.

        Raises:
            ConfigError: it is not.
        """
        if not is_installed(self.name):
            raise ConfigError(f"local model {self.name!r} is not in {model_folder(self.name).parent}; agentmesh models pull {self.name}")

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """See ports.Model."""
        over = threading.Event()
        try:
            return await asyncio.to_thread(self._answer, prompt, on_token, over)
        finally:
            over.set()  # a cancelled asker: the thread stops at its next token

    async def close(self) -> None:
        """See ports.Model."""

    @property
    def context_tokens(self) -> int:
        """How many tokens prompt and answer may have together."""
        self._load()
        return int(self._model.config.max_position_embeddings)

    def count(self, text: str) -> int:
        """How many tokens a text is."""
        self._load()
        return len(self._tokenizer(text, verbose=False)["input_ids"])

    # ---- parts ---------------------------------------------------------------------------------
    def _load(self) -> None:
        with self._load_lock:
            if self._model is not None:
                return
            self.check(self.name)
            transformers_logging.disable_progress_bar()
            folder = str(model_folder(self.name))
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=best_dtype(device))
            self._model = model.to(device).eval()

    def _answer(self, prompt: Prompt, on_token: Callable[[str], None] | None, over: threading.Event) -> Answer:
        self._load()
        with self._turn:
            ids = self.encoded(prompt)
            wanted = int(prompt.options.get("max_tokens", MAX_TOKENS))
            room = self._model.config.max_position_embeddings
            if len(ids) + wanted > room:
                raise ContextTooLong(
                    f"the prompt has {len(ids)} tokens and asks for {wanted} more; {self.name!r} takes {room} together: send less"
                )
            stop = _Stop(self._tokenizer, len(ids), over, on_token, _strings(prompt.options.get("stop")))
            said = self._generate(ids, wanted, prompt.options, stop)
        text, calls = _calls(stop.text(said), prompt.tools)
        finish = "tool_calls" if calls else "length" if len(said) >= wanted else "stop"
        return Answer(Message("assistant", text, calls), Usage(len(ids), len(said)), finish)

    def encoded(self, prompt: Prompt) -> list[int]:
        """The prompt as token ids, by the model's own chat template; tools and output schema as text."""
        messages = [_plain(m) for m in prompt.messages]
        told = [TOOLS_TEXT.format(tools="\n".join(_tool(t) for t in prompt.tools))] if prompt.tools else []
        told += [OUTPUT_TEXT.format(schema=dumps(dict(prompt.output)))] if prompt.output is not None else []
        if told:
            if messages and messages[0]["role"] == "system":
                told.insert(0, messages.pop(0)["content"])
            messages.insert(0, {"role": "system", "content": "\n\n".join(told)})
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # verbose: a prompt that is too long is our error to raise, not the tokenizer's to warn about
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _generate(self, ids: list[int], wanted: int, options: Any, stop: "_Stop") -> list[int]:
        temperature = float(options.get("temperature", 0.0))
        how: dict[str, Any] = {"do_sample": False}
        if temperature > 0:
            how = {"do_sample": True, "temperature": temperature, "top_p": float(options.get("top_p", 1.0))}
            if "seed" in options:
                torch.manual_seed(int(options["seed"]))
        given = torch.tensor([ids], device=self._model.device)  # (1, t)
        with torch.inference_mode():
            out = self._model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=wanted, stopping_criteria=StoppingCriteriaList([stop]),
                pad_token_id=self._tokenizer.eos_token_id, **how,
            )  # fmt: skip
        said: list[int] = out[0, len(ids) :].tolist()
        return said


class _Stop(StoppingCriteria):  # type: ignore[misc]  # transformers is untyped here
    """Looks at each new token: passes its text on, and ends on a stop string or when nobody waits any more."""

    def __init__(
        self, tokenizer: Any, start: int, over: threading.Event, on_token: Callable[[str], None] | None, stops: Sequence[str]
    ) -> None:
        self._tokenizer, self._start, self._over = tokenizer, start, over
        self._on_token, self._stops, self._told = on_token, stops, ""

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        ended = self._over.is_set()
        if self._on_token is not None or self._stops:
            text = self.text(input_ids[0, self._start :].tolist())
            ended = ended or any(s in text for s in self._stops)
            if self._on_token is not None and not text.endswith("\ufffd"):  # the rest of a character is still to come
                self._on_token(text[len(self._told) :])
                self._told = text
        return torch.full((input_ids.shape[0],), ended, dtype=torch.bool, device=input_ids.device)

    def text(self, ids: list[int]) -> str:
        """What was said, up to the first stop string."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        for stop in self._stops:
            text = text.partition(stop)[0]
        return text


def _plain(message: Message) -> dict[str, str]:
    if message.role == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message.text}\n</tool_response>"}
    calls = "".join(f'\n<tool_call>{{"name": "{c.name}", "arguments": {c.arguments}}}</tool_call>' for c in message.tool_calls)
    return {"role": message.role, "content": message.text + calls}


def _tool(spec: ToolSpec) -> str:
    return dumps({"name": spec.name, "description": spec.description, "parameters": dict(spec.parameters)})


def _calls(text: str, tools: Sequence[ToolSpec]) -> tuple[str, tuple[ToolCall, ...]]:
    """The tool calls in an answer, in Hermes' format, and the text without them."""
    if not tools:
        return text, ()
    calls = []
    for i, found in enumerate(CALL.findall(text)):
        try:
            asked = json.loads(found)
            calls.append(ToolCall(f"call_{i}", str(asked["name"]), json.dumps(asked.get("arguments", {}))))
        except (ValueError, KeyError, TypeError):
            continue
    return (CALL.sub("", text).strip() if calls else text), tuple(calls)


def _strings(given: Any) -> list[str]:
    return [given] if isinstance(given, str) else list(given or ())
