"""POST /v1/embeddings: texts to vectors, by embedders of this process. No run: the same text gives the same vector.

Source: https://platform.openai.com/docs/api-reference/embeddings/create
"""

import asyncio
import base64
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from agentmesh.errors import MeshError, did_you_mean
from agentmesh.serve.request import parse_object
from agentmesh.serve.responses import ApiError, api_error_of

if TYPE_CHECKING:
    from agentmesh.rag.embedders.base import Embedder, Floats

FIELDS = ("model", "input", "encoding_format", "dimensions", "input_type", "user")
MAX_TEXTS = 2048


class Embeddings:
    """Answers requests with these embedders, by the names that requests use.

    One that computes in this process does one request at a time, because it uses all threads.
    """

    def __init__(self, embedders: "Mapping[str, Embedder]") -> None:
        self.embedders = dict(embedders)
        self._turns = {name: asyncio.Lock() for name, one in self.embedders.items() if not one.remote}

    async def answer(self, raw: bytes, *, is_left: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """The response to a request's body.

        Args:
            is_left: whether its client has disconnected, checked when its turn comes: clients that retry after a
                timeout would otherwise keep the embedder busy with answers that nobody reads.

        Raises:
            ApiError: the request is wrong, or the embedder failed.
            ConnectionError: its client has disconnected.
        """
        request = parse_object(raw)
        for name in request:
            if name not in FIELDS:
                message = f"there is no parameter {name!r} here.{did_you_mean(name, FIELDS)}"
                raise ApiError(400, message, "unknown_parameter", param=name)
        model = request.get("model")
        if not isinstance(model, str) or model not in self.embedders:
            raise self._unknown(model)
        texts = _texts(request.get("input"))
        form = _one_of(request, "encoding_format", ("float", "base64"))
        kind = _one_of(request, "input_type", ("passage", "query"))
        async with AsyncExitStack() as stack:
            if model in self._turns:
                await stack.enter_async_context(self._turns[model])
            if is_left():
                raise ConnectionError
            try:
                rows = await asyncio.to_thread(_rows, self.embedders[model], texts, kind, request.get("dimensions"))
            except MeshError as e:
                refusal = api_error_of(e)
                raise ApiError(refusal.status, str(e), "embedder_error") from None
        data = [
            {"object": "embedding", "index": i, "embedding": _encode(row, form)} for i, row in enumerate(rows)
        ]  # fmt: skip
        return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": 0, "total_tokens": 0}}

    def _unknown(self, name: Any) -> ApiError:
        names = f"use one of {', '.join(self.embedders)}" if self.embedders else "start the server with --embed NAME"
        close = did_you_mean(str(name), self.embedders)
        return ApiError(404, f"there is no embedder {name!r} here; {names}.{close}", "model_not_found", param="model")


def _rows(embedder: "Embedder", texts: list[str], kind: str, d: Any) -> "Floats | list[Floats]":
    rows = embedder.documents(texts) if kind == "passage" else [embedder.query(text) for text in texts]
    if d is not None and d != len(rows[0]):
        message = f"dimensions is {d!r} and the vectors have {len(rows[0])}; leave it out"
        raise ApiError(400, message, "invalid_value", param="dimensions")
    return rows


def _encode(row: "Floats", form: str) -> list[float] | str:
    return row.tolist() if form == "float" else base64.b64encode(row.astype("<f4").tobytes()).decode()


def _texts(value: Any) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ApiError(
            400, "`input` must be text, or a list of texts; tokens are not taken", "invalid_value", param="input"
        )
    if not all(texts):
        raise ApiError(400, f"input[{texts.index('')}] is empty", "invalid_value", param="input")
    if len(texts) > MAX_TEXTS:
        message = f"`input` has {len(texts)} texts; at most {MAX_TEXTS} a request"
        raise ApiError(400, message, "invalid_value", param="input")
    return texts


def _one_of(request: dict[str, Any], name: str, choices: tuple[str, ...]) -> str:
    value = request.get(name, choices[0])
    if value not in choices:
        raise ApiError(
            400, f"{name} is {value!r}; it must be {' or '.join(map(repr, choices))}", "invalid_value", param=name
        )
    return str(value)
