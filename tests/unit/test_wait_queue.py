"""Whose ticket is whose in the waiting line of one process."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from batchllm_celery.limiter import Estimate, Permit
from batchllm_celery.limiter.line import BURST_GAP, LATE, MOST_SAVED, Line, Question, Waiter
from batchllm_celery.limiter.wire import Reply

TOKENS_LIMITED, HELD_UP = 1, 32


@dataclass
class Stand:
    """A line and a limiter that answers what it is told to."""

    line: Line
    flags: int = TOKENS_LIMITED

    def join(self, tokens: int, *, first: bool = False) -> Waiter:
        future: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()
        waiter = Waiter(lambda: Estimate(tokens), future)
        self.line.join(waiter, first=first)
        return waiter

    def ask(self, now: float) -> Question:
        return self.line.question("p", 1, now)

    def answer(self, question: Question, starts: list[float], now: float) -> None:
        flags = self.flags | (HELD_UP if len(starts) < self.line.waiting else 0)
        reply = Reply(1, 0, 0, 0.1, 0, flags, 0, 1, tuple(start - now for start in starts))
        self.line.take(question, reply, now, now, now)

    def fetch(self, starts: list[float], now: float) -> Question:
        question = self.ask(now)
        self.answer(question, starts, now)
        return question

    def owed(self) -> int:
        return self.line.pending.input_tokens


@pytest.fixture
def stand() -> Stand:
    return Stand(Line("q"))


async def test_a_refused_call_does_not_take_the_ticket_of_a_small_one(stand: Stand) -> None:
    """It has its own tokens reserved: the ticket in hand would let the next start come too soon."""
    small = stand.join(50)
    stand.fetch([10.1], now=10.0)
    large = stand.join(900, first=True)
    stand.line.release(10.1)
    assert small.granted.result().estimate == Estimate(50)
    assert not large.granted.done()
    assert stand.fetch([10.2], now=10.1).reserved == [Estimate(900)]
    stand.line.release(10.2)
    assert large.granted.result().estimate == Estimate(900)
    assert stand.owed() == 0
    assert (stand.line.waiting, list(stand.line.alive())) == (0, [])


async def test_who_has_a_ticket_is_not_asked_for_again(stand: Stand) -> None:
    """Whatever their places are: the one that came first was refused, and has none yet."""
    stand.join(50)
    stand.join(60)
    stand.fetch([10.3], now=10.0)
    stand.join(900, first=True)
    assert stand.ask(10.1).reserved == [Estimate(900), Estimate(60)]


async def test_the_ticket_of_a_cancelled_waiter_goes_to_the_oldest_without_one(
    stand: Stand,
) -> None:
    """And the limiter hears of the difference in tokens."""
    gone, second, third = stand.join(50), stand.join(60), stand.join(70)
    stand.fetch([10.1, 10.2], now=10.0)
    stand.line.leave(gone)
    assert stand.ask(10.05).reserved == []  # the third will use it
    stand.line.proof = 10.05
    stand.line.release(10.1)
    assert third.granted.done()
    assert not second.granted.done()
    assert stand.owed() == 20


async def test_a_ticket_of_nobody_is_used_by_whoever_waits(stand: Stand) -> None:
    """The only waiter left takes the earlier ticket of a cancelled one; its own is free then."""
    gone, left = stand.join(50), stand.join(60)
    stand.fetch([10.1, 10.2], now=10.0)
    stand.line.leave(gone)
    stand.line.release(10.1)
    assert left.granted.done()
    newcomer = stand.join(60)
    stand.line.release(10.2)
    assert newcomer.granted.done()


async def test_a_late_ticket_leaves_its_waiter_in_line(stand: Stand) -> None:
    """What is given back is asked for again, in the old order."""
    first, second = stand.join(50), stand.join(60)
    stand.fetch([10.1, 10.2], now=10.0)
    stand.line.drop_late(10.2 + LATE + 0.01)
    assert [one.reserved for one in stand.line.pending.unused] == [Estimate(50), Estimate(60)]
    assert stand.ask(10.5).waiters == [first, second]


async def test_tickets_that_a_cooldown_voids_are_asked_for_again(stand: Stand) -> None:
    """Those in hand and those on their way."""
    first, second = stand.join(50), stand.join(60)
    stand.fetch([10.1], now=10.0)
    question = stand.ask(10.05)
    assert question.waiters == [second]
    stand.line.saw_generation(2, 10.06)
    stand.answer(question, [10.2], 10.07)
    assert not stand.line.tickets
    assert stand.ask(10.1).waiters == [first, second]


async def test_without_tokens_any_waiter_uses_any_ticket(stand: Stand) -> None:
    """A refused call comes before all who had no turn."""
    stand.flags = 0
    stand.fetch([], now=9.9)
    waiting = stand.join(50)
    stand.fetch([10.1], now=10.0)
    refused = stand.join(900, first=True)
    stand.line.release(10.1)
    assert refused.granted.done()
    assert not waiting.granted.done()


class Caller:
    """Waiters that come at given times before a quota without limits; when each was served."""

    def __init__(self, stand: Stand) -> None:
        self.stand, self.asks, self.longest = stand, 0, 0.0
        self.waiting: list[tuple[float, Waiter]] = []
        stand.flags = 0

    def come(self, at: float) -> None:
        self.waiting.append((at, self.stand.join(1)))
        self.look(at)

    def look(self, now: float) -> None:
        line = self.stand.line
        if line.next_ask() <= now:
            self.asks += 1
            self.stand.fetch([now] * line.waiting, now)
            line.release(now)
        served = [came for came, waiter in self.waiting if waiter.granted.done()]
        self.longest = max([self.longest, *(now - came for came in served)])
        self.waiting = [one for one in self.waiting if not one[1].granted.done()]


async def test_calls_that_start_together_wait_for_no_quiet_moment(stand: Stand) -> None:
    """A hundred within 50 ms, when the fleet was idle before: each is served within the gap."""
    caller = Caller(stand)
    for step in range(100):
        caller.come(10.0 + step * 0.0005)
    for step in range(100, 112):
        caller.look(10.0 + step * 0.0005)
    assert not caller.waiting
    assert caller.longest <= BURST_GAP + 0.001


async def test_a_steady_stream_costs_a_question_for_five_starts(stand: Stand) -> None:
    """What bursts may spend is saved by the others."""
    caller = Caller(stand)
    for step in range(2_000):
        caller.come(10.0 + step * 0.01)
    assert caller.asks <= 0.2 * 2_000 + MOST_SAVED + 1
    assert caller.longest <= 0.1
