"""The endpoint as an ASGI app: /v1/chat/completions, /v1/models, /health; each chat request is a run of the mesh."""

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agentmesh.mesh import Mesh
from agentmesh.serve.auth import AuthMiddleware
from agentmesh.serve.chat import answer_chat
from agentmesh.serve.embeddings import Embeddings
from agentmesh.serve.request import chat_target, parse_chat, unknown_model
from agentmesh.serve.request_run import RequestRun
from agentmesh.serve.responses import (
    ApiError,
    HttpResponse,
    Receive,
    Scope,
    Send,
    body_of,
    client_gone,
    headers_of,
    model_json,
    models_json,
)

if TYPE_CHECKING:
    from agentmesh.rag.embedders.base import Embedder

logger = logging.getLogger("agentmesh.serve")


class Endpoint:
    """Answers OpenAI's chat API with runs of one mesh, and embeddings without runs.

    Args:
        models: the names of models that may be asked directly.
        embedders: by the names that requests use.
        key: that clients must send; "" is for loopback alone.
        health: whether the server is ready, and what /health reports.
        origin: the crew file, for `agentmesh runs resume`.
    """

    def __init__(
        self, mesh: Mesh, *, models: Sequence[str], key: str = "", origin: str = "",
        health: Callable[[], tuple[bool, dict[str, Any]]] = lambda: (True, {}),
        embedders: "Mapping[str, Embedder] | None" = None,
    ) -> None:  # fmt: skip
        self._embeddings = Embeddings(embedders or {})
        self.mesh, self.models = mesh, list(models)
        self._health, self._origin, self._began_s = health, origin, int(time.time())
        self._waiting: Counter[str] = Counter()
        self._closing = asyncio.Event()
        routes = [
            Route("/health", self.health),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{name:path}", self.one_model),
            Route("/v1/chat/completions", _RawAsgi(self.chat), methods=["POST"]),
            Route("/v1/embeddings", _RawAsgi(self.embed), methods=["POST"]),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route, Exception: _server_error})
        self.app = AuthMiddleware(app, key)

    @property
    def names(self) -> list[str]:
        """What a chat may name as its model: agents first, then models."""
        return [*self.mesh.crew.agents, *self.models]

    def close(self) -> None:
        """Tell waiting clients that the server stops; their runs continue."""
        self._closing.set()

    # ---- lists and health ----------------------------------------------------------------------
    async def health(self, request: Request) -> Response:
        """GET /health."""
        is_ready, report = await asyncio.to_thread(self._health)
        return JSONResponse({"ready": is_ready, **report}, 200 if is_ready else 503)

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse(models_json([*self.names, *self._embeddings.embedders], self._began_s))

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        if name not in self.names and name not in self._embeddings.embedders:
            refusal = unknown_model(name, self.names)
            return JSONResponse(refusal.to_json(), refusal.status)
        return JSONResponse(model_json(name, self._began_s))

    # ---- runs ----------------------------------------------------------------------------------
    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions: read, resolved to an agent and its task, begun as a run, answered."""
        response = HttpResponse(send)
        try:
            headers = headers_of(scope)
            chat = parse_chat(await body_of(headers, receive))
            target = chat_target(chat, self.mesh.crew, self.models)
        except ApiError as refusal:
            await response.refuse(refusal)
            return
        except ConnectionError:
            return
        run = RequestRun(
            self.mesh, target, key=headers.get("idempotency-key", ""), stream=chat.stream, origin=self._origin,
            waiting=self._waiting,
        )  # fmt: skip
        await answer_chat(run, chat, response, receive, self._closing)

    async def embed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/embeddings; no run."""
        response = HttpResponse(send)
        try:
            raw = await body_of(headers_of(scope), receive)
            disconnected = asyncio.create_task(client_gone(receive))
            try:
                await response.whole(200, await self._embeddings.answer(raw, is_left=disconnected.done))
            finally:
                disconnected.cancel()
        except ApiError as refusal:
            await response.refuse(refusal)
        except ConnectionError:
            return


class _RawAsgi:
    """An ASGI app as an object, because Starlette calls a plain function with a Request."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Any]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    routes = "there are POST /v1/chat/completions and /v1/embeddings, GET /v1/models and GET /health"
    refusal = ApiError(error.status_code, f"there is no {request.method} {request.url.path}; {routes}", "not_found")
    return JSONResponse(refusal.to_json(), error.status_code, error.headers)


async def _server_error(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return JSONResponse(ApiError(500, "the server failed; its log says why").to_json(), 500)
