"""Lanes before one engine: which of its queues a worker asks for the next steps, and what it keeps free for whom."""

from collections.abc import Callable, Mapping, Sequence

RESERVED = 16  # of so many places one is kept for the realtime lane, at least one
TURNS = 8  # in one of so many turns the low lane comes first, and in another one the high lane
RECENT_S = 0.02  # how long only the realtime lane is asked before it is seen whether there is room for the others again
RANKS = {"realtime": 0, "high": 1, "low": 2}


class Lanes:
    """How many steps may be taken, and from which queues first. For one consumer's thread.

    Args:
        lanes: `realtime`, `high` or `low` for each of the broker's queues.
        admits: how many more there is room for, given how many are in hand.
    """

    def __init__(self, lanes: Mapping[str, str], admits: Callable[[int], int]) -> None:
        self._lanes, self._admits, self._turn, self._places = dict(lanes), admits, 0, 0
        self._keeps = {"realtime"} < set(self._lanes.values())
        self._owed, self._repaid = set[str](), 0

    def __call__(self, in_hand: int) -> int:
        """How many more may be taken, the reserved places among them."""
        more = max(0, self._admits(in_hand))
        self._places = in_hand + more
        return more

    @property
    def reserved(self) -> int:
        """How many of the places that there were at the last look are kept for the realtime lane.

        An engine has fewer places while it holds long prompts. Of a single place none is kept: nobody else would ever have it.
        """
        return max(1, self._places // RESERVED) if self._keeps and self._places > 1 else 0

    def kept(self, urgent: int) -> int:
        """How many of the places left over are kept, with so many of the realtime lane in hand."""
        return max(0, self.reserved - urgent)

    def order(self, queues: Sequence[str], room: int, wait_s: float, urgent: int) -> tuple[list[str], int, float]:
        """The queues to ask, the first that has something is taken from; at most how many; and how long to wait for one.

        Args:
            urgent: how many of the realtime lane are in hand; for those no place is kept any more.
        """
        kept = self.kept(urgent)
        if room <= kept:
            return [q for q in queues if self.is_urgent(q)], room, RECENT_S
        first = self._owed_to(queues) or self._next_turn()
        ranked = sorted(queues, key=lambda queue: -1 if self._lane(queue) == first else RANKS[self._lane(queue)])
        return ranked, room - kept, wait_s

    def not_begun(self, queue: str) -> None:
        """What came from that queue was no step to be done: of a cancelled run, say. Its lane has its turn again; from any thread."""
        self._owed.add(self._lane(queue))

    def _owed_to(self, queues: Sequence[str]) -> str:
        """A lane that has its turn again. Not for ever: a claim takes a millisecond, and thousands may have been cancelled."""
        for lane in sorted(self._owed & {self._lane(queue) for queue in queues}):
            if self._repaid < TURNS:
                self._repaid += 1
                self._owed.discard(lane)
                return lane
        self._repaid = 0
        return ""

    def _next_turn(self) -> str:
        self._turn += 1
        return {0: "low", TURNS // 2: "high"}.get(self._turn % TURNS, "realtime")

    def is_urgent(self, queue: str) -> bool:
        """Whether a queue is of the realtime lane."""
        return self._lane(queue) == "realtime"

    def _lane(self, queue: str) -> str:
        return self._lanes.get(queue.removesuffix(".suspects"), "high")
