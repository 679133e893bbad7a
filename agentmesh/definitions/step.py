"""What a flow may ask for: Ask, Call, Delegate, Approve, Sleep; and what a tool may: its ToolContext."""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, NamedTuple, TypeVar

from agentmesh.errors import StepError, ToolError
from agentmesh.message import Message, ToolSpec
from agentmesh.schema import digest, from_json, to_json

T_co = TypeVar("T_co", covariant=True)
Lane = Literal["queued", "due", "held", "child"]
# the flow or tool that this code runs in, for error messages; "" is neither
RUNNING_INSIDE: ContextVar[str] = ContextVar("agentmesh_inside", default="")


class StepPolicy(NamedTuple):
    """How a step is planned and executed; of each lane only what concerns it.

    Args:
        queue: of the crew; "" is the model's own, or the crew's first.
        timeout_s: of one attempt.
        retries: how many attempts may follow one that failed.
        at_most_once: no attempt follows one that was cut off by a crash, unless `reconcile`, or a person, allows it.
        reconcile: asked with the step's key after a crash: the value, `NotDone`, or `Unknown` (a person decides).
        max_output_bytes: of the value's JSON; longer text keeps its head and tail.
        held: what the step waits for before anything else; `approve` is a person's approval, and the default of lane `held`.
        due_in_s: of lane `due`: for how long it waits.
    """

    queue: str = ""
    timeout_s: float | None = None
    retries: int = 0
    at_most_once: bool = False
    reconcile: Callable[[str], Any] | None = None
    max_output_bytes: int = 1 << 20
    held: str = ""
    due_in_s: float = 0


DEFAULT_POLICY = StepPolicy()


@dataclass(frozen=True)
class Step(Generic[T_co]):
    """One unit of work to be journaled; it is done when it is given to a Context, not when it is made.

    A class of steps describes itself here, and nothing else looks at which class it is: a new kind is one class.

    Attributes:
        kind: its name in the journal and in messages.
        lane: who ends it: `queued` a worker, `due` the clock, `held` a person, `child` a run of its own.
        target: what a worker does for a step of lane `queued`: call a `function` (see `bind`), or ask a `model`.
        error: the StepError that a step fails with whose function raised an exception, after its retries.
    """

    kind: ClassVar[str] = ""
    lane: ClassVar[Lane] = "queued"
    target: ClassVar[Literal["function", "model"]] = "function"
    error: ClassVar[type[StepError]] = StepError
    name: str

    @property
    def label(self) -> str:
        """What errors and logs call it."""
        return f"{self.kind} `{self.name}`"

    def policy(self) -> StepPolicy:
        """How it is planned and executed."""
        return DEFAULT_POLICY

    def digest(self) -> str:
        """A fingerprint of what must not change while a run is open."""
        return digest(self.kind, self.name)

    def bind(self, context: "ToolContext") -> Callable[[], Any]:
        """Of target `function`: what a worker calls, on a thread, or awaits when it is a coroutine function."""
        raise NotImplementedError(f"{type(self).__name__}.bind: a step of lane 'queued' says what a worker calls")

    def child(self) -> tuple[Any, Any]:
        """Of lane `child`: the agent, and the task as JSON."""
        raise NotImplementedError(f"{type(self).__name__}.child: a step of lane 'child' says which agent does what")

    def encode(self, value: Any) -> Any:
        """A value of `bind`'s function as the journal's JSON.

        Raises:
            TypeError: it has no JSON form.
        """
        return to_json(value)

    def decode(self, value: Any) -> T_co:
        """The step's value from the journal's JSON; of lanes `due` and `held` that is None where nobody gave one."""
        raise NotImplementedError(f"{type(self).__name__}.decode: a step says what its value is")

    def describe(self) -> Any:
        """What a person is shown who must decide about this step, as JSON."""
        return None


@dataclass(frozen=True)
class Ask(Step[Message]):
    """Ask a model; its value is the model's message.

    Args:
        name: the asking agent's.
        model: `provider:name`, an object with `ask`, or "" for the crew's.
        output: JSON Schema of the text, or None.
    """

    kind: ClassVar[str] = "Ask"
    target: ClassVar[Literal["function", "model"]] = "model"
    model: Any = ""
    messages: Sequence[Message] = ()
    tools: Sequence[ToolSpec] = ()
    output: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    queue: str = ""
    retries: int = 3
    timeout_s: float | None = None

    def digest(self) -> str:
        """Agent and output type, so that a corrected typo in the instructions blocks no run."""
        return digest(self.kind, self.name, self.output)

    def policy(self) -> StepPolicy:
        """The agent's."""
        return StepPolicy(self.queue, self.timeout_s, self.retries)

    def decode(self, value: Any) -> Message:
        """The message."""
        return Message.from_json(value)


@dataclass(frozen=True)
class Call(Step[T_co]):
    """Call a tool with these arguments (plain JSON)."""

    kind: ClassVar[str] = "Call"
    error: ClassVar[type[StepError]] = ToolError
    tool: Any = None  # a tool.Tool, which imports this module
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The tool."""
        return f"tool `{self.name}`"

    def policy(self) -> StepPolicy:
        """The tool's."""
        policy: StepPolicy = self.tool.policy
        return policy

    def digest(self) -> str:
        """Name and arguments."""
        return digest(self.kind, self.name, self.arguments)

    def bind(self, context: "ToolContext") -> Callable[[], Any]:
        """The tool with its typed arguments."""
        bound: Callable[[], Any] = self.tool.bind(self.arguments, context)
        return bound

    def encode(self, value: Any) -> Any:
        """As the tool's return type says."""
        return to_json(value, self.tool.returns)

    def decode(self, value: Any) -> T_co:
        """The tool's value."""
        decoded: T_co = from_json(value, self.tool.returns)
        return decoded

    def describe(self) -> Any:
        """The arguments."""
        return dict(self.arguments)


@dataclass(frozen=True)
class Delegate(Step[T_co]):
    """Have a sub-agent do a task, in a run of its own."""

    kind: ClassVar[str] = "Delegate"
    lane: ClassVar[Lane] = "child"
    agent: Any = None  # an agent.Agent, which imports this module
    task: Any = None

    def digest(self) -> str:
        """Name, fields and task."""
        return digest(self.kind, self.name, self.agent._fields_json(), self.task)

    def child(self) -> tuple[Any, Any]:
        """The agent and its task."""
        return self.agent, self.task

    def decode(self, value: Any) -> T_co:
        """The sub-agent's value."""
        decoded: T_co = from_json(value, self.agent.output)
        return decoded


@dataclass(frozen=True, init=False)
class Approve(Step[None]):
    """Wait until a person approves; a denial is ApprovalDenied. Occupies no worker."""

    kind: ClassVar[str] = "Approve"
    lane: ClassVar[Lane] = "held"
    question: str = ""
    about: Any = None

    def __init__(self, question: str, about: Any = None) -> None:
        object.__setattr__(self, "name", "approve")
        object.__setattr__(self, "question", question)
        object.__setattr__(self, "about", about)

    def digest(self) -> str:
        """The question."""
        return digest(self.kind, self.question)

    def decode(self, value: Any) -> None:
        """None: it was approved."""

    def describe(self) -> Any:
        """The question, and `about` where it was given."""
        return (
            {"question": self.question, "about": self.about} if self.about is not None else {"question": self.question}
        )


@dataclass(frozen=True, init=False)
class Sleep(Step[None]):
    """Wait for a time, by the clock of the journal's store. Occupies no worker."""

    kind: ClassVar[str] = "Sleep"
    lane: ClassVar[Lane] = "due"
    seconds: float = 0

    def __init__(self, seconds: float) -> None:
        if not 0 <= seconds <= 10 * 365 * 86400:
            raise ValueError(f"Sleep({seconds!r}): seconds must be 0 to ten years")
        object.__setattr__(self, "name", "sleep")
        object.__setattr__(self, "seconds", seconds)

    def policy(self) -> StepPolicy:
        """It waits for so long."""
        return StepPolicy(due_in_s=self.seconds)

    def digest(self) -> str:
        """How long."""
        return digest(self.kind, self.seconds)

    def decode(self, value: Any) -> None:
        """None: the time is over."""


@dataclass(frozen=True)
class ToolContext:
    """What a tool may know of its step: a parameter with this annotation is given it, and is hidden from the model.

    Args:
        key: `run_id/n`, the same in every attempt and in every retry of the run: an idempotency key for other services.
        attempt: 1 for the first.
        deps: the crew's `deps`.
    """

    key: str = "none/0"
    attempt: int = 1
    run_id: str = "none"
    deps: Any = None
    _cancelled: Callable[[], bool] = field(default=lambda: False, repr=False)
    _progress: Callable[[str], None] = field(default=lambda text: None, repr=False)

    @property
    def cancelled(self) -> bool:
        """Whether the run was cancelled, or another attempt has taken over the step."""
        return self._cancelled()

    def progress(self, text: str) -> None:
        """Send a line of progress to the run's live stream."""
        self._progress(text)
