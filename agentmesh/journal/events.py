"""The facts that a journal holds, each in the past tense. Pure values; `at_ms` is the store's time in milliseconds."""

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any, Literal

from agentmesh.journal.run_spec import RunSpec

Lane = Literal["queued", "due", "held", "child"]
# The lanes of the kinds of steps that existed before StepPlanned had a lane.
LANES_BEFORE: Mapping[str, Lane] = {"Sleep": "due", "Approve": "held", "Delegate": "child"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A fact of one run.

    Args:
        line_bytes: its line's size in this process's memory; known once the line was read or written, else 0.
    """

    at_ms: int = field(default=0, compare=False, metadata={"retry": "inherit"})
    line_bytes: int = field(default=0, compare=False, repr=False, metadata={"retry": "reset"})

    def to_json(self) -> dict[str, Any]:
        """`{"e": "StepDone", "n": 3, …}`: the kind and the fields that differ from their defaults. The store adds the time."""
        out: dict[str, Any] = {"e": type(self).__name__}
        for name, default in _defaults(type(self)).items():
            value = getattr(self, name)
            if value != default or default is _REQUIRED:
                out[name] = value
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event, RunSpec):
    """A run began; its payload is the RunSpec, everything that the run is replayed from."""

    @classmethod
    def of(cls, spec: RunSpec) -> "RunStarted":
        """The event of this spec; the store adds its time."""
        return spec if isinstance(spec, cls) else cls(**vars(spec))


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlanned(Event):
    """The flow asked for step `n`.

    Args:
        lane: who ends it: `queued` a worker, `due` the clock, `held` a person, `child` a run of its own.
        digest: of what must not change while the run is open.
        gather: the first step of its gather; 0 is none.
        detail: what a person is shown who must decide about it: the question, or a held tool's arguments.
    """

    n: int
    kind: str
    name: str
    digest: str = ""
    queue: str = ""
    gather: int = 0
    detail: Any = None
    lane: Lane = "queued"

    def to_json(self) -> dict[str, Any]:
        """See Event; a default lane is written too where its absence would mean another lane."""
        out = Event.to_json(self)
        return out | {"lane": self.lane} if self.kind in LANES_BEFORE else out


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone(Event):
    """Step `n` has its value."""

    n: int
    value: Any = None
    usage: Mapping[str, float] = field(default_factory=dict)
    attempt: int = 1
    finish: str = ""  # `length`: the model's answer was cut off at its maximum
    model: str = ""  # of an Ask: which model answered, as `provider:name` or an object's name


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFailed(Event):
    """Step `n` failed for good; `error` is errors.error_to_json's."""

    n: int
    error: Mapping[str, Any]
    usage: Mapping[str, float] = field(default_factory=dict)
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRetried(Event):
    """An attempt at step `n` failed; another follows after `after_ms`.

    Args:
        away: no model server was reachable; the attempt is not counted against `retries`.
    """

    n: int
    error: Mapping[str, Any]
    attempt: int = 1
    after_ms: int = 0
    away: bool = False
    usage: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInDoubt(Event):
    """An at-most-once step was cut off by a crash: it is unknown whether it happened."""

    n: int
    attempt: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResolved(Event):
    """A person decided what became of a step in doubt, quarantined or held: `done`, `failed` or `retry`."""

    n: int
    action: str
    value: Any = None
    by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepQuarantined(Event):
    """Step `n` crashed its process too often; it waits for a person. `n` 0 is the advance of the run."""

    n: int
    crashes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRevived(Event):
    """A person released a held step; `n` 0 is the run itself."""

    n: int
    by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatherClosed(Event):
    """The gather that began with step `first` is closed; the flow sees these members and no others."""

    first: int
    members: list[int] = field(default_factory=list)  # in the order they ended
    why: str = "all"  # all | need | impossible | deadline


@dataclass(frozen=True, slots=True, kw_only=True)
class Approved(Event):
    """A person approved step `n`."""

    n: int
    by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Denied(Event):
    """A person denied step `n`."""

    n: int
    by: str = ""
    reason: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitRaised(Event):
    """A person raised the limits of the run's tree."""

    limits: Mapping[str, Any]
    by: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Woken(Event):
    """The time of step `n`, of lane `due`, has come."""

    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDone(Event):
    """The run has its value."""

    value: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFailed(Event):
    """The run ended with an error."""

    error: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCancelled(Event):
    """Somebody cancelled the run, or a run above it."""

    by: str = ""


KINDS: dict[str, type[Event]] = {cls.__name__: cls for cls in Event.__subclasses__()}
ENDS = (RunDone, RunFailed, RunCancelled)
_REQUIRED: Any = object()


def _default(f: "Field[Any]") -> Any:
    if f.default is not MISSING:
        return f.default
    return f.default_factory() if f.default_factory is not MISSING else _REQUIRED


_DEFAULTS: dict[type[Event], dict[str, Any]] = {}


def _defaults(cls: type[Event]) -> dict[str, Any]:
    """An event's own fields and their defaults."""
    if cls not in _DEFAULTS:
        _DEFAULTS[cls] = {f.name: _default(f) for f in fields(cls) if f.name not in Event.__dataclass_fields__}
    return _DEFAULTS[cls]


def event_from_json(data: Mapping[str, Any], at_ms: int = 0, line_bytes: int = 0) -> Event:
    """The event that `to_json` wrote; unknown fields, of a newer writer, are left out.

    Raises:
        KeyError: no such kind.
    """
    cls = KINDS[data["e"]]
    field_names = _defaults(cls)
    values = {k: v for k, v in data.items() if k in field_names}
    if cls is StepPlanned and "lane" not in data and data["kind"] in LANES_BEFORE:
        values["lane"] = LANES_BEFORE[data["kind"]]
    return cls(at_ms=at_ms, line_bytes=line_bytes, **values)
