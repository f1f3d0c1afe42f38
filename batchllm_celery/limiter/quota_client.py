"""One quota in one process: its wait queue, one timer, and at most one request under way."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable

from batchllm_celery.connection import Connection
from batchllm_celery.errors import QuotaUnavailableError
from batchllm_celery.events import CooldownEnded, CooldownStarted, Events, QuotaOversize
from batchllm_celery.keys import QuotaKeys
from batchllm_celery.limiter.permit import CallOutcome, Estimate, Permit, SettledCall
from batchllm_celery.limiter.protocol import AcquireReply, acquire_arguments
from batchllm_celery.limiter.scripts import ACQUIRE
from batchllm_celery.limiter.wait_queue import LATEST_START, SentRequest, Waiter, WaitQueue

logger = logging.getLogger("batchllm_celery")

#: How long, in seconds, closing may take to flush what has ended; then the lease ends it.
FLUSH_ON_CLOSE = 1.0
#: How long, in seconds, after a request that failed the next one is made.
AFTER_FAILURE = 0.5


class QuotaClient:
    """Acquires and settles on one quota, for all callers of this process.

    A request carries what has ended since the last one and the demand of all waiters. Its reply is
    start times. Whoever asks while it is under way waits for the next one.
    """

    def __init__(
        self,
        connection: Connection,
        keys: QuotaKeys,
        quota: str,
        process: str,
        events: Events,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.queue = WaitQueue(quota)
        self._connection = connection
        self._keys = [keys.state, keys.procs, keys.waiting, keys.channel]
        self._process = process
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._now = clock
        self._clock = ServerClock()
        # A sequence that no earlier life of this process id has used.
        self._sequence = time.time_ns() // 1_000
        self._request: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._cooldown_timer: asyncio.TimerHandle | None = None
        self._closed = False

    async def acquire(
        self,
        estimate: Callable[[], Estimate],
        priority: int,
        *,
        is_retry: bool,
        tried: int = 0,
    ) -> Permit:
        """Wait for a permit; `Limiter.acquire` describes it."""
        queue = self.queue
        permit = queue.take_prefetched(self._now(), estimate())
        while permit is None:
            waiter = Waiter(estimate, self._loop.create_future(), priority, is_retry, tried)
            queue.join(waiter)
            self._wake(min(queue.next_request(), queue.next_start()))
            try:
                permit = await waiter.permit
            except asyncio.CancelledError:
                self._leave(waiter)
                raise
            if not queue.may_start(permit, self._now()):
                # The loop was late: the call would start after its time, or in a cooldown.
                self._settle_unused(permit)
                permit, is_retry = None, True
        return permit

    def _leave(self, waiter: Waiter) -> None:
        """A cancelled waiter: nothing that it was given is lost."""
        given = waiter.permit
        if given.cancelled():
            if not self._closed:
                self.queue.leave(waiter)
        elif given.exception() is None:
            self._settle_unused(given.result())

    def _settle_unused(self, permit: Permit) -> None:
        permit.settled = True
        self.settle(SettledCall(permit, CallOutcome.UNUSED))

    def settle(self, call: SettledCall) -> None:
        """Count the end of a call."""
        self.queue.settle(call, self._now())
        self._wake(self.queue.next_request())

    def notified(self, message: bytes) -> None:
        """A message of the quota's channel: `epoch:N`, or `slot:PROCESS`."""
        kind, _, value = message.partition(b":")
        if kind == b"epoch" and value.isdigit() and len(value) < 20:
            self.queue.announce_epoch(int(value), self._now())
        elif kind == b"slot" and value == self._process.encode() and self.queue.waiting:
            self.queue.ask_now = True
        self._wake(self.queue.next_request())

    async def close(self) -> None:
        """Cancel all waiters, and flush what has ended and what was not used."""
        self._closed = True
        for timer in (self._timer, self._cooldown_timer):
            if timer is not None:
                timer.cancel()
        for waiter in list(self.queue.in_turn()):
            waiter.permit.cancel()
        self.queue.waiting = 0
        try:
            async with asyncio.timeout(FLUSH_ON_CLOSE):
                if self._request is not None:
                    await asyncio.wait({self._request})
                self.queue.release_all(self._now())
                if self.queue.settlements.since is not None or self.queue.last_reply is not None:
                    await self._ask()
        except TimeoutError:
            logger.debug("limiter.flush_timeout quota=%s", self.queue.quota)
        except Exception as error:
            self._log_failure(error)
        finally:
            if self._request is not None:
                self._request.cancel()

    # -- one timer for everything that has a time

    def _wake(self, at: float) -> None:
        if at >= self._timer_at or self._closed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        # A moment of the past runs in the loop's next iteration: callers of this one are gathered.
        self._timer = self._loop.call_at(max(at, 0.0), self._run_due)

    def _run_due(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now, queue = self._now(), self.queue
        queue.grant_due(now)
        if self._request is None:
            if queue.next_request() <= now + 1e-4:
                self._request = self._loop.create_task(self._make_request(), name="limiter-request")
            else:
                self._wake(queue.next_request())
        if queue.next_start() > now or queue.is_fresh(now):
            self._wake(queue.next_start())

    # -- one request at a time

    async def _make_request(self) -> None:
        try:
            await self._ask()
        except Exception as error:
            self._log_failure(error)
            self.queue.fail(error)
            await asyncio.sleep(AFTER_FAILURE)
        finally:
            self._request = None
        if not self._closed:
            self._wake(0.0)

    async def _ask(self) -> None:
        self._sequence += 1
        sent_at = self._now()
        sent = self.queue.make_request(self._sequence, sent_at)
        arguments = acquire_arguments(
            self._process, sent.request, sent.estimates, sent.ended, sent.report
        )
        raw: bytes = await self._connection.patiently(
            lambda: ACQUIRE(self._connection.client, self._keys, arguments)
        )
        now = self._now()
        reply = AcquireReply.parse(raw)
        self._announce_cooldown(reply)
        replied_at = self._clock.local(sent_at, now, reply.now_us)
        self.queue.accept(sent, reply, sent_at=sent_at, replied_at=replied_at, now=now)
        if reply.exhausted_until_us:
            self._end_day(reply.exhausted_until_us * 1e-6)
        if reply.oversize:
            self._warn_of_oversize(sent)

    def _end_day(self, resets_at: float) -> None:
        """Fail all waiters: nobody here will be served today.

        While reservations are held, or permits that may not have begun, the next reply will say so
        again: the first item that learns of it may park the batch, and their calls are still due.
        """
        queue = self.queue
        if queue.reservations:
            return
        if self._now() < queue.permitted_at + LATEST_START:
            queue.ask_after = queue.permitted_at + LATEST_START
            return
        queue.fail(QuotaUnavailableError(queue.quota, resets_at))

    def _announce_cooldown(self, reply: AcquireReply) -> None:
        last, quota, seconds = self.queue.last_reply, self.queue.quota, reply.cooldown
        if seconds <= 0 or (last is not None and reply.epoch == last.epoch):
            return
        if last is None and not self._events:
            return
        self._events.emit(CooldownStarted(quota, reply.epoch, seconds, reply.consecutive_cooldowns))
        if self._cooldown_timer is not None:
            self._cooldown_timer.cancel()
        self._cooldown_timer = self._loop.call_later(
            seconds, self._events.emit, CooldownEnded(quota, reply.epoch, seconds)
        )

    def _warn_of_oversize(self, sent: SentRequest) -> None:
        largest = max((one.input_tokens + one.output_tokens for one in sent.estimates), default=0)
        self._events.emit(QuotaOversize(self.queue.quota, largest))

    def _log_failure(self, error: Exception) -> None:
        logger.error("limiter.failed quota=%s error=%s", self.queue.quota, type(error).__name__)


class ServerClock:
    """Redis' time in local monotonic time, from the quickest of the recent round trips.

    The server's moment lies somewhere between sending and receiving. A start must never be early,
    so the least `received - server time` of the last seconds counts, kept within this round trip:
    a late loop doesn't shift starts, nor does a server whose clock was set.
    """

    #: How long, in seconds, a round trip counts at least; twice as long at most.
    WINDOW = 5.0

    def __init__(self) -> None:
        self._offsets = [math.inf, math.inf]
        """The least of this window, and of the one before."""
        self._window_began = 0.0

    def local(self, sent_at: float, received_at: float, server_now_us: int) -> float:
        """The local time at which the server's clock showed `server_now_us`."""
        if received_at - self._window_began > self.WINDOW:
            self._offsets, self._window_began = [math.inf, self._offsets[0]], received_at
        seconds = server_now_us * 1e-6
        self._offsets[0] = min(self._offsets[0], received_at - seconds)
        return min(received_at, max(sent_at, seconds + min(self._offsets)))
