"""Any OpenAI-compatible server over HTTP: OpenAI, vLLM, SGLang, Ollama, llama-server, gateways. One thin client."""

import asyncio
import contextlib
import random
import re
import time
from collections.abc import AsyncGenerator, Callable

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_base, wait_random_exponential

from agentmesh.address import server_address
from agentmesh.errors import ContextTooLong, ModelError, ModelRefused
from agentmesh.model import Answer, Model, Prompt, RetryLater
from agentmesh.models.openai_format import (
    MALFORMED_ANSWER,
    SseParser,
    StreamAssembler,
    parse_answer,
    request_body,
    retry_after_s,
    server_reason,
)
from agentmesh.schema import loads

MAX_WAIT_S = 5.0  # a longer one is the journal's: it holds no worker
FIRST_WAIT_S = 0.25
DRAIN_S = 0.5  # for the few bytes after [DONE], without which the connection could not be used again
CONTEXT_TOO_LONG = re.compile(r"context_length_exceeded|context (size|window|length)|too many tokens", re.I)


class TransientFailure(Exception):
    """An attempt failed in a way that another attempt may not.

    Attributes:
        after_s: when the server wants to be asked again; None where it does not say.
        disconnected: the connection was refused or broke off: the server may be down.
        was_sent: the server may have begun to work on the request.
        has_answered: some of the answer had come; a new attempt of the step retracts that.
        wrong_server: only another server may answer: this one has another model or key, or does not speak this API.
    """

    def __init__(
        self, error: ModelError, after_s: float | None = None, *, disconnected: bool = False, was_sent: bool = True,
        wrong_server: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(str(error))
        self.error, self.after_s, self.wrong_server = error, after_s, wrong_server
        self.disconnected, self.was_sent, self.has_answered = disconnected, was_sent, False


class _Wait(wait_base):
    """The wait that the server named, else exponential with full jitter.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    def __init__(self) -> None:
        self._jitter = wait_random_exponential(multiplier=2 * FIRST_WAIT_S, max=MAX_WAIT_S)

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        if isinstance(error, TransientFailure) and error.after_s is not None:
            return error.after_s
        return float(self._jitter(retry_state))


class HttpModel(Model):
    """A Model behind `/chat/completions`.

    Args:
        name: what it is called; the model that the server is asked for is the prompt's.
        base_url, api_key: see server_address.
        set_by: where URL and key come from, for the hints of errors.
        tries: attempts within one step, as long as the waits between them stay under 5 s.

    Raises:
        ConfigError: OpenAI's own server and no key, or a base URL that is not a URL.
    """

    def __init__(
        self, name: str = "", *, base_url: str | None = None, api_key: str | None = None, timeout_s: float = 600.0,
        tries: int = 5, connections: int = 1000, set_by: tuple[str, str] = ("OPENAI_BASE_URL", "OPENAI_API_KEY"),
    ) -> None:  # fmt: skip
        super().__init__(name)
        self._url_by, self._key_by = set_by
        self.base_url, key = server_address(base_url, api_key, set_by=self._url_by)
        self._url = f"{self.base_url}/chat/completions"
        self._key = key
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._timeout_s, self._tries, self._connections = timeout_s, max(1, tries), connections
        # A session lives inside a generator that its loop ends when it shuts down, so that none outlives its loop.
        self._sessions: dict[asyncio.AbstractEventLoop, tuple[aiohttp.ClientSession, AsyncGenerator[None, None]]] = {}

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """See Model."""
        body = request_body(prompt, stream=on_token is not None)
        began_s = time.monotonic()
        try:
            return await self._post(prompt, body, on_token)  # nearly always enough, and tenacity is not free
        except TransientFailure as e:
            self._raise_unless_retried_here(e)
            failure = e
        if self._tries > 1:
            await asyncio.sleep(random.uniform(0, FIRST_WAIT_S) if failure.after_s is None else failure.after_s)
            try:
                return await self._retry(prompt, body, on_token)
            except TransientFailure as e:
                failure = e
        attempts = f"({self._tries} {'try' if self._tries == 1 else 'tries'}) within {time.monotonic() - began_s:.1f} s"
        error = ModelError(f"{failure.error.message} {attempts}", hint=failure.error.hint)
        raise RetryLater(error, MAX_WAIT_S) from None

    async def _retry(self, prompt: Prompt, body: bytes, on_token: Callable[[str], None] | None) -> Answer:
        async for attempt in AsyncRetrying(
            stop=stop_after_attempt(self._tries - 1),
            wait=_Wait(),
            reraise=True,
            retry=retry_if_exception_type(TransientFailure),
        ):
            with attempt:
                try:
                    return await self._post(prompt, body, on_token)
                except TransientFailure as e:
                    self._raise_unless_retried_here(e)
                    raise
        raise AssertionError("unreachable")

    def _raise_unless_retried_here(self, failure: TransientFailure) -> None:
        """The engine retries after a partial answer or a long wait; and no other server is known."""
        if failure.wrong_server:
            raise failure.error from None
        if failure.has_answered:
            raise RetryLater(failure.error, 0.0) from None
        if failure.after_s is not None and failure.after_s > MAX_WAIT_S:
            raise RetryLater(failure.error, failure.after_s) from None

    async def once(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """One attempt, for a caller that knows other servers.

        Raises:
            TransientFailure: another attempt may succeed.
            ModelError: it would not.
        """
        return await self._post(prompt, request_body(prompt, stream=on_token is not None), on_token)

    async def unhealthy_reason(self, timeout_s: float) -> str:
        """Why the server cannot be asked now, or "": by GET /health, and where it has none by GET /v1/models.

        Source: https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html, llama.cpp's and SGLang's servers
        """
        session, limit = await self._session(), aiohttp.ClientTimeout(total=timeout_s)
        try:
            for url in (f"{self.base_url.removesuffix('/v1')}/health", f"{self.base_url}/models"):
                async with session.get(url, headers=self._headers, timeout=limit) as response:
                    if response.status < 400:
                        return ""
                    status = response.status
                    if status >= 500:
                        break
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as e:
            return str(e) or f"no answer in {timeout_s:g} s"
        return f"{url} answered {status}"

    async def close(self) -> None:
        """See Model."""
        _, lifetime = self._sessions.pop(asyncio.get_running_loop(), (None, None))
        if lifetime is not None:
            await lifetime.aclose()

    async def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        existing = self._sessions.get(loop)
        if existing is not None:
            return existing[0]
        for closed in [other for other in list(self._sessions) if other.is_closed()]:  # others' threads add theirs
            self._sessions.pop(closed, None)
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=10),
            cookie_jar=aiohttp.DummyCookieJar(),
        )
        lifetime = _session_lifetime(session)
        self._sessions[loop] = session, lifetime
        await anext(lifetime)
        return session

    async def _post(self, prompt: Prompt, body: bytes, on_token: Callable[[str], None] | None) -> Answer:
        session, assembly = await self._session(), StreamAssembler()
        try:
            async with session.post(self._url, data=body, headers=self._headers) as response:
                if response.status != 200:
                    raise self._refusal(prompt, response, (await response.read()).decode(errors="replace"))
                if on_token is not None and response.content_type != "application/json":
                    return await self._streamed(response, assembly, on_token)
                answer = self._whole(await response.read())
        except TransientFailure as e:
            e.has_answered = assembly.has_text
            raise
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as e:
            refused = isinstance(e, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
            slow = isinstance(e, TimeoutError) and not refused
            failure = TransientFailure(self._connection_error(e), disconnected=not slow, was_sent=not refused)
            failure.has_answered = assembly.has_text
            raise failure from None
        if on_token is not None and answer.message.text:  # a server that does not stream
            on_token(answer.message.text)
        return answer

    async def _streamed(
        self, response: aiohttp.ClientResponse, assembly: StreamAssembler, on_token: Callable[[str], None]
    ) -> Answer:  # fmt: skip
        parser = SseParser()
        async for chunk in response.content.iter_any():
            for data in parser.feed(chunk):
                if text := self._text_of(assembly, data):
                    on_token(text)
            if parser.done:
                break
        if assembly.finish is None:
            raise TransientFailure(ModelError(f"the stream from {self.base_url} ended in the middle of an answer"))
        if not response.content.at_eof():
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ConnectionError):
                async with asyncio.timeout(DRAIN_S):
                    await response.read()
        return assembly.answer()

    def _text_of(self, assembly: StreamAssembler, data: bytes) -> str:
        """The text of a piece of the stream."""
        try:
            piece = loads(data)
            if piece.get("error"):
                reason = server_reason(data.decode(errors="replace"), self._key)
                raise TransientFailure(ModelError(f"{self.base_url} broke off its answer: {reason}"))
            return assembly.add(piece)
        except MALFORMED_ANSWER:
            raise TransientFailure(ModelError(
                f"the stream from {self.base_url} is not a chat completion: {data[:200].decode(errors='replace')!r}"
            )) from None  # fmt: skip

    def _whole(self, raw: bytes) -> Answer:
        try:
            return parse_answer(loads(raw))
        except MALFORMED_ANSWER:
            excerpt = raw[:200].decode(errors="replace")
            error = ModelError(
                f"{self.base_url} did not answer with a chat completion: {excerpt!r}",
                hint=f"set {self._url_by} to an OpenAI-compatible server",
            )
            raise TransientFailure(error, wrong_server=True) from None

    def _refusal(self, prompt: Prompt, response: aiohttp.ClientResponse, text: str) -> Exception:
        status, reason = response.status, server_reason(text, self._key)
        if status in (401, 403):
            return TransientFailure(
                ModelRefused(f"{self.base_url} refused the key ({status}: {reason})", hint=f"check {self._key_by}"),
                wrong_server=True,
            )
        if status == 404:
            return TransientFailure(
                ModelRefused(
                    f"{self.base_url} has no model {prompt.model!r} (404: {reason})", hint="check its name and the URL"
                ),
                wrong_server=True,
            )
        if status in (400, 413) and CONTEXT_TOO_LONG.search(text):
            return ContextTooLong(
                f"the prompt is longer than {prompt.model!r} takes: {reason}",
                hint="send less, or use a model with more context",
            )
        if status == 429 and "insufficient_quota" in text:
            return ModelRefused(
                f"{self.base_url} says that the account's quota is used up: {reason}",
                hint="raise it, or use another key",
            )
        if status in (408, 409, 429) or status >= 500:
            wait_s = retry_after_s(response.headers.get("Retry-After"))
            return TransientFailure(ModelError(f"{self.base_url} answered {status}: {reason}"), wait_s)
        return ModelRefused(f"{self.base_url} refused the request ({status}): {reason}")

    def _connection_error(self, error: Exception) -> ModelError:
        """What a failed connection means."""
        reason = str(error) or type(error).__name__
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return ModelError(
                f"no model server responds at {self.base_url} ({reason})",
                hint=f"start the server, or set {self._url_by} to yours",
            )
        if isinstance(error, TimeoutError):
            return ModelError(
                f"{self.base_url} did not end its answer in {self._timeout_s:g} s",
                hint="ask for less, or raise timeout_s",
            )
        return ModelError(f"the connection to {self.base_url} broke off ({reason})", hint="see that server's log")


async def _session_lifetime(session: aiohttp.ClientSession) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        await session.close()
