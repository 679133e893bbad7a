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

from agentmesh.agent import Agent
from agentmesh.crew import Crew
from agentmesh.errors import did_you_mean
from agentmesh.mesh import Mesh
from agentmesh.message import Message
from agentmesh.question import Asked, Question
from agentmesh.schema import explain, from_json, loads
from agentmesh.serve.answering import Answering, Receive, Scope, Send, body_of, headers_of, left
from agentmesh.serve.embeddings import Embeddings
from agentmesh.serve.exchange import CLIENT, Exchange
from agentmesh.serve.guard import Guard
from agentmesh.serve.refusal import Refusal
from agentmesh.serve.reply import PING, Head, Outcome, model_json, models_json
from agentmesh.serve.request import Chat, chat_of, for_engine
from agentmesh.step import Ask

if TYPE_CHECKING:
    from agentmesh.rag.embedder import Embedder

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
            Route("/v1/chat/completions", _Raw(self.chat), methods=["POST"]),
            Route("/v1/embeddings", _Raw(self.embed), methods=["POST"]),
        ]
        app = Starlette(routes=routes, exception_handlers={HTTPException: _lost, Exception: _broken})
        self.app = Guard(app, key)

    @property
    def names(self) -> list[str]:
        """What a chat may name as its model: agents, then models."""
        return [*self.mesh.crew.agents, *self.models]

    def close(self) -> None:
        """Answer whoever waits that the server stops; their runs go on."""
        self._closing.set()

    async def embed(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/embeddings."""
        answering = Answering(send)
        try:
            raw = await body_of(headers_of(scope), receive)
            gone = asyncio.create_task(left(receive))
            try:
                await answering.whole(200, await self._embeddings.answer(raw, is_left=gone.done))
            finally:
                gone.cancel()
        except Refusal as refusal:
            await answering.refuse(refusal)
        except ConnectionError:
            return

    # ---- small answers -------------------------------------------------------------------------
    async def health(self, request: Request) -> Response:
        """GET /health."""
        good, said = await asyncio.to_thread(self._health)
        return JSONResponse({"ready": good, **said}, 200 if good else 503)

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

    def _unknown(self, name: str) -> Refusal:
        said = f"there is no model {name!r} here; there are {', '.join(self.names)}.{did_you_mean(name, self.names)}"
        return Refusal(404, said, "model_not_found", param="model")

    # ---- chat ----------------------------------------------------------------------------------
    async def chat(self, scope: Scope, receive: Receive, send: Send) -> None:
        """POST /v1/chat/completions."""
        answering = Answering(send)
        try:
            headers = headers_of(scope)
            chat = chat_of(await body_of(headers, receive))
            exchange = self._exchange(chat, headers.get("idempotency-key", ""))
        except Refusal as refusal:
            await answering.refuse(refusal)
            return
        except ConnectionError:
            return
        await self._attend(answering, exchange, chat, receive)

    async def _attend(self, answering: Answering, exchange: Exchange, chat: Chat, receive: Receive) -> None:
        """See the run to its end, the client's leaving, or the server's, whichever comes first."""
        work = asyncio.create_task(self._work(answering, exchange, chat))
        gone, closing = asyncio.create_task(left(receive)), asyncio.create_task(self._closing.wait())
        try:
            await asyncio.wait({work, gone, closing}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
            elif not gone.done():
                work.cancel()
                await asyncio.wait({work})
                await answering.refuse(_stops(exchange))
        except Refusal as refusal:
            await answering.refuse(refusal)
            if refusal.code == "retried" and not exchange.keyed:
                await exchange.cancel("agentmesh serve")  # nobody can ask for it any more
        finally:
            for task in (work, gone, closing):
                task.cancel()
            await asyncio.gather(work, gone, closing, return_exceptions=True)
            if exchange.close() and not _was_answered(work) and not self._closing.is_set():
                await exchange.cancel(CLIENT)

    async def _work(self, answering: Answering, exchange: Exchange, chat: Chat) -> None:
        await exchange.begin()
        answering.headers[RUN_HEADER] = exchange.run_id
        if not chat.stream:
            outcome = await exchange.outcome()
            answering.headers[RUN_HEADER] = exchange.run_id  # of the one that answered
            await answering.whole(200, Head(exchange.run_id, chat.model, int(time.time())).whole(outcome))
            return
        head = Head(exchange.run_id, chat.model, int(time.time()))
        pieces = exchange.pieces()
        begun, coming = False, asyncio.ensure_future(anext(pieces))
        try:
            while True:
                done, _ = await asyncio.wait({coming}, timeout=PING_S)
                if not done:
                    await answering.event(PING)
                    continue
                piece = coming.result()
                if not begun:
                    begun = True
                    await answering.event(head.begins())
                if isinstance(piece, Outcome):
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
    def _exchange(self, chat: Chat, key: str) -> Exchange:
        run_id = keyed_run(self.mesh.crew.name, key) if key else uuid.uuid4().hex[:12]
        agent, task, history = self._asked(chat)
        return Exchange(
            self.mesh, run_id, agent, task, history, keyed=bool(key), stream=chat.stream, origin=self._origin,
            waiting=self._waiting,
        )  # fmt: skip

    def _asked(self, chat: Chat) -> tuple[Agent[Any], Any, Sequence[Message]]:
        """The agent, its task and what was said before."""
        if chat.model in self.mesh.crew.agents:
            return _to_agent(self.mesh.crew, chat)
        if chat.model not in self.models:
            raise self._unknown(chat.model)
        if chat.model.startswith("local:") and self.mesh.crew.servers_of(Ask(Asked.name, chat.model)) is None:
            chat = for_engine(chat)
        question = Question(
            model=chat.model,
            messages=tuple(chat.messages),
            tools=tuple(chat.tools),
            output=chat.output,
            options=chat.options,
        )
        return Asked(), question, ()


def _stops(exchange: Exchange) -> Refusal:
    then = "ask again with the same Idempotency-Key" if exchange.keyed else f"agentmesh runs resume {exchange.run_id}"
    said = f"the server stops and run {exchange.run_id} goes on where a worker is; {then}"
    return Refusal(503, said, "server_stops", again=exchange.keyed)


def keyed_run(crew: str, key: str) -> str:
    """The run of an Idempotency-Key; endpoints of several crews may share a journal."""
    of_crew = hashlib.sha256(crew.encode()).digest()
    return f"http-{hashlib.blake2b(key.encode(), key=of_crew, digest_size=16).hexdigest()}"


def _was_answered(work: "asyncio.Task[None]") -> bool:
    """Whether it came to an answer, or to a refusal, rather than being cut off."""
    return work.done() and not work.cancelled()


def _to_agent(crew: Crew, chat: Chat) -> tuple[Agent[Any], Any, Sequence[Message]]:
    agent = crew.agents[chat.model]
    for name, given in (("tools", chat.tools), ("response_format", chat.options.get("response_format"))):
        if given:
            said = (
                f"agent {chat.model!r} has its own {'tools' if name == 'tools' else 'output type'}; leave out `{name}`"
            )
            raise Refusal(400, said, "invalid_value", param=name)
    *history, last = chat.messages
    if last.role != "user":
        said = f"the last message to an agent is its task: it must be of role 'user', not {last.role!r}"
        raise Refusal(400, said, "invalid_value", param="messages")
    if agent.task_type is str:
        return agent, last.text, history
    try:
        return agent, from_json(loads(last.text), agent.task_type), history
    except (ValueError, ValidationError) as e:
        why = explain(e) if isinstance(e, ValidationError) else str(e)
        said = f"agent {chat.model!r} takes JSON as the last message's text: {why}"
        raise Refusal(400, said, "invalid_value", param="messages") from None


class _Raw:
    """An ASGI app that Starlette does not take for a function of a Request."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Any]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


async def _lost(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    there = "there are POST /v1/chat/completions and /v1/embeddings, GET /v1/models and GET /health"
    refusal = Refusal(error.status_code, f"there is no {request.method} {request.url.path}; {there}", "not_found")
    return JSONResponse(refusal.to_json(), error.status_code, error.headers)


async def _broken(request: Request, error: Exception) -> Response:
    logger.error("a request failed", exc_info=error)
    return JSONResponse(Refusal(500, "the server failed; its log says why").to_json(), 500)
