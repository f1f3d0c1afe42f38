"""The one place that wires the parts of a worker process: ledger, limiter, registry, runner."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from batchllm_celery.connection import Connection
from batchllm_celery.errors import (
    BatchNotFoundError,
    BatchUnreadableError,
    FailureKind,
    StrategyNotFoundError,
    StrategyParametersError,
    UsageError,
    describe,
)
from batchllm_celery.events import Events, WorkerStarted, WorkerStopped
from batchllm_celery.execution import ItemJob, ItemRunner, Prices, Stopped, Unrunnable
from batchllm_celery.execution.pricing import given_prices
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import (
    Beat,
    Claim,
    Heartbeat,
    Ledger,
    WorkerInfo,
    able,
    list_workers,
    new_process_id,
)
from batchllm_celery.limiter import Estimator, Limiter
from batchllm_celery.models import (
    NO_TOKENS,
    BatchSpec,
    BatchState,
    Failure,
    Quota,
    RetryState,
    StrategySpec,
    TokenUsage,
    WorkItemResult,
)
from batchllm_celery.settings import Settings
from batchllm_celery.strategies import LLMCallStrategy, ProcessResources, Registry
from batchllm_celery.strategies.failures import log_bug, status_of
from batchllm_celery.worker.slots import Slots
from batchllm_celery.worker.startup import ready_file, touch_forever
from batchllm_celery.worker.unrunnable import (
    MOST_DELAY,
    Faults,
    is_missing,
    is_of_the_process,
    reason_of,
)

logger = logging.getLogger("batchllm_celery")

#: A straggler must not hold up its neighbours: so many times the slots are admitted.
ADMITTED_PER_SLOT = 4
#: Items that a message is taken to name until the first one has come: a process that takes more
#: than it can run keeps them from its neighbours.
LARGE_MESSAGE = 100
#: What was lost is enqueued in messages of so many items, ahead of what waits already.
OFFERED_PER_TASK = 10
URGENT = 9
#: How often a worker that lives on offers asks for more, while each brings as much as it asked for.
HUNGRY_SECONDS = 0.25

#: A shorter wait for the quota is not worth a word in a task's result.
SHOWN_WAIT_SECONDS = 1.0

#: Seconds before a time limit of Celery's at which what still runs goes back.
CUT_OFF_BEFORE = 5.0

#: Seconds until parameters that no live worker takes fail their items. They are a typing error
#: more often than a deploy.
PARAMETERS_AFTER = 30.0
#: Where a live worker could run it so many seconds ago, an item waits no longer than this.
ABLE_SECONDS, ABLE_DELAY = 10.0, 2.0
#: A key that is refused is this process' own if its quota had a success anywhere in so many seconds
#: before, or has one in so many after.
CREDENTIAL_SECONDS, CREDENTIAL_WAIT = 60.0, 5.0
_CREDENTIAL_LOOK = 0.5

_HALTED = frozenset({BatchState.PAUSED, BatchState.PARKED})

Publish = Callable[[str, Sequence[int], str, int], None]


@dataclass(slots=True)
class Tally:
    """What became of the items of one message; its text is what Flower shows as the result."""

    succeeded: int = 0
    failed: int = 0
    tokens: int = 0
    returned: int = 0
    unknown: bool = False
    """Whether Redis does not know the batch."""
    waited: float = 0.0
    """Seconds that the one of them waited for the quota which waited longest."""
    kinds: dict[str, int] = field(default_factory=dict)

    def add(self, result: WorkItemResult[Any, Any] | None) -> None:
        if result is None:
            self.returned += 1
            return
        self.tokens += result.token_usage.total_tokens
        self.waited = max(self.waited, result.timing.waited)
        if result.success:
            self.succeeded += 1
            return
        self.failed += 1
        kind = str(result.error_kind or FailureKind.UNKNOWN)
        self.kinds[kind] = self.kinds.get(kind, 0) + 1

    def __str__(self) -> str:
        text = f"{self.succeeded:,} ok, {self.failed:,} failed, {self.tokens:,} tokens"
        if self.kinds:
            text += " (" + ", ".join(f"{kind} {n}" for kind, n in sorted(self.kinds.items())) + ")"
        if self.waited >= SHOWN_WAIT_SECONDS:
            text += f", waited {self.waited:.1f} s for the quota"
        return text + (f", {self.returned:,} handed back" if self.returned else "")


@dataclass(slots=True)
class _Running:
    """One claimed item in this process: what a pause or a drain needs to know of it."""

    claim: Claim
    task: asyncio.Task[WorkItemResult[Any, Any] | None]
    begun: bool = False
    handed_back: bool = False

    @property
    def in_call(self) -> bool:
        return self.claim.calling


@dataclass(slots=True)
class _Admission:
    """The items of one message that are not done yet."""

    items: int
    on_left: Callable[[int], None]

    def leave(self, items: int) -> None:
        items = min(items, self.items)  # after an error some end when all have been left
        if items:
            self.items -= items
            self.on_left(items)

    def leave_one(self, _: object) -> None:
        self.leave(1)


def _until_cut(time_limit: float) -> float:
    """Seconds after which calls are cut off, before a time limit of Celery's does worse."""
    return max(time_limit / 2, time_limit - CUT_OFF_BEFORE)


class _LedgerGate:
    """Asks the ledger before each call, and keeps there what a move to another process needs.

    The item's other questions are its methods too: with thousands of items in flight, a closure
    for each would weigh more than all that this holds.
    """

    __slots__ = ("_claim", "_quota", "_runtime", "_spec", "_strategy")

    def __init__(
        self,
        runtime: Runtime,
        claim: Claim,
        spec: StrategySpec,
        strategy: LLMCallStrategy[Any],
        quota: str,
    ) -> None:
        self._runtime = runtime
        self._claim = claim
        self._spec = spec
        self._strategy = strategy
        self._quota = quota

    async def prepare(self) -> None:
        await self._runtime.registry.prepare(self._strategy)
        if self._runtime.faults.found:
            self._runtime.faults.was_prepared(self._spec)

    async def parks(self) -> bool:
        return await self._runtime.parks(self._quota)

    async def begin(self) -> FailureKind | BatchState | None:
        if self._runtime.draining:
            return BatchState.PAUSED
        return await self._runtime.ledger.claims.begin(self._claim)

    async def save(
        self,
        attempts: int,
        refusals: int,
        state: RetryState,
        usage: TokenUsage,
        *,
        overloads: int,
        last_error: str,
    ) -> None:
        await self._runtime.ledger.claims.save(
            self._claim,
            attempts,
            refusals,
            state,
            usage,
            overloads=overloads,
            last_error=last_error,
        )

    def gave_up(self) -> None:
        self._claim.given_up += 1

    def calls(self, under_way: bool) -> None:
        self._claim.calling, self._claim.unused = under_way, not under_way

    async def hands_back(self, failure: Failure, error: Exception, *, called: bool) -> bool:
        runtime, claim = self._runtime, self._claim
        if not runtime.settings.unrunnable_after:
            return False
        if called and not runtime.faults.may_hand_back(claim.batch_id, claim.index):
            return False
        if failure.kind is FailureKind.AUTHENTICATION and (called or status_of(error) is not None):
            return await runtime.credential_is_ours(self._quota, claim)
        return is_missing(error) if called else is_of_the_process(failure, error)


def _rehearsed(result: WorkItemResult[Any, Any]) -> WorkItemResult[Any, Any]:
    """A rehearsal's result: marked as one, and without tokens that nobody spent."""
    metadata = {**result.metadata, "dry_run": True}
    changes = {"token_usage": NO_TOKENS, "cost": None, "metadata": metadata}
    return result.model_copy(update=changes)


class Runtime:
    """All parts of one worker process; opened on first use, closed when the process ends.

    Args:
        settings: this process' settings.
        url: Redis.
        publish: sends a Celery message for items that no message has brought (a blocking call).
        slots: items in flight at once; default `settings.slots`.
        queues: the lanes that this worker serves; default `settings.queues`.
        events: who is told.
    """

    def __init__(
        self,
        settings: Settings,
        url: str,
        publish: Publish,
        *,
        slots: int | None = None,
        queues: Sequence[str] | None = None,
        events: Events | None = None,
    ) -> None:
        self.settings = settings
        self.queues = list(queues or settings.queues)
        self.events = events if events is not None else Events()
        self.process_id = new_process_id()
        self.draining = False
        self._url = url
        self._publish = publish
        self._slots = Slots(slots or settings.slots)
        self._admitted = self._messages = 0
        self._message_items = LARGE_MESSAGE
        self._room = asyncio.Condition()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running: dict[tuple[str, int], _Running] = {}
        self._last_delivery = time.monotonic()
        self._hungry = False
        self.faults = Faults()
        self._refused_keys: dict[str, float] = {}  # quota -> when it was no matter of this process
        self._started_at = time.time()
        self._opening = asyncio.Lock()
        self._parts: contextlib.AsyncExitStack | None = None
        self.on_room: Callable[[], None] = lambda: None
        self.dropped_messages: Callable[[], int] = lambda: 0

    # -- lifetime ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and start the background work; repeating it is harmless."""
        async with self._opening:
            if self._parts is not None:
                return
            async with contextlib.AsyncExitStack() as parts:
                await self._wire(parts)
                self._parts = parts.pop_all()
        self.events.emit(WorkerStarted(self.process_id))

    async def _wire(self, parts: contextlib.AsyncExitStack) -> None:
        settings = self.settings
        connection = await parts.enter_async_context(
            Connection(self._url, events=self.events, denied_seconds=settings.lease_seconds)
        )
        self._connection = connection
        keys = Keys(settings.namespace, connection.database)
        await connection.patiently(connection.ping)
        self.ledger = await parts.enter_async_context(
            Ledger(
                connection,
                keys,
                process_id=self.process_id,
                settings=settings.model_copy(update={"slots": self._slots.limit}),
            )
        )
        self.limiter = await parts.enter_async_context(
            Limiter(connection, keys, process_id=self.process_id, events=self.events)
        )
        resources = ProcessResources(
            connection=connection,
            keys=keys,
            settings=settings,
            slots=self._slots.limit,
            events=self.events,
        )
        self._resources = resources
        self.registry = Registry(resources)
        parts.push_async_callback(self.registry.close)
        prices = Prices(settings.prices_file)
        self.runner = ItemRunner(self.limiter, Estimator(), self.events, prices)
        self._start_heartbeat(parts, keys)
        self._in_background(parts, self._offer_loop())
        if settings.heartbeat_file is not None:
            file, interval = ready_file(settings.heartbeat_file), settings.heartbeat_seconds
            self._in_background(parts, touch_forever(file, interval, self._has_redis))

    def _start_heartbeat(self, parts: contextlib.AsyncExitStack, keys: Keys) -> None:
        loop = asyncio.get_running_loop()
        self._heartbeat = Heartbeat(
            self._url,
            keys,
            process_id=self.process_id,
            batches=self.ledger.claims.holding.batches,
            notify=lambda beats: loop.call_soon_threadsafe(self._on_beats, beats),
            interval=self.settings.heartbeat_seconds,
            presence=self._presence,
            able=partial(self._able, keys),
        )
        self._heartbeat.start()
        parts.callback(self._heartbeat.stop)

    def _presence(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.process_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            slots=self._slots.limit,
            running=len(self._running),
            queues=",".join(self.queues),
            started_at=self._started_at,
            dropped_messages=self.dropped_messages(),
            unreadable=",".join(self._unreadable()[:5]),
            strategies=",".join(sorted(self.registry.names())),
            unrunnable=json.dumps(
                {fault.name: (fault.reason, fault.since) for fault in self.faults.all()[:20]}
            ),
        )

    def _able(self, keys: Keys, now: float) -> list[tuple[str | int | float, ...]]:
        """The commands that tell others what this process can run; in the heartbeat's thread."""
        faults, broken = self.faults.all(), set(self.faults.keys())
        names = set(self.registry.names()) - {fault.name for fault in faults}
        members = [able.registered(name) for name in names]
        members += [able.prepared(key) for key in self.registry.prepared() if key not in broken]
        moment, succeeded = time.monotonic(), dict(self.runner.succeeded_at)
        successes = {quota: moment - at for quota, at in succeeded.items()}
        kept = 2 * self.settings.unrunnable_after
        return able.commands(keys, now, members, successes, kept)

    def _unreadable(self) -> list[str]:
        return [entry.name for entry in self._connection.broken.all() if entry.kind == "batch"]

    def _in_background(self, parts: contextlib.AsyncExitStack, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)

        async def end() -> None:
            task.cancel()
            await asyncio.wait([task])

        parts.push_async_callback(end)

    def drain(self) -> None:
        """Start no further call: items that wait go back at once, calls in flight may end within
        `settings.drain_seconds`."""
        if self.draining:
            return
        self.draining = True
        self._hand_back(lambda running: not running.in_call)
        seconds = self.settings.drain_seconds
        asyncio.get_running_loop().call_later(
            seconds, self._hand_back, lambda running: True, f"drain_seconds={seconds:g}"
        )

    def abandon(self) -> None:
        """End at once: calls in flight are cut off and handed back too (a cold shutdown)."""
        self.draining = True
        self._hand_back(lambda running: True)

    async def close(self) -> None:
        """Hand back what still runs, then close everything in reverse order."""
        self.draining = True
        self._hand_back(lambda running: True)
        tasks = [running.task for running in self._running.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=5.0)
        parts, self._parts = self._parts, None
        if parts is not None:
            await parts.aclose()
            self.events.emit(WorkerStopped(self.process_id))

    # -- work -------------------------------------------------------------------------------------

    def room_for_messages(self, in_hand: int) -> int:
        """How many more messages may be taken: asked by the pool before each, from its thread.

        Those that have not reached us yet, in hand or still to be taken, pass for as large as the
        last one that did.
        """
        if self.draining:
            return 0
        on_the_way = max(0, in_hand - self._messages) * self._message_items
        if self.faults.found and (few := self.faults.messages()) is not None:
            return 0 if in_hand else few
        return max(0, math.ceil(self._free_admissions(on_the_way) / self._message_items))

    def expect(self, items: int) -> None:
        """A message of so many items is on its way to us; from the pool's thread."""
        self._message_items = max(1, items)

    async def run_items(
        self,
        batch_id: str,
        indexes: Sequence[int],
        *,
        offered: bool = False,
        time_limit: float | None = None,
    ) -> Tally:
        """Claim and run the items that one message names; what others hold is left to them.

        Args:
            batch_id: the batch.
            indexes: the items.
            offered: whether a worker sent it for items that no message had brought.
            time_limit: seconds after which Celery ends this; what runs 5 s before goes back.
        """
        ends = math.inf if time_limit is None else time.monotonic() + _until_cut(time_limit)
        await self.open()
        if not offered:
            self._last_delivery, self._hungry = time.monotonic(), False
        tally = Tally()
        async with self._admission(len(indexes)) as admission:
            if self.draining:
                return tally
            try:
                reply = await self.ledger.claims.claim(batch_id, indexes)
            except BatchNotFoundError:
                tally.unknown = True
                logger.warning("batch.unknown batch_id=%s", batch_id)
                return tally
            except BatchUnreadableError:
                return tally  # it has been logged; `status` names it
            if self.draining:  # since we asked: nobody else would hand them back
                await self.ledger.claims.release(reply.claims)
                tally.returned = len(reply.claims)
                return tally
            admission.leave(len(indexes) - len(reply.claims))
            tasks = [self._start(reply.spec, claim) for claim in reply.claims]
            for task in tasks:
                task.add_done_callback(admission.leave_one)
            try:
                if tasks and ends < math.inf:
                    await self._run_until(ends, tasks, f"time_limit={time_limit:g}")
                ended = await asyncio.gather(*tasks, return_exceptions=True)
            except asyncio.CancelledError:  # revoked, or a cold shutdown
                if tasks:
                    await asyncio.wait(tasks)
                raise
        for result in ended:
            if isinstance(result, Exception):
                raise result  # shows in Celery; the item itself went back
            tally.add(None if isinstance(result, BaseException) else result)
        return tally

    async def _run_until(self, ends: float, tasks: Sequence[asyncio.Task[Any]], why: str) -> None:
        _, late = await asyncio.wait(tasks, timeout=max(0.0, ends - time.monotonic()))
        self._hand_back(lambda running: running.task in late, why)

    @contextlib.asynccontextmanager
    async def _admission(self, items: int) -> AsyncIterator[_Admission]:
        if not self.draining and self._free_admissions() <= 0:
            async with self._room:
                await self._room.wait_for(self._may_enter)
        self._admitted += items
        self._messages += 1
        if items != self._message_items:
            self._message_items = max(1, items)
            self.on_room()
        admission = _Admission(items, self._on_left)
        try:
            yield admission
        finally:
            self._messages -= 1
            admission.leave(admission.items)
            async with self._room:
                self._room.notify_all()
            self.on_room()

    def _on_left(self, items: int) -> None:
        """Items have ended, or were not ours to run: the next message need not wait for the last
        of their neighbours."""
        was_full = self._free_admissions() <= 0
        self._admitted -= items
        if was_full and self._free_admissions() > 0:
            self._spawn(self._announce_room())

    async def _announce_room(self) -> None:
        async with self._room:
            self._room.notify_all()
        self.on_room()

    def _may_enter(self) -> bool:
        return self.draining or self._free_admissions() > 0

    def _free_admissions(self, on_the_way: int = 0) -> int:
        return ADMITTED_PER_SLOT * self._slots.limit - self._admitted - on_the_way

    def _start(
        self, spec: BatchSpec, claim: Claim
    ) -> asyncio.Task[WorkItemResult[Any, Any] | None]:
        task = asyncio.ensure_future(self._run_claim(spec, claim))
        running = self._running[claim.batch_id, claim.index] = _Running(claim, task)
        task.add_done_callback(partial(self._ended, running))
        return task

    def _ended(self, running: _Running, _: object) -> None:
        claim = running.claim
        self._running.pop((claim.batch_id, claim.index), None)
        if not running.begun:  # cancelled at once: `_run_claim` never saw it
            self._spawn(self.ledger.claims.release([claim]))

    async def _run_claim(self, spec: BatchSpec, claim: Claim) -> WorkItemResult[Any, Any] | None:
        self._running[claim.batch_id, claim.index].begun = True
        try:
            await self._slots.take(spec.priority)
            try:
                outcome = await self._run_one(spec, claim)
                # Inside: what a budget can be overshot by is what the slots hold.
                if isinstance(outcome, WorkItemResult):
                    return await self._record(claim, outcome)
            finally:
                self._slots.give()
            if isinstance(outcome, Unrunnable):
                return await self._hand_back_or_fail(spec, claim, outcome)
            if outcome.until is not None:
                await self.ledger.batches.defer(claim.batch_id, outcome.until)
            await self.ledger.claims.release([claim])
        except asyncio.CancelledError:
            await asyncio.shield(self.ledger.claims.release([claim]))
            if self._is_handed_back(claim):
                return None
            raise
        except Exception:
            # A fault of ours or of Redis, not the item's: held any longer it would hang for ever.
            await asyncio.shield(self.ledger.claims.release([claim]))
            raise
        return None

    async def _run_one(
        self, spec: BatchSpec, claim: Claim
    ) -> WorkItemResult[Any, Any] | Stopped | Unrunnable:
        if claim.payload.problem is not None:
            problem = f"InvalidInput: {claim.payload.problem}"
            return self._without_call(claim, FailureKind.INVALID_INPUT, problem)
        chosen = claim.payload.strategy or spec.strategy
        if self.faults.found and (fault := self.faults.waiting(chosen)):
            return Unrunnable(fault.reason, parameters=fault.parameters)
        try:
            strategy = await self.registry.get(chosen)
            job = self._job(spec, claim, chosen, strategy)
        except UsageError as error:
            return self._not_built(chosen, claim, error)
        except BaseException as error:  # a property of it fails: it would each time
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            log_bug("strategy.unusable", error, strategy=chosen.name)
            return self._without_call(claim, FailureKind.LOGIC_ERROR, describe(error))
        with self.registry.using(strategy):
            outcome = await self.runner.run(job)
        await self.registry.close_surplus()
        if isinstance(outcome, WorkItemResult):
            if self.faults.found:
                self.faults.ran(chosen)
        elif isinstance(outcome, Unrunnable):
            claim.usage, claim.last_error = job.usage, job.last_error
        if spec.config.dry_run and isinstance(outcome, WorkItemResult):
            return _rehearsed(outcome)
        return outcome

    def _not_built(
        self, chosen: StrategySpec, claim: Claim, error: UsageError
    ) -> WorkItemResult[Any, Any] | Unrunnable:
        of_the_job = Failure(FailureKind.INVALID_REQUEST, describe(error))
        if self.settings.unrunnable_after and (
            isinstance(error, StrategyNotFoundError) or is_of_the_process(of_the_job, error)
        ):
            return Unrunnable(
                reason_of(error), parameters=isinstance(error, StrategyParametersError)
            )
        return self._without_call(claim, of_the_job.kind, of_the_job.message)

    async def _hand_back_or_fail(
        self, spec: BatchSpec, claim: Claim, outcome: Unrunnable
    ) -> WorkItemResult[Any, Any] | None:
        """Hand an item back that this process can't run; or end it, where nobody can."""
        chosen = claim.payload.strategy or spec.strategy
        fault = self.faults.add(chosen, outcome.reason, claim.batch_id, called=outcome.called)
        fault.parameters = outcome.parameters
        self._call_later(fault.retry_at - time.monotonic(), self.on_room)
        first = claim.handed_back_at or claim.server_now
        last = await able.able_at(self._connection, self._resources.keys, chosen)
        after = self.settings.unrunnable_after
        if outcome.parameters:
            after = min(after, PARAMETERS_AFTER)
        fault.hopeless = claim.server_now - max(first, last) > after
        if fault.hopeless:
            if outcome.parameters:
                return await self._record(
                    claim, self._without_call(claim, FailureKind.INVALID_REQUEST, outcome.reason)
                )
            why = f"Unrunnable: no worker could run strategy {chosen.name!r} for {after:g} s; "
            why += f"the last one that tried: {outcome.reason}"
            result = self._without_call(claim, FailureKind.UNRUNNABLE, why)
            return await self._record(claim, result)
        if outcome.called or not claim.handed_back_at:
            claim.handed_back_at = first
            await self.ledger.claims.save(
                claim,
                claim.attempts,
                claim.refusals,
                claim.state,
                claim.usage,
                overloads=claim.overloads,
                last_error=claim.last_error,
            )
        delay = self.faults.delay(fault, claim.batch_id, claim.index)
        if claim.server_now - last < ABLE_SECONDS and delay <= MOST_DELAY:
            delay = min(delay, ABLE_DELAY)
        await self.ledger.claims.release([claim], delay=delay)
        return None

    async def credential_is_ours(self, quota: str, claim: Claim) -> bool:
        """Whether a key that a provider refused is this process' own: the quota's calls succeed
        elsewhere, or did a moment ago. Else the key is the fleet's, and the batch stops."""
        refused = self._refused_keys.get(quota, -math.inf)
        known = time.monotonic() - refused < CREDENTIAL_SECONDS
        waits = not known and await self._has_neighbours()
        ends = time.monotonic() + CREDENTIAL_WAIT if waits else -math.inf
        keys = self._resources.keys
        while True:
            at = await able.succeeded_at(self._connection, keys, quota)
            if claim.server_now - at < CREDENTIAL_SECONDS:
                return True
            if time.monotonic() >= ends:
                self._refused_keys[quota] = time.monotonic()
                return False
            await asyncio.sleep(_CREDENTIAL_LOOK)

    async def _has_neighbours(self) -> bool:
        """Whether another live worker serves a queue of ours."""
        workers = await list_workers(self._connection, self._resources.keys)
        return any(
            worker.worker_id != self.process_id
            and not set(self.queues).isdisjoint(worker.queues.split(","))
            for worker in workers
        )

    def _call_later(self, delay: float, then: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_later(max(0.0, delay) + 0.01, then)

    def _job(
        self,
        spec: BatchSpec,
        claim: Claim,
        chosen: StrategySpec,
        strategy: LLMCallStrategy[Any],
    ) -> ItemJob:
        payload = claim.payload
        quota = spec.quota or strategy.quota or spec.strategy.name
        # The runner asks for them, too, where a failure would be taken for one of Redis.
        _ = strategy.max_output_tokens, strategy.models()
        # Where it has its default name nobody has chosen it.
        if strategy.full_speed and quota in (strategy.model_name, spec.strategy.name):
            self.limiter.begin_at_full_speed(quota)
        gate = _LedgerGate(self, claim, chosen, strategy, quota)
        return ItemJob(
            batch_id=claim.batch_id,
            item_id=payload.item_id,
            index=claim.index,
            prompt=payload.prompt,
            context=payload.context,
            strategy=strategy,
            prepare=gate.prepare,
            quota=quota,
            config=spec.config,
            state=claim.state,
            attempts=claim.attempts,
            refusals=claim.refusals,
            overloads=claim.overloads,
            last_error=claim.last_error,
            usage=claim.usage,
            queued_seconds=claim.queued_seconds + time.monotonic() - claim.claimed_at,
            priority=spec.priority,
            prices=given_prices(spec.prices),
            needs_prices=spec.max_cost is not None,
            estimate_usage=spec.token_budget is not None,
            gate=gate,
            parks=gate.parks,
        )

    async def parks(self, quota: str) -> bool:
        """What the quota says when its day is over; one that nobody configured parks."""
        connection, key = self._resources.connection, self._resources.keys.quota(quota).state
        assert connection is not None
        client: Any = connection.client
        config: bytes | None = await connection.patiently(lambda: client.hget(key, "config"))
        return config is None or Quota.model_validate_json(config).day_exhausted == "park"

    def _without_call(
        self, claim: Claim, kind: FailureKind, error: str
    ) -> WorkItemResult[Any, Any]:
        return WorkItemResult(
            item_id=claim.payload.item_id,
            index=claim.index,
            success=False,
            error=error,
            error_kind=kind,
            context=claim.payload.context,
        )

    async def _record(
        self, claim: Claim, result: WorkItemResult[Any, Any]
    ) -> WorkItemResult[Any, Any]:
        # It arrives even if this task is cancelled now: the answer is paid for.
        result, line = await self.ledger.claims.fitting(claim.payload.signed(result))
        tokens = result.token_usage.total_tokens
        await self.ledger.claims.record(
            claim, result, spent_tokens=tokens, cost=result.cost, line=line
        )
        return result

    # -- control ----------------------------------------------------------------------------------

    def _on_beats(self, beats: Sequence[Beat]) -> None:
        """Batches were paused or stopped: what waits goes back, calls in flight may end."""
        halted = set()
        for beat in beats:
            if beat.state is None or beat.state in _HALTED or beat.state.stopped:
                halted.add(beat.batch_id)
            if beat.state is not None:
                self._spawn(
                    self.ledger.recovery.on_heartbeat(beat.batch_id, beat.state, lost=beat.lost)
                )
        if halted:
            self._hand_back(lambda one: not one.in_call and one.claim.batch_id in halted)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _hand_back(self, wanted: Callable[[_Running], bool], why: str = "a_shutdown") -> None:
        """Give items back; `why` is what their calls, if they are in one, were cut off by."""
        for running in list(self._running.values()):
            if wanted(running):
                running.handed_back = True
                running.claim.cut_by = why
                running.task.cancel()

    def _is_handed_back(self, claim: Claim) -> bool:
        running = self._running.get((claim.batch_id, claim.index))
        return running is not None and running.handed_back

    # -- background -------------------------------------------------------------------------------

    async def _offer_loop(self) -> None:
        """Enqueue again, as Celery tasks, what was lost and what no message ever brought."""
        interval = min(self.settings.offer_seconds, self.settings.lease_seconds / 6)
        while True:
            await asyncio.sleep(min(interval, HUNGRY_SECONDS) if self._hungry else interval)
            if self.draining:
                continue
            try:
                await self.ledger.recovery.reconcile(self._runs)
            except Exception as error:  # the next look may do better
                logger.warning("reconcile.failed error=%s", describe(error))
            for queue in self.queues:
                try:
                    await self._offer(queue)
                except Exception as error:  # without any further look, work is lost
                    logger.warning("offer.failed queue=%s error=%s", queue, describe(error))

    def _runs(self, claim: Claim) -> bool:
        running = self._running.get((claim.batch_id, claim.index))
        return running is not None and running.claim is claim

    async def _offer(self, queue: str) -> None:
        """What was lost must not wait for an idle worker; the rest is for those with free slots."""
        hungry = time.monotonic() - self._last_delivery >= self.settings.offer_seconds
        idle = hungry and self._slots.free > 0
        wanted = self._slots.free if idle else max(1, self._slots.limit // 4)
        priority = 0 if idle else URGENT
        offered = await self.ledger.recovery.requeue(
            queue, wanted, lost_only=not idle, skips=self.faults.blocks
        )
        if idle and wanted:  # nothing but offers brings work, after a pause for instance
            self._hungry = sum(len(indexes) for _, indexes in offered) >= wanted
        for batch_id, indexes in offered:
            for first in range(0, len(indexes), OFFERED_PER_TASK):
                some = indexes[first : first + OFFERED_PER_TASK]
                await asyncio.to_thread(self._publish, batch_id, some, queue, priority)

    def _has_redis(self) -> bool:
        """Whether Redis has answered lately."""
        return time.monotonic() - self._heartbeat.last_beat < self.settings.lease_seconds
