"""What a device's worker does besides answering: the embed steps of ingests, by an encoder beside the engine."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

from agentmesh.boot import load_crew
from agentmesh.crew import Crew
from agentmesh.errors import ConfigError
from agentmesh.queue import EMBED, Queue, Suspects

log = logging.getLogger("agentmesh.gpu")

RAG = "agentmesh.rag.ingest"


def encoder_of(queues: Iterable[Queue]) -> str:
    """The encoder that these queues' processes run beside their model; "" where they run none.

    Raises:
        ConfigError: they name several.
    """
    named = sorted({q.embed for q in queues if q.embed})
    if len(named) > 1:
        raise ConfigError(
            f"queues of one model name the encoders {', '.join(named)}, and the same processes serve them; name one"
        )
    return named[0] if named else ""


def taken_by(crews: Iterable[Crew], only: Sequence[str] = ()) -> list[str]:
    """The broker's queues that the workers of these crews' queues take from: their own, and that of ingests' embed steps."""
    found = list(crews)
    return [q for crew in found for q in crew.broker_queues(only)] + embed_queues(found, only)


def embed_queues(crews: Iterable[Crew], only: Sequence[str] = (), *, suspects: Suspects = "too") -> list[str]:
    """The broker's queue of embed steps, and the one of its suspects, where a queue of these crews names an encoder."""
    served = [crew.queues[q] for crew in crews for q in crew.queues_in("device", only)]
    return load_crew(RAG).broker_queues([EMBED], suspects=suspects) if any(q.embed for q in served) else []


def prepared(queues: Iterable[Queue], hopeless: Callable[[Exception], None]) -> list[Crew]:
    """Load the encoder of these queues and let it claim its memory, before an engine takes what is free.

    Answers the crew whose embed steps the process takes then; [] where the queues name no encoder.

    Raises:
        ConfigError: it is not here, or there is no memory for it.
    """
    name = encoder_of(queues)
    if not name:
        return []
    began = time.monotonic()
    # no memory of the device is kept for others that an ingest may name
    encoder: Any = import_module("agentmesh.rag.embed").embedder(name, alone=True)
    encoder.prepare(hopeless=hopeless)
    log.info("%s is loaded in %.1f s, for the embed steps of ingests", name, time.monotonic() - began)
    return [load_crew(RAG)]
