"""RunSpec, the payload of RunStarted, and what of it sub-agents' runs and retries get."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Self

Rule = Literal["given", "inherit", "reset", "sum"]


def rules(*, child: Rule, retry: Rule) -> dict[str, Rule]:
    """A field's metadata: what the spec of a sub-agent's run, and of a retry, has in it.

    Args:
        child, retry: `given` by the caller · `inherit` this spec's value · `reset` the default ·
            `sum` this spec's value plus what is given.
    """
    return {"child": child, "retry": retry}


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """What defines a run and is replayed from. A new field is one line here, with its rules.

    Args:
        task: text, or any JSON value.
        fields: the agent's typed fields, JSON.
        history: messages of an earlier conversation, JSON.
        parent, parent_n: the run and the step that this run does the work of; of a sub-agent's run only.
        limits: of the whole tree; only a root's are looked at.
        origin: the crew file, so that `runs resume` needs no more.
        stream: whether tokens are streamed live.
        canvas: the Celery request that waits for the run's result, or None.
        trace: the W3C traceparent under which the tree was begun, or "".
    """

    crew: str = field(metadata=rules(child="inherit", retry="inherit"))
    version: str = field(default="", metadata=rules(child="inherit", retry="given"))
    agent: str = field(metadata=rules(child="given", retry="inherit"))
    task: Any = field(default=None, metadata=rules(child="given", retry="inherit"))
    fields: Mapping[str, Any] = field(default_factory=dict, metadata=rules(child="given", retry="inherit"))
    history: Sequence[Any] = field(default_factory=list, metadata=rules(child="reset", retry="inherit"))
    parent: str = field(default="", metadata=rules(child="given", retry="inherit"))
    parent_n: int = field(default=0, metadata=rules(child="given", retry="inherit"))
    limits: Mapping[str, Any] = field(default_factory=dict, metadata=rules(child="inherit", retry="given"))
    origin: str = field(default="", metadata=rules(child="inherit", retry="inherit"))
    stream: bool = field(default=False, metadata=rules(child="inherit", retry="inherit"))
    canvas: Mapping[str, Any] | None = field(default=None, metadata=rules(child="reset", retry="reset"))
    trace: str = field(default="", metadata=rules(child="inherit", retry="inherit"))

    def child(self, **given: Any) -> Self:
        """The spec of a sub-agent's run below this one."""
        return self._derived("child", given)

    def retry(self, **given: Any) -> Self:
        """The spec of a retry of this run."""
        return self._derived("retry", given)

    def _derived(self, relation: str, given: dict[str, Any]) -> Self:
        values = dict(given)
        for f in fields(self):
            rule = f.metadata.get(relation, "reset")
            if rule == "inherit" and f.name not in given:
                values[f.name] = getattr(self, f.name)
            elif rule == "sum":
                values[f.name] = getattr(self, f.name) + given.get(f.name, 0)
        return type(self)(**values)
