"""Each protection of the protocol is taken out in turn; the simulation must see it within 200 seeds."""

from collections.abc import Callable
from typing import Any

import pytest

from agentmesh.journal import maintenance, protocol, quarantine, transaction
from agentmesh.journal.transaction import Transaction
from agentmesh.testing.oracle import Violation
from agentmesh.testing.simulation import Faults, simulate

Plant = Callable[[pytest.MonkeyPatch], Faults]


def no_fence(patch: pytest.MonkeyPatch) -> Faults:
    """Any commit under any fence is taken, also of a step that has ended."""
    patch.setattr(protocol, "same_fence", lambda rec, fence: True)

    def commit(s: Transaction, a: dict[str, Any]) -> Any:
        _, run, key = protocol.split_unit(a["unit"])
        if isinstance(s.rec(run, key), str) and s.is_open(run) and a["how"] == "done":
            s.event(run, a["event"])
        return protocol.commit(s, a)

    patch.setitem(maintenance.ALL_VERBS, "commit", commit)
    return Faults()


def no_outbox(patch: pytest.MonkeyPatch) -> Faults:
    """A message is sent and nothing remembers it."""
    enqueue = Transaction.enqueue

    def forgetful(self: Transaction, unit: str, run: str, key: str, rec: dict[str, Any]) -> None:
        enqueue(self, unit, run, key, rec)
        self.t.zrem(f"q:{rec['q']}", unit)

    patch.setattr(Transaction, "enqueue", forgetful)
    return Faults()


def no_sweeper(patch: pytest.MonkeyPatch) -> Faults:
    """Nobody looks after what is lost or due."""
    patch.setitem(maintenance.ALL_VERBS, "sweep", lambda s, a: ({"ok": 1, "count": 0}, []))
    return Faults()


def counter_instead_of_set(patch: pytest.MonkeyPatch) -> Faults:
    """The join's count also goes down when a commit is refused."""

    def commit(s: Transaction, a: dict[str, Any]) -> Any:
        head, lines = protocol.commit(s, a)
        _, run, key = protocol.split_unit(a["unit"])
        if head.get("no") == "stale" or head.get("again"):
            for first, g in list(s.t.hashes[f"ga:{run}"].items()):
                if int(first) <= int(key) <= g["last"] and s.is_open(run):
                    s.end_member(run, int(first), int(key), True)
        return head, lines

    patch.setitem(maintenance.ALL_VERBS, "commit", commit)
    return Faults()


def dispatch_only_the_unplanned(patch: pytest.MonkeyPatch) -> Faults:
    """A step is sent when it is planned and never again."""
    patch.setattr(maintenance, "resend_entry", lambda s, unit, run, key, rec: None)
    patch.setattr(Transaction, "give_back", lambda self, unit, run, key, rec, crashed: self.leave(unit, rec))
    return Faults()


def no_version_check(patch: pytest.MonkeyPatch) -> Faults:
    """What comes next is written although somebody wrote in between: what the writer saw is not what is there."""

    def versionless(verb: Callable[[Transaction, dict[str, Any]], Any]) -> Callable[[Transaction, dict[str, Any]], Any]:
        def do(s: Transaction, a: dict[str, Any]) -> Any:
            run = a.get("run") or protocol.split_unit(a["unit"])[1]
            return verb(s, {**a, "version": s.t.length(f"ev:{run}")})

        return do

    patch.setitem(maintenance.ALL_VERBS, "commit", versionless(protocol.commit))
    patch.setitem(maintenance.ALL_VERBS, "plan", versionless(protocol.plan))
    return Faults()


def claim_without_token(patch: pytest.MonkeyPatch) -> Faults:
    """A client that asks again is taken for another worker, and given the step a second time."""

    def claim(s: Transaction, a: dict[str, Any]) -> Any:
        _, run, key = protocol.split_unit(a["unit"])
        rec = s.rec(run, key)
        if isinstance(rec, dict) and rec["st"] == "leased":
            s.give_back(a["unit"], run, key, rec, crashed=False)
        return protocol.claim(s, a)

    patch.setitem(maintenance.ALL_VERBS, "claim", claim)
    return Faults(tokens=False, crash=0, zombie=0)


def child_that_leaves_its_parent(patch: pytest.MonkeyPatch) -> Faults:
    """A child's end says nothing to its parent."""
    patch.setattr(Transaction, "end_delegate", lambda self, run, n, up, ok: None)
    return Faults()


def commit_that_dies_before_its_advance(patch: pytest.MonkeyPatch) -> Faults:
    """The last member's end is written, the body's entry is another act, and the process may die between them."""
    close = Transaction.close

    def half(self: Transaction, run: str, first: int, g: dict[str, Any], why: str) -> None:
        if (self.now + first) % 7 == 0:
            advance, self.advance = self.advance, lambda run: None  # type: ignore[method-assign]
            close(self, run, first, g, why)
            self.advance = advance  # type: ignore[method-assign]
        else:
            close(self, run, first, g, why)

    patch.setattr(Transaction, "close", half)
    return Faults()


def lease_never_renewed(patch: pytest.MonkeyPatch) -> Faults:
    """A long step loses its lease although its worker lives."""
    return Faults(loss=0, repeat=0, crash=0, zombie=0, reply_lost=0, renewing=False)


def no_quarantine(patch: pytest.MonkeyPatch) -> Faults:
    """A step that kills its process is given to the next one, for ever."""
    patch.setattr(quarantine, "POISON_DEATHS", 10**6)
    return Faults()


MUTANTS: list[Plant] = [

    no_quarantine, no_fence, no_outbox, no_sweeper, counter_instead_of_set, dispatch_only_the_unplanned, no_version_check,
    claim_without_token, child_that_leaves_its_parent, commit_that_dies_before_its_advance, lease_never_renewed,
]  # fmt: skip


@pytest.mark.parametrize("plant", MUTANTS, ids=lambda plant: plant.__name__)
def test_the_simulation_catches(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    faults = plant(monkeypatch)
    for seed in range(200):
        try:
            simulate(seed, faults)
        except Violation:
            return
    pytest.fail(f"200 seeds went well without: {plant.__doc__}")


def test_the_constants_are_the_scripts_too() -> None:
    lua = __import__("agentmesh.journal.redis", fromlist=["script"]).script("sweep")[0]
    values = f"{transaction.RESEND_MS}, {transaction.VERSION_TRIES}, {transaction.VERSION_WAIT_MS}, {maintenance.SWEEPER_LOCK_MS}"
    said = f"RESEND_MS, VERSION_TRIES, VERSION_WAIT_MS, SWEEPER_MS = {values}"
    assert said in lua
