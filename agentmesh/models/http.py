"""Any OpenAI-compatible server over HTTP: OpenAI, vLLM, SGLang, Ollama, llama-server, gateways. One thin client."""

import asyncio
import os
import re
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any
from weakref import WeakKeyDictionary

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt
from tenacity.wait import wait_base, wait_random_exponential

from agentmesh.errors import ConfigError, ContextTooLong, ModelError, ModelRefused
from agentmesh.models.wire import Assembly, answer_of, body
from agentmesh.ports import Answer, Prompt, RetryLater
from agentmesh.schema import loads

OPENAI = "https://api.openai.com/v1"
LONGEST_WAIT_S = 5.0  # a longer one is the journal's: it holds no worker
TOO_LONG = re.compile(r"context_length_exceeded|maximum context length|context (size|window|length)|too many tokens", re.I)


class _Passing(Exception):
    """Something that asking again may mend."""

    def __init__(self, error: ModelError, after_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error, self.after_s = error, after_s


class _Wait(wait_base):
    """What the server asked for, else exponential with full jitter.

    Source: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    def __init__(self) -> None:
        self._jitter = wait_random_exponential(multiplier=0.25, max=LONGEST_WAIT_S)

    def __call__(self, retry_state: RetryCallState) -> float:
        error = retry_state.outcome.exception() if retry_state.outcome else None
        if isinstance(error, _Passing) and error.after_s is not None:
            return error.after_s
        return float(self._jitter(retry_state))


class HttpModel:
    """A Model behind `/chat/completions`.

    Args:
        base_url: OPENAI_BASE_URL when left out, else OpenAI's.
        api_key: OPENAI_API_KEY when left out; only OpenAI itself insists on one.
        tries: attempts within one step, as long as the waits between them stay under 5 s.

    Raises:
        ConfigError: OpenAI's own server and no key.
    """

    def __init__(
        self, *, base_url: str | None = None, api_key: str | None = None, timeout_s: float = 600.0, tries: int = 5,
        connections: int = 1000,
    ) -> None:  # fmt: skip
        self.base_url = (base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI).rstrip("/")
        key = api_key or os.environ.get("OPENAI_API_KEY", "")
        if not key and self.base_url == OPENAI:
            raise ConfigError(
                "there is no OPENAI_API_KEY in the environment; set it, or set OPENAI_BASE_URL to a server that needs none"
            )
        self._url = f"{self.base_url}/chat/completions"
        self._headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        self._timeout_s, self._tries, self._connections = timeout_s, tries, connections
        self._sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, aiohttp.ClientSession] = WeakKeyDictionary()

    async def ask(self, prompt: Prompt, on_token: Callable[[str], None] | None = None) -> Answer:
        """See ports.Model."""
        sent = body(prompt, stream=on_token is not None)
        try:
            return await self._once(prompt, sent, on_token)  # nearly always enough, and tenacity is not free
        except _Passing as first:
            self._hand_over(first)
            failed = first
        await asyncio.sleep(failed.after_s if failed.after_s is not None else 0.1)
        try:
            async for attempt in AsyncRetrying(
                stop=stop_after_attempt(max(1, self._tries - 1)), wait=_Wait(), reraise=True,
                retry=retry_if_exception_type(_Passing),
            ):  # fmt: skip
                with attempt:
                    try:
                        return await self._once(prompt, sent, on_token)
                    except _Passing as e:
                        self._hand_over(e)
                        raise
        except _Passing as e:
            raise RetryLater(ModelError(f"{e.error.message} ({self._tries} tries)"), LONGEST_WAIT_S) from None
        raise AssertionError("unreachable")

    def _hand_over(self, failed: _Passing) -> None:
        """A long wait becomes the journal's."""
        if failed.after_s is not None and failed.after_s > LONGEST_WAIT_S:
            raise RetryLater(failed.error, failed.after_s) from None

    async def close(self) -> None:
        """See ports.Model."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()

    def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        session = self._sessions.get(loop)
        if session is None or session.closed:
            session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=60),
                timeout=aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=10),
                auto_decompress=True, cookie_jar=aiohttp.DummyCookieJar(),
            )  # fmt: skip
            self._sessions[loop] = session
        return session

    async def _once(self, prompt: Prompt, sent: bytes, on_token: Callable[[str], None] | None) -> Answer:
        said_before = False
        try:
            async with self._session().post(self._url, data=sent, headers=self._headers) as response:
                if response.status != 200:
                    raise self._refusal(prompt, response, (await response.read()).decode(errors="replace"))
                if on_token is None:
                    return self._whole(await response.read())
                assembly = Assembly()
                async for piece in _pieces(response):
                    text = assembly.add(piece)
                    if text:
                        said_before = True
                        on_token(text)
                if assembly.finish is None:
                    raise _Passing(ModelError(f"the stream from {self.base_url} ended in the middle of an answer"))
                return assembly.answer()
        except _Passing as e:
            if said_before:  # a new attempt of the step retracts what was said
                raise RetryLater(e.error, 0.0) from None
            raise
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as e:
            error = ModelError(_unreachable(self.base_url, e))
            if said_before:
                raise RetryLater(error, 0.0) from None
            raise _Passing(error) from None

    def _whole(self, raw: bytes) -> Answer:
        try:
            return answer_of(loads(raw))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            shown = raw[:200].decode(errors="replace")
            raise ModelError(
                f"{self.base_url} answered what is no chat completion: {shown!r}; is it an OpenAI-compatible server?"
            ) from None

    def _refusal(self, prompt: Prompt, response: aiohttp.ClientResponse, text: str) -> Exception:
        status, said = response.status, _said(text)
        if status in (401, 403):
            return ModelRefused(f"{self.base_url} refused the key ({status}: {said}); check OPENAI_API_KEY")
        if status == 404:
            return ModelRefused(f"{self.base_url} has no model {prompt.model!r} (404: {said}); check its name and the URL")
        if status in (400, 413) and TOO_LONG.search(text):
            return ContextTooLong(f"the prompt is longer than {prompt.model!r} takes: {said}; send less, or a model with more context")
        if status == 429 and "insufficient_quota" in text:
            return ModelRefused(f"{self.base_url} says that the account's quota is used up: {said}")
        if status in (408, 409, 429) or status >= 500:
            return _Passing(ModelError(f"{self.base_url} answered {status}: {said}"), _retry_after(response.headers.get("Retry-After")))
        return ModelRefused(f"{self.base_url} refused the request ({status}): {said}")


async def _pieces(response: aiohttp.ClientResponse) -> Any:
    """The JSON pieces of a server-sent event stream.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
    """
    async for line in response.content:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            yield loads(data)
        except ValueError:
            raise _Passing(ModelError(f"the stream is not JSON: {data[:200].decode(errors='replace')!r}")) from None


def _retry_after(header: str | None) -> float | None:
    """Seconds, from seconds or an HTTP date. Source: RFC 9110, section 10.2.3."""
    if not header:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def _said(text: str) -> str:
    """The server's own sentence."""
    try:
        error = loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)[:500]
    except (ValueError, KeyError, TypeError):
        return text[:200].strip() or "no reason given"


def _unreachable(url: str, error: Exception) -> str:
    reason = str(error) or type(error).__name__
    return f"no model answers at {url} ({reason}); start the server, or set OPENAI_BASE_URL to the one you mean"
