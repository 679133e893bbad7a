"""One chat over HTTP: begins its run, answers whole or as a stream, and cancels the run when its client leaves."""

import asyncio
import time

from agentmesh.serve.request import ChatRequest
from agentmesh.serve.request_run import CANCELLED_BY_CLIENT, RequestRun
from agentmesh.serve.responses import SSE_PING, ApiError, ChatResponse, HttpResponse, Receive, RunOutcome, client_gone

PING_S = 10.0  # how long a stream may be silent before a comment keeps proxies from closing it
RUN_HEADER = "x-agentmesh-run"


async def answer_chat(
    run: RequestRun, chat: ChatRequest, response: HttpResponse, receive: Receive, closing: asyncio.Event
) -> None:
    """Answer until the run ends, the client leaves or the server stops, whichever comes first.

    Args:
        receive: the rest of the request, whose body was read.
        closing: set when the server stops.
    """
    work = asyncio.create_task(_answer(run, chat, response))
    disconnected, stopping = asyncio.create_task(client_gone(receive)), asyncio.create_task(closing.wait())
    try:
        await asyncio.wait({work, disconnected, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            work.result()
        elif not disconnected.done():
            work.cancel()
            await asyncio.wait({work})
            await response.refuse(_server_stopping(run))
    except ApiError as refusal:
        await response.refuse(refusal)
        if refusal.code == "retried" and not run.is_keyed:
            await run.cancel("agentmesh serve")  # no client can ask for it again
    finally:
        for task in (work, disconnected, stopping):
            task.cancel()
        await asyncio.gather(work, disconnected, stopping, return_exceptions=True)
        was_answered = work.done() and not work.cancelled()  # or refused, rather than cut off
        if run.close() and not was_answered and not closing.is_set():
            await run.cancel(CANCELLED_BY_CLIENT)


async def _answer(run: RequestRun, chat: ChatRequest, response: HttpResponse) -> None:
    await run.begin()
    response.headers[RUN_HEADER] = run.run_id
    if chat.stream:
        await _stream(run, chat, response)
        return
    outcome = await run.outcome()
    response.headers[RUN_HEADER] = run.run_id  # of the retry that answered, if there was one
    await response.whole(200, ChatResponse(run.run_id, chat.model, int(time.time())).whole(outcome))


async def _stream(run: RequestRun, chat: ChatRequest, response: HttpResponse) -> None:
    body = ChatResponse(run.run_id, chat.model, int(time.time()))
    pieces = run.pieces()
    has_begun, next_piece = False, asyncio.ensure_future(anext(pieces))
    try:
        while True:
            done, _ = await asyncio.wait({next_piece}, timeout=PING_S)
            if not done:
                await response.event(SSE_PING)
                continue
            piece = next_piece.result()
            if not has_begun:
                has_begun = True
                await response.event(body.begins())
            if isinstance(piece, RunOutcome):
                for chunk in body.ends(piece, with_usage=chat.usage_in_stream):
                    await response.event(chunk)
                await response.end()
                return
            await response.event(body.piece(*piece))
            next_piece = asyncio.ensure_future(anext(pieces))
    finally:
        next_piece.cancel()
        await asyncio.gather(next_piece, return_exceptions=True)
        await pieces.aclose()


def _server_stopping(run: RequestRun) -> ApiError:
    then = "send it again with the same Idempotency-Key" if run.is_keyed else f"agentmesh runs resume {run.run_id}"
    message = f"the server is shutting down; run {run.run_id} continues on the workers; {then}"
    return ApiError(503, message, "server_stops", retryable=run.is_keyed)
