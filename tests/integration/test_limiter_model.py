"""The scripts on a real Valkey in virtual time: what each step promises, one history each.

Random histories are in test_limiter_properties.py.
"""

from __future__ import annotations

import heapq
import math
import random
import struct
import uuid
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import redis

from batchllm_celery.keys import Keys
from batchllm_celery.limiter import Estimate, QuotaState
from batchllm_celery.limiter.protocol import (
    AcquireReply,
    AcquireRequest,
    EndedCalls,
    acquire_arguments,
)
from batchllm_celery.limiter.quota_state import configure_arguments, read_state
from batchllm_celery.limiter.scripts import ACQUIRE, CONFIGURE, STATE
from batchllm_celery.models import CooldownPolicy, Quota, QuotaLimits
from batchllm_celery.simulation.quotas import Bucket
from tests.integration.virtual_redis import VirtualRedis
from tests.support import ValkeyServer


class Scripts:
    """Requests of several processes to one quota, in virtual time."""

    def __init__(self, server: VirtualRedis, quota: Quota) -> None:
        self.server = server
        keys = Keys(f"t{uuid.uuid4().hex[:8]}").quota(quota.name)
        self.keys = [keys.state, keys.procs, keys.waiting, keys.channel]
        self.sequence = 0
        self.epoch = 0
        self.version = -1
        self.full_speed = False
        self.configure(quota)

    def configure(self, quota: Quota) -> None:
        keys = [self.keys[0], self.keys[3]]
        self.server.call(CONFIGURE, keys, configure_arguments(quota, update=True))

    def state(self) -> QuotaState:
        """What `status` shows."""
        return read_state("q", *self.server.call(STATE, [self.keys[0], self.keys[2]]))

    def ask(
        self,
        process: str,
        wants: list[int],
        *,
        aware: bool = True,
        refused: bool = False,
        retry_after: float | None = None,
        day_exhausted: float | None = None,
        ended: list[EndedCalls] | None = None,
        **fields: Any,
    ) -> AcquireReply:
        """A request for waiters of `wants` tokens; `fields` are those of `AcquireRequest`.

        `aware`: the process knows whether tokens are limited. `refused`: a call of the present
        epoch was. Durations are in seconds.
        """
        self.sequence += 1
        values: dict[str, Any] = {
            "sequence": self.sequence,
            "wanted": len(wants),
            "known_epoch": self.epoch,
            "full_speed": self.full_speed,
            "refused_epoch": self.epoch if refused else -1,
            "retry_after_us": -1 if retry_after is None else round(retry_after * 1e6),
            "day_exhausted_us": -1 if day_exhausted is None else round(day_exhausted * 1e6),
        }
        request = AcquireRequest(**{**values, **fields})
        estimates = [Estimate(tokens, 0) for tokens in wants if aware]
        overloads = request.overloads
        if ended is None:
            ended = [EndedCalls(self.version, overloads=overloads)] if overloads else []
        arguments = acquire_arguments(process, request, estimates, ended)
        reply = AcquireReply.parse(self.server.call(ACQUIRE, self.keys, arguments))
        self.epoch, self.version = reply.epoch, reply.limit_version
        return reply


def seconds_until(reply: AcquireReply) -> list[float]:
    """The starts of a reply, in seconds after it."""
    return [start_us * 1e-6 for start_us in reply.starts_us]


@pytest.fixture
def server(valkey: ValkeyServer) -> Iterator[VirtualRedis]:
    virtual = VirtualRedis(valkey.url)
    yield virtual
    virtual.client.close()


def test_the_same_request_twice_gets_the_same_reply(server: VirtualRedis) -> None:
    """A repeated request spends nothing."""
    limits = QuotaLimits(requests_per_minute=600, requests_per_day=10)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    first = scripts.ask("a", [1, 1, 1], sequence=7)
    server.now += 1
    assert scripts.ask("a", [1, 1, 1], sequence=7) == first
    assert len(scripts.ask("a", [1] * 10, sequence=8).starts_us) <= 7


def pass_while_heard(scripts: Scripts, seconds: float) -> None:
    """Time passes, in which a process that wants nothing is heard of every second."""
    end = scripts.server.now + seconds
    while scripts.server.now < end:
        scripts.server.now = min(scripts.server.now + 1.0, end)
        scripts.ask("bystander", [])


def test_calls_of_a_dead_process_free_their_slots(server: VirtualRedis) -> None:
    """After ten seconds of silence a process has no calls in flight."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(max_concurrency=3)))
    assert len(scripts.ask("dead", [1, 1, 1]).starts_us) == 3
    pass_while_heard(scripts, 9.5)
    assert scripts.ask("alive", [1]).starts_us == ()
    pass_while_heard(scripts, 2.0)
    assert len(scripts.ask("alive", [1]).starts_us) == 1


@pytest.mark.parametrize("away", [13.0, 3600.0])
def test_calls_in_flight_count_while_redis_was_away(server: VirtualRedis, away: float) -> None:
    """Silence of everybody is no death: whoever speaks first does not get the others' slots."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(max_concurrency=3)))
    assert len(scripts.ask("busy", [1, 1, 1]).starts_us) == 3
    server.now += away
    assert scripts.ask("first", [1, 1, 1]).starts_us == ()
    server.now += 1.0
    scripts.ask("busy", [], in_flight=3)
    pass_while_heard(scripts, 9.0)
    assert scripts.ask("first", [1, 1, 1]).starts_us == ()


@pytest.mark.parametrize("known", [True, False])
def test_a_clock_that_was_ahead_for_a_while_is_not_waited_for(
    server: VirtualRedis, known: bool
) -> None:
    """Redis' clock jumps ahead by an hour and is set back: the fleet goes on within seconds."""
    limits = (
        QuotaLimits(requests_per_minute=600, requests_per_day=1_000) if known else QuotaLimits()
    )
    scripts = Scripts(server, Quota(name="q", limits=limits, horizon_seconds=2.0))
    assert scripts.ask("a", [1] * 5).starts_us
    server.now += 3600
    scripts.ask("a", [], in_flight=5, refused=True, retry_after=30)
    ahead = scripts.ask("b", [1] * 5)
    assert ahead.starts_us == ()
    server.now -= 3599
    back = scripts.ask("a", [1] * 5, in_flight=5)
    assert back.epoch > ahead.epoch  # starts dated by the wrong clock are void
    assert back.starts_us == ()
    assert back.cooldown <= 30
    server.now += 30.5
    given = scripts.ask("a", [1] * 5, in_flight=5)
    assert len(given.starts_us) >= 1
    assert max(given.starts_us) < 1_000_000


def test_a_days_end_told_by_a_clock_that_was_ahead_is_set_back_too(server: VirtualRedis) -> None:
    """Exhausted for an hour on a clock that is a month ahead: not for a month and an hour."""
    scripts = Scripts(server, Quota(name="q"))
    scripts.ask("a", [1])
    server.now += 30 * 86_400
    assert scripts.ask("a", [1], in_flight=1, day_exhausted=3600.0).exhausted_until_us
    server.now -= 30 * 86_400 - 60
    assert scripts.ask("a", [1]).exhausted_until_us <= (server.now + 3600) * 1e6
    server.now += 3600
    assert len(scripts.ask("a", [1]).starts_us) == 1


def test_nothing_starts_for_a_while_after_redis_restarted(server: VirtualRedis) -> None:
    """Another run id: a new epoch, and no start before horizon + 1 s."""
    limits = QuotaLimits(requests_per_minute=600)
    scripts = Scripts(server, Quota(name="q", limits=limits, horizon_seconds=2.0))
    before = scripts.ask("a", [1, 1])
    server.now, server.run_id = server.now + 0.5, "second"
    after = scripts.ask("a", [1])
    assert after.epoch > before.epoch
    assert after.starts_us == ()
    assert after.cooldown == pytest.approx(3.0)
    server.now += 3.0
    assert len(scripts.ask("a", [1]).starts_us) == 1


@pytest.mark.parametrize("size", [100, 200, 400])
def test_first_guesses_never_empty_the_providers_second(server: VirtualRedis, size: int) -> None:
    """What a provider's bucket of a second did not take, it does not hold on top of its second."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    bucket = Bucket(60_000, 1.0, server.now)
    scripts.ask("a", [900] * 2)
    bucket.charge(100, server.now)
    server.now += 0.9
    bucket.charge(100, server.now)
    scripts.ask("a", [], forfeited_input=-1600)
    wants = [size] * (800 // size) + [890, 890]
    while wants:
        for delay, tokens in zip(seconds_until(scripts.ask("a", wants)), list(wants), strict=False):
            assert bucket.wait(tokens, server.now + delay) == 0
            bucket.charge(tokens, server.now + delay)
            wants.pop(0)
        server.now += 0.5


def test_requests_of_nearly_a_second_get_no_burst(server: VirtualRedis) -> None:
    """A provider's bucket of a second holds one of them, and nothing on top."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    bucket = Bucket(60_000, 1.0, server.now)
    scripts.ask("a", [])
    left = 4
    while left:
        server.now += 0.4
        for delay in seconds_until(scripts.ask("a", [980] * left)):
            assert bucket.wait(980, server.now + delay) == 0
            bucket.charge(980, server.now + delay)
            left -= 1


def test_a_first_guess_of_minutes_holds_nobody_up_for_minutes(server: VirtualRedis) -> None:
    """Of 100,000 reserved tokens all that were not used come back, but for a second's worth.

    While they held the fleet up, the provider's bucket was full and took in no more.
    """
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    assert scripts.ask("a", [100_000]).starts_us
    server.now += 0.5
    assert not scripts.ask("a", [100]).starts_us
    scripts.ask("a", [], forfeited_input=-99_950)
    server.now += 0.9
    assert not scripts.ask("a", [100]).starts_us
    server.now += 0.2
    assert scripts.ask("a", [100]).starts_us


def test_requests_that_use_more_and_less_than_estimated_leave_nothing_unused(
    server: VirtualRedis,
) -> None:
    """Debts and refunds of half a second's worth make up for one another."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    draw = random.Random(1)
    ends: list[tuple[float, int]] = []
    begun, used = server.now, 0
    for _ in range(2400):
        owed = sum(tokens for at, tokens in ends if at <= server.now)
        ends = [end for end in ends if end[0] > server.now]
        for delay in seconds_until(scripts.ask("a", [600] * 4, debt_input=owed)):
            more = draw.choice([-500, 500])
            ends.append((server.now + delay + 0.5, more))
            used += 600 + more
        server.now += 0.05
    assert used / (server.now - begun) / 1000 > 0.96


def test_a_large_request_starts_beside_small_ones_that_use_less(server: VirtualRedis) -> None:
    """What small ones of another process give back is not theirs alone."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    for _ in range(40):
        scripts.ask("small", [50] * 8, debt_input=-20)
        server.now += 0.05
    waited = 0.0
    while not scripts.ask("large", [900]).starts_us:
        scripts.ask("small", [50] * 8, debt_input=-20)
        server.now += 0.05
        waited += 0.05
        assert waited <= 2.0


@pytest.mark.parametrize(
    ("processes", "distance", "tokens", "limits"),
    [
        (2, 0.04, (60, 200), QuotaLimits(tokens_per_minute=60_000)),
        (8, 0.04, (60, 200), QuotaLimits(tokens_per_minute=60_000)),
        (20, 0.08, (600, 600), QuotaLimits(tokens_per_minute=60_000)),
        (2, 0.04, (0, 0), QuotaLimits(requests_per_minute=600)),
        (8, 0.04, (0, 0), QuotaLimits(requests_per_minute=600)),
    ],
)
def test_a_process_far_from_redis_gets_its_share(
    server: VirtualRedis,
    processes: int,
    distance: float,
    tokens: tuple[int, int],
    limits: QuotaLimits,
) -> None:
    """The others hear of room at once and ask at once, this one later: they take turns."""
    scripts = Scripts(server, Quota(name="q", limits=limits))
    draw = random.Random(1)
    begun = server.now
    asks = [(begun, f"p{i}") for i in range(processes)]
    starts: dict[str, list[float]] = {name: [] for _, name in asks}
    while asks[0][0] < begun + 240:
        server.now, name = heapq.heappop(asks)
        reserved = sum(start > server.now for start in starts[name])
        reply = scripts.ask(name, [draw.randint(*tokens) for _ in range(8)], reserved=reserved)
        starts[name] += [server.now + delay for delay in seconds_until(reply)]
        away = distance if name == "p0" else 0.001 + draw.expovariate(1 / 0.003)
        heapq.heappush(asks, (server.now + reply.ask_again_us * 1e-6 + away, name))
    far, *near = map(len, starts.values())
    assert 0.45 <= far / (far + sum(near) / len(near)) <= 0.55


def test_who_is_not_next_does_not_ask_at_the_moment_there_is_room(server: VirtualRedis) -> None:
    """Everybody would; the first in the queue is served without waiting."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    assert len(scripts.ask("first", [260] * 4).starts_us) == 2
    server.now += 0.26
    other = scripts.ask("other", [100])
    assert not other.starts_us
    assert other.ask_again_us == pytest.approx(50_000)
    assert scripts.ask("first", [260] * 2).starts_us


def test_a_raised_quota_is_used_at_once(server: VirtualRedis) -> None:
    """What a large request owed at the old rate is paid at the new one."""
    low, high = (Quota(name="q", limits=QuotaLimits(tokens_per_minute=n)) for n in (6_000, 600_000))
    scripts = Scripts(server, low)
    assert scripts.ask("a", [6_000]).starts_us
    server.now += 1
    assert not scripts.ask("a", [100]).starts_us
    scripts.configure(high)
    server.now += 0.6
    assert scripts.ask("a", [100]).starts_us


def test_the_first_answer_after_tokens_were_limited_gives_no_start(server: VirtualRedis) -> None:
    """Who asks without estimates would get as many as it wants."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(requests_per_minute=600)))
    scripts.ask("a", [1], aware=False)
    scripts.configure(Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    server.now += 1
    reply = scripts.ask("a", [1000] * 50, aware=False)
    assert (reply.starts_us, reply.tokens_limited, reply.ask_again_us) == ((), True, 1_000)
    assert len(scripts.ask("a", [1000] * 50).starts_us) == 1


def test_a_changed_quota_is_tried_again_on_the_day_that_was_over(server: VirtualRedis) -> None:
    """Who raised it, or has paid, does not wait for the old one's reset."""
    scripts = Scripts(server, Quota(name="q"))
    assert scripts.ask("a", [1], day_exhausted=3600.0).exhausted_until_us
    scripts.configure(Quota(name="q", limits=QuotaLimits(requests_per_minute=600)))
    server.now += 1
    assert scripts.ask("a", [1]).starts_us


def test_what_one_has_no_use_for_goes_to_the_next_at_once(server: VirtualRedis) -> None:
    """The first in the queue hears of a free slot, has its share, and passes it on."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(max_concurrency=2)))
    assert scripts.ask("ends", [1]).starts_us
    assert scripts.ask("first", [1]).starts_us
    server.now += 0.01
    assert not scripts.ask("first", [1], in_flight=1).starts_us
    server.now += 0.01
    assert not scripts.ask("second", [1]).starts_us
    with server.client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(scripts.keys[3])
        channel.get_message(timeout=5)
        scripts.ask("ends", [])
        assert channel.get_message(timeout=5)["data"] == b"slot:first"
        server.now += 0.01
        assert not scripts.ask("first", [1], in_flight=1).starts_us
        assert channel.get_message(timeout=5)["data"] == b"slot:second"
        assert scripts.ask("second", [1]).starts_us


def test_a_request_repeated_after_its_process_was_given_up_counts_once(
    server: VirtualRedis,
) -> None:
    """Redis replied, the reply was lost, and the link was away for longer than the lease."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    scripts.ask("a", [10])
    first = scripts.ask("a", [], debt_input=30_000, in_flight=1, sequence=7)
    pass_while_heard(scripts, 12.0)
    owed = scripts.state().owed_seconds["tokens"]
    assert scripts.ask("a", [], debt_input=30_000, in_flight=1, sequence=7) == first
    assert scripts.state().owed_seconds["tokens"] == owed


def test_a_redis_that_lost_the_last_cooldown_is_noticed(server: VirtualRedis) -> None:
    """A copy that was behind took over: whoever knows more says so, and all begins anew, once."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(requests_per_minute=600)))
    scripts.ask("a", [1])
    scripts.ask("b", [])
    before = server.client.hget(scripts.keys[0], "live")
    assert isinstance(before, bytes)
    server.now += 1
    known = scripts.ask("a", [], refused=True, retry_after=1.0).epoch
    server.client.hset(scripts.keys[0], "live", before)
    server.now += 0.001
    noticed = scripts.ask("a", [1])
    assert noticed.epoch > known
    assert noticed.starts_us == ()
    server.now += 3.1
    again = scripts.ask("a", [1])
    assert again.epoch == noticed.epoch
    assert again.starts_us


def test_a_newer_version_may_add_to_the_state_of_a_quota(server: VirtualRedis) -> None:
    """What it appends is not read: both versions share a quota while workers are replaced."""
    limits = QuotaLimits(tokens_per_minute=60_000)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    scripts.ask("a", [900])
    live = server.client.hget(scripts.keys[0], "live")
    assert isinstance(live, bytes)
    server.client.hset(scripts.keys[0], "live", live + struct.pack("<d", 7.0))
    server.now += 0.5
    [start] = seconds_until(scripts.ask("a", [900, 900]))
    assert start == pytest.approx(0.9 / 0.995 - 0.5, abs=0.001)
    server.client.hset(scripts.keys[0], "live", live + struct.pack("<d", 7.0))
    scripts.state()
    scripts.configure(Quota(name="q", limits=QuotaLimits(tokens_per_minute=70_000)))


def test_a_quota_that_redis_lost_starts_carefully(server: VirtualRedis) -> None:
    """A process that knows a vanished quota makes the fleet wait; a new process does not."""
    scripts = Scripts(server, Quota(name="q"))
    known = scripts.ask("a", [1]).epoch
    server.client.delete(*scripts.keys[:3])
    server.now += 0.1
    reply = scripts.ask("a", [1], known_epoch=known)
    assert reply.epoch > known
    assert reply.starts_us == ()


def test_five_cooldowns_leave_one_probe_at_a_time(server: VirtualRedis) -> None:
    """The breaker: one call of one process, until one succeeds; a dead prober is replaced."""
    limits = QuotaLimits(requests_per_minute=6_000)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    for _ in range(5):
        server.now += 100
        scripts.ask("a", [1])
        scripts.ask("a", [], refused=True)
    server.now += 100
    probe = scripts.ask("a", [1, 1, 1])
    assert probe.probing
    assert len(probe.starts_us) == 1
    assert scripts.ask("b", [1]).starts_us == ()
    pass_while_heard(scripts, 11)
    assert len(scripts.ask("b", [1]).starts_us) == 1
    scripts.ask("b", [], in_flight=1, successes=1, probe_ended=True)
    assert len(scripts.ask("b", [1, 1, 1]).starts_us) == 3


def test_overloads_open_no_cooldown_but_the_breaker(server: VirtualRedis) -> None:
    """503s: the epoch stays, and after five in a row calls go one at a time."""
    limits = QuotaLimits(requests_per_minute=6_000)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    before = scripts.ask("a", [1] * 6)
    reply = scripts.ask("a", [], overloads=5)
    assert reply.epoch == before.epoch
    assert reply.cooldown == 0
    server.now += 2
    assert len(scripts.ask("a", [1] * 6, in_flight=1).starts_us) == 1


def test_nobody_overtakes_the_last_step_of_a_slow_start(server: VirtualRedis) -> None:
    """What is asked for together with it starts after it."""
    policy = CooldownPolicy(kind="slow_start", cooldowns=(1.0,), ramp=(0.5, 0.4, 0.2))
    scripts = Scripts(server, Quota(name="q", policy=policy))
    scripts.ask("a", [1])
    scripts.ask("a", [], refused=True)
    server.now += 1.0
    scripts.ask("a", [1])
    server.now += 0.4
    starts = seconds_until(scripts.ask("a", [1, 1, 1]))
    assert sorted(starts) == starts
    assert starts[1] == starts[2] == pytest.approx(0.2, abs=1e-5)


def test_a_late_refusal_opens_no_second_cooldown(server: VirtualRedis) -> None:
    """A 429 of an older epoch changes nothing."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(requests_per_minute=6_000)))
    scripts.ask("a", [1])
    old = scripts.epoch
    first = scripts.ask("a", [], refused=True, retry_after=3.0)
    scripts.epoch = old
    late = scripts.ask("b", [], refused=True, retry_after=30.0)
    assert late.epoch == first.epoch
    assert late.consecutive_cooldowns == 1
    assert late.cooldown <= 3.0


def allowed(scripts: Scripts) -> float:
    """The pace: requests a minute of an unknown quota, a share of a known one."""
    state = scripts.state()
    return state.rate_factor if state.limits.finite() else state.allowed_per_minute or 0.0


def load(scripts: Scripts, seconds: float, *, successes: int = 0) -> list[float]:
    """Somebody waits all the time; the pace every quarter of a second."""
    paces = []
    for _ in range(round(seconds * 4)):
        scripts.server.now += 0.25
        scripts.ask("a", [1] * 10, successes=successes)
        paces.append(allowed(scripts))
    return paces


@pytest.mark.parametrize("rate", [10.0, None])
def test_after_a_cut_the_pace_comes_back_along_a_cubic(
    server: VirtualRedis, rate: float | None
) -> None:
    """Down at once; then up while somebody waits, fast at first, slowly near what was refused."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(requests_per_minute=rate and 600)))
    scripts.ask("a", [1] * 20)
    scripts.ask("a", [], successes=8)
    before = allowed(scripts)
    scripts.ask("a", [], refused=True, retry_after=1.0)
    after = allowed(scripts)
    assert 0.4 * before <= after <= 0.8 * before
    assert scripts.ask("a", [1] * 10).cooldown == pytest.approx(1.0)
    assert load(scripts, 1.0)[-1] == pytest.approx(after)  # nothing is learnt in a cooldown
    paces = load(scripts, 60)
    assert paces == sorted(paces)
    early, late, middle = paces[20] - paces[0], paces[100] - paces[80], paces[60] - paces[40]
    assert early > middle > late >= 0
    found = after / 0.75  # what was allowed when the provider refused, as the limiter judged
    assert paces[100] == pytest.approx(found, rel=0.02)
    if rate:
        assert paces[-1] == 1.0
    else:
        assert paces[-1] > found  # it looks for more


def test_refusals_without_a_success_cut_once(server: VirtualRedis) -> None:
    """The second one says nothing new; after a success the next one does."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(requests_per_minute=600)))
    scripts.ask("a", [1] * 20)
    scripts.ask("a", [], successes=8)
    scripts.ask("a", [], refused=True, retry_after=1.0)
    once = allowed(scripts)
    for _ in range(3):
        server.now += 1.5
        scripts.ask("a", [], refused=True, retry_after=1.0)
    assert allowed(scripts) == once
    server.now += 1.5
    scripts.ask("a", [], successes=1)
    scripts.ask("a", [], refused=True, retry_after=1.0)
    assert allowed(scripts) < once


def test_refusals_before_any_success_do_not_end_the_search(server: VirtualRedis) -> None:
    """They say that the quota is used up, not how large it is: somebody else may have used it."""
    scripts = Scripts(server, Quota(name="q"))
    scripts.ask("a", [1] * 3)
    first = allowed(scripts)
    for _ in range(3):
        scripts.ask("a", [], refused=True, retry_after=20.0)
    assert allowed(scripts) == first / 2  # one cut for all three
    server.now += 21
    for _ in range(6):
        scripts.ask("a", [1] * 9, successes=4)
        server.now += 0.5
    assert allowed(scripts) >= 0.8 * first


@pytest.mark.parametrize("said", ["by the process", "by the quota"])
def test_full_speed_starts_all_at_once_until_a_call_is_refused(
    server: VirtualRedis, said: str
) -> None:
    """Nobody's quota: no start waits. A refusal sets the rate to what came through before it."""
    limits = QuotaLimits.unlimited() if said == "by the quota" else QuotaLimits()
    scripts = Scripts(server, Quota(name="q", limits=limits))
    scripts.full_speed = said == "by the process"
    for _ in range(20):
        given = scripts.ask("a", [1] * 50, successes=50)
        assert len(given.starts_us) == 50
        assert max(given.starts_us) < 1_000
        server.now += 1.0
    scripts.ask("a", [], refused=True, retry_after=1.0)
    assert 20 <= allowed(scripts) / 60 / 0.75 <= 50
    server.now += 1.1
    starts = [delay for _ in range(3) for delay in scripts.ask("a", [1] * 200).starts_us]
    assert len(starts) < 60  # of the 200, in the half second ahead


def test_full_speed_that_is_refused_at_once_starts_as_any_quota_does(server: VirtualRedis) -> None:
    """Before any success there is nothing to go by."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits.unlimited()))
    assert len(scripts.ask("a", [1] * 50).starts_us) == 50
    scripts.ask("a", [], refused=True, retry_after=1.0)
    other = Scripts(server, Quota(name="q"))
    assert len(other.ask("a", [1] * 50).starts_us) < 10
    assert 0 < allowed(scripts) < allowed(other)


def test_a_known_rate_beside_unlimited_tokens_limits(server: VirtualRedis) -> None:
    """Unlimited is said of one dimension, not of the others."""
    limits = QuotaLimits(requests_per_minute=60, tokens_per_minute=math.inf)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    scripts.full_speed = True
    assert len(scripts.ask("a", [1] * 50).starts_us) <= 2


def test_a_quota_set_to_unlimited_is_so_at_once(server: VirtualRedis) -> None:
    """And back again: what the search had found, or its absence, is not kept."""
    scripts = Scripts(server, Quota(name="q"))
    assert len(scripts.ask("a", [1] * 50).starts_us) < 10
    scripts.configure(Quota(name="q", limits=QuotaLimits.unlimited()))
    assert len(scripts.ask("a", [1] * 50).starts_us) == 50
    scripts.configure(Quota(name="q", limits=QuotaLimits(requests_per_minute=600)))
    scripts.configure(Quota(name="q"))
    server.now += 10
    assert len(scripts.ask("a", [1] * 50).starts_us) < 10


def test_a_spent_window_tells_the_quota(server: VirtualRedis) -> None:
    """What the minute had let in is the new rate, however lately the last cut was."""
    scripts = Scripts(server, Quota(name="q"))
    scripts.ask("a", [1] * 20)
    scripts.ask("a", [], successes=10)
    scripts.ask("a", [], refused=True, retry_after=0.1)  # a cut: the quota is found
    for _ in range(60):  # ten calls a second
        server.now += 0.5
        scripts.ask("a", [1] * 5, successes=5)
    scripts.ask("a", [], refused=True, retry_after=0.1)
    for _ in range(2):
        server.now += 0.5
        scripts.ask("a", [1] * 5, successes=5)
    scripts.ask("a", [], refused=True, retry_after=50.0)  # 100 of the last 10 s fill the minute
    server.now += 50
    assert load(scripts, 27)[-1] == pytest.approx(100, rel=0.1)


@pytest.mark.parametrize(
    "limits", [QuotaLimits(requests_per_minute=6_000), QuotaLimits(tokens_per_minute=6_000)]
)
def test_what_a_cooldown_has_voided_is_not_given_back_again(
    server: VirtualRedis, limits: QuotaLimits
) -> None:
    """Starts returned by a process that has not heard of the cooldown: no burst follows it."""
    scripts = Scripts(server, Quota(name="q", limits=limits))
    scripts.ask("a", [1] * 40)
    old = scripts.epoch
    scripts.ask("b", [], refused=True, retry_after=1.0)
    new, scripts.epoch = scripts.epoch, old
    scripts.ask("a", [], unused=30, reusable=30, reusable_input=30)
    scripts.epoch = new
    server.now += 0.9
    starts = scripts.ask("a", [1] * 14).starts_us
    assert min(later - sooner for sooner, later in pairwise(starts)) > 5_000


def test_time_in_which_nobody_waits_does_not_raise_the_rate(server: VirtualRedis) -> None:
    """Ten minutes of little load raise nothing, and a rate that was found is approached anew."""
    scripts = Scripts(server, Quota(name="q"))
    scripts.ask("a", [1] * 20)
    scripts.ask("a", [], successes=8)
    scripts.ask("a", [], refused=True, retry_after=1.0)
    found = load(scripts, 60)[-1]
    for _ in range(600):
        server.now += 1.0
        scripts.ask("a", [1])
    assert allowed(scripts) <= found
    assert load(scripts, 2)[-1] < 0.85 * found


def test_slots_are_shared_among_those_who_wait(server: VirtualRedis) -> None:
    """Concurrency is one number for the fleet: no process takes another's share, none is lost."""
    limits = QuotaLimits(max_concurrency=6, requests_per_minute=60_000)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    assert len(scripts.ask("a", [1] * 9).starts_us) == 6
    server.now += 0.01
    assert scripts.ask("b", [1] * 9).starts_us == ()
    server.now += 0.01
    assert scripts.ask("a", [1] * 3, in_flight=3, successes=3).starts_us == ()  # it has its share
    assert len(scripts.ask("b", [1] * 9).starts_us) == 3
    scripts.ask("a", [], in_flight=0, successes=3)
    assert len(scripts.ask("b", [1] * 6, in_flight=3).starts_us) == 3


def test_an_unknown_protocol_is_refused_by_its_number(server: VirtualRedis) -> None:
    """A script does not guess what the numbers of another version mean."""
    scripts = Scripts(server, Quota(name="q"))
    arguments = acquire_arguments("a", AcquireRequest(sequence=1, wanted=1))
    with pytest.raises(redis.ResponseError, match="protocol 2, not 7"):
        server.call(ACQUIRE, scripts.keys, [7, *arguments[1:]])
