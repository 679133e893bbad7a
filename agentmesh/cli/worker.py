"""`agentmesh worker`: supervised worker processes for one or more crews; what a dead one held is given back at once."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

from agentmesh.boot import load_crew, open_journal, place
from agentmesh.celery.loop import drive
from agentmesh.celery.supervise import Supervisor
from agentmesh.cli.child import spec_of
from agentmesh.config import Config, load
from agentmesh.errors import ServiceDown

AGAIN_S = 0.2
STOPPED = -15  # killed by our own SIGTERM before it could answer it


def giver_back(config: Config, queues: list[str]) -> Callable[[str, int], None]:
    """Gives back what a dead worker held: its leases at once, and what it had taken from the broker at the next sweep.

    A store that is away as well is asked again for as long as the leases may run.
    """

    def give_back(worker: str, code: int) -> None:
        until = time.monotonic() + config.lease_s
        while True:
            try:
                _give_back(worker, code)
                return
            except (ServiceDown, OSError):
                if time.monotonic() > until:
                    raise
                time.sleep(AGAIN_S)

    def _give_back(worker: str, code: int) -> None:
        _, journal, valkey = open_journal(config)
        try:
            drive(journal.release(worker, crashed=code not in (0, STOPPED), queues=queues))
        finally:
            drive(journal.close())
            if valkey is not None:
                valkey.leave()

    return give_back


def run_workers(
    crews: list[str], *, queues: list[str], concurrency: int, processes: int, broker: str, model: str, file: Path | None
) -> int:
    """Supervise until stopped."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    config = load(file=file, broker=broker or None, model=model or None)
    loaded = [load_crew(path) for path in crews]  # what is wrong with a file is said once, here
    served = [q for crew in loaded for q in crew.broker_queues(queues)]
    config, valkey = place(config)
    where = "the embedded Valkey" if valkey is not None else config.broker
    print(f"crews {', '.join(c.name for c in loaded)} · queues {', '.join(served)} · {processes} × {concurrency or 'as declared'} "
          f"· broker {where} · lease {config.lease_s:g} s · drain {config.drain_s:g} s", flush=True)  # fmt: skip
    argv = spec_of(config, crews=crews, queues=queues, concurrency=concurrency)
    supervisor = Supervisor([argv] * processes, on_death=giver_back(config, served), drain_s=config.drain_s + 2)
    try:
        return supervisor.run()
    finally:
        if valkey is not None:
            valkey.leave()
