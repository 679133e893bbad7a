"""The live stream of many attempts at once is sent together."""

import asyncio
from collections.abc import Sequence
from typing import Any

from agentmesh.engine.token_buffer import FLUSH_S, TokenBuffer
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


def test_all_attempts_of_a_process_flush_at_the_same_ticks() -> None:
    sent = Sent()

    async def go() -> None:
        journal: Any = sent
        lives = [TokenBuffer(journal, f"r{i}", 1, 1) for i in range(20)]
        counting = asyncio.create_task(sent.count_turns())
        for live in lives:
            live.text("a")
            await asyncio.sleep(FLUSH_S / 40)  # they do not begin together
        while len(sent.came) < 20:
            await asyncio.sleep(FLUSH_S)
        counting.cancel()

    asyncio.run(go())
    # two ticks at most fall into half a flush's time; each one's sends are in a turn or two
    assert len({turn for turn, _ in sent.came}) <= 6


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
