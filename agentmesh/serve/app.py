"""The endpoint as an ASGI app: /v1/chat/completions, /v1/models, /health; each chat request is a run of the mesh."""

import asyncio
import hashlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from agentmesh.definitions.agent import Agent
from agentmesh.definitions.crew import Crew
from agentmesh.definitions.passthrough import ModelRequest, Passthrough
from agentmesh.definitions.step import Ask
from agentmesh.errors import did_you_mean
from agentmesh.mesh import Mesh
from agentmesh.message import Message
from agentmesh.schema import explain, from_json, loads
from agentmesh.serve.auth import AuthMiddleware
from agentmesh.serve.embeddings import Embeddings
from agentmesh.serve.request import ChatRequest, check_for_local_engine, parse_chat
from agentmesh.serve.request_run import CANCELLED_BY_CLIENT, RequestRun
from agentmesh.serve.responses import (
    SSE_PING,
    ApiError,
    ChatResponse,
    HttpResponse,
    Receive,
    RunOutcome,
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

PING_S = 10.0  # how long a stream may be silent before a comment keeps proxies from closing it
RUN_HEADER = "x-agentmesh-run"


class Endpoint:
    """Answers OpenAI's chat API with runs of one mesh, and embeddings without.

    Args:
        models: the names of bare models that may be asked for.
        embedders: by the names that requests call them by.
        key: that clients must show; "" is for loopback alone.
        health: what /health says, and whether it is good news.
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
        app = Starlette(routes=routes, exception_handlers={HTTPException: _lost, Exception: _broken})
        self.app = AuthMiddleware(app, key)

    @property
    def names(self) -> list[str]:
        """What a chat may name as its model: agents, then models."""
        return [*self.mesh.crew.agents, *self.models]

    def close(self) -> None:
        """Answer whoever waits that the server stops; their runs go on."""
        self._closing.set()

    async def embed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/embeddings."""
        answering = HttpResponse(send)
        try:
            raw = await body_of(headers_of(scope), receive)
            disconnect = asyncio.create_task(client_gone(receive))
            try:
                await answering.whole(200, await self._embeddings.answer(raw, is_left=disconnect.done))
            finally:
                disconnect.cancel()
        except ApiError as refusal:
            await answering.refuse(refusal)
        except ConnectionError:
            return

    # ---- small answers -------------------------------------------------------------------------
    async def health(self, request: Request) -> Response:
        """GET /health."""
        good, report = await asyncio.to_thread(self._health)
        return JSONResponse({"ready": good, **report}, 200 if good else 503)

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models."""
        return JSONResponse(models_json([*self.names, *self._embeddings.embedders], self._began_s))

    async def one_model(self, request: Request) -> Response:
        """GET /v1/models/NAME."""
        name = request.path_params["name"]
        if name not in self.names and name not in self._embeddings.embedders:
            refusal = self._unknown(name)
            return JSONResponse(refusal.to_json(), refusal.status)
        return JSONResponse(model_json(name, self._began_s))

    def _unknown(self, name: str) -> ApiError:
        message = f"there is no model {name!r} here; there are {', '.join(self.names)}.{did_you_mean(name, self.names)}"
        return ApiError(404, message, "model_not_found", param="model")

    # ---- chat ----------------------------------------------------------------------------------
    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions."""
        answering = HttpResponse(send)
        try:
            headers = headers_of(scope)
            chat = parse_chat(await body_of(headers, receive))
            exchange = self._exchange(chat, headers.get("idempotency-key", ""))
        except ApiError as refusal:
            await answering.refuse(refusal)
            return
        except ConnectionError:
            return
        await self._attend(answering, exchange, chat, receive)

    async def _attend(self, answering: HttpResponse, exchange: RequestRun, chat: ChatRequest, receive: Receive) -> None:
        """See the run to its end, the client's leaving, or the server's, whichever comes first."""
        work = asyncio.create_task(self._work(answering, exchange, chat))
        disconnect, closing = asyncio.create_task(client_gone(receive)), asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait({work, disconnect, closing}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif not disconnect.done():
                work.cancel()
                await asyncio.wait({work})
                await answering.refuse(_server_stopping(exchange))
        except ApiError as refusal:
            await answering.refuse(refusal)
            if refusal.code == "retried" and not exchange.keyed:
                await exchange.cancel("agentmesh serve")  # nobody can ask for it any more
        finally:
            for task in (work, disconnect, closing):
                task.cancel()
            await asyncio.gather(work, disconnect, closing, return_exceptions=True)
            if exchange.close() and not _was_answered(work) and not self._closing.is_set():
                await exchange.cancel(CANCELLED_BY_CLIENT)

    async def _work(self, answering: HttpResponse, exchange: RequestRun, chat: ChatRequest) -> None:
        await exchange.begin()
        answering.headers[RUN_HEADER] = exchange.run_id
        if not chat.stream:
            outcome = await exchange.outcome()
            answering.headers[RUN_HEADER] = exchange.run_id  # of the one that answered
            await answering.whole(200, ChatResponse(exchange.run_id, chat.model, int(time.time())).whole(outcome))
            return
        head = ChatResponse(exchange.run_id, chat.model, int(time.time()))
        pieces = exchange.pieces()
        begun, coming = False, asyncio.ensure_future(anext(pieces))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=PING_S)
                if not done:
                    await answering.event(SSE_PING)
                    continue
                piece = coming.result()
                if not begun:
                    begun = True
                    await answering.event(head.begins())
                if isinstance(piece, RunOutcome):
                    for chunk in head.ends(piece, with_usage=chat.usage_in_stream):
                        await answering.event(chunk)
                    await answering.end()
                    return
                await answering.event(head.piece(*piece))
                coming = asyncio.ensure_future(anext(pieces))
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
            await pieces.aclose()

    # ---- from a request to a run ---------------------------------------------------------------
    def _exchange(self, chat: ChatRequest, key: str) -> RequestRun:
        run_id = keyed_run(self.mesh.crew.name, key) if key else uuid.uuid4().hex[:12]
        agent, task, history = self._asked(chat)
        return RequestRun(
            self.mesh, run_id, agent, task, history, keyed=bool(key), stream=chat.stream, origin=self._origin,
            waiting=self._waiting,
        )  # fmt: skip

    def _asked(self, chat: ChatRequest) -> tuple[Agent[Any, Any], Any, Sequence[Message]]:
        """The agent, its task and what was said before."""
        if chat.model in self.mesh.crew.agents:
            return _to_agent(self.mesh.crew, chat)
        if chat.model not in self.models:
            raise self._unknown(chat.model)
        if (
            chat.model.startswith("local:")
            and self.mesh.crew.queues.servers_of(Ask(Passthrough.name, chat.model)) is None
        ):
            chat = check_for_local_engine(chat)
        question = ModelRequest(
            model=chat.model,
            messages=tuple(chat.messages),
            tools=tuple(chat.tools),
            output=chat.output,
            options=chat.options,
        )
        return Passthrough(), question, ()


def _server_stopping(exchange: RequestRun) -> ApiError:
    then = "ask again with the same Idempotency-Key" if exchange.keyed else f"agentmesh runs resume {exchange.run_id}"
    message = f"the server is shutting down; run {exchange.run_id} continues on the workers; {then}"
    return ApiError(503, message, "server_stops", again=exchange.keyed)


def keyed_run(crew: str, key: str) -> str:
    """The run of an Idempotency-Key; endpoints of several crews may share a journal."""
    of_crew = hashlib.sha256(crew.encode()).digest()
    return f"http-{hashlib.blake2b(key.encode(), key=of_crew, digest_size=16).hexdigest()}"


def _was_answered(work: "asyncio.Task[None]") -> bool:
    """Whether it came to an answer, or to a refusal, rather than being cut off."""
    return work.done() and not work.cancelled()


def _to_agent(crew: Crew, chat: ChatRequest) -> tuple[Agent[Any, Any], Any, Sequence[Message]]:
    agent = crew.agents[chat.model]
    for name, given in (("tools", chat.tools), ("response_format", chat.options.get("response_format"))):
        if given:
            message = (
                f"agent {chat.model!r} has its own {'tools' if name == 'tools' else 'output type'}; leave out `{name}`"
            )
            raise ApiError(400, message, "invalid_value", param=name)
    *history, last = chat.messages
    if last.role != "user":
        message = f"the last message to an agent is its task: it must be of role 'user', not {last.role!r}"
        raise ApiError(400, message, "invalid_value", param="messages")
    if agent.task_type is str:
        return agent, last.text, history
    try:
        return agent, from_json(loads(last.text), agent.task_type), history
    except (ValueError, ValidationError) as e:
        why = explain(e) if isinstance(e, ValidationError) else str(e)
        message = f"agent {chat.model!r} takes JSON as the last message's text: {why}"
        raise ApiError(400, message, "invalid_value", param="messages") from None


class _RawAsgi:
    """An ASGI app that Starlette does not take for a function of a Request."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Any]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _lost(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    routes = "there are POST /v1/chat/completions and /v1/embeddings, GET /v1/models and GET /health"
    refusal = ApiError(error.status_code, f"there is no {request.method} {request.url.path}; {routes}", "not_found")
    return JSONResponse(refusal.to_json(), error.status_code, error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return JSONResponse(ApiError(500, "the server failed; its log says why").to_json(), 500)
