"""The one place that wires the parts of a worker process, and drains it."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from batchllm_celery.errors import (
    BatchNotFoundError,
    BatchUnreadableError,
    FailureKind,
    describe,
)
from batchllm_celery.event_loop import Unending
from batchllm_celery.events import Events, WorkerStarted, WorkerStopped
from batchllm_celery.ledger import Beat, Heartbeat, WorkerInfo, able
from batchllm_celery.models import BatchState, WorkItemResult
from batchllm_celery.services import Services
from batchllm_celery.settings import Settings
from batchllm_celery.worker.admission import Admission
from batchllm_celery.worker.items import Items
from batchllm_celery.worker.slots import Slots
from batchllm_celery.worker.startup import ready_file, touch_forever
from batchllm_celery.worker.unrunnable import Faults

logger = logging.getLogger("batchllm_celery")

#: Lost items are enqueued again in messages of so many, ahead of the messages that wait already.
REQUEUED_PER_MESSAGE = 10
URGENT = 9
#: Seconds between two requeues of a worker that gets no other work, while each brings as much as
#: it asked for.
STARVED_SECONDS = 0.25

#: A shorter wait for the quota, in seconds, is not named in a task's result.
SHOWN_WAIT_SECONDS = 1.0

#: Seconds before a time limit of Celery's at which what still runs goes back.
CUT_OFF_BEFORE = 5.0

#: Seconds that a process waits, when it closes, for its items to be released.
CLOSE_SECONDS = 5.0

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


class Runtime:
    """All parts of one worker process; opened at first use, closed when the process ends.

    Args:
        settings: this process' settings.
        url: of Redis.
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
        slots = slots or settings.slots
        self.services = Services(
            settings.model_copy(update={"slots": slots}),
            url,
            events=events,
            denied_seconds=settings.lease_seconds,
        )
        self.queues = list(queues or settings.queues)
        self.dropped_messages: Callable[[], int] = lambda: 0
        self.send_again: Callable[[str, int, bytes], None] = lambda *_: None
        """Sends the message of a Celery task again whose item is done; blocks."""
        self.tell_end: Callable[[str, int, dict[str, Any]], None] = lambda *_: None
        """Calls the Celery task that is to be told that a batch is over; blocks."""
        self._publish = publish
        self._slots = Slots(slots)
        self._faults = Faults()
        self.admission = Admission(slots, self._faults)
        self.items = Items(self.services, self._slots, self._faults, self.admission, self.queues)
        self._last_delivery = time.monotonic()
        self._starved = False
        self._started_at = time.time()
        self._opening = asyncio.Lock()
        self._is_open = False

    # -- lifetime ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and start the background work; repeating it is harmless."""
        async with self._opening:
            if self._is_open:
                return
            services = self.services
            # Nothing after this one can fail: until then, opening may be tried again.
            await services.connection.patiently(services.connection.ping)
            # Each part is made here, on the loop: the heartbeat's thread asks some of them.
            _ = services.ledger
            await services.enter(services.limiter)
            _ = services.registry, self.items.runner
            self._start_heartbeat()
            self._in_background(self._requeue_forever)
            settings = services.settings
            if settings.heartbeat_file is not None:
                file, interval = ready_file(settings.heartbeat_file), settings.heartbeat_seconds
                self._in_background(partial(touch_forever, file, interval, self._has_redis))
            self._is_open = True
        services.events.emit(WorkerStarted(services.process_id))

    def _start_heartbeat(self) -> None:
        services, loop = self.services, asyncio.get_running_loop()
        self._heartbeat = Heartbeat(
            services.url,
            services.keys,
            process_id=services.process_id,
            batches=services.ledger.claims.holding.batches,
            notify=lambda beats: loop.call_soon_threadsafe(self._on_beats, beats),
            interval=services.settings.heartbeat_seconds,
            presence=self.presence,
            able=self._able,
        )
        self._heartbeat.start()
        services.stack.callback(self._heartbeat.stop)

    def _in_background(self, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        self.services.stack.push_async_callback(Unending(work).end)

    def drain(self) -> None:
        """Start no further call: items that wait go back at once, calls in flight may end within
        `settings.drain_seconds`."""
        if self.admission.closed:
            return
        self.admission.close()
        self.items.hand_back(lambda item: not item.claim.calling)
        seconds = self.services.settings.drain_seconds
        asyncio.get_running_loop().call_later(
            seconds, self.items.hand_back, lambda item: True, f"drain_seconds={seconds:g}"
        )

    def abandon(self) -> None:
        """End at once: calls in flight are cut off and handed back too (a cold shutdown)."""
        self.admission.close()
        self.items.hand_back(lambda item: True)

    async def close(self) -> None:
        """Hand back what still runs, then close everything in reverse order."""
        self.admission.close()
        await self.items.hand_back_all(CLOSE_SECONDS)
        await self.services.close()
        if self._is_open:
            self._is_open = False
            self.services.events.emit(WorkerStopped(self.services.process_id))

    # -- work -------------------------------------------------------------------------------------

    async def run_items(
        self,
        batch_id: str,
        indexes: Sequence[int],
        *,
        requeued: bool = False,
        time_limit: float | None = None,
    ) -> Tally:
        """Claim and run the items that one message names; what others hold is left to them.

        Args:
            batch_id: the batch.
            indexes: the items.
            requeued: whether a worker sent it for items that no message had brought.
            time_limit: seconds after which Celery ends this; what runs 5 s before goes back.
        """
        began = time.monotonic()
        if not self._is_open and not self.admission.closed:
            await self.open()
        if not requeued:
            self._last_delivery, self._starved = time.monotonic(), False
        tally, claims = Tally(), self.services.ledger.claims
        message = await self.admission.enter(len(indexes))
        try:
            if self.admission.closed:
                return tally
            try:
                reply = await claims.claim(batch_id, indexes)
            except BatchNotFoundError:
                tally.unknown = True
                logger.warning("batch.unknown batch_id=%s", batch_id)
                return tally
            except BatchUnreadableError:
                return tally  # it has been logged; `status` names it
            if self.admission.closed:  # since we asked: nobody else would hand them back
                await claims.release(reply.claims)
                tally.returned = len(reply.claims)
                return tally
            message.leave(len(indexes) - len(reply.claims))
            tasks = [self.items.start(reply.spec, claim) for claim in reply.claims]
            for task in tasks:
                task.add_done_callback(message.leave_one)
            try:
                if tasks and time_limit is not None:
                    await self._run_until(began + _until_cut(time_limit), tasks, time_limit)
                ended = await asyncio.gather(*tasks, return_exceptions=True)
            except asyncio.CancelledError:  # revoked, or a cold shutdown
                if tasks:
                    await asyncio.wait(tasks)
                raise
        finally:
            message.end()
        for result in ended:
            if isinstance(result, Exception):
                raise result  # shows in Celery; the item itself went back
            tally.add(None if isinstance(result, BaseException) else result)
        return tally

    async def _run_until(
        self, ends: float, tasks: Sequence[asyncio.Task[Any]], time_limit: float
    ) -> None:
        _, late = await asyncio.wait(tasks, timeout=max(0.0, ends - time.monotonic()))
        self.items.hand_back(lambda item: item.task in late, f"time_limit={time_limit:g}")

    # -- control ----------------------------------------------------------------------------------

    def _on_beats(self, beats: Sequence[Beat]) -> None:
        """Batches were paused or stopped: what waits goes back, calls in flight may end."""
        halted = set()
        for beat in beats:
            if beat.state is None or beat.state in _HALTED or beat.state.stopped:
                halted.add(beat.batch_id)
            if beat.state is not None:
                recovery = self.services.ledger.recovery
                self.items.spawn(recovery.on_heartbeat(beat.batch_id, beat.state, lost=beat.lost))
        if halted:
            self.items.hand_back(
                lambda item: not item.claim.calling and item.claim.batch_id in halted
            )

    def presence(self) -> WorkerInfo:
        """What the fleet knows of this process; asked by the heartbeat, from its thread."""
        services, broken = self.services, self.services.connection.broken.all()
        unreadable = [entry.name for entry in broken if entry.kind == "batch"]
        faults = self._faults.all()[:20]
        return WorkerInfo(
            worker_id=services.process_id,
            host=socket.gethostname(),
            pid=os.getpid(),
            slots=self._slots.limit,
            running=len(self.items),
            queues=",".join(self.queues),
            started_at=self._started_at,
            dropped_messages=self.dropped_messages(),
            unreadable=",".join(unreadable[:5]),
            strategies=",".join(sorted(services.registry.names())),
            unrunnable=json.dumps({fault.name: (fault.reason, fault.since) for fault in faults}),
        )

    def _able(self, now: float) -> list[tuple[str | int | float, ...]]:
        """The commands that tell others what this process can run; in the heartbeat's thread."""
        services, registry = self.services, self.services.registry
        faults, broken = self._faults.all(), set(self._faults.keys())
        names = set(registry.names()) - {fault.name for fault in faults}
        members = [able.registered(name) for name in names]
        members += [able.prepared(key) for key in registry.prepared() if key not in broken]
        moment, succeeded = time.monotonic(), dict(self.items.runner.succeeded_at)
        successes = {quota: moment - at for quota, at in succeeded.items()}
        kept = 2 * services.settings.unrunnable_after
        return able.commands(services.keys, now, members, successes, kept)

    # -- background -------------------------------------------------------------------------------

    async def _requeue_forever(self) -> None:
        """Enqueue again, as Celery tasks, what was lost and what no message ever brought."""
        settings, recovery = self.services.settings, self.services.ledger.recovery
        interval = min(settings.offer_seconds, settings.lease_seconds / 6)
        while True:
            await asyncio.sleep(min(interval, STARVED_SECONDS) if self._starved else interval)
            if self.admission.closed:
                continue
            try:
                await recovery.reconcile(self.items.runs)
            except Exception as error:  # the next round may do better
                logger.warning("reconcile.failed error=%s", describe(error))
            for queue in self.queues:
                try:
                    await self._requeue(queue)
                except Exception as error:  # without any further round, work is lost
                    logger.warning("offer.failed queue=%s error=%s", queue, describe(error))

    async def _requeue(self, queue: str) -> None:
        """What was lost must not wait for an idle worker; the rest is for those with free slots."""
        starved = time.monotonic() - self._last_delivery >= self.services.settings.offer_seconds
        idle = starved and self._slots.free > 0
        wanted = self._slots.free if idle else max(1, self._slots.limit // 4)
        priority = 0 if idle else URGENT
        requeued = await self.services.ledger.recovery.requeue(
            queue, wanted, lost_only=not idle, skips=self._faults.blocks
        )
        if idle and wanted:  # only this loop brings work, after a pause for instance
            self._starved = sum(len(indexes) for _, indexes in requeued) >= wanted
        owed, self.services.ledger.recovery.owed = self.services.ledger.recovery.owed, []
        ended, self.services.ledger.recovery.ended = self.services.ledger.recovery.ended, []
        for batch_id, round_ in ended:
            spec = await self.services.ledger.batches.spec(batch_id)
            if spec.on_finished is not None:
                await asyncio.to_thread(self.tell_end, batch_id, round_, spec.on_finished)
            await self.services.ledger.batches.told(batch_id, round_)
        for batch_id, index, task in owed:
            await asyncio.to_thread(self.send_again, batch_id, index, task)
        for batch_id, indexes in requeued:
            for first in range(0, len(indexes), REQUEUED_PER_MESSAGE):
                some = indexes[first : first + REQUEUED_PER_MESSAGE]
                await asyncio.to_thread(self._publish, batch_id, some, queue, priority)

    async def send_owed(self, batch_id: str, indexes: Sequence[int]) -> None:
        """Have Celery tell the tasks that await these items, where they are done: what ran them was
        a message of a worker's own."""
        ledger = self.services.ledger
        spec = ledger.claims.known_spec(batch_id)
        if spec is None or not spec.standing:
            return
        for index, found in zip(
            indexes, await ledger.standing.look(batch_id, indexes, tasks=True), strict=True
        ):
            if found.outcome is not None and found.task:
                await asyncio.to_thread(self.send_again, batch_id, index, found.task)

    def _has_redis(self) -> bool:
        """Whether Redis has answered lately."""
        since = time.monotonic() - self._heartbeat.last_beat
        return since < self.services.settings.lease_seconds


def _until_cut(time_limit: float) -> float:
    """Seconds after which calls are cut off, before a time limit of Celery's does worse."""
    return max(time_limit / 2, time_limit - CUT_OFF_BEFORE)
