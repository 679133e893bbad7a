"""What a flow may ask for: Ask, Call, Delegate, Approve, Sleep; and what a tool may: its ToolContext."""

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from agentmesh.message import Message, ToolSpec
from agentmesh.schema import digest, from_json

T_co = TypeVar("T_co", covariant=True)
# the flow or tool that this code runs in, for error messages; "" is neither
RUNNING_INSIDE: ContextVar[str] = ContextVar("agentmesh_inside", default="")


@dataclass(frozen=True)
class Step(Generic[T_co]):
    """One unit of work to be journaled; it is done when it is given to a Context, not when it is made."""

    kind: ClassVar[str] = ""
    name: str

    def digest(self) -> str:
        """A fingerprint of what must not change while a run is open."""
        return digest(self.kind, self.name)

    def decode(self, value: Any) -> T_co:
        """The step's value from the journal's JSON."""
        raise NotImplementedError

    def detail(self) -> Any:
        """What a person is shown who must decide about this step."""
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

    def decode(self, value: Any) -> Message:
        """The message."""
        return Message.from_json(value)


@dataclass(frozen=True)
class Call(Step[T_co]):
    """Call a tool with these arguments (plain JSON)."""

    kind: ClassVar[str] = "Call"
    tool: Any = None  # a tool.Tool; this floor does not know it
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Name and arguments."""
        return digest(self.kind, self.name, self.arguments)

    def decode(self, value: Any) -> T_co:
        """The tool's value."""
        decoded: T_co = from_json(value, self.tool.returns)
        return decoded

    def detail(self) -> Any:
        """The arguments."""
        return dict(self.arguments)


@dataclass(frozen=True)
class Delegate(Step[T_co]):
    """Have a sub-agent do a task, in a run of its own."""

    kind: ClassVar[str] = "Delegate"
    agent: Any = None  # an agent.Agent; this floor does not know it
    task: Any = None

    def digest(self) -> str:
        """Name, fields and task."""
        return digest(self.kind, self.name, self.agent._fields_json(), self.task)

    def decode(self, value: Any) -> T_co:
        """The sub-agent's value."""
        decoded: T_co = from_json(value, self.agent.output)
        return decoded


@dataclass(frozen=True, init=False)
class Approve(Step[None]):
    """Wait until a person approves; a denial is ApprovalDenied. Occupies no worker."""

    kind: ClassVar[str] = "Approve"
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

    def detail(self) -> Any:
        """The question, and `about` where it was given."""
        return (
            {"question": self.question, "about": self.about} if self.about is not None else {"question": self.question}
        )


@dataclass(frozen=True, init=False)
class Sleep(Step[None]):
    """Wait for a time, by the clock of the journal's store. Occupies no worker."""

    kind: ClassVar[str] = "Sleep"
    seconds: float = 0

    def __init__(self, seconds: float) -> None:
        if not 0 <= seconds <= 10 * 365 * 86400:
            raise ValueError(f"Sleep({seconds!r}): seconds must be 0 to ten years")
        object.__setattr__(self, "name", "sleep")
        object.__setattr__(self, "seconds", seconds)

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
