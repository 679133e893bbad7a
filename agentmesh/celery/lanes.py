"""Lanes: from which of its queues a worker takes the next steps first, and how many places it reserves for the realtime lane."""

from collections.abc import Callable, Mapping, Sequence

RESERVED_OF = 16  # one of so many places is reserved for the realtime lane, at least one
TURNS = 8  # in one of so many turns the low lane comes first, and in another one the high lane
REALTIME_POLL_S = 0.02  # how long only the realtime lane is polled before room for the others is checked again
PRIORITIES = {"realtime": 0, "high": 1, "low": 2}


class Lanes:
    """How many steps may be taken, and from which queues first. For one consumer's thread.

    Args:
        lanes: `realtime`, `high` or `low` for each of the broker's queues.
        admits: how many more steps there is room for, given how many are in flight.
    """

    def __init__(self, lanes: Mapping[str, str], admits: Callable[[int], int]) -> None:
        self._lanes, self._admits, self._turn, self._places = dict(lanes), admits, 0, 0
        self._reserves = {"realtime"} < set(self._lanes.values())
        self._owed, self._repaid = set[str](), 0

    def __call__(self, in_flight: int) -> int:
        """How many more may be taken, the reserved places among them."""
        more = max(0, self._admits(in_flight))
        self._places = in_flight + more
        return more

    @property
    def reserved(self) -> int:
        """How many of the places that there were at the last call are reserved for the realtime lane.

        An engine has fewer places while it holds long prompts. A single place is never reserved: no other lane would get one.
        """
        return max(1, self._places // RESERVED_OF) if self._reserves and self._places > 1 else 0

    def still_reserved(self, urgent: int) -> int:
        """How many free places are reserved, with so many steps of the realtime lane in flight."""
        return max(0, self.reserved - urgent)

    def order(self, queues: Sequence[str], room: int, wait_s: float, urgent: int) -> tuple[list[str], int, float]:
        """The queues to take from, in that order; how many steps at most; and how long to wait for one.

        Args:
            urgent: how many steps of the realtime lane are in flight; they use reserved places.
        """
        reserved = self.still_reserved(urgent)
        if room <= reserved:
            return [q for q in queues if self.is_urgent(q)], room, REALTIME_POLL_S
        first = self._owed_to(queues) or self._next_turn()
        ranked = sorted(queues, key=lambda queue: -1 if self._lane(queue) == first else PRIORITIES[self._lane(queue)])
        return ranked, room - reserved, wait_s

    def give_turn_back(self, queue: str) -> None:
        """Give the lane of this queue its turn back: the message had no step to do, as of a cancelled run. From any thread."""
        self._owed.add(self._lane(queue))

    def _owed_to(self, queues: Sequence[str]) -> str:
        """A lane that has its turn back. Not for ever: thousands of steps may have been cancelled."""
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
