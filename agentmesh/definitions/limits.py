"""What a run may spend."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from agentmesh.errors import DefinitionError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Ceilings of a run and all its sub-agents together; `None` sets no limit.

    They are checked before each model call, so calls in flight may exceed them. At a limit the run is held
    (`agentmesh runs resume ID --limit turns=50`) or, with `on_limit="fail"`, ends as LimitReached.

    Args:
        turns: model calls.
        tokens: input and output.
        cost_usd: dollars, where prices are known.
        seconds: since the start, without the time that the run was held.
        depth: how deep sub-agents may call sub-agents; at least 1.
    """

    turns: int | None = 10_000  # enough for wide fan-outs, and an end for an agent that has none
    tokens: int | None = None
    cost_usd: float | None = None
    seconds: float | None = None
    depth: int = 8
    on_limit: Literal["hold", "fail"] = "hold"

    def __post_init__(self) -> None:
        for name in ("turns", "tokens", "cost_usd", "seconds", "depth"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise DefinitionError(
                    f"Limits({name}={value!r}) must be above 0", hint="leave it out, or give None, for no limit"
                )
        if self.on_limit not in ("hold", "fail"):
            raise DefinitionError(f"Limits() has the unknown on_limit {self.on_limit!r}", hint="use 'hold' or 'fail'")

    def to_json(self) -> dict[str, Any]:
        """All fields, JSON values."""
        return asdict(self)
