"""Lanes before one engine: which of a model's queues a worker asks for the next steps, and what it keeps free for whom."""

from collections.abc import Callable, Mapping, Sequence

RESERVED = 16  # of so many places one is kept for the realtime lane, at least one
TURNS = 8  # in one of so many turns the low lane comes before the high one
LOOK_S = 0.05  # how long only the realtime lane is asked before it is seen whether there is room for the others again
RANKS = {"realtime": 0, "high": 1, "low": 2}


class Lanes:
    """How many steps may be taken, and from which queues first. For one consumer's thread.

    Args:
        lanes: `realtime`, `high` or `low` for each of the broker's queues.
        admits: how many more there is room for, given how many are in hand.
        places: how many there can be at most.
    """

    def __init__(self, lanes: Mapping[str, str], admits: Callable[[int], int], places: int) -> None:
        self._lanes, self._admits, self._turn = dict(lanes), admits, 0
        self.reserved = max(1, places // RESERVED) if {"realtime"} < set(self._lanes.values()) else 0

    def __call__(self, in_hand: int) -> int:
        """How many more may be taken, the reserved places among them."""
        return self._admits(in_hand)

    def order(self, queues: Sequence[str], room: int, wait_s: float) -> tuple[list[str], int, float]:
        """The queues to ask, the first that has something is taken from; at most how many; and how long to wait for one."""
        self._turn += 1
        low_first = self._turn % TURNS == 0

        def rank(queue: str) -> int:
            place = RANKS[self._lane(queue)]
            return 3 - place if low_first and place else place

        if not self.reserved:
            return sorted(queues, key=rank), room, wait_s
        if room > self.reserved:
            return sorted(queues, key=rank), room - self.reserved, wait_s
        return [q for q in queues if self._lane(q) == "realtime"], room, LOOK_S

    def _lane(self, queue: str) -> str:
        return self._lanes.get(queue.removesuffix(".suspects"), "high")
