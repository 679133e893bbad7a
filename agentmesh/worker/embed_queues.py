"""What a device's worker does besides answering: the embed steps of ingests, by an encoder beside the engine."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import EMBED_QUEUE, Queue, Suspects
from agentmesh.errors import ConfigError
from agentmesh.runtime.crew_file import load_crew

log = logging.getLogger("agentmesh.gpu")

RAG = "agentmesh.rag.ingest"


def encoder_name(queues: Iterable[Queue]) -> str:
    """The encoder that these queues' processes run beside their model; "" where they run none.

    Raises:
        ConfigError: they name several.
    """
    encoders = sorted({q.embed for q in queues if q.embed})
    if len(encoders) > 1:
        raise ConfigError(
            f"queues of one model name the encoders {', '.join(encoders)}, and the same processes serve them",
            hint="name one",
        )
    return encoders[0] if encoders else ""


def consumed_queues(crews: Iterable[Crew], only: Sequence[str] = ()) -> list[str]:
    """The broker's queues that the workers of these crews' queues take from: their own, and that of ingests' embed steps."""
    crews_ = list(crews)
    return [q for crew in crews_ for q in crew.queues.broker_names(only)] + embed_queues(crews_, only)


def embed_queues(crews: Iterable[Crew], only: Sequence[str] = (), *, suspects: Suspects = "include") -> list[str]:
    """The broker's queue of embed steps, and the one of its suspects, where a queue of these crews names an encoder."""
    served = [crew.queues[q] for crew in crews for q in crew.queues.of_pool("device", only)]
    return load_crew(RAG).queues.broker_names([EMBED_QUEUE], suspects=suspects) if any(q.embed for q in served) else []


def prepare_encoder(queues: Iterable[Queue], on_fatal: Callable[[Exception], None]) -> list[Crew]:
    """Load the encoder of these queues and let it claim its memory, before an engine takes what is free.

    Answers the crew whose embed steps the process takes then; [] where the queues name no encoder.

    Raises:
        ConfigError: it is not here, or there is no memory for it.
    """
    name = encoder_name(queues)
    if not name:
        return []
    began = time.monotonic()
    # no memory of the device is kept for others that an ingest may name
    encoder: Any = import_module("agentmesh.rag.embedders").embedder(name, single_process=True)
    encoder.prepare(on_fatal=on_fatal)
    log.info("%s is loaded in %.1f s, for the embed steps of ingests", name, time.monotonic() - began)
    return [load_crew(RAG)]
