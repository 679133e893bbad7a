"""When an agent is to be run again and again; a declaration, whose times are computed without a clock of its own."""

import hashlib
import re
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from typing import Any
from zoneinfo import ZoneInfo

from agentmesh.errors import DefinitionError

SCHEDULE_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
FIELDS = (
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day", 1, 31, ()),
    ("month", 1, 12, MONTHS),
    ("weekday", 0, 7, DAYS),
)
SEARCH_DAYS = 366 * 8  # the longest way between two leap days


@dataclass(frozen=True, slots=True)
class Recurrence:
    """The times of a crontab line or an interval, as moments in UTC.

    Args:
        when: `minute hour day month weekday`, all of which must match; or seconds between two times, counted from 1970.
        timezone: the IANA zone in which a crontab line is read.
    """

    when: str | float
    timezone: str = "UTC"

    def last(self, now: datetime) -> datetime:
        """The latest time that is not after `now`."""
        if not isinstance(self.when, str):
            return datetime.fromtimestamp(now.timestamp() // self.when * self.when, UTC)
        return self._nearest(now, -1)

    def next(self, now: datetime) -> datetime:
        """The first time after `now`."""
        if not isinstance(self.when, str):
            return datetime.fromtimestamp((now.timestamp() // self.when + 1) * self.when, UTC)
        return self._nearest(now, 1)

    def _nearest(self, now: datetime, way: int) -> datetime:
        today = now.astimezone(ZoneInfo(self.timezone)).date()
        for days in range(SEARCH_DAYS):
            times = [t for t in _times_on(self, today + timedelta(days=way * days)) if (t > now) == (way > 0)]
            if times:
                return min(times) if way > 0 else max(times)
        raise DefinitionError(f"schedule {self.when!r} never runs: there is no such day")


@lru_cache(maxsize=1024)
def _times_on(times: Recurrence, day: date) -> tuple[datetime, ...]:
    """A day's times. One that the change to summer time skips is not there; one that the change back repeats is once."""
    minutes, hours, days, months, weekdays = _parse_crontab(str(times.when))
    if day.day not in days or day.month not in months or day.isoweekday() % 7 not in weekdays:
        return ()
    zone = ZoneInfo(times.timezone)
    found = []
    for hour in sorted(hours):
        for minute in sorted(minutes):
            local = datetime(day.year, day.month, day.day, hour, minute, tzinfo=zone)  # of two, the first
            moment = local.astimezone(UTC)
            if moment.astimezone(zone).replace(tzinfo=None) == local.replace(tzinfo=None):
                found.append(moment)
    return tuple(found)


@lru_cache(maxsize=256)
def _parse_crontab(line: str) -> tuple[frozenset[int], ...]:
    parts = line.split()
    if len(parts) != len(FIELDS):
        raise DefinitionError(f"schedule {line!r} must be five fields, minute hour day month weekday, or seconds")
    return tuple(_parse_field(line, part, *field) for part, field in zip(parts, FIELDS, strict=True))


def _parse_field(line: str, text: str, name: str, least: int, most: int, names: tuple[str, ...]) -> frozenset[int]:
    values: set[int] = set()
    for item in text.lower().split(","):
        span, _, step = item.partition("/")
        first, _, last = span.partition("-")
        try:
            low, high = (
                (least, most)
                if span == "*"
                else (_parse_number(first, names, least), _parse_number(last or first, names, least))
            )
            stride = int(step or 1)
        except ValueError:
            raise DefinitionError(f"schedule {line!r}: {item!r} is not a valid {name}") from None
        if step and not last and span != "*":
            high = most
        if not least <= low <= high <= most or stride < 1:
            raise DefinitionError(f"schedule {line!r}: the {name} {item!r} must be within {least} and {most}")
        values.update(range(low, high + 1, stride))
    return frozenset(n % 7 for n in values) if name == "weekday" else frozenset(values)


def _parse_number(text: str, names: tuple[str, ...], least: int) -> int:
    return names.index(text) + least if text in names else int(text)


@dataclass(frozen=True, slots=True)
class Schedule:
    """When, which agent, which task: `Schedule("0 7 * * mon-fri", Digest(), "the night", timezone="Europe/Lisbon")`.

    Args:
        when: a crontab line, or seconds between two runs, at least 1.
        timezone: the schedule's own, an IANA name.
        name: of its runs' ids, `NAME-20261125T070000Z`; made of the agent's name and a digest when left out.

    Raises:
        DefinitionError: no crontab line, no such zone, not an agent.
    """

    when: str | float
    agent: Any  # an Agent, which stands on a floor above
    task: Any = ""
    timezone: str = "UTC"
    name: str = ""

    def __post_init__(self) -> None:
        if not hasattr(self.agent, "_task_json") or isinstance(self.agent, type):
            raise DefinitionError(f"schedule {self.when!r} was given {self.agent!r}, which is not an agent")
        try:
            ZoneInfo(self.timezone)
        except (KeyError, ValueError, OSError):
            raise DefinitionError(f"schedule {self.when!r}: unknown timezone {self.timezone!r}") from None
        if not isinstance(self.when, str) and self.when < 1:
            raise DefinitionError(f"schedule {self.when!r}: an interval is at least 1 second")
        self.times.next(datetime(2000, 1, 1, tzinfo=UTC))
        if not self.name:
            text = repr((self.when, self.agent.name, self.agent._task_json(self.task), self.timezone))
            mark = hashlib.blake2b(text.encode(), digest_size=3).hexdigest()
            object.__setattr__(self, "name", f"{self.agent.name[:24]}-{mark}")
        if not SCHEDULE_NAME.fullmatch(self.name):
            raise DefinitionError(f"schedule name {self.name!r} must be letters, digits, `_`, `-`, at most 32")

    @property
    def times(self) -> Recurrence:
        """Its times."""
        return Recurrence(self.when, self.timezone)

    def run_id(self, slot: datetime) -> str:
        """The id of the run that is due at this time: whoever begins it, it is one run."""
        return f"{self.name}-{slot.astimezone(UTC):%Y%m%dT%H%M%SZ}"
