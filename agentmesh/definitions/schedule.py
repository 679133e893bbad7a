"""When an agent is run repeatedly: a declaration, and its times computed from a given moment, without a clock."""

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

from agentmesh.errors import DefinitionError

SCHEDULE_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
FIELDS = (("minute", 0, 59), ("hour", 0, 23), ("day", 1, 31), ("month", 1, 12), ("weekday", 0, 7))
MAX_INTERVAL_S = 100 * 366 * 86_400
ANY_MOMENT = datetime(2000, 1, 1, tzinfo=UTC)
LONGEST_REPEAT = timedelta(hours=3)  # no zone sets its clocks back by more


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The times of a crontab line or an interval, as moments in UTC.

    On the days when the clocks change, a line that names its minutes and its hours (`30 2 * * *`) does not run at a time
    that is skipped, and runs once at a time that comes twice. A line whose minute or hour begins with `*` follows the time
    that passes, through both hours of a repeated one.

    Args:
        when: `minute hour day month weekday`; or seconds between two times, counted from 1970. Day and weekday must both
            match where one of them begins with `*`, else either of them is enough, as in cron.
        timezone: the IANA zone in which a crontab line is read.

    Source: Debian's crontab(5), by cronsim, https://github.com/cuu508/cronsim; it adds `L` and `LW` to the days, and
        `FRI#2` and `5L` to the weekdays.
    """

    when: str | float
    timezone: str = "UTC"

    def last(self, now: datetime) -> datetime:
        """The latest time that is not after `now`."""
        if not isinstance(self.when, str):
            return datetime.fromtimestamp(now.timestamp() // self.when * self.when, UTC)
        start = now.astimezone(ZoneInfo(self.timezone))
        # cronsim answers times before its start, and knows a line's times by the first pass of a repeated hour
        start += LONGEST_REPEAT if start.fold else timedelta(microseconds=1)
        return self._first(self.when, start, lambda moment: moment <= now, reverse=True)

    def next(self, now: datetime) -> datetime:
        """The first time after `now`."""
        if not isinstance(self.when, str):
            return datetime.fromtimestamp((now.timestamp() // self.when + 1) * self.when, UTC)
        start = now.astimezone(ZoneInfo(self.timezone))
        return self._first(self.when, start, lambda moment: moment > now, reverse=False)

    def _first(self, line: str, start: datetime, fits: Callable[[datetime], bool], *, reverse: bool) -> datetime:
        if len(line.split()) != len(FIELDS):
            raise DefinitionError(
                f"schedule {line!r} must be five fields",
                hint="write minute hour day month weekday, or a number of seconds",
            )
        try:
            for local in CronSim(line, start, reverse=reverse):
                if fits(moment := local.astimezone(UTC)) and _is_on_line(line, local):
                    return moment
        except CronSimError:
            raise _invalid_field(line) from None
        raise _never_runs(line)


def _is_on_line(line: str, local: datetime) -> bool:
    """Whether a line names this time of the clock: cronsim moves one that is skipped to the end of the gap."""
    clock = local.replace(tzinfo=None)
    return next(CronSim(line, clock - timedelta(seconds=1))) == clock


def _invalid_field(line: str) -> DefinitionError:
    for i, (text, (name, low, high)) in enumerate(zip(line.split(), FIELDS, strict=True)):
        alone = ["*"] * len(FIELDS)
        alone[i] = text
        try:
            CronSim(" ".join(alone), ANY_MOMENT)
        except CronSimError:
            return DefinitionError(
                f"schedule {line!r}: {text!r} is not a valid {name}, which must be within {low} and {high}",
                hint="write `*`, numbers, ranges as 1-5, steps as */15, or a list of these with commas",
            )
    return _never_runs(line)


def _never_runs(line: str) -> DefinitionError:
    return DefinitionError(
        f"schedule {line!r} never runs: there is no such day", hint="choose a day that its months have"
    )


@dataclass(frozen=True, slots=True)
class Schedule:
    """When, which agent, which task: `Schedule("0 7 * * mon-fri", Digest(), "the night", timezone="Europe/Lisbon")`.

    Args:
        when: a crontab line, or seconds between two runs, at least 1.
        timezone: the schedule's own, an IANA name.
        name: of its runs' ids, `NAME-20261125T070000Z`; made of the agent's name and a digest when left out.

    Raises:
        DefinitionError: the line or the zone is invalid, or `agent` is not an agent.
    """

    when: str | float
    agent: Any  # an Agent, which stands on a floor above
    task: Any = ""
    timezone: str = "UTC"
    name: str = ""

    def __post_init__(self) -> None:
        if not hasattr(self.agent, "_task_json") or isinstance(self.agent, type):
            raise DefinitionError(
                f"schedule {self.when!r} was given {self.agent!r}, which is not an agent",
                hint="pass an instance of Agent",
            )
        try:
            ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            raise DefinitionError(
                f"schedule {self.when!r}: unknown timezone {self.timezone!r}", hint="use an IANA name, as Europe/Lisbon"
            ) from None
        if not isinstance(self.when, str) and not (
            isinstance(self.when, int | float) and 1 <= self.when <= MAX_INTERVAL_S
        ):
            raise DefinitionError(
                f"schedule {self.when!r}: an interval is at least 1 second, and at most {MAX_INTERVAL_S}",
                hint="write a number of seconds between them",
            )
        self.times.next(ANY_MOMENT)
        if not self.name:
            text = repr((self.when, self.agent.name, self.agent._task_json(self.task), self.timezone))
            digest = hashlib.blake2b(text.encode(), digest_size=3).hexdigest()
            object.__setattr__(self, "name", f"{self.agent.name[:24]}-{digest}")
        if not SCHEDULE_NAME.fullmatch(self.name):
            raise DefinitionError(
                f"schedule name {self.name!r} must be letters, digits, `_`, `-`, at most 32", hint="choose another name"
            )

    @property
    def times(self) -> Recurrence:
        """The times at which it is due."""
        return Recurrence(self.when, self.timezone)

    def run_id(self, slot: datetime) -> str:
        """The id of the run that is due at this time; several processes that begin it begin one run."""
        return f"{self.name}-{slot.astimezone(UTC):%Y%m%dT%H%M%SZ}"
