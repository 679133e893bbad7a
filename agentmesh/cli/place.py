"""Where a command finds its runs: settings, the embedded Valkey or a named broker, and a client over the journal."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentmesh.boot import open_journal
from agentmesh.celery.loop import drive
from agentmesh.celery.valkey import EmbeddedValkey
from agentmesh.config import Config, load
from agentmesh.errors import RunError
from agentmesh.journal import Journal
from agentmesh.run import Client, Run


@dataclass(slots=True)
class Place:
    """Settings and an open journal; `close` gives both back."""

    config: Config
    journal: Journal
    valkey: EmbeddedValkey | None

    @classmethod
    def open(cls, *, broker: str = "", model: str = "", file: Path | None = None) -> "Place":
        """From the settings in force here."""
        config = load(file=file, broker=broker or None, model=model or None)
        return cls(*open_journal(config))

    @property
    def client(self) -> Client:
        """For handles; it needs no crew's code."""
        return Client(crew=None, journal=self.journal, drive=drive)

    def run(self, run_id: str) -> Run[Any]:
        """A handle to a run that exists.

        Raises:
            RunError: it does not.
        """
        if drive(self.journal.head(run_id)) is None:
            where = self.config.broker if self.valkey is None else str(self.config.home)
            raise RunError(
                f"there is no run {run_id!r} in {where}; `agentmesh runs ls` lists those that are", run_id=run_id
            )
        return Run(run_id, self.client)

    def close(self) -> None:
        """Leave."""
        drive(self.journal.close())
        if self.valkey is not None:
            self.valkey.leave()
