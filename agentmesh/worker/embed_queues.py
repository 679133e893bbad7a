"""The embed steps of ingests on device workers, whose encoder runs beside the engine."""

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

from agentmesh.definitions.crew import Crew
from agentmesh.definitions.queue import EMBED_QUEUE, DeviceQueue, Suspects
from agentmesh.errors import ConfigError
from agentmesh.runtime.crew_file import load_crew

log = logging.getLogger("agentmesh.gpu")

RAG = "agentmesh.rag.ingest"  # the module of the crew of ingests


def encoder_name(queues: Iterable[DeviceQueue]) -> str:
    """The encoder that the processes of these queues run beside their model; "" for none.

    Raises:
        ConfigError: the queues name several.
    """
    encoders = sorted({q.embed for q in queues if q.embed})
    if len(encoders) > 1:
        raise ConfigError(
            f"queues of one model name the encoders {', '.join(encoders)}, and the same processes serve them",
            hint="write the same `embed` in each",
        )
    return encoders[0] if encoders else ""


def consumed_queues(crews: Iterable[Crew], only: Sequence[str] = ()) -> list[str]:
    """The broker queues that the workers of these crews consume: their own, and that of ingests' embed steps."""
    every_crew = list(crews)
    return [q for crew in every_crew for q in crew.queues.broker_names(only)] + embed_queues(every_crew, only)


def embed_queues(crews: Iterable[Crew], only: Sequence[str] = (), *, suspects: Suspects = "include") -> list[str]:
    """The broker queue of embed steps and that of its suspects, where a queue of these crews names an encoder; else []."""
    embeds = any(queue.embed for crew in crews for queue in crew.queues.on_devices(only))
    return load_crew(RAG).queues.broker_names([EMBED_QUEUE], suspects=suspects) if embeds else []


def prepare_encoder(queues: Iterable[DeviceQueue], on_fatal: Callable[[Exception], None]) -> list[Crew]:
    """Load the encoder of these queues and let it allocate its memory, before an engine takes what is free.

    Returns:
        The crew whose embed steps the process then serves; [] where the queues name no encoder.

    Raises:
        ConfigError: the encoder is not on this machine, or there is not enough memory for it.
    """
    name = encoder_name(queues)
    if not name:
        return []
    started_s = time.monotonic()
    # single: no memory of the device is reserved for other encoders that an ingest may name
    encoder: Any = import_module("agentmesh.rag.embedders").embedder(name, single_process=True)
    encoder.prepare(on_fatal=on_fatal)
    log.info("%s is loaded in %.1f s, for the embed steps of ingests", name, time.monotonic() - started_s)
    return [load_crew(RAG)]
