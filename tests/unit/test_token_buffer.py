"""Tokens of many concurrent attempts are published together."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from agentmesh.engine.token_buffer import MIN_FLUSH_S, TokenBuffer, flush_interval_s
from agentmesh.errors import JournalError
from agentmesh.journal.types import Token
from agentmesh.model import Thought


class Sent:
    """A journal's end of the stream: what came, and in which turn of the loop."""

    def __init__(self) -> None:
        self.turn, self.came = 0, list[tuple[int, Token]]()

    async def stream(self, run_id: str, tokens: Sequence[Token]) -> None:
        self.came += [(self.turn, t) for t in tokens]

    async def count_turns(self) -> None:
        while True:
            self.turn += 1
            await asyncio.sleep(0)


class Slow:
    """A journal whose `stream` takes its time, or fails."""

    def __init__(self, delay_s: Callable[[], float], *, broken: bool = False) -> None:
        self._delay_s, self._broken = delay_s, broken
        self.sent: list[tuple[float, Token]] = []
        self.sending = 0

    async def stream(self, run_id: str, tokens: Sequence[Token]) -> None:
        self.sending += 1
        await asyncio.sleep(self._delay_s())
        if self._broken:
            raise JournalError("the journal's server is out of memory", hint="give it more")
        self.sent += [(time.monotonic(), t) for t in tokens]


def buffer(journal: Any, run_id: str = "r") -> TokenBuffer:
    return TokenBuffer(journal, run_id, 1, 1)


def test_all_attempts_of_a_process_flush_at_the_same_ticks() -> None:
    sent = Sent()

    async def go() -> None:
        lives = [buffer(sent, f"r{i}") for i in range(20)]
        for live in lives:
            live.text("first")  # is sent at once
        while len(sent.came) < 20:
            await asyncio.sleep(0)
        counting = asyncio.create_task(sent.count_turns())
        for live in lives:
            live.text("a")
            await asyncio.sleep(MIN_FLUSH_S / 40)  # they do not begin together
        while len(sent.came) < 40:
            await asyncio.sleep(MIN_FLUSH_S)
        counting.cancel()
        for live in lives:
            await live.flush()

    asyncio.run(go())
    # few ticks fall into half a flush's time; each one's sends are in a turn or two
    assert len({turn for turn, token in sent.came if token.text == "a"}) <= 6


def test_words_go_on_while_a_send_is_under_way() -> None:
    """`stream` takes 10 ms and a word comes each 8 ms: no word waits for the end of its step."""

    async def go() -> int:
        live = buffer(slow)
        for _ in range(50):
            live.text("x")
            await asyncio.sleep(0.008)
        sent = len(slow.sent)
        await live.flush()
        return sent

    slow = Slow(lambda: 0.01)
    assert asyncio.run(go()) >= 40
    assert len(slow.sent) == 50


@pytest.mark.parametrize("seed", range(3))
def test_each_word_is_sent_soon_at_random_times(seed: int) -> None:
    """Two ticks and two sends at most after it was said; the machine may be busy, so most of them, and all of them in order."""
    rng = random.Random(seed)
    slow = Slow(lambda: rng.uniform(0, 0.03))
    said: list[float] = []

    async def go() -> None:
        live = buffer(slow)
        for i in range(100):
            said.append(time.monotonic())
            live.text(str(i))
            await asyncio.sleep(rng.choice([0, 0, 0.001, 0.012]))
        await live.flush()

    asyncio.run(go())
    assert [token.text for _, token in slow.sent] == [str(i) for i in range(100)]
    lags = sorted(at - began for (at, _), began in zip(slow.sent, said, strict=True))
    assert lags[90] < 2 * MIN_FLUSH_S + 2 * 0.03 + 0.1


def test_the_first_word_is_sent_at_once() -> None:
    async def go() -> None:
        live = buffer(slow)
        live.text("now")
        for _ in range(3):
            await asyncio.sleep(0)
        assert slow.sending == 1
        await live.flush()

    slow = Slow(lambda: 0)
    asyncio.run(go())


def test_a_cancelled_attempt_loses_no_word_that_is_being_sent() -> None:
    async def attempt() -> None:
        live = buffer(slow)
        live.text("a")
        try:
            await asyncio.sleep(0.01)  # "a" is being sent
            live.text("b")
            await asyncio.sleep(60)
        finally:
            await live.flush()

    async def go() -> None:
        task = asyncio.create_task(attempt())
        await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    slow = Slow(lambda: 0.05)
    asyncio.run(go())
    assert [token.text for _, token in slow.sent] == ["a", "b"]


def test_what_cannot_be_sent_is_logged_once_and_fails_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def go() -> None:
        live = buffer(slow)
        for _ in range(5):
            live.text("x")
            await asyncio.sleep(0.015)
        await live.flush()

    slow = Slow(lambda: 0, broken=True)
    asyncio.run(go())
    assert slow.sending > 1
    assert [r.getMessage() for r in caplog.records] == [
        "run r step 1: live tokens could not be sent: the journal's server is out of memory; give it more"
    ]


def test_ticks_grow_with_the_attempts_that_stream() -> None:
    async def go() -> None:
        lives = [buffer(slow, f"r{i}") for i in range(500)]
        assert flush_interval_s() == MIN_FLUSH_S
        for live in lives:
            live.text("x")
        while len(slow.sent) < 500:
            await asyncio.sleep(0)
        assert flush_interval_s() == pytest.approx(0.1)
        for live in lives:
            await live.flush()
        assert flush_interval_s() == MIN_FLUSH_S

    slow = Slow(lambda: 0)
    asyncio.run(go())


def test_reasoning_is_of_its_own_kind_and_the_rest_is_sent_at_the_end() -> None:
    sent = Sent()

    async def go() -> None:
        journal: Any = sent
        live = TokenBuffer(journal, "r", 2, 3)
        live.text(Thought("hm"))
        live.text("yes")
        await live.flush()

    asyncio.run(go())
    assert [(t.kind, t.text) for _, t in sent.came] == [("thought", "hm"), ("text", "yes")]
