"""When a schedule is due, also on the days when the clocks change."""

import random
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

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


def test_a_line_that_follows_the_hours_runs_through_both_of_a_repeated_one() -> None:
    times = Recurrence("*/20 * * * *", "Europe/Berlin")
    assert times.next(utc(2026, 10, 25, 0, 40)) == utc(2026, 10, 25, 1)  # the second 2:00 of that night
    assert times.last(utc(2026, 10, 25, 1, 59)) == utc(2026, 10, 25, 1, 40)
    assert times.next(utc(2026, 3, 29, 0, 40)) == utc(2026, 3, 29, 1)  # 3:00, for there is no 2:00


def test_a_day_or_a_weekday_is_enough_where_both_are_named() -> None:
    times = Recurrence("0 0 13 * fri")
    assert times.next(utc(2026, 11, 25)) == utc(2026, 11, 27)
    assert times.next(utc(2026, 12, 11)) == utc(2026, 12, 13)
    assert Recurrence("0 0 L * *").last(utc(2026, 3, 15)) == utc(2026, 2, 28)


ZONES = ("UTC", "Europe/Berlin", "America/New_York", "Australia/Lord_Howe", "America/St_Johns", "Antarctica/Troll")
NIGHTS = (utc(2026, 3, 29, 1), utc(2026, 10, 25, 1), utc(2026, 3, 8, 7), utc(2026, 11, 1, 6), utc(2026, 4, 4, 15))
MINUTE = timedelta(minutes=1)


def random_field(dice: random.Random, low: int, high: int) -> tuple[str, set[int]]:
    """A field of a line, and the numbers that it names."""
    first = dice.randint(low, high - 1)
    last, step = dice.randint(first + 1, high), dice.randint(1, 7)
    return dice.choice(
        [
            ("*", {*range(low, high + 1)}),
            (f"*/{step}", {*range(low, high + 1, step)}),
            (f"{first}", {first}),
            (f"{first}-{last}", {*range(first, last + 1)}),
            (f"{first}-{last}/{step}", {*range(first, last + 1, step)}),
            (f"{first},{last}", {first, last}),
        ]
    )


def named_by(fields: list[tuple[str, set[int]]], local: datetime) -> bool:
    """The rule, minute by minute: what cron says, and that a time which comes twice is one time for a line that names it."""
    (minute, minutes), (hour, hours), (day, days), (_, months), (weekday, weekdays) = fields
    of_day, of_week = local.day in days, bool({local.isoweekday(), local.isoweekday() % 7} & weekdays)
    on_day = of_day and of_week if "*" in (day[0], weekday[0]) else of_day or of_week
    repeated = local.fold and "*" not in (minute[0], hour[0])
    return local.minute in minutes and local.hour in hours and local.month in months and on_day and not repeated


@pytest.mark.parametrize("seed", range(60))
def test_times_are_those_that_a_walk_over_the_minutes_finds(seed: int) -> None:
    dice = random.Random(seed)
    fields = [random_field(dice, *span) for span in ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))]
    fields[3] = ("*", {*range(1, 13)})  # else most lines are not due within the days that are walked
    zone = dice.choice(ZONES)
    times = Recurrence(" ".join(text for text, _ in fields), zone)
    start = dice.choice(NIGHTS) - timedelta(days=1)
    minutes = [start + MINUTE * i for i in range(3 * 24 * 60)]
    due = [m for m in minutes if named_by(fields, m.astimezone(ZoneInfo(zone)))]
    for now in (*dice.sample(minutes, 30), *due[:30]):
        later, earlier = [m for m in due if m > now], [m for m in due if m <= now]
        assert times.next(now) == later[0] if later else times.next(now) > minutes[-1]
        assert times.last(now) == earlier[-1] if earlier else times.last(now) < start
