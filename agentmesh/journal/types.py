"""The values that a Journal takes and answers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from agentmesh.journal.events import Event, StepPlanned
from agentmesh.journal.run_spec import RunSpec

# ---- the journal -------------------------------------------------------------------------------
# A unit is what a message may ask a worker to do: "s|RUN|N" a step, "a|RUN" advancing a run,
# "f|RUN" reporting a run's end to a user's canvas, "g|RUN|N" a gather's deadline (a timer only).


def step_unit(run_id: str, n: int) -> str:
    """The unit of a step."""
    return f"s|{run_id}|{n}"


def advance_unit(run_id: str) -> str:
    """The unit that advances a run."""
    return f"a|{run_id}"


def finish_unit(run_id: str) -> str:
    """The unit that reports a run's end to a user's canvas."""
    return f"f|{run_id}"


def original_run_id(run_id: str) -> str:
    """The run's id; of a retry (`tea-7~2`) and of the runs below it, the id that the first run has."""
    root, below, rest = run_id.partition("/")
    return root.partition("~")[0] + below + rest


@dataclass(frozen=True, slots=True)
class TaskMessage:
    """A rendered message: the broker's list and the text around a delivery tag that the store fills in."""

    queue: str
    head: str
    tail: str

    def packed(self) -> str:
        """One string, as entries keep it."""
        return f"{self.queue}\0{self.head}\0{self.tail}"


@dataclass(frozen=True, slots=True)
class NewRun:
    """A run to begin: its id, what it is, and the messages that its entries send.

    Args:
        wire: the message that advances the run, rendered once.
        finish: the message that reports its end to a user's canvas, or None.
    """

    run_id: str
    spec: RunSpec
    wire: TaskMessage | None = None
    finish: TaskMessage | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step to plan.

    Args:
        event: its StepPlanned, whose lane says who ends it.
        state: where it stands first: `queued` is sent now, `held` waits for a person, `due` for `due_in_ms`, `child` has
            a run of its own, `ended` failed before it began (`end` says why).
        limited: it is claimed only within the limits of its run.
        once: delivery at most once; `reconcile` says that the step can tell what happened.
    """

    event: StepPlanned
    state: Literal["queued", "held", "due", "child", "ended"]
    wire: TaskMessage | None = None
    due_in_ms: int = 0
    child: NewRun | None = None
    limited: bool = False
    once: bool = False
    reconcile: bool = False
    held: str = ""
    end: Event | None = None


@dataclass(frozen=True, slots=True)
class GatherPlan:
    """Which steps are joined: `first` to `last`, `need` successes; `everyone` waits for all ends."""

    first: int
    last: int
    need: int
    everyone: bool = False
    deadline_in_ms: int = 0
    window: int = 0


@dataclass(frozen=True, slots=True)
class NextSteps:
    """What comes next by a replay: steps to plan, perhaps as a gather, or the end of the run. Empty: nothing new.

    Args:
        up: of a child's end, the event that its parent gets in the same transaction.
    """

    plans: Sequence[StepPlan] = ()
    gather: GatherPlan | None = None
    end: Event | None = None
    up: Event | None = None


@dataclass(frozen=True, slots=True)
class RetryImport:
    """What run `new` begins with of an ended run's journal.

    Args:
        events: with their old times; the first is the new run's RunStarted.
        retained: steps that have ended and need no planning.
        interrupted: queued steps without an end, and their digests; one that is at most once and was begun is in doubt.
    """

    old: str
    new: str
    events: Sequence[Event]
    retained: Sequence[int]
    interrupted: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Claimed:
    """The entry is leased under `fence`; `events` are those after the version that the worker had.

    Args:
        in_doubt: an at-most-once step that was begun before and cut off.
        limit: which limit the run has reached; the run is to end with it.
    """

    fence: int
    events: Sequence[Event]
    version: int
    attempt: int = 1
    in_doubt: bool = False
    limit: str = ""


@dataclass(frozen=True, slots=True)
class Refused:
    """Not done, and why: busy, later, held, in_doubt, ended, unknown, cancelled, stale, conflict, exists, run."""

    why: str
    detail: str = ""
    events: Sequence[Event] = ()
    version: int = 0


@dataclass(frozen=True, slots=True)
class Accepted:
    """Written.

    Args:
        version: the journal's length now.
        conflict: another writer wrote in between.
        is_repeat: the same call was made before; nothing was written now.
    """

    version: int = 0
    conflict: bool = False
    is_repeat: bool = False


@dataclass(frozen=True, slots=True)
class OutboxMessage:
    """A message for a broker that is not the journal's own server."""

    queue: str
    body: str


@dataclass(frozen=True, slots=True)
class RunHead:
    """A run at a glance; totals are of the whole tree and kept at its root. Times are the store's, 0 is not yet."""

    id: str
    status: Literal["open", "done", "failed", "cancelled"]
    agent: str
    crew: str
    version: str
    started_ms: int
    ended_ms: int
    turns: int
    tokens: int
    cost_usd: float
    refused: int

    @classmethod
    def of(cls, run_id: str, head: Mapping[str, Any]) -> "RunHead":
        """From the store's hash, whose values may be text."""

        def number(name: str) -> float:
            return float(head.get(name) or 0)

        return cls(
            run_id, head["status"], head["agent"], head["crew"], head["version"], int(number("started")),
            int(number("ended")), int(number("turns")), int(number("tokens")), number("usd"), int(number("refused")),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class WaitingEntry:
    """An entry that waits.

    Args:
        key: the step's number, or `a`: the run itself.
        why: approve, in_doubt, quarantined, limit:…, version:…, replay:…
        name: of the step's tool or agent; empty for a run.
        detail: what its plan says to a person: the question, or a held tool's arguments.
    """

    run_id: str
    key: str
    why: str
    name: str = ""
    detail: Any = None


@dataclass(frozen=True, slots=True)
class OpenEntries:
    """The entries of a run's tree.

    Args:
        moving: how many are queued, leased or due without a reason to wait.
        waiting: those that wait for a person, a limit or another worker.
    """

    moving: int
    waiting: Sequence[WaitingEntry]


@dataclass(frozen=True, slots=True)
class JournalCounts:
    """What a journal holds now, of all crews.

    Args:
        queues: entries that wait for a worker, by broker queue.
        expired: leases past their deadline. late: timers past their time. lost: queued entries whose message must be
            lost (architecture.md, law 6). A sweep moves all three, so many of them for long mean that no worker sweeps.
    """

    open_runs: int
    leased: int
    due: int
    held: int
    queues: Mapping[str, int]
    expired: int = 0
    late: int = 0
    lost: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """A live piece of a step's attempt: text, thought (reasoning), progress, or `retract`: what it streamed before is void."""

    run_id: str
    n: int
    attempt: int
    kind: Literal["text", "thought", "progress", "retract"]
    text: str
