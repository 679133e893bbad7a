"""Any OpenAI-compatible `/embeddings` over HTTP: OpenAI, vLLM, TEI, Ollama, llama-server.

The standard library's client, one connection a thread: an ingest step calls from a thread, and a search waits anyway.
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

LONGEST_WAIT_S = 5.0  # a longer one is the caller's: it holds no worker
BATCH_TEXTS, BATCH_CHARACTERS = 128, 200_000  # OpenAI takes 2,048 texts and 300,000 tokens


class HttpEmbedder(BaseEmbedder):
    """Vectors from a server; the key comes from OPENAI_API_KEY alone.

    Args:
        name: `openai:MODEL` (OPENAI_BASE_URL, else OpenAI's own), or the server's URL followed by `#MODEL`.
        prefixes: before a query and before a document; what models of that name were trained with when left out.
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
        self._mine = threading.local()

    def close(self) -> None:
        """Ends this thread's connection; the next call makes another."""
        if getattr(self._mine, "link", None) is not None:
            self._mine.link.close()
            self._mine.link = None

    def embed(self, texts: list[str]) -> Any:
        """See BaseEmbedder."""
        rows: list[list[float]] = []
        for batch in _batches(texts):
            for attempt in Retrying(
                stop=stop_after_attempt(self._tries), wait=_wait_s, retry=retry_if_exception(_passing), reraise=True
            ):
                with attempt:
                    rows += self._once(batch)
        return rows

    def _once(self, batch: list[str]) -> list[list[float]]:
        body = json.dumps({"model": self.model or "default", "input": batch, "encoding_format": "float"}).encode()
        headers = {"Content-Type": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        try:
            link = self._link()
            link.request("POST", f"{self._address.path}/embeddings", body, headers)
            answer = link.getresponse()
            raw = answer.read()
        except (OSError, HTTPException) as e:
            self.close()
            reason = str(e) or type(e).__name__
            raise EmbedderError(
                f"no embedding server responds at {self.base_url} ({reason})",
                hint="start the server, or correct its URL",
                after_s=0.0,
            ) from None
        if answer.status != 200:
            raise self._refusal(answer.status, raw.decode(errors="replace"), answer.headers.get("Retry-After"))
        try:
            data = sorted(json.loads(raw)["data"], key=lambda d: d["index"])
            return [list(map(float, d["embedding"])) for d in data]
        except (ValueError, KeyError, TypeError):
            shown = raw[:100].decode(errors="replace")
            raise EmbedderError(
                f"{self.base_url} did not answer with embeddings: {shown!r}", hint="is it an OpenAI-compatible server?"
            ) from None

    def _link(self) -> HTTPConnection:
        # a forked child must not talk on its parent's connection
        link, pid = getattr(self._mine, "link", None), os.getpid()
        if link is None or self._mine.pid != pid:
            kind = HTTPSConnection if self._address.scheme == "https" else HTTPConnection
            link = kind(self._address.hostname or "", self._address.port, timeout=self._timeout_s)
            self._mine.link, self._mine.pid = link, pid
        made: HTTPConnection = link
        return made

    def _refusal(self, status: int, text: str, retry_after: str | None) -> EmbedderError:
        said = " ".join(text.split())[:200]
        if self._key:
            said = said.replace(self._key, "…")
        if status in (401, 403):
            return EmbedderError(f"{self.base_url} refused the key ({status}: {said})", hint="check OPENAI_API_KEY")
        if status == 404:
            return EmbedderError(
                f"{self.base_url} has no embedding model {self.model or 'default'!r} (404: {said})",
                hint="write its name behind the URL, like 'http://localhost:8000/v1#NAME'",
            )
        if status >= 500 or (status in (408, 409, 429) and "insufficient_quota" not in text):
            return EmbedderError(f"{self.base_url} answered {status}: {said}", after_s=_seconds(retry_after))
        return EmbedderError(f"{self.base_url} refused the request ({status}: {said})")


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


def _passing(error: BaseException) -> bool:
    return isinstance(error, EmbedderError) and error.after_s is not None and error.after_s <= LONGEST_WAIT_S


_jitter = wait_random_exponential(multiplier=0.5, max=LONGEST_WAIT_S)


def _wait_s(state: RetryCallState) -> float:
    """What the server asked for, else exponential with full jitter."""
    error = state.outcome.exception() if state.outcome else None
    return (error.after_s if isinstance(error, EmbedderError) else None) or float(_jitter(state))


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, float(retry_after or 0.0))
    except ValueError:  # a date: nobody sends one here
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
