"""The journal in Redis, with a file of what people decided: `audited+redis://localhost:6379/0`."""

import json
import os
import time
from typing import Any

from agentmesh.journal.redis import RedisJournal
from agentmesh.journal.types import Accepted, Refused


class AuditJournal(RedisJournal):
    """Approvals, denials, cancellations and raised limits are lines of the file that AUDIT_LOG names."""

    def __init__(self, url: str, **settings: Any) -> None:
        super().__init__(url.removeprefix("audited+"), **settings)

    async def signal(self, run_id: str, event: Any) -> Accepted | Refused:
        """See Journal."""
        answer = await super().signal(run_id, event)
        if isinstance(answer, Accepted):
            with open(os.environ.get("AUDIT_LOG", "audit.jsonl"), "a") as file:
                file.write(json.dumps({"at": time.time(), "run": run_id, **event.to_json()}) + "\n")
        return answer
