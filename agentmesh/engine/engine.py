"""The engine: claim, execute, replay, commit. It knows Journal, Dispatch and StepExecutor, and nothing behind them."""

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agentmesh.definitions.crew import Crew
from agentmesh.definitions.step import Step
from agentmesh.engine.dispatch import Dispatch
from agentmesh.engine.executor import Attempt, Charge, StepExecutor
from agentmesh.engine.history_cache import HISTORY_CACHE_BYTES, CachedHistory, HistoryCache
from agentmesh.engine.planner import Planner, parent_event, provisional_history
from agentmesh.engine.replay import Failed, History, Outcome, Waiting, replay
from agentmesh.engine.token_buffer import TokenBuffer
from agentmesh.errors import LimitReached, ReplayError, UnknownName, error_to_json
from agentmesh.journal.events import Event, RunFailed, StepDone, StepFailed
from agentmesh.journal.journal import Journal
from agentmesh.journal.types import Accepted, Claimed, NewRun, NextSteps, Refused, advance_unit, step_unit

# A suspect waits so long for its worker to have few enough units in flight; after that the outbox sends it again.
SUSPECT_WAIT_S, SUSPECT_POLL_S = 5.0, 0.01
THREADED_REPLAY_EVENTS = 400  # events; longer ones leave the event loop


class Skipped(str):
    """Why there was nothing to do for a message: its unit has ended, is leased by another worker, or is not due."""

    __slots__ = ()


@dataclass(slots=True)
class Lease:
    """A unit this process works on."""

    fence: int
    task: "asyncio.Task[Any] | None" = None
    lost: bool = False
    loop: asyncio.AbstractEventLoop | None = field(default=None)


class Engine:
    """Carries runs of one crew forward, a unit at a time.

    Args:
        worker: this process's name in leases.
        on_run_end: called with each run that this process ends.
        apart: suspects have a worker process of their own, which is not this one.
        model: of agents that name none, in a crew that names none.
        history_cache_bytes: what the events of recent runs may take of this process's memory.
    """

    def __init__(
        self, *, crew: Crew, journal: Journal, dispatch: Dispatch, executor: StepExecutor, worker: str,
        on_run_end: Callable[[History, Event], None] | None = None, apart: bool = False, model: Any = None,
        history_cache_bytes: int = HISTORY_CACHE_BYTES,
    ) -> None:  # fmt: skip
        self.crew, self.journal, self.worker = crew, journal, worker
        self.planner = Planner(crew, dispatch, model)
        self._executor, self._on_run_end, self._isolates_suspects = executor, on_run_end, apart
        self._history_cache = HistoryCache(history_cache_bytes)
        self.leases: dict[str, Lease] = {}
        self._tokens = itertools.count(1)  # with the worker's name, a token that no other claim has

    # ---- the two units of work -----------------------------------------------------------------
    async def step(self, run_id: str, n: int, queue: str) -> str:
        """Execute step n if it has not ended; answers what became of it, for the log."""
        unit = step_unit(run_id, n)
        rate = self.crew.queues[queue].rate_limit() if queue in self.crew.queues else None
        grant = await self._claim(unit, run_id, rate=rate, queue=queue)
        if isinstance(grant, Refused):
            return Skipped(grant.why)
        claimed, cached = grant
        lease = self.leases[unit] = Lease(claimed.fence, asyncio.current_task(), loop=asyncio.get_running_loop())
        try:
            if claimed.limit:
                return await self._end_at_limit(unit, claimed, cached.history)
            step = await self._requested_step(cached, n)
            if step is None:
                return "not waited for"
            event, charge = await self._execute(step, n, claimed, lease, cached.history)
            lease.task = None  # executed: from here on only the journal says whether it counts
            return await self._commit(unit, n, claimed, event, charge, cached)
        except asyncio.CancelledError:
            if not lease.lost:
                raise
            return "lost"
        except (ReplayError, UnknownName) as e:
            await self.journal.hold(unit, fence=claimed.fence, why=f"replay: {e}")
            self._history_cache.drop(run_id)
            return "held"
        finally:
            self.leases.pop(unit, None)

    async def advance(self, run_id: str) -> str:
        """Replay the run and write what comes next."""
        unit = advance_unit(run_id)
        grant = await self._claim(unit, run_id)
        if isinstance(grant, Refused):
            return Skipped(grant.why)
        claimed, cached = grant
        self.leases[unit] = Lease(claimed.fence)
        try:
            while True:
                version = cached.history.version
                with self._history_cache.writing(run_id):
                    nxt, _ = await self._replay_until_blocked(cached)
                    answer = await self.journal.plan(run_id, fence=claimed.fence, version=version, next=nxt)
                    if isinstance(answer, Accepted) or answer.why != "conflict":
                        self._cache_or_drop(run_id, cached, answer)
                        return "planned" if isinstance(answer, Accepted) else answer.why
                epoch = self.journal.epoch
                events = await self.journal.events(run_id)
                cached = CachedHistory(History(run_id, events), epoch=epoch)
        except (ReplayError, UnknownName) as e:
            await self.journal.hold(unit, fence=claimed.fence, why=f"replay: {e}")
            self._history_cache.drop(run_id)
            return "held"
        finally:
            self.leases.pop(unit, None)

    async def begin(self, new: NewRun) -> Accepted | Refused:
        """Begin a run with its first steps, which a replay over an empty history finds."""
        cached = CachedHistory(provisional_history(new))
        nxt, waiting = await self._replay_until_blocked(cached)
        if waiting is not None and not waiting.steps:
            nxt = NextSteps()
        answer = await self.journal.begin(new, nxt)
        if (
            self._on_run_end is not None
            and nxt.end is not None
            and isinstance(answer, Accepted)
            and not answer.is_repeat
        ):
            self._on_run_end(cached.history, nxt.end)
        return answer

    async def claim_unit(self, unit: str, run_id: str) -> Claimed | Refused:
        """Lease a unit that is neither step nor advance; the caller removes it from `leases` when it is done."""
        grant = await self._claim(unit, run_id)
        if isinstance(grant, Refused):
            return grant
        self.leases[unit] = Lease(grant[0].fence)
        return grant[0]

    # ---- parts ---------------------------------------------------------------------------------
    async def _claim(
        self, unit: str, run_id: str, *, rate: tuple[int, int] | None = None, queue: str = ""
    ) -> tuple[Claimed, CachedHistory] | Refused:
        await self._history_cache.wait_for_write(run_id)
        cached = self._history_cache.get(run_id, self.journal.epoch)
        version = cached.history.version if cached else 0
        until_s = time.monotonic() + SUSPECT_WAIT_S
        while True:
            claimed = await self.journal.claim(
                unit, worker=self.worker, token=f"{self.worker}#{next(self._tokens)}", version=version,
                crew=self.crew.name, crew_version=self.crew.version, rate=rate,
                apart=self._isolates_suspects and self.crew.queues.isolates_suspects(queue or self.crew.queues.first),
            )  # fmt: skip
            if not (isinstance(claimed, Refused) and claimed.why == "room") or time.monotonic() > until_s:
                break
            await asyncio.sleep(SUSPECT_POLL_S)
            while len(self.leases) >= int(claimed.detail) and time.monotonic() < until_s:
                await asyncio.sleep(SUSPECT_POLL_S)
        if isinstance(claimed, Refused):
            return claimed
        cached = self._history_cache.get(run_id, self.journal.epoch)
        if cached is None or cached.history.version < claimed.version - len(claimed.events):
            events, epoch = claimed.events, self.journal.epoch
            if len(events) < claimed.version:  # the history was evicted while the claim was under way
                events = (await self.journal.events(run_id))[: claimed.version]
            cached = CachedHistory(History(run_id, events), epoch=epoch)
        else:
            cached.history.catch_up(claimed.events, claimed.version)
        self._history_cache.keep(run_id, cached)
        return claimed, cached

    async def _replay(self, history: History) -> Outcome:
        started = history.started
        assert started is not None
        agent = self.crew.agent(started.agent, started.fields)
        if history.version > THREADED_REPLAY_EVENTS:
            return await asyncio.to_thread(replay, agent, history)
        return replay(agent, history)

    async def _requested_step(self, cached: CachedHistory, n: int) -> Step[Any] | None:
        """Step n as the flow asks for it now; None when the flow does not wait for it any more."""
        if cached.waiting is None or n not in cached.waiting.steps:
            outcome = await self._replay(cached.history)
            if not isinstance(outcome, Waiting) or n not in outcome.steps:
                return None
            cached.waiting = outcome
        return cached.waiting.steps[n]

    async def _execute(
        self, step: Step[Any], n: int, claimed: Claimed, lease: Lease, history: History
    ) -> tuple[Event, Charge]:
        started = history.started
        assert started is not None
        live = TokenBuffer(self.journal, history.run_id, n, claimed.attempt)
        attempt = Attempt(
            history.run_id, n, claimed.attempt, claimed.in_doubt, lambda: lease.lost, live.progress,
            live.text if started.stream and step.target == "model" else None, started.agent, started.trace,
            history.away.get(n, ()),
        )  # fmt: skip
        if claimed.attempt > 1 and started.stream:
            live.retract()
        try:
            return await self._executor.do(step, attempt)
        finally:
            await live.flush()

    async def _commit(
        self, unit: str, n: int, claimed: Claimed, event: Event, charge: Charge, cached: CachedHistory
    ) -> str:
        """Write the step's end together with what comes next, or a gather's member's end alone: journal/lua/commit.lua."""
        history = cached.history
        planned = history.planned[n]
        if planned.gather or not isinstance(event, StepDone | StepFailed):
            answer = await self.journal.commit(unit, fence=claimed.fence, event=event, charge=charge)
            return type(event).__name__ if isinstance(answer, Accepted) else answer.why
        version = history.version
        with self._history_cache.writing(history.run_id):
            history.extend([event])
            cached.waiting = None
            try:
                nxt, _ = await self._replay_until_blocked(cached)
            except (ReplayError, UnknownName):
                # The step's end is worth keeping; the advance it leaves will meet the same error and hold the run.
                await self.journal.commit(unit, fence=claimed.fence, event=event, version=-1, charge=charge)
                raise
            answer = await self.journal.commit(
                unit, fence=claimed.fence, event=event, version=version, next=nxt, charge=charge
            )
            self._cache_or_drop(history.run_id, cached, answer)
        return type(event).__name__ if isinstance(answer, Accepted) else answer.why

    async def _replay_until_blocked(self, cached: CachedHistory) -> tuple[NextSteps, Waiting | None]:
        """Replay until a step must be executed; the history then holds what `next` will write."""
        plans: list[Any] = []
        while True:
            outcome = await self._replay(cached.history)
            nxt = self.planner.next(cached.history, outcome)
            cached.history.extend(_expected_events(nxt))
            plans += nxt.plans
            # after a lone step that failed before it began no worker would continue the run: continue it here
            if not nxt.plans or nxt.gather or any(p.state != "ended" for p in nxt.plans):
                break
        cached.waiting = outcome if isinstance(outcome, Waiting) else None
        return NextSteps(plans, nxt.gather, nxt.end, nxt.up), cached.waiting

    def _cache_or_drop(self, run_id: str, cached: CachedHistory, answer: Accepted | Refused) -> None:
        """Keep the history when the store wrote exactly what was expected; else drop it."""
        if isinstance(answer, Accepted) and not answer.conflict and answer.version == cached.history.version:
            if cached.history.end is None:
                self._history_cache.keep(run_id, cached)
            elif self._on_run_end is not None:
                self._on_run_end(cached.history, cached.history.end)
        else:
            self._history_cache.drop(run_id)

    async def _end_at_limit(self, unit: str, claimed: Claimed, history: History) -> str:
        """The run ends because it may spend no more."""
        error = LimitReached(
            f"run {history.run_id} reached its limit of {claimed.limit}", hint="raise it in Crew(limits=…)",
            run_id=history.run_id, limit=claimed.limit,
        )  # fmt: skip
        failed = StepFailed(n=int(unit.rpartition("|")[2]), error=error_to_json(error))
        end = NextSteps(end=RunFailed(error=error_to_json(error)), up=parent_event(history, Failed(error)))
        version = history.version
        self._history_cache.drop(history.run_id)
        answer = await self.journal.commit(unit, fence=claimed.fence, event=failed, version=version, next=end)
        if (
            self._on_run_end is not None
            and end.end is not None
            and isinstance(answer, Accepted)
            and not answer.conflict
        ):
            self._on_run_end(history, end.end)
        return "limit"

    # ---- leases: called from another thread ------------------------------------------------------
    def held_leases(self) -> list[tuple[str, int]]:
        """The leases to renew."""
        return [(unit, lease.fence) for unit, lease in list(self.leases.items())]

    def lose_lease(self, unit: str) -> None:
        """A lease was lost to another worker, or its run was cancelled: stop working on it. Thread-safe."""
        lease = self.leases.get(unit)
        if lease is None:
            return
        lease.lost = True
        if lease.loop is not None:
            lease.loop.call_soon_threadsafe(_cancel_task, lease)


def _cancel_task(lease: Lease) -> None:
    if lease.task is not None:  # read on its own loop: a step that is being committed is not stopped
        lease.task.cancel()


def _expected_events(nxt: NextSteps) -> list[Event]:
    """The events that the store will append for `next`, as far as they are known here."""
    planned: list[Event] = [p.event for p in nxt.plans]
    ended = [p.end for p in nxt.plans if p.end is not None]
    return [*planned, *ended, *([nxt.end] if nxt.end is not None else [])]
