"""A crew whose device's workers embed too. Their encoder is slow, so that they can be killed while it works.

It writes a byte a batch into `batches` beside its weights.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

from agentmesh import Agent, Context, Crew, DeviceQueue, Queue
from agentmesh.message import user
from agentmesh.rag.ingest import Ingest

ENCODER = os.environ["EMBEDDING_ENCODER"]
SLOW_S = 0.08


class Teller(Agent[int]):
    """Asks its model as often as it is told; answers how many words came."""

    model = "local:tiny"
    options = {"max_tokens": 50, "temperature": 0.7, "seed": 3, "ignore_eos": True}

    def flow(self, task: int, ctx: Context) -> int:
        """All at once."""
        return len(ctx.gather(self.ask([user(f"say {i}")]) for i in range(task)))


def slow_encoder() -> None:
    """In the worker's process alone."""
    from transformers import BertModel

    forward = BertModel.forward

    def slow(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Path(ENCODER, "batches").open("ab") as file:
            file.write(b".")
        time.sleep(SLOW_S)
        return forward(self, *args, **kwargs)

    BertModel.forward = slow  # type: ignore[method-assign]


if "agentmesh.worker.gpu_worker" in " ".join(sys.orig_argv):
    slow_encoder()

crew = Crew(
    Teller(), Ingest(), name="embedding",
    queues=[Queue("main"), DeviceQueue("gpu", model="tiny", embed=f"local:{ENCODER}")],
)  # fmt: skip
