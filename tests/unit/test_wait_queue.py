"""Whose reservation is whose in the wait queue of one process, and who comes first."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from batchllm_celery.limiter import CallOutcome, Estimate, Permit
from batchllm_celery.limiter.permit import SettledCall
from batchllm_celery.limiter.protocol import AcquireReply
from batchllm_celery.limiter.wait_queue import (
    LATEST_START,
    MOST_SAVED_REQUESTS,
    SAVED_REQUEST_GAP,
    SentRequest,
    Waiter,
    WaitQueue,
)


@dataclass
class Stand:
    """A wait queue, and a limiter that replies what it is told to."""

    queue: WaitQueue
    tokens_limited: bool = True
    epoch: int = 1
    probing: bool = False

    def join(
        self, tokens: int, *, priority: int = 0, retry: bool = False, tried: int = 0
    ) -> Waiter:
        future: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()
        waiter = Waiter(lambda: Estimate(tokens), future, priority, retry, tried)
        self.queue.join(waiter)
        return waiter

    def request(self, now: float) -> SentRequest:
        return self.queue.make_request(1, now)

    def reply(
        self, sent: SentRequest, starts: list[float], now: float, sent_at: float | None = None
    ) -> None:
        reply = AcquireReply(
            epoch=self.epoch,
            now_us=0,
            cooldown_until_us=0,
            ask_again_us=100_000,
            exhausted_until_us=0,
            consecutive_cooldowns=0,
            tokens_limited=self.tokens_limited,
            slots_limited=False,
            probing=self.probing,
            may_prefetch=False,
            oversize=False,
            held_up=len(starts) < self.queue.waiting,
            starts_us=tuple(round((start - now) * 1e6) for start in starts),
        )
        sent_at = now if sent_at is None else sent_at
        self.queue.accept(sent, reply, sent_at=sent_at, replied_at=now, now=now)

    def fetch(self, starts: list[float], now: float) -> SentRequest:
        sent = self.request(now)
        self.reply(sent, starts, now)
        return sent

    def debt(self) -> int:
        """Input tokens that the next request owes (negative: returns)."""
        return self.queue.settlements.debt_input


@pytest.fixture
def stand() -> Stand:
    return Stand(WaitQueue("q"))


async def test_a_refused_call_does_not_use_the_reservation_of_a_small_one(stand: Stand) -> None:
    """It has its own tokens reserved: the one in hand would let the next start come too soon."""
    small = stand.join(50)
    stand.fetch([10.1], now=10.0)
    large = stand.join(900, retry=True)
    stand.queue.grant_due(10.1)
    assert small.permit.result().estimate == Estimate(50)
    assert not large.permit.done()
    assert stand.fetch([10.2], now=10.1).estimates == [Estimate(900)]
    stand.queue.grant_due(10.2)
    assert large.permit.result().estimate == Estimate(900)
    assert stand.debt() == 0
    assert (stand.queue.waiting, list(stand.queue.in_turn())) == (0, [])


async def test_who_has_a_reservation_is_not_asked_for_again(stand: Stand) -> None:
    """Whatever their places are: the one that comes first was refused, and has none yet."""
    stand.join(50)
    stand.join(60)
    stand.fetch([10.3], now=10.0)
    stand.join(900, retry=True)
    assert stand.request(10.1).estimates == [Estimate(900), Estimate(60)]


async def test_the_reservation_of_a_cancelled_waiter_goes_to_the_next_without_one(
    stand: Stand,
) -> None:
    """And the limiter hears of the difference in tokens."""
    gone, second, third = stand.join(50), stand.join(60), stand.join(70)
    stand.fetch([10.1, 10.2], now=10.0)
    stand.queue.leave(gone)
    assert stand.request(10.05).estimates == []  # the third will use it
    stand.queue.grant_due(10.1)
    assert third.permit.done()
    assert not second.permit.done()
    assert stand.debt() == 20


async def test_a_reservation_of_nobody_is_used_by_whoever_waits(stand: Stand) -> None:
    """The only waiter left uses the earlier one of a cancelled one; its own is free then."""
    gone, left = stand.join(50), stand.join(60)
    stand.fetch([10.1, 10.2], now=10.0)
    stand.queue.leave(gone)
    stand.queue.grant_due(10.1)
    assert left.permit.done()
    newcomer = stand.join(60)
    stand.queue.grant_due(10.2)
    assert newcomer.permit.done()


async def test_a_late_reservation_leaves_its_waiter_in_the_queue(stand: Stand) -> None:
    """What is released is asked for again, in the old order."""
    first, second = stand.join(50), stand.join(60)
    stand.fetch([10.1, 10.2], now=10.0)
    stand.queue.drop_late(10.2 + LATEST_START + 0.01)
    request = stand.request(10.5)
    assert (request.request.unused, request.request.forfeited_input) == (2, -110)
    assert request.waiters == [first, second]


async def test_reservations_that_a_cooldown_voids_are_asked_for_again(stand: Stand) -> None:
    """Those in hand and those on their way."""
    first, second = stand.join(50), stand.join(60)
    stand.fetch([10.1], now=10.0)
    sent = stand.request(10.05)
    assert sent.waiters == [second]
    stand.queue.begin_epoch(2, 10.06)
    stand.reply(sent, [10.2], 10.07)
    assert not stand.queue.reservations
    assert stand.request(10.1).waiters == [first, second]


async def test_waiters_that_were_cancelled_just_now_are_not_asked_for(stand: Stand) -> None:
    """They leave in their own time, and have no estimate any more."""
    waiters = [stand.join(50) for _ in range(6)]
    for waiter in waiters[:2]:
        waiter.permit.cancel()
    sent = stand.request(10.0)
    assert sent.waiters == waiters[2:]
    assert sent.request.wanted == 4


async def test_without_tokens_any_waiter_uses_any_reservation(stand: Stand) -> None:
    """A refused call comes before all that had no permit."""
    stand.tokens_limited = False
    stand.fetch([], now=9.9)
    waiting = stand.join(50)
    stand.fetch([10.1], now=10.0)
    refused = stand.join(900, retry=True)
    stand.queue.grant_due(10.1)
    assert refused.permit.done()
    assert not waiting.permit.done()


async def test_a_permit_ends_with_its_freshness_its_time_and_its_epoch(stand: Stand) -> None:
    """Whatever comes first."""
    waiter = stand.join(50)
    stand.fetch([10.1], now=10.0)
    stand.queue.grant_due(10.1)
    permit, queue = waiter.permit.result(), stand.queue
    assert queue.may_start(permit, 10.1)
    assert not queue.may_start(permit, 10.26)
    stand.fetch([], now=10.3)
    assert queue.may_start(permit, 10.3)
    assert not queue.may_start(permit, 10.36)
    queue.begin_epoch(2, 10.3)
    assert not queue.may_start(permit, 10.3)


# -- announcements


async def test_an_announced_epoch_stops_but_is_not_passed_on(stand: Stand) -> None:
    """Redis is asked at once, and never learns what only a message said; it says what is so."""
    waiter = stand.join(50)
    stand.fetch([10.1], now=10.0)
    stand.queue.announce_epoch(10**18, 10.05)
    stand.queue.grant_due(10.1)
    assert not waiter.permit.done()
    assert stand.queue.next_request() < 10.1
    sent = stand.request(10.1)
    assert sent.request.known_epoch == 1
    stand.reply(sent, [10.2], now=10.1)  # in epoch 1 still: the message was false
    stand.queue.grant_due(10.2)
    assert stand.queue.may_start(waiter.permit.result(), 10.2)


async def test_after_a_false_announcement_none_is_believed_for_a_second(stand: Stand) -> None:
    """Whoever floods the channel slows nobody down."""
    stand.join(50)
    stand.fetch([10.1], now=10.0)
    stand.queue.announce_epoch(7, 10.01)
    stand.fetch([10.1], now=10.02)
    stand.queue.announce_epoch(8, 10.03)
    assert len(stand.queue.reservations) == 1
    stand.queue.announce_epoch(9, 11.03)
    assert len(stand.queue.reservations) == 0


async def test_a_reply_on_its_way_does_not_make_an_announcement_false(stand: Stand) -> None:
    """It was asked for before; its starts are released, and Redis is asked again."""
    stand.join(50)
    stand.fetch([], now=9.9)
    sent = stand.request(10.0)
    stand.queue.announce_epoch(2, 10.01)
    stand.reply(sent, [10.12], now=10.02, sent_at=10.0)
    assert len(stand.queue.reservations) == 0
    stand.epoch = 2
    stand.fetch([10.14], now=10.04)
    assert (stand.queue.epoch, len(stand.queue.reservations)) == (2, 1)


# -- priority


@pytest.mark.parametrize("tokens_limited", [True, False])
async def test_the_first_permit_goes_to_the_most_urgent(stand: Stand, tokens_limited: bool) -> None:
    """Later but more urgent callers are served first; equals in the order they came."""
    stand.tokens_limited = tokens_limited
    stand.fetch([], now=9.9)
    usual = [stand.join(50), stand.join(50)]
    stand.fetch([10.1, 10.2], now=10.0)  # they have reservations already
    urgent = [stand.join(70, priority=priority) for priority in (5, 9, 5)]
    order = [urgent[1], urgent[0], urgent[2], *usual]
    stand.fetch([10.21, 10.22, 10.23], now=10.05)
    for served, now in enumerate((10.1, 10.2, 10.21, 10.22, 10.23), start=1):
        stand.queue.grant_due(now)
        assert [waiter.permit.done() for waiter in order] == [i < served for i in range(5)]
    assert stand.queue.waiting == 0
    assert stand.debt() == 0  # each start has what its call will use


async def test_among_equals_a_refused_call_comes_first(stand: Stand) -> None:
    """Priority comes before it: a usual call that was refused waits for an urgent one."""
    stand.tokens_limited = False
    stand.fetch([], now=9.9)
    usual, refused = stand.join(1), stand.join(1, retry=True)
    urgent, refused_urgent = stand.join(1, priority=5), stand.join(1, priority=5, retry=True)
    order = [refused_urgent, urgent, refused, usual]
    assert list(stand.queue.in_turn()) == order


async def test_who_gave_its_reservation_to_an_urgent_call_is_asked_for_again(stand: Stand) -> None:
    """It keeps its place among its equals."""
    first, second = stand.join(50), stand.join(60)
    stand.fetch([10.1, 10.2], now=10.0)
    urgent = stand.join(500, priority=5)
    stand.queue.grant_due(10.1)
    assert urgent.permit.result().estimate == Estimate(500)
    assert stand.debt() == 450
    assert stand.request(10.15).waiters == [first]
    stand.queue.grant_due(10.2)
    assert second.permit.done()


async def test_a_cancelled_urgent_call_leaves_its_reservation_to_the_next(stand: Stand) -> None:
    """No start is lost on the way, and none is used twice."""
    usual = stand.join(50)
    urgent = stand.join(60, priority=9)
    stand.fetch([10.1, 10.2], now=10.0)
    stand.queue.leave(urgent)
    stand.queue.grant_due(10.1)
    assert usual.permit.done()
    assert (stand.queue.waiting, len(stand.queue.reservations)) == (0, 1)


# -- when to ask


async def test_a_refusal_is_reported_at_once_and_a_success_soon(stand: Stand) -> None:
    """The fleet must stop; a success only carries tokens."""
    stand.fetch([], now=9.9)
    waiters = [stand.join(50), stand.join(50)]
    stand.fetch([10.0, 10.0], now=10.0)
    stand.queue.grant_due(10.0)
    permits = [waiter.permit.result() for waiter in waiters]
    stand.queue.settle(SettledCall(permits[0], CallOutcome.SUCCEEDED), 10.01)
    assert 10.01 < stand.queue.next_request() <= 10.2
    stand.queue.settle(SettledCall(permits[1], CallOutcome.REFUSED), 10.02)
    assert stand.queue.next_request() <= 10.02


class Caller:
    """Waiters that come at given times before a quota without limits; when each was served."""

    def __init__(self, stand: Stand) -> None:
        self.stand, self.requests, self.longest = stand, 0, 0.0
        self.waiting: list[tuple[float, Waiter]] = []
        stand.tokens_limited = False

    def come(self, at: float) -> None:
        self.waiting.append((at, self.stand.join(1)))
        self.act(at)

    def act(self, now: float) -> None:
        queue = self.stand.queue
        if queue.next_request() <= now:
            self.requests += 1
            self.stand.fetch([now] * queue.waiting, now)
            queue.grant_due(now)
        served = [came for came, waiter in self.waiting if waiter.permit.done()]
        self.longest = max([self.longest, *(now - came for came in served)])
        self.waiting = [one for one in self.waiting if not one[1].permit.done()]


async def test_calls_that_start_together_wait_for_no_quiet_moment(stand: Stand) -> None:
    """A hundred within 50 ms, when the fleet was idle before: each is served within the gap."""
    caller = Caller(stand)
    for step in range(100):
        caller.come(10.0 + step * 0.0005)
    for step in range(100, 112):
        caller.act(10.0 + step * 0.0005)
    assert not caller.waiting
    assert caller.longest <= SAVED_REQUEST_GAP + 0.001


async def test_a_steady_stream_costs_a_request_for_five_starts(stand: Stand) -> None:
    """What bursts may spend is saved by the others."""
    caller = Caller(stand)
    for step in range(2_000):
        caller.come(10.0 + step * 0.01)
    assert caller.requests <= 0.2 * 2_000 + MOST_SAVED_REQUESTS + 1
    assert caller.longest <= 0.1


@pytest.mark.parametrize("tokens_limited", [True, False])
async def test_probes_go_to_whoever_was_called_least(stand: Stand, tokens_limited: bool) -> None:
    """In a long outage no item uses up all its calls while others have made none."""
    stand.tokens_limited, stand.probing = tokens_limited, True
    tried = {"a": 3, "b": 0, "c": 1}
    calls: list[str] = []
    for number in range(12):
        waiters = {
            name: stand.join(10, retry=times > 0, tried=times) for name, times in tried.items()
        }
        now = 10.0 + number
        stand.fetch([now + 0.1], now=now)
        stand.queue.grant_due(now + 0.1)
        [probed] = [name for name, waiter in waiters.items() if waiter.permit.done()]
        assert waiters[probed].permit.result().probe
        calls.append(probed)
        tried[probed] += 1
        for waiter in waiters.values():
            if not waiter.permit.done():
                stand.queue.leave(waiter)
    assert max(tried.values()) - min(tried.values()) <= 1
    assert calls[:2] == ["b", "b"] or calls[:2] == ["b", "c"]


async def test_an_urgent_probe_goes_first_even_if_it_was_called_often(stand: Stand) -> None:
    """Priority decides before fairness does."""
    stand.probing = True
    stand.join(10)
    urgent = stand.join(10, priority=5, retry=True, tried=9)
    stand.fetch([10.1], now=10.0)
    stand.queue.grant_due(10.1)
    assert urgent.permit.done()


async def test_without_the_breaker_a_refused_call_keeps_its_turn(stand: Stand) -> None:
    """However often it was called."""
    stand.join(10)
    refused = stand.join(10, retry=True, tried=9)
    stand.fetch([10.1], now=10.0)
    stand.queue.grant_due(10.1)
    assert refused.permit.done()
