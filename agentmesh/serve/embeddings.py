"""POST /v1/embeddings: texts to vectors, by embedders of this process. No run: nothing in it could be lost or held.

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

KNOWN = ("model", "input", "encoding_format", "dimensions", "input_type", "user")
MOST_TEXTS = 2048


class Embeddings:
    """Answers requests with these embedders, by the names that requests call them by.

    One that computes in this process does one request at a time: it has all threads already.
    """

    def __init__(self, embedders: "Mapping[str, Embedder]") -> None:
        self.embedders = dict(embedders)
        self._turns = {name: asyncio.Lock() for name, one in self.embedders.items() if not one.remote}

    async def answer(self, raw: bytes, *, is_left: Callable[[], bool] = lambda: False) -> dict[str, Any]:
        """The response to a request's body.

        Args:
            is_left: whether its client is gone, asked when its turn comes: clients that gave up and ask again would
                else keep the embedder busy with what nobody reads.

        Raises:
            Refusal: the request is wrong, or the embedder failed.
            ConnectionError: its client is gone.
        """
        request = parse_object(raw)
        for name in request:
            if name not in KNOWN:
                message = f"there is no parameter {name!r} here.{did_you_mean(name, KNOWN)}"
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
            {"object": "embedding", "index": i, "embedding": _written(row, form)} for i, row in enumerate(rows)
        ]  # fmt: skip
        return {"object": "list", "data": data, "model": model, "usage": {"prompt_tokens": 0, "total_tokens": 0}}

    def _unknown(self, name: Any) -> ApiError:
        known = (
            f"there are {', '.join(self.embedders)}" if self.embedders else "none is served; start with --embed NAME"
        )
        hint = did_you_mean(str(name), self.embedders)
        return ApiError(404, f"there is no embedder {name!r} here: {known}.{hint}", "model_not_found", param="model")


def _rows(embedder: "Embedder", texts: list[str], kind: str, d: Any) -> "Floats | list[Floats]":
    rows = embedder.documents(texts) if kind == "passage" else [embedder.query(text) for text in texts]
    if d is not None and d != len(rows[0]):
        message = f"dimensions is {d!r} and the vectors have {len(rows[0])}; leave it out"
        raise ApiError(400, message, "invalid_value", param="dimensions")
    return rows


def _written(row: "Floats", form: str) -> list[float] | str:
    return row.tolist() if form == "float" else base64.b64encode(row.astype("<f4").tobytes()).decode()


def _texts(given: Any) -> list[str]:
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ApiError(
            400, "`input` must be text, or a list of texts; tokens are not taken", "invalid_value", param="input"
        )
    if not all(texts):
        raise ApiError(400, f"input[{texts.index('')}] is empty", "invalid_value", param="input")
    if len(texts) > MOST_TEXTS:
        message = f"`input` has {len(texts)} texts; at most {MOST_TEXTS} a request"
        raise ApiError(400, message, "invalid_value", param="input")
    return texts


def _one_of(asked: dict[str, Any], name: str, known: tuple[str, ...]) -> str:
    value = asked.get(name, known[0])
    if value not in known:
        raise ApiError(
            400, f"{name} is {value!r}; it must be {' or '.join(map(repr, known))}", "invalid_value", param=name
        )
    return str(value)
