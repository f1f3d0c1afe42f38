"""The waiting line of one process before one quota: who waits, which tickets it holds, when to ask.

No I/O and no clock of its own: every method is told the local monotonic time.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from batchllm_celery.limiter.pending import Pending, Unused
from batchllm_celery.limiter.permit import CallOutcome, Estimate, Permit
from batchllm_celery.limiter.wire import Reply, pack_question

#: A ticket so many seconds late is void: a stalled host must not fire everything at once.
LATE = 0.25
#: Nothing starts unless the limiter has answered within so many seconds.
PROOF = 0.25
#: How old a proof may get before it is renewed, while tickets wait for their time.
RENEW = 0.19
#: A proof is renewed (and the next tickets fetched) so long before a start.
AHEAD = 0.05
#: Outcomes ride on the next question, or go by themselves after so many seconds ...
FLUSH = 0.15
#: ... or after so many where a settled call frees a slot that others wait for.
FLUSH_SLOT = 0.005
#: A process with calls in flight renews its lease (10 s in the script) so often.
RENEW_LEASE = 3.0
#: Tickets asked for at once.
LARGEST_ASK = 256
#: At this many starts a second questions are gathered: over time there are so many per start.
BUSY_RATE = 25.0
ASKS_PER_START = 0.2
#: What was saved of them is left for calls that end (and others that start) together ...
MOST_SAVED = 10.0
#: ... whose questions are so far apart.
BURST_GAP = 0.005
_RATE_MEMORY = 0.3
_NEVER = math.inf
_NO_TOKENS = Estimate()


@dataclass(slots=True, eq=False)
class Waiter:
    """One caller of `acquire` that has no permit yet.

    Its estimate is asked for anew whenever it counts: hundreds may join before the first answer
    has taught the estimator anything, and would reserve by the plain guess for minutes.
    """

    guess: Callable[[], Estimate]
    granted: asyncio.Future[Permit]
    has_ticket: bool = False

    @property
    def estimate(self) -> Estimate:
        return self.guess()


@dataclass(slots=True)
class Ticket:
    """The right to start one call at `start`, if the generation is still the same then."""

    start: float
    generation: int
    reserved: Estimate
    probe: bool
    waiter: Waiter | None = None
    """Whose tokens are reserved: a large request that took the ticket of a small one would let the
    next call start too soon. None: no tokens are, or a caller's to come."""


@dataclass(slots=True)
class Question:
    """Arguments of acquire.lua, and for whom each ticket of the answer will have reserved what."""

    arguments: list[bytes | str | int | float]
    waiters: list[Waiter]
    reserved: list[Estimate]
    spare: Estimate


@dataclass(slots=True)
class Line:
    """Waiters, oldest first, and tickets, earliest first.

    Where tokens are limited a ticket is its waiter's own; else any waiter may use any ticket.
    """

    quota: str
    again: deque[Waiter] = field(default_factory=deque)
    """Those who had a turn already (a refused call, a stale permit): they come first."""
    waiters: deque[Waiter] = field(default_factory=deque)
    tickets: deque[Ticket] = field(default_factory=deque)
    waiting: int = 0
    in_flight: int = 0
    generation: int = 0
    proof: float = -_NEVER
    pending: Pending = field(default_factory=Pending)
    urgent: bool = False
    asked_at: float = -_NEVER
    ask_after: float = -_NEVER
    last: Reply | None = None
    rate: float = 0.0
    acquired: int = 0
    permits: int = 0
    permitted_at: float = -_NEVER
    saved: float = MOST_SAVED
    """Questions that may follow closely on one another."""
    mean_input: float = 0.0
    mean_output: float = 0.0

    # -- waiters

    def join(self, waiter: Waiter, *, first: bool = False) -> None:
        """Wait at the end of the line, or before all who had no turn yet."""
        self.waiting += 1
        if first:
            self.again.append(waiter)
            return
        self.acquired += 1
        self.waiters.append(waiter)
        if self.by_tokens:
            self.mean_input += 0.05 * (waiter.estimate.input_tokens - self.mean_input)
            self.mean_output += 0.05 * (waiter.estimate.output_tokens - self.mean_output)

    def leave(self, waiter: Waiter) -> None:
        """A cancelled waiter; its place in the deque is skipped when its turn comes."""
        self.waiting -= 1
        waiter.granted.cancel()

    def _waiter_for(self, ticket: Ticket) -> Waiter | None:
        """Its own; if that one is gone, the oldest without a ticket, or else the oldest."""
        own = ticket.waiter
        if own is not None and not own.granted.done():
            return own
        return next(self._without_ticket(), None) or next(self.alive(), None)

    def _without_ticket(self) -> Iterator[Waiter]:
        return (waiter for waiter in self.alive() if not waiter.has_ticket)

    def alive(self) -> Iterator[Waiter]:
        everybody = chain(self.again, self.waiters)
        return (waiter for waiter in everybody if not waiter.granted.done())

    def _forget_served(self) -> None:
        for line in (self.again, self.waiters):
            while line and line[0].granted.done():
                line.popleft()

    # -- tickets

    def at_once(self, now: float, estimate: Estimate) -> Permit | None:
        """A permit without waiting, from a ticket that was fetched for callers to come."""
        if self.waiting or not self.tickets or now - self.proof > PROOF:
            return None
        self.drop_late(now)
        if not self.tickets or self.tickets[0].start > now:
            return None
        self.acquired += 1
        return self._permit(self.tickets.popleft(), estimate, now)

    def release(self, now: float) -> None:
        """Hand out every ticket whose time has come."""
        self.drop_late(now)
        while self.waiting and self.tickets and self.tickets[0].start <= now + 1e-4:
            if now - self.proof > PROOF:
                return
            waiter = self._waiter_for(self.tickets[0])
            if waiter is None:  # all of them were cancelled just now, and leave by themselves
                return
            self.waiting -= 1
            waiter.granted.set_result(self._permit(self.tickets.popleft(), waiter.estimate, now))
            self._forget_served()

    def _permit(self, ticket: Ticket, estimate: Estimate, now: float) -> Permit:
        reserved = ticket.reserved
        if reserved != estimate and self.by_tokens:
            self.pending.replace(reserved, estimate)
        self.in_flight += 1
        self.permits += 1
        self.permitted_at = now
        return Permit(
            self.quota, ticket.generation, ticket.start, self.permits, estimate, ticket.probe
        )

    def drop_late(self, now: float) -> None:
        """Give back tickets whose time has passed."""
        while self.tickets and now > self.tickets[0].start + LATE:
            self._give_back(self.tickets.popleft(), now)

    def give_back_all(self, now: float) -> None:
        while self.tickets:
            self._give_back(self.tickets.popleft(), now)

    def _give_back(self, ticket: Ticket, now: float) -> None:
        if ticket.waiter is not None:
            ticket.waiter.has_ticket = False
        pending = self.pending
        pending.unused.append(Unused(ticket.start, ticket.generation, ticket.reserved))
        pending.probe_ended |= ticket.probe
        if pending.since is None:
            pending.since = now

    def usable(self, permit: Permit, now: float) -> bool:
        """Whether a call with this permit may still start at this moment."""
        return (
            permit.generation == self.generation
            and now - self.proof <= PROOF
            and now <= permit.start + LATE
        )

    def settle(
        self,
        permit: Permit,
        outcome: CallOutcome,
    ) -> None:
        """Count the end of a call; `pending` has its tokens."""
        self.in_flight -= 1
        if outcome in (CallOutcome.REFUSED, CallOutcome.DAY_EXHAUSTED):
            self.urgent = True

    def saw_generation(self, generation: int, now: float) -> bool:
        """The fleet cools down (or the limits changed): void what was handed out before."""
        if generation <= self.generation:
            return False
        self.generation = generation
        self.give_back_all(now)
        if self.waiting:
            self.urgent = True
        return True

    # -- questions and answers

    @property
    def by_tokens(self) -> bool:
        return self.last is None or self.last.by_tokens

    def next_ask(self) -> float:
        """When to ask the limiter next; infinity: there is nothing to say."""
        if self.urgent:
            return -_NEVER
        at = _NEVER
        if self.waiting > len(self.tickets):
            at = self.ask_after
        if self.waiting and self.tickets:
            at = min(at, max(self.proof + RENEW, self.tickets[0].start - AHEAD))
        if self.pending.since is not None:
            slot = self.last is not None and (self.last.by_slots or self.last.probing)
            at = min(at, self.pending.since + (FLUSH_SLOT if slot else FLUSH))
        if self.in_flight:
            at = min(at, self.asked_at + RENEW_LEASE)
        return at

    def next_start(self) -> float:
        """When the next ticket can be used; infinity without one or without a waiter."""
        return self.tickets[0].start if self.tickets and self.waiting else _NEVER

    def question(self, process: str, sequence: int, now: float) -> Question:
        """What to ask now. What is pending travels with it."""
        self.drop_late(now)
        self._measure(now)
        held = len(self.tickets)
        want = min(max(self.waiting - held, 0), LARGEST_ASK)
        waiters = self._unprovided(want) if self.by_tokens else []
        reserved = [waiter.estimate for waiter in waiters]
        if self.by_tokens:
            want = len(reserved)  # some were cancelled just now, and have not left yet
        spare = min(self._spare(), LARGEST_ASK - want)
        mean = Estimate(round(self.mean_input), round(self.mean_output))
        numbers = [
            sequence,
            held,
            self.in_flight + held,
            want,
            spare,
            *self.pending.arguments(self.generation, now),
            mean.input_tokens,
            mean.output_tokens,
        ]
        self.pending = Pending(generation=self.generation)
        self.urgent = False
        self.asked_at = now
        return Question(pack_question(process, numbers, reserved), waiters, reserved, mean)

    def _unprovided(self, want: int) -> list[Waiter]:
        """The oldest that have no ticket, but for those who will use the tickets of nobody."""
        owners = (ticket.waiter for ticket in self.tickets)
        free = sum(owner is None or owner.granted.done() for owner in owners)
        return list(islice(self._without_ticket(), free, free + want))

    def _measure(self, now: float) -> None:
        gone = min(now - self.asked_at, 10.0)
        weight = 1 - math.exp(-gone / _RATE_MEMORY)
        self.rate += weight * (self.acquired / max(gone, 1e-3) - self.rate)
        earned = min(self.saved + ASKS_PER_START * self.acquired, MOST_SAVED)
        self.saved = max(earned - 1.0, -1.0)
        self.acquired = 0

    def _spare(self) -> int:
        """Tickets for callers to come: spares them a round trip while no limit holds them up."""
        if self.last is None or not self.last.plain or self.last.limited or self.rate < BUSY_RATE:
            return 0
        return max(math.ceil(self.rate * 0.3) - max(len(self.tickets) - self.waiting, 0), 0)

    def take(self, question: Question, reply: Reply, sent: float, at: float, now: float) -> None:
        """The answer: `at` is the local time of the server's `now`, `sent` that of the question."""
        self.saw_generation(reply.generation, now)
        tickets = list(self._tickets(question, reply, at))
        if reply.generation == self.generation:
            self.proof = sent
            self._add_tickets(tickets)
        else:  # a newer generation was announced while this answer travelled
            self._refuse_tickets(tickets, now)
        self.last = reply
        self.ask_after = self._ask_after(reply, at, now)

    def _tickets(self, question: Question, reply: Reply, at: float) -> Iterator[Ticket]:
        known = len(question.waiters)
        for i, delay in enumerate(reply.starts_in):
            waiter = question.waiters[i] if i < known else None
            reserved = question.reserved[i] if i < known else question.spare
            yield Ticket(at + delay, reply.generation, reserved, reply.probing, waiter)

    def _add_tickets(self, tickets: list[Ticket]) -> None:
        # Refunds may let a later answer start earlier than tickets that are held already.
        unsorted = bool(self.tickets and tickets and tickets[0].start < self.tickets[-1].start)
        self.tickets.extend(tickets)
        for ticket in tickets:
            if ticket.waiter is not None:
                ticket.waiter.has_ticket = True
        if unsorted:
            self.tickets = deque(sorted(self.tickets, key=lambda ticket: ticket.start))

    def _refuse_tickets(self, tickets: list[Ticket], now: float) -> None:
        for ticket in tickets:
            self._give_back(ticket, now)
        self.urgent = True

    def _ask_after(self, reply: Reply, at: float, now: float) -> float:
        gap = min(1.0 / ASKS_PER_START / self.rate, 0.1) if self.rate > BUSY_RATE else 0.001
        if not reply.limited:
            return self.asked_at + (min(gap, BURST_GAP) if self.saved >= 1.0 else gap)
        soonest = self.asked_at + gap
        if self.tickets:
            enough = min(self.asked_at + RENEW, self.tickets[-1].start - AHEAD)
            return max(soonest, enough, min(at + reply.again_in, now + RENEW))
        return max(soonest, at + reply.again_in)
