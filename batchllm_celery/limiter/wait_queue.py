"""The wait queue of one process before one quota: who waits, what is reserved, when to ask.

No I/O and no clock of its own: every method takes the local monotonic time, in seconds.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from batchllm_celery.limiter.permit import CallOutcome, Estimate, Permit, SettledCall
from batchllm_celery.limiter.protocol import AcquireReply, AcquireRequest, EndedCalls, LimitReport
from batchllm_celery.limiter.settlements import Settlements, Unused, limit_report

#: How late, in seconds, a start may be used: a stalled process must not start all at once.
LATEST_START = 0.25
#: How long, in seconds, a reply of the limiter allows starts: a process that hears nothing could
#: miss a cooldown.
FRESHNESS_LEASE = 0.25
#: How old, in seconds, the newest reply may get while reservations wait for their time.
RENEW_FRESHNESS = 0.19
#: How long, in seconds, before a start the freshness is renewed and more starts are asked for.
ASK_AHEAD = 0.05
#: How long, in seconds, settled calls wait for a request that carries them.
FLUSH_AFTER = 0.15
#: ... and where calls in flight are limited: others wait for the slot.
FLUSH_SLOT_AFTER = 0.005
#: How often, in seconds, a process with calls in flight renews its lease (10 s in the script).
RENEW_CALLS_LEASE = 3.0
#: The most starts that one request asks for.
MOST_WANTED = 256
#: The number of starts a second from which requests are spaced.
BUSY_RATE = 25.0
#: Requests per start, over time, of a busy process.
REQUESTS_PER_START = 0.2
#: The most requests that may be saved up for calls that end, and others that start, together.
MOST_SAVED_REQUESTS = 10.0
#: The time, in seconds, between requests that were saved up.
SAVED_REQUEST_GAP = 0.005
#: The longest time, in seconds, between requests of a busy process whose waiters are not held up.
_LONGEST_GAP = 0.1
#: The shortest time, in seconds, between requests of a process that is not busy.
_SHORTEST_GAP = 0.001
#: The time, in seconds, over which the rate of starts is averaged.
_RATE_WINDOW = 0.3
#: How long, in seconds, no other announcement is believed after a false one.
IGNORE_AFTER_FALSE = 1.0
#: How many seconds' worth of starts are prefetched.
_PREFETCH_SECONDS = 0.3
#: How early, in seconds, a start may be used: a timer may run so much too soon.
_TIMER_PRECISION = 1e-4
_NEVER = math.inf
#: What everybody should know of as soon as it can be.
_AT_ONCE = (CallOutcome.REFUSED, CallOutcome.DAY_EXHAUSTED, CallOutcome.OVERLOADED)


@dataclass(slots=True, eq=False)
class Waiter:
    """One caller of `acquire` that has no permit yet.

    `estimate` is called whenever the tokens count: hundreds may join before the first reply has
    taught the estimator anything, and would reserve by the plain guess for minutes.
    """

    estimate: Callable[[], Estimate]
    permit: asyncio.Future[Permit]
    priority: int = 0
    is_retry: bool = False
    tried: int = 0
    """Calls that were made for it already."""
    has_reservation: bool = False


@dataclass(slots=True)
class Reservation:
    """The right to start one call at `start`, if the epoch is still the same then."""

    start: float
    epoch: int
    reserved: Estimate
    probe: bool
    limit_version: int = -1
    waiter: Waiter | None = None
    """Whose tokens are reserved: a large call that used the reservation of a small one would let
    the next call start too soon. None: no tokens are, or those of a caller to come."""


@dataclass(slots=True)
class SentRequest:
    """A request, and for whom each reservation of its reply will have reserved what."""

    request: AcquireRequest
    ended: list[EndedCalls]
    report: LimitReport | None
    waiters: list[Waiter]
    estimates: list[Estimate]
    prefetched: Estimate


@dataclass(slots=True)
class RequestPacing:
    """How closely requests follow one another: over time a busy process makes few per start."""

    rate: float = 0.0
    """Starts a second, averaged."""
    starts: int = 0
    """Starts since the last request."""
    last_request: float = -_NEVER
    _saved: float = MOST_SAVED_REQUESTS

    def requested(self, now: float) -> None:
        """Count a request."""
        passed = min(now - self.last_request, 10.0)
        weight = 1 - math.exp(-passed / _RATE_WINDOW)
        self.rate += weight * (self.starts / max(passed, 1e-3) - self.rate)
        saved = min(self._saved + REQUESTS_PER_START * self.starts, MOST_SAVED_REQUESTS)
        self._saved = max(saved - 1.0, -1.0)
        self.last_request, self.starts = now, 0

    def next_request(self, *, held_up: bool) -> float:
        """When the next request may follow; those of waiters that are held up spend no savings."""
        gap = _SHORTEST_GAP
        if self.rate > BUSY_RATE:
            gap = min(1.0 / REQUESTS_PER_START / self.rate, _LONGEST_GAP)
        if not held_up and self._saved >= 1.0:
            gap = min(gap, SAVED_REQUEST_GAP)
        return self.last_request + gap


@dataclass(slots=True)
class WaitQueue:
    """Waiters in the order of their turns, and reservations, earliest first.

    Turns: the higher priority first; within one, callers that had a permit already (their call was
    refused, or the permit went stale) before all others; then first come, first served.

    Where tokens are limited a reservation belongs to the waiter whose tokens it has reserved,
    unless one of higher priority waits. Else any waiter may use any reservation.
    """

    quota: str
    reservations: deque[Reservation] = field(default_factory=deque)
    waiting: int = 0
    in_flight: int = 0
    epoch: int = 0
    announced: int = 0
    """A newer epoch that the channel announced: nothing starts until Redis was asked."""
    announced_at: float = -_NEVER
    ignore_until: float = -_NEVER
    full_speed: bool = False
    """Where nobody has set the quota, it begins without a limit."""
    fresh_since: float = -_NEVER
    """When the newest reply of the present epoch was asked for."""
    settlements: Settlements = field(default_factory=Settlements)
    ask_now: bool = False
    ask_after: float = -_NEVER
    """Waiters without a reservation need not ask before."""
    last_reply: AcquireReply | None = None
    permitted_at: float = -_NEVER
    """When the newest permit was given."""
    pacing: RequestPacing = field(default_factory=RequestPacing)
    _waiters: dict[tuple[int, bool], deque[Waiter]] = field(default_factory=dict)
    """By rank, the smallest first: (-priority, not a retry)."""
    _permits: int = 0
    _mean_input: float = 0.0
    _mean_output: float = 0.0

    # -- waiters

    def join(self, waiter: Waiter) -> None:
        """Wait behind all of the same rank."""
        self.waiting += 1
        rank = (-waiter.priority, not waiter.is_retry)
        self._waiters.setdefault(rank, deque()).append(waiter)
        if waiter.is_retry:
            return
        self.pacing.starts += 1
        if self.tokens_limited:
            estimate = waiter.estimate()
            self._mean_input += 0.05 * (estimate.input_tokens - self._mean_input)
            self._mean_output += 0.05 * (estimate.output_tokens - self._mean_output)

    def leave(self, waiter: Waiter) -> None:
        """Stop waiting (cancelled). Its place is skipped later."""
        self.waiting -= 1
        waiter.permit.cancel()

    def fail(self, error: Exception) -> None:
        """Raise `error` in all that wait."""
        for waiter in list(self.in_turn()):
            self.waiting -= 1
            waiter.permit.set_exception(error)

    def in_turn(self) -> Iterator[Waiter]:
        """Those who wait, in the order of their turns."""
        ranks = chain.from_iterable(self._waiters[rank] for rank in sorted(self._waiters))
        return (waiter for waiter in ranks if not waiter.permit.done())

    def _without_reservation(self) -> Iterator[Waiter]:
        return (waiter for waiter in self.in_turn() if not waiter.has_reservation)

    def _waiter_for(self, reservation: Reservation) -> Waiter | None:
        """Who uses it: the most urgent one, if it goes before the reservation's own waiter. If that
        one is gone, the next without a reservation, or else the next.

        The breaker's probe goes to the one that was called least: in a long outage the same few
        would else use up all the calls that they may make, and fail.
        """
        if reservation.probe:
            order = ((-waiter.priority, waiter.tried) for waiter in self.in_turn())
            least = min(order, default=None)
            return next((w for w in self.in_turn() if (-w.priority, w.tried) == least), None)
        first, own = next(self.in_turn(), None), reservation.waiter
        if own is None or own.permit.done():
            own = next(self._without_reservation(), None) or first
        return first if first and own and first.priority > own.priority else own

    # -- reservations

    def take_prefetched(self, now: float, estimate: Estimate) -> Permit | None:
        """A permit without waiting, from a reservation that was made for callers to come."""
        if self.waiting or not self.reservations or not self.is_fresh(now):
            return None
        self.drop_late(now)
        if not self.reservations or self.reservations[0].start > now:
            return None
        self.pacing.starts += 1
        return self._permit(self.reservations.popleft(), estimate, now)

    def grant_due(self, now: float) -> None:
        """Give permits for all reservations whose time has come."""
        self.drop_late(now)
        while (
            self.waiting
            and self.reservations
            and self.reservations[0].start <= now + _TIMER_PRECISION
            and self.is_fresh(now)
        ):
            waiter = self._waiter_for(self.reservations[0])
            if waiter is None:  # all of them were cancelled just now, and leave by themselves
                return
            reservation = self.reservations.popleft()
            if reservation.waiter is not None:
                reservation.waiter.has_reservation = False
            self.waiting -= 1
            waiter.permit.set_result(self._permit(reservation, waiter.estimate(), now))
            self._forget_served()

    def _forget_served(self) -> None:
        for rank, waiters in list(self._waiters.items()):
            while waiters and waiters[0].permit.done():
                waiters.popleft()
            if not waiters:
                del self._waiters[rank]

    def _permit(self, reservation: Reservation, estimate: Estimate, now: float) -> Permit:
        reserved = reservation.reserved
        if reserved != estimate and self.tokens_limited:
            self.settlements.replace(reserved, estimate)
        self.in_flight += 1
        self._permits += 1
        self.permitted_at = now
        return Permit(
            quota=self.quota,
            epoch=reservation.epoch,
            start=reservation.start,
            id=self._permits,
            estimate=estimate,
            probe=reservation.probe,
            limit_version=reservation.limit_version,
        )

    def drop_late(self, now: float) -> None:
        """Release the reservations whose time has passed."""
        while self.reservations and now > self.reservations[0].start + LATEST_START:
            self._release(self.reservations.popleft(), now)

    def release_all(self, now: float) -> None:
        """Release all reservations: others may have those whose start lies ahead."""
        while self.reservations:
            self._release(self.reservations.popleft(), now)

    def _release(self, reservation: Reservation, now: float) -> None:
        if reservation.waiter is not None:
            reservation.waiter.has_reservation = False
        settlements = self.settlements
        settlements.unused.append(
            Unused(reservation.start, reservation.epoch, reservation.reserved)
        )
        settlements.probe_ended |= reservation.probe
        if settlements.since is None:
            settlements.since = now

    def is_fresh(self, now: float) -> bool:
        """Whether the limiter's newest reply still allows starts."""
        return now - self.fresh_since <= FRESHNESS_LEASE

    def is_void(self, permit: Permit) -> bool:
        """Whether a cooldown has begun, or the limits have changed, since it was given."""
        return permit.epoch != self.epoch or self.announced > permit.epoch

    def may_start(self, permit: Permit, now: float) -> bool:
        """Whether a call with this permit may still start at this moment."""
        return (
            not self.is_void(permit) and self.is_fresh(now) and now <= permit.start + LATEST_START
        )

    def settle(self, call: SettledCall, now: float) -> None:
        """Count the end of a call; the next request carries it, a refusal or overload at once."""
        self.settlements.add(call, now)
        self.in_flight -= 1
        if call.outcome in _AT_ONCE:
            self.ask_now = True

    def announce_epoch(self, epoch: int, now: float) -> None:
        """The channel says that there is a newer epoch: stop, and ask Redis at once.

        Anybody can write to a channel. So Redis never learns of an epoch that only a message
        announced: it would believe it and publish the next one. After a false message no other is
        believed for a second; what a real one says then comes with the next reply.
        """
        if epoch <= max(self.epoch, self.announced) or now < self.ignore_until:
            return
        self.announced, self.announced_at = epoch, now
        self.release_all(now)
        self.ask_now = True

    def begin_epoch(self, epoch: int, now: float) -> None:
        """The fleet cools down, or the limits have changed: older reservations are void."""
        if epoch <= self.epoch:
            return
        self.epoch = epoch
        self.release_all(now)
        if self.waiting:
            self.ask_now = True

    # -- requests and replies

    @property
    def tokens_limited(self) -> bool:
        """Whether requests carry estimates; the first one does."""
        return self.last_reply is None or self.last_reply.tokens_limited

    def next_request(self) -> float:
        """When to ask the limiter next; infinity: there is nothing to ask."""
        if self.ask_now:
            return -_NEVER
        at = _NEVER
        if self.waiting > len(self.reservations):
            at = self.ask_after
        if self.waiting and self.reservations:
            renew = max(self.fresh_since + RENEW_FRESHNESS, self.reservations[0].start - ASK_AHEAD)
            at = min(at, renew)
        if self.settlements.since is not None:
            reply = self.last_reply
            frees_slot = reply is not None and (reply.slots_limited or reply.probing)
            after = FLUSH_SLOT_AFTER if frees_slot else FLUSH_AFTER
            at = min(at, self.settlements.since + after)
        if self.in_flight:
            at = min(at, self.pacing.last_request + RENEW_CALLS_LEASE)
        return at

    def next_start(self) -> float:
        """When the next reservation can be used; infinity without one or without a waiter."""
        return self.reservations[0].start if self.reservations and self.waiting else _NEVER

    def make_request(self, sequence: int, now: float) -> SentRequest:
        """What to ask now. All settlements travel with it."""
        self.drop_late(now)
        self.pacing.requested(now)
        reserved = len(self.reservations)
        wanted = min(max(self.waiting - reserved, 0), MOST_WANTED)
        waiters: list[Waiter] = []
        estimates: list[Estimate] = []
        if self.tokens_limited:
            # Those without a reservation, but for those who will use the reservations of nobody.
            owners = (reservation.waiter for reservation in self.reservations)
            free = sum(owner is None or owner.permit.done() for owner in owners)
            waiters = list(islice(self._without_reservation(), free, free + wanted))
            estimates = [waiter.estimate() for waiter in waiters]
            wanted = len(waiters)  # some were cancelled just now, and have not left yet
        prefetched = Estimate(round(self._mean_input), round(self._mean_output))
        request = AcquireRequest(
            sequence=sequence,
            reserved=reserved,
            in_flight=self.in_flight,
            wanted=wanted,
            prefetch=min(self._prefetch(), MOST_WANTED - wanted),
            prefetch_input=prefetched.input_tokens,
            prefetch_output=prefetched.output_tokens,
            full_speed=self.full_speed,
            **self.settlements.request_fields(self.epoch, now),
        )
        limited = self.last_reply is not None and self.last_reply.limit_version >= 0
        ended = self.settlements.ended_calls(limited=limited)
        told = self.settlements.told
        report = None if told is None else limit_report(told, now)
        self.settlements = Settlements(epoch=self.epoch)
        self.ask_now = False
        return SentRequest(request, ended, report, waiters, estimates, prefetched)

    def _prefetch(self) -> int:
        """Starts for callers to come spare them a round trip, while no limit holds anybody up."""
        reply, rate = self.last_reply, self.pacing.rate
        if reply is None or not reply.may_prefetch or reply.held_up or rate < BUSY_RATE:
            return 0
        left = max(len(self.reservations) - self.waiting, 0)
        return max(math.ceil(rate * _PREFETCH_SECONDS) - left, 0)

    def accept(
        self,
        sent: SentRequest,
        reply: AcquireReply,
        *,
        sent_at: float,
        replied_at: float,
        now: float,
    ) -> None:
        """Take the reply to `sent`.

        Args:
            sent: the request.
            reply: its reply.
            sent_at: when the request was sent.
            replied_at: the local time of the reply's `now_us`.
            now: the present moment.
        """
        self.begin_epoch(reply.epoch, now)
        if reply.epoch >= self.announced:
            self.announced = 0
        elif sent_at >= self.announced_at:  # Redis knows nothing of it
            self.announced, self.ignore_until = 0, now + IGNORE_AFTER_FALSE
        reservations = []
        for i, start_us in enumerate(reply.starts_us):
            known = i < len(sent.waiters)
            waiter = sent.waiters[i] if known else None
            reserved = sent.estimates[i] if known else sent.prefetched
            start = replied_at + start_us * 1e-6
            reservations.append(
                Reservation(
                    start, reply.epoch, reserved, reply.probing, reply.limit_version, waiter
                )
            )
        if reply.epoch == self.epoch and not self.announced:
            self.fresh_since = sent_at
            self._add(reservations)
        else:  # a newer epoch was announced while this reply travelled
            for reservation in reservations:
                self._release(reservation, now)
            self.ask_now = True
        self.last_reply = reply
        self.ask_after = self._ask_after(reply, replied_at, now)

    def _add(self, new: list[Reservation]) -> None:
        # Refunds may let a later reply start earlier than reservations that are held already.
        held = self.reservations
        unsorted = bool(held and new and new[0].start < held[-1].start)
        held.extend(new)
        for reservation in new:
            if reservation.waiter is not None:
                reservation.waiter.has_reservation = True
        if unsorted:
            self.reservations = deque(sorted(held, key=lambda reservation: reservation.start))

    def _ask_after(self, reply: AcquireReply, replied_at: float, now: float) -> float:
        soonest = self.pacing.next_request(held_up=reply.held_up)
        if not reply.held_up:
            return soonest
        again = replied_at + reply.ask_again_us * 1e-6
        if not self.reservations:
            return max(soonest, again)
        enough = min(
            self.pacing.last_request + RENEW_FRESHNESS, self.reservations[-1].start - ASK_AHEAD
        )
        return max(soonest, enough, min(again, now + RENEW_FRESHNESS))
