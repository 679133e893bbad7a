"""Any OpenAI-compatible `/embeddings` over HTTP: OpenAI, vLLM, TEI, Ollama, llama-server.

Uses the standard library's client, with one connection in each thread: steps and searches call it from threads.
"""

import json
import os
import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt
from tenacity.wait import wait_random_exponential

from agentmesh.address import server_address
from agentmesh.errors import ConfigError, EmbedderError
from agentmesh.rag.embedders.base import BaseEmbedder, trained_prefixes

MAX_WAIT_S = 5.0  # for a longer one the step is retried, which holds no worker
BATCH_TEXTS, BATCH_CHARACTERS = 128, 200_000  # of one request; OpenAI takes 2,048 texts and 300,000 tokens


class HttpEmbedder(BaseEmbedder):
    """Vectors from a server; the key comes from OPENAI_API_KEY alone.

    Args:
        name: `openai:MODEL` (OPENAI_BASE_URL, else OpenAI's own), or the server's URL followed by `#MODEL`.
        prefixes: before a query and before a document; what models of that name were trained with, when left out.
        tries: attempts of one request, as long as the waits between them stay under 5 s.

    Raises:
        ConfigError: the URL is not a URL, or OpenAI's own server and no key.
    """

    remote = True

    def __init__(
        self, name: str, *, prefixes: tuple[str, str] | None = None, timeout_s: float = 60.0, tries: int = 4
    ) -> None:  # fmt: skip
        url, _, model = ("", "", name.removeprefix("openai:")) if name.startswith("openai:") else name.partition("#")
        super().__init__(model)
        self.name, self._timeout_s, self._tries = name, timeout_s, max(1, tries)
        self.prefixes = prefixes or trained_prefixes(model)
        self.base_url, self._key = server_address(url, set_by="the embedder's URL" if url else "OPENAI_BASE_URL")
        self._address = urlsplit(self.base_url)
        self._thread = threading.local()

    def close(self) -> None:
        """Close this thread's connection; the next call opens another."""
        if getattr(self._thread, "connection", None) is not None:
            self._thread.connection.close()
            self._thread.connection = None

    def embed(self, texts: list[str]) -> Any:
        """See BaseEmbedder."""
        rows: list[list[float]] = []
        for batch in _batches(texts):
            for attempt in Retrying(
                stop=stop_after_attempt(self._tries),
                wait=_wait_s,
                retry=retry_if_exception(_is_transient),
                reraise=True,
            ):
                with attempt:
                    rows += self._request(batch)
        return rows

    def _request(self, batch: list[str]) -> list[list[float]]:
        body = json.dumps({"model": self.model or "default", "input": batch, "encoding_format": "float"}).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            connection = self._connection()
            connection.request("POST", f"{self._address.path}/embeddings", body, headers)
            response = connection.getresponse()
            raw = response.read()
        except (OSError, HTTPException) as e:
            self.close()
            reason = str(e) or type(e).__name__
            raise EmbedderError(
                f"no embedding server responds at {self.base_url} ({reason})",
                hint="start the server, or correct its URL",
                after_s=0.0,
            ) from None
        if response.status != 200:
            raise self._refusal(response.status, raw.decode(errors="replace"), response.headers.get("Retry-After"))
        try:
            data = sorted(json.loads(raw)["data"], key=lambda d: d["index"])
            return [list(map(float, d["embedding"])) for d in data]
        except (ValueError, KeyError, TypeError):
            excerpt = raw[:100].decode(errors="replace")
            raise EmbedderError(
                f"{self.base_url} did not answer with embeddings: {excerpt!r}",
                hint="use the URL of an OpenAI-compatible server",
            ) from None

    def _connection(self) -> HTTPConnection:
        """This thread's connection; after a fork a new one, for the parent talks on the old one."""
        existing: HTTPConnection | None = getattr(self._thread, "connection", None)
        if existing is not None and self._thread.pid == os.getpid():
            return existing
        kind = HTTPSConnection if self._address.scheme == "https" else HTTPConnection
        connection = kind(self._address.hostname or "", self._address.port, timeout=self._timeout_s)
        self._thread.connection, self._thread.pid = connection, os.getpid()
        return connection

    def _refusal(self, status: int, text: str, retry_after: str | None) -> EmbedderError:
        reason = " ".join(text.split())[:200]
        if self._key:
            reason = reason.replace(self._key, "…")
        if status in (401, 403):
            return EmbedderError(f"{self.base_url} refused the key ({status}: {reason})", hint="check OPENAI_API_KEY")
        if status == 404:
            return EmbedderError(
                f"{self.base_url} has no embedding model {self.model or 'default'!r} (404: {reason})",
                hint="write its name after the URL, like 'http://localhost:8000/v1#NAME'",
            )
        if status >= 500 or (status in (408, 409, 429) and "insufficient_quota" not in text):
            return EmbedderError(f"{self.base_url} answered {status}: {reason}", after_s=_seconds(retry_after))
        return EmbedderError(f"{self.base_url} refused the request ({status}: {reason})")


def openai(model: str) -> HttpEmbedder:
    """The embedder `openai:MODEL`."""
    if not model:
        raise ConfigError("the embedder 'openai:' names no model", hint="write it like 'openai:text-embedding-3-small'")
    return HttpEmbedder(f"openai:{model}")


def http(rest: str) -> HttpEmbedder:
    """The embedder `http://HOST/v1#MODEL`."""
    return HttpEmbedder(f"http:{rest}")


def https(rest: str) -> HttpEmbedder:
    """The embedder `https://HOST/v1#MODEL`."""
    return HttpEmbedder(f"https:{rest}")


def _is_transient(error: BaseException) -> bool:
    return isinstance(error, EmbedderError) and error.after_s is not None and error.after_s <= MAX_WAIT_S


_jitter = wait_random_exponential(multiplier=0.5, max=MAX_WAIT_S)


def _wait_s(state: RetryCallState) -> float:
    """The wait that the server named, else exponential with full jitter."""
    error = state.outcome.exception() if state.outcome else None
    return (error.after_s if isinstance(error, EmbedderError) else None) or float(_jitter(state))


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, float(retry_after or 0.0))
    except ValueError:  # a date, which embedding servers do not send
        return 0.0


def _batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for text in texts:
        if batch and (len(batch) == BATCH_TEXTS or characters + len(text) > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        batch.append(text)
        characters += len(text)
    if batch:
        yield batch
