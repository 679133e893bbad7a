"""Every error agentmesh raises, in one tree; imports nothing, so that any room may raise.

```
MeshError
├── DefinitionError      the code is wrong; raised while a class, Tool or Crew is made
│   ├── ToolSignatureError  NameTaken  UnknownName
├── ConfigError          a setting is wrong or missing
│   ├── ExtraMissing  ServiceDown
├── StepError            one step failed for good; a flow may catch it
│   ├── ModelError (ModelRefused  OutputInvalid  ContextTooLong)  ToolError  StepTimeout
│   └── DelegateFailed  QuorumMissed  ApprovalDenied  StepRefused  GpuOutOfMemory
├── RunError             a run ended without a value
│   ├── RunFailedError  RunCancelledError  LimitReached
├── ReplayError          holds the run: the flow no longer asks for what it asked
├── JournalError (JournalVersion)
├── StoreError           a store of documents refused; what it holds is as it was
│   ├── StoreConflict  StoreDamaged  StoreFull  StoreVersion
│   └── FilterInvalid  EmbedderMismatch
└── EmbedderError  DocumentError
```

`TryAgain` stands apart: a tool raises it to speak to the model.
"""

import difflib
import os
import traceback
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self


class MeshError(Exception):
    """Anything agentmesh raises on purpose: what happened and where, and one thing to do about it.

    `str(error)` is both, `message; hint`; commands print them as an `error:` and a `help:` line.

    Args:
        message: what happened, and where.
        hint: one thing to do, in the imperative; "" where there is nothing to do.
        fields: become attributes; they survive pickle and the journal.
    """

    fields: ClassVar[tuple[str, ...]] = ()

    def __init__(self, message: str = "", *, hint: str = "", **fields: Any) -> None:
        unknown = set(fields) - set(self.fields)
        if unknown:
            raise TypeError(f"{type(self).__name__} has no field {sorted(unknown)[0]!r}")
        self.message, self.hint = message or (self.__doc__ or "").splitlines()[0], hint
        super().__init__(self.message)
        for name in self.fields:
            setattr(self, name, fields.get(name))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own reduce calls cls(*args) and would lose the keyword fields.
        return _rebuild, (type(self), self.message, self.hint, self._given())

    def __str__(self) -> str:
        return _sentence(self.message, self.hint)

    def _given(self) -> dict[str, Any]:
        return {f: v for f in self.fields if (v := getattr(self, f)) is not None}

    def with_fields(self, **fields: Any) -> Self:
        """The same error with more said about where it happened; returns itself."""
        for name, value in fields.items():
            if name in self.fields and getattr(self, name) is None:
                setattr(self, name, value)
        return self


def _rebuild(cls: type[MeshError], message: str, hint: str, fields: dict[str, Any]) -> MeshError:
    return cls(message, hint=hint, **fields)


def _sentence(message: str, hint: str) -> str:
    return f"{message}; {hint}" if hint else message


class DefinitionError(MeshError):
    """The code of a crew is wrong."""


class ToolSignatureError(DefinitionError):
    """A function cannot be a tool as it is written."""


class NameTaken(DefinitionError):
    """Two things of a crew have one name."""


class UnknownName(DefinitionError):
    """A crew names something it does not have."""


class ConfigError(MeshError):
    """A setting is wrong or missing."""


class ExtraMissing(ConfigError):
    """A package of an extra is not installed."""


class ServiceDown(ConfigError):
    """A server does not respond."""


class StepError(MeshError):
    """One step failed for good."""

    fields: ClassVar[tuple[str, ...]] = ("run_id", "n", "name", "attempts")
    run_id: str | None
    n: int | None
    name: str | None
    attempts: int | None


class ModelError(StepError):
    """A model gave no usable answer."""


class ModelRefused(ModelError):
    """The model's server refused the request."""


class OutputInvalid(ModelError):
    """The model did not meet the output type, not even when corrected."""


class ContextTooLong(ModelError):
    """The prompt is longer than the model's context."""


class ToolError(StepError):
    """A tool raised."""

    fields: ClassVar[tuple[str, ...]] = (*StepError.fields, "again")
    again: bool | None  # the tool raised TryAgain: its text is for the model


class StepTimeout(StepError):
    """A step took longer than its timeout."""


class DelegateFailed(StepError):
    """A sub-agent's run ended without a value."""

    fields: ClassVar[tuple[str, ...]] = (*StepError.fields, "child")
    child: str | None


class QuorumMissed(StepError):
    """Too few members of a gather succeeded."""

    fields: ClassVar[tuple[str, ...]] = (*StepError.fields, "errors")
    errors: "list[StepError] | None"


class ApprovalDenied(StepError):
    """A person said no."""

    fields: ClassVar[tuple[str, ...]] = (*StepError.fields, "by")
    by: str | None


class StepRefused(StepError):
    """The engine would not start this step."""


class GpuOutOfMemory(StepError):
    """The device has no room for this request."""


class RunError(MeshError):
    """A run ended without a value."""

    fields: ClassVar[tuple[str, ...]] = ("run_id",)
    run_id: str | None


class RunFailedError(RunError):
    """The run failed."""

    fields: ClassVar[tuple[str, ...]] = ("run_id", "cause")
    cause: str | None  # the type's name of the exception that ended the flow


class RunCancelledError(RunError):
    """The run was cancelled."""


class LimitReached(RunError):
    """The run spent what it may spend."""

    fields: ClassVar[tuple[str, ...]] = ("run_id", "limit")
    limit: str | None


class ReplayError(MeshError):
    """The flow no longer asks for the steps it asked for; the run is held."""

    fields: ClassVar[tuple[str, ...]] = ("run_id", "n")
    run_id: str | None
    n: int | None


class JournalError(MeshError):
    """The journal gave an unexpected answer."""


class JournalVersion(JournalError):
    """The journal was written by another format of agentmesh."""


class StoreError(MeshError):
    """A store of documents refused; what it holds is as it was."""

    fields: ClassVar[tuple[str, ...]] = ("path",)
    path: str | None


class StoreConflict(StoreError):
    """A source is not what the writer thought it was."""

    fields: ClassVar[tuple[str, ...]] = ("path", "source", "expected", "found")
    source: str | None
    expected: str | None
    found: str | None


class StoreDamaged(StoreError):
    """A file of a store is truncated, changed or gone."""

    fields: ClassVar[tuple[str, ...]] = ("path", "file")
    file: str | None


class StoreFull(StoreError):
    """The disk has no room for a commit."""


class StoreVersion(StoreError):
    """A store was written by a newer format of agentmesh, or an asked version of it is gone."""


class FilterInvalid(StoreError):
    """A filter cannot be understood."""


class EmbedderMismatch(StoreError):
    """Vectors come from another embedder than the store's."""


class EmbedderError(MeshError):
    """An embedder gave no usable vectors."""

    fields: ClassVar[tuple[str, ...]] = ("after_s",)
    after_s: float | None  # given: asking again after that many seconds may help


class DocumentError(MeshError):
    """A document cannot be read."""

    fields: ClassVar[tuple[str, ...]] = ("source",)
    source: str | None


class TryAgain(Exception):
    """Raised by a tool: the text goes to the model, the turn counts, the run continues."""


def _tree(cls: type[MeshError]) -> Iterable[type[MeshError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _tree(sub)


def _classes() -> dict[str, type[MeshError]]:
    """Every error by its name in journals, also by the name that an earlier version wrote."""
    names = {cls.__name__: cls for cls in _tree(MeshError)}
    return names | {"RunFailed": RunFailedError, "RunCancelled": RunCancelledError}


def error_to_json(error: BaseException) -> dict[str, Any]:
    """An error as the journal keeps it: type, message, hint, fields; foreign ones keep only type and text."""
    if not isinstance(error, MeshError):
        return {"type": type(error).__name__, "message": well_formed(str(error))}
    fields = error._given()
    if isinstance(error, QuorumMissed) and error.errors:
        fields["errors"] = [error_to_json(e) for e in error.errors]
    if error.hint:
        fields["hint"] = well_formed(error.hint)
    return {"type": type(error).__name__, "message": well_formed(error.message), **fields}


def well_formed(text: str) -> str:
    """The text as UTF-8 can have it: halves of a surrogate pair are joined, and one without the other is U+FFFD.

    Such halves come with names of files (`surrogateescape`) and with JSON that was cut inside of an emoji.

    >>> well_formed("\\ud83d\\ude00 \\udcff")
    '😀 \ufffd'
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def raised_at(error: BaseException) -> str:
    """`crew.py:12`: where an exception came from in the folder of the code that we called; "" where we called none."""
    ours = os.path.dirname(__file__) + os.sep
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    folder = os.path.dirname(frames[0].filename) if frames else ""
    own = [f for f in frames if f.filename.startswith(folder)]
    return f"{os.path.basename(own[-1].filename)}:{own[-1].lineno}" if own else ""


def message_of(data: Mapping[str, Any]) -> str:
    """What `error_to_json` keeps, for a person: `KeyError: 'k' (crew.py:12)`, or the message of an error of ours."""
    kind, at = data["type"], f" ({data['at']})" if "at" in data else ""
    ours = kind in _classes()
    return _sentence(data["message"], data.get("hint", "")) if ours else f"{kind}: {data['message']}{at}"


def error_from_json(data: Mapping[str, Any]) -> MeshError:
    """The error again; an unknown type comes back as StepError that names it."""
    cls = _classes().get(data["type"])
    if cls is None:
        return StepError(f"{data['type']}: {data['message']}")
    fields = {f: data[f] for f in cls.fields if f in data}
    if "errors" in fields:
        fields["errors"] = [error_from_json(e) for e in fields["errors"]]
    return cls(data["message"], hint=data.get("hint", ""), **fields)


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """` Did you mean 'gpu'?`, or "" when none of the names is close."""
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
