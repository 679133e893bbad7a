"""The audited journal keeps the contract of journals."""

import pytest
from audit_journal import AuditJournal

from agentmesh.testing import ValkeyServer
from agentmesh.testing.contracts import LEASE_MS, JournalContract
from agentmesh.testing.servers import running_server


@pytest.fixture(scope="module")
def valkey():
    """A Valkey of the module's own."""
    with running_server(ValkeyServer) as server:
        yield server


class TestAuditJournal(JournalContract):
    """Over an empty Valkey each time."""

    @pytest.fixture(autouse=True)
    def places(self, valkey, tmp_path, monkeypatch):
        """Where it keeps runs, and where it writes what people decide."""
        valkey.flush()
        self.url, self.log = f"audited+{valkey.url}", tmp_path / "audit.jsonl"
        monkeypatch.setenv("AUDIT_LOG", str(self.log))

    def make(self):
        """As its scheme makes it."""
        return AuditJournal(self.url, ttl_ms=LEASE_MS)

    def test_a_cancellation_is_written_down(self):
        """As one line with the run."""
        self.test_a_cancelled_run_takes_no_more()
        (line,) = self.log.read_text().splitlines()
        assert '"run": "r"' in line
        assert "RunCancelled" in line
