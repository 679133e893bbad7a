"""Constrained decoding with llguidance: JSON that meets a schema, tool calls, or free text before a tool call.

Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import llguidance
import llguidance.hf
import numpy as np
import numpy.typing as npt

from agentmesh.inference.tokenization import THINK, THINK_END
from agentmesh.message import ToolSpec

log = logging.getLogger("agentmesh.gpu")

CALL, CALL_END = "<tool_call>", "</tool_call>"

MAX_STRING = 2000  # of a string without a bound: a small model may never end it
MAX_DEPTH = 32
VALUES = {"const", "enum", "default", "examples"}  # keys of a schema whose values are not schemas
# keys of a schema whose value maps names to schemas
SCHEMA_MAPS = {"properties", "patternProperties", "dependentSchemas", "$defs", "definitions"}
CACHED_GRAMMARS = 64  # compiled ones; the copy of one takes microseconds


def bound_strings(schema: Any, depth: int = 0) -> Any:
    """The schema with a `maxLength` for every string that has no bound."""
    if isinstance(schema, list):
        return [bound_strings(v, depth + 1) for v in schema]
    if not isinstance(schema, Mapping) or depth >= MAX_DEPTH:
        return schema
    out = {k: v if k in VALUES else bound_strings(v, depth + 1) for k, v in schema.items()}
    for key in SCHEMA_MAPS & out.keys():
        if isinstance(schema[key], Mapping):
            out[key] = {k: bound_strings(v, depth + 1) for k, v in schema[key].items()}
    kinds = schema.get("type")
    is_text = kinds == "string" or (isinstance(kinds, list) and "string" in kinds)
    if is_text and not {"enum", "const", "pattern", "format", "maxLength"} & schema.keys():
        out["maxLength"] = max(MAX_STRING, schema.get("minLength", 0))
    return out


def grammar_of(
    tools: Sequence[ToolSpec], output: Mapping[str, Any] | None, choice: str = "auto", *, tags_are_tokens: bool = False
) -> str:
    """The grammar of an answer, or "" for free text.

    Args:
        output: a JSON Schema the text must meet where no tool is called.
        choice: `auto`, `required`, `none`, or a tool's name that must be called.
        tags_are_tokens: whether each tag of a tool call is one token; see `Grammars`.
    """
    opening, closing = (CALL, CALL_END) if tags_are_tokens else (f'"{CALL}"', f'"{CALL_END}"')
    callable_tools = [t for t in tools if choice in ("auto", "required", t.name)]
    if choice == "none" or not callable_tools:
        return "" if output is None else f"start: SPACE? answer\nSPACE: /[ \\n]{{1,2}}/\nanswer: {_json(output)}\n"
    call = f"call: SPACE? {opening} SPACE? {_calls(callable_tools)} SPACE? {closing}\nSPACE: /[ \\n]{{1,2}}/\n"
    if choice != "auto":
        return f"start: call\n{call}" if choice != "required" else f"start: call+\n{call}"
    if output is not None:
        return f"start: call+ | SPACE? answer\n{call}answer: {_json(output)}\n"
    # free text; the opening tag begins a call
    opened = f"opened: TEXT {opening}" if tags_are_tokens else f"opened[lazy]: TEXT {opening}"
    return (
        f"start: called* TEXT\ncalled: opened SPACE? {_calls(callable_tools)} SPACE? {closing}\n{opened}\n"
        "TEXT: /(.|\\n)*/\nSPACE: /[ \\n]{1,2}/\n"
    )


def _calls(tools: Sequence[ToolSpec]) -> str:
    return "(" + " | ".join(_json(_call_schema(t)) for t in tools) + ")"


def _call_schema(tool: ToolSpec) -> dict[str, Any]:
    parameters = dict(tool.parameters)
    definitions: dict[str, Any] = {k: parameters.pop(k) for k in ("$defs", "definitions") if k in parameters}
    return {
        "type": "object",
        "properties": {"name": {"const": tool.name}, "arguments": parameters},
        "required": ["name", "arguments"],
        "additionalProperties": False,
        **definitions,
    }


def _json(schema: Mapping[str, Any]) -> str:
    # With flexible whitespace a small model may write blanks for ever. lenient: a keyword that llguidance does not support
    # is ignored, and the rest of the schema still holds.
    options = {
        "whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "lenient": True, "coerce_one_of": True
    }  # fmt: skip
    return "%json " + json.dumps({**bound_strings(schema), "x-guidance": options})


class Grammars:
    """Makes constraints for one tokenizer.

    Args:
        tokenizer: a fast tokenizer of transformers.
        vocabulary: the number of scores that the model returns for a token.
        ends: ids of the tokens that end an answer.
    """

    def __init__(self, tokenizer: Any, vocabulary: int, ends: Iterable[int] = ()) -> None:
        self._tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary)
        self._compiled = functools.lru_cache(CACHED_GRAMMARS)(self._compile)
        self._think = self._one(tokenizer, THINK), self._one(tokenizer, THINK_END)
        # inside reasoning every token but an end, which would leave the answer empty
        self._in_reasoning = np.ones(vocabulary, dtype=np.bool_)
        self._in_reasoning[list(ends)] = False
        tags = self._one(tokenizer, CALL), self._one(tokenizer, CALL_END)
        self.tags_are_tokens = (
            None not in tags
        )  # to llguidance such a token is a special one, which text cannot produce

    @staticmethod
    def _one(tokenizer: Any, text: str) -> int | None:
        """The id of a text that is one token; None where it is several."""
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return int(ids[0]) if len(ids) == 1 else None

    def constraint(self, grammar: str, *, thinking: bool = False) -> "Constraint":
        """A constraint for one answer.

        Args:
            thinking: the prompt ends inside the model's reasoning; the grammar begins after it.

        Raises:
            ValueError: llguidance refuses the grammar; the message says why.
        """
        if thinking and self._think[1] is None:
            # the end of reasoning is several tokens, so the grammar must match it
            grammar = f'start: thought answered\nthought[lazy]: /(.|\\n)*/ "{THINK_END}"\n' + grammar.replace(
                "start:", "answered:", 1
            )
        return Constraint(self._compiled(grammar).deep_copy(), self._in_reasoning, *self._think, thinking=thinking)

    def _compile(self, grammar: str) -> Any:
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0)
        if matcher.is_error():
            raise ValueError(matcher.get_error().splitlines()[0])
        if warnings := matcher.get_grammar_warnings():
            log.warning("the grammar does not enforce all of this schema: %s", "; ".join(warnings))
        return matcher


class Constraint:
    """The state of one answer and the tokens that may come next; used by one thread at a time.

    Args:
        in_reasoning: bool (vocabulary,), the tokens that may come next inside reasoning.
        opens, closes: the tokens that begin and end reasoning; None where the model has no such token.
    """

    def __init__(
        self, matcher: Any, in_reasoning: npt.NDArray[np.bool_], opens: int | None, closes: int | None, *, thinking: bool = False
    ) -> None:  # fmt: skip
        self._matcher, self._in_reasoning, self._opens, self._closes = matcher, in_reasoning, opens, closes
        self._starts_thinking = thinking and closes is not None
        self.reset()

    def reset(self) -> None:
        """Return to the state before the first token."""
        self._matcher.reset()
        self._thinking = self._began = self._starts_thinking

    def take(self, tokens: Sequence[int]) -> None:
        """Advance by these tokens of the answer."""
        for token in tokens:
            if self._thinking:
                self._thinking = token != self._closes
            elif not self._began and token == self._opens and self._closes is not None:
                self._thinking, self._began = True, True
            else:
                self._began = True
                self._matcher.consume_token(token)

    def allowed(self, vocabulary: int) -> npt.NDArray[np.bool_] | None:
        """The tokens that may come next, bool (vocabulary,); None if all may."""
        if self._thinking:
            return self._in_reasoning
        if self._matcher.is_error():  # a limit of the parser: the rest of the answer is free
            return None
        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        bits = np.zeros(vocabulary, dtype=np.bool_)
        unpacked = np.unpackbits(packed, bitorder="little")[:vocabulary]
        bits[: unpacked.shape[0]] = unpacked
        if not self._began and self._opens is not None and self._closes is not None:
            bits[self._opens] = True
        return bits if bits.any() else None
