"""When a schedule is due, also on the days when the clocks change."""

from datetime import UTC, datetime

import pytest

from agentmesh import Agent, Crew, DefinitionError, NameTaken, Schedule
from agentmesh.definitions.schedule import Recurrence


class Digest(Agent):
    """Digests."""


def utc(*parts: int) -> datetime:
    return datetime(*parts, tzinfo=UTC)  # type: ignore[misc,arg-type]


def test_a_crontab_line_is_read_in_its_own_zone() -> None:
    times = Recurrence("0 7 * * mon-fri", "America/New_York")
    assert times.next(utc(2026, 11, 27, 13)) == utc(2026, 11, 30, 12)  # from Friday morning to Monday, in winter
    assert times.last(utc(2026, 11, 29, 13)) == utc(2026, 11, 27, 12)
    assert Recurrence("*/20 8-9 1,15 jan *").next(utc(2026, 1, 1, 8, 40)) == utc(2026, 1, 1, 9)
    assert Recurrence("0 0 29 2 *").next(utc(2026, 1, 1)) == utc(2028, 2, 29)
    assert Recurrence("0 0 * * 7").next(utc(2026, 11, 25)) == utc(2026, 11, 29)


def test_an_hour_that_is_skipped_is_not_due_and_one_that_is_repeated_is_due_once() -> None:
    times = Recurrence("30 2 * * *", "Europe/Berlin")
    assert times.next(utc(2026, 3, 28, 12)) == utc(2026, 3, 30, 0, 30)  # on 29 March there is no 2:30
    assert times.next(utc(2026, 10, 24, 12)) == utc(2026, 10, 25, 0, 30)  # on 25 October there are two
    assert times.next(utc(2026, 10, 25, 0, 30)) == utc(2026, 10, 26, 1, 30)


def test_an_interval_counts_from_the_epoch() -> None:
    assert Recurrence(90.0).last(utc(1970, 1, 1, 0, 3, 10)) == utc(1970, 1, 1, 0, 3)
    assert Recurrence(90.0).next(utc(1970, 1, 1, 0, 3)) == utc(1970, 1, 1, 0, 4, 30)


@pytest.mark.parametrize(
    ("when", "zone", "said"),
    [
        ("0 7 * *", "UTC", "must be five fields"), ("61 * * * *", "UTC", "must be within 0 and 59"),
        ("0 x * * *", "UTC", "'x' is not a valid hour"), ("0 0 31 2 *", "UTC", "never runs"),
        ("0 7 * * *", "Europe/Lisboa", "unknown timezone 'Europe/Lisboa'"), (0.5, "UTC", "at least 1 second"),
    ],
)  # fmt: skip
def test_what_is_no_schedule_is_said(when: str | float, zone: str, said: str) -> None:
    with pytest.raises(DefinitionError, match=said):
        Schedule(when, Digest(), timezone=zone)


def test_its_runs_are_named_after_their_time() -> None:
    daily = Schedule("0 7 * * *", Digest(), "news", name="daily")
    assert daily.run_id(utc(2026, 11, 25, 7)) == "daily-20261125T070000Z"
    assert Schedule("0 7 * * *", Digest(), "a").name != Schedule("0 7 * * *", Digest(), "b").name
    with pytest.raises(NameTaken, match="several schedules with the same name"):
        Crew(Digest(), name="c", schedules=[daily, daily])
    with pytest.raises(DefinitionError, match="which is not an agent"):
        Schedule(60, Digest)
