"""The scripts on a real Valkey against a Python model of them, step by step, in virtual time."""

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
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from batchllm_celery.keys import Keys
from batchllm_celery.limiter import Estimate
from batchllm_celery.limiter.limiter import script_fields
from batchllm_celery.limiter.wire import Reply, pack_question
from batchllm_celery.models import CooldownPolicy, Quota, QuotaLimits
from batchllm_celery.simulation.quotas import Bucket
from tests.integration.limiter_model import Answer, Model
from tests.integration.virtual_redis import VirtualRedis
from tests.support import ValkeyServer

PROCESSES = ("a", "b", "c")


class Scripts:
    """Questions of several processes to one quota, in virtual time."""

    def __init__(self, server: VirtualRedis, quota: Quota) -> None:
        self.server = server
        keys = Keys(f"t{uuid.uuid4().hex[:8]}").quota(quota.name)
        self.keys = [keys.state, keys.procs, keys.waiting, keys.channel]
        self.sequence = 0
        self.generation = 0
        self.full_speed = False
        self.configure(quota)

    def configure(self, quota: Quota) -> None:
        self.server.call(
            "configure.lua",
            [self.keys[0], self.keys[3]],
            [quota.model_dump_json(), 1, *script_fields(quota)],
        )

    def state(self) -> list[bytes]:
        return list(self.server.call("state.lua", [self.keys[0], self.keys[2]], []))

    def ask(self, process: str, wants: list[int], **told: Any) -> Reply:
        """The named values default to nothing having happened."""
        retry_after = told.get("retry_after")
        numbers = [
            told.get("sequence") or self._next(),
            told.get("held", 0),
            told.get("in_flight", 0),
            len(wants),
            0,
            told.get("generation", self.generation),
            told.get("successes", 0),
            0,
            told.get("unused", 0),
            told.get("reusable", 0),
            told.get("reusable_tokens", 0),
            0,
            told.get("tokens_owed", 0),
            0,
            told.get("idle", 0),
            0,
            self.generation if told.get("refused") else -1,
            -1 if retry_after is None else round(retry_after * 1e6),
            told.get("overloads", 0),
            round(told["day_exhausted"] * 1e6) if "day_exhausted" in told else -1,
            told.get("probe_ended", 0),
            0,
            0,
        ]
        estimates = [Estimate(tokens, 0) for tokens in wants if not told.get("unaware")]
        arguments = [*pack_question(process, numbers, estimates), int(self.full_speed)]
        reply = Reply.parse(self.server.call("acquire.lua", self.keys, arguments))
        self.generation = reply.generation
        return reply

    def _next(self) -> int:
        self.sequence += 1
        return self.sequence


def microseconds(reply: Reply) -> list[int]:
    return [round(delay * 1e6) for delay in reply.starts_in]


class ScriptsAgainstModel(RuleBasedStateMachine):
    """Every answer of the script equals the model's, whatever came before."""

    server: VirtualRedis

    @initialize(
        requests=st.sampled_from([0, 2, 10, 300]),
        tokens=st.sampled_from([0, 100, 5_000]),
        per_day=st.sampled_from([0, 12]),
        ramp=st.sampled_from([(), (0.5, 0.4, 0.2)]),
    )
    def configure(self, requests: int, tokens: int, per_day: int, ramp: tuple[float, ...]) -> None:
        limits = QuotaLimits(
            requests_per_minute=requests * 60 or None,
            tokens_per_minute=tokens * 60 or None,
            requests_per_day=per_day or None,
        )
        policy = CooldownPolicy(kind="slow_start", cooldowns=(1.0, 2.0, 5.0), ramp=ramp)
        self.model = Model(requests, tokens, per_day, ramp=ramp)
        self.scripts = Scripts(self.server, Quota(name="q", limits=limits, policy=policy))
        self.granted = 0
        self.scripts.ask("a", [])
        self.model.ask("a", self.server.now * 1e6, [])

    def both(self, process: str, wants: list[int], **told: Any) -> tuple[Reply, Answer]:
        before = self.scripts.generation
        reply = self.scripts.ask(process, wants, **told)
        answer = self.model.ask(process, round(self.server.now * 1e6), wants, **told)
        assert microseconds(reply) == pytest.approx(answer.starts, abs=2)
        assert reply.consecutive == answer.consecutive
        assert (reply.generation > before) == answer.generation_grew
        assert bool(reply.exhausted_until) == answer.exhausted
        self.granted += len(reply.starts_in)
        return reply, answer

    @rule(
        process=st.sampled_from(PROCESSES),
        wants=st.lists(st.integers(1, 400), max_size=12),
        held=st.integers(0, 3),
    )
    def ask(self, process: str, wants: list[int], held: int) -> None:
        self.both(process, wants, held=held)

    @rule(
        process=st.sampled_from(PROCESSES),
        owed=st.integers(-500, 500),
        idle=st.sampled_from([0, -40, -4_000]),
    )
    def settle(self, process: str, owed: int, idle: int) -> None:
        self.both(process, [], successes=1, tokens_owed=owed, idle=idle)

    @precondition(lambda self: self.granted > 2)
    @rule(
        process=st.sampled_from(PROCESSES),
        unused=st.integers(1, 2),
        late=st.integers(0, 2),
        tokens=st.integers(0, 400),
    )
    def give_back(self, process: str, unused: int, late: int, tokens: int) -> None:
        self.granted -= unused
        ahead = max(unused - late, 0)
        self.both(
            process,
            [],
            unused=unused,
            reusable=ahead,
            reusable_tokens=ahead * tokens,
            idle=(ahead - unused) * tokens,
        )

    @rule(
        process=st.sampled_from(PROCESSES),
        retry_after=st.one_of(st.none(), st.floats(0, 20).map(lambda s: round(s, 3))),
    )
    def refuse(self, process: str, retry_after: float | None) -> None:
        if self.model.consecutive < 4:  # the fifth opens the breaker, which the model leaves out
            self.both(process, [], refused=True, retry_after=retry_after)

    @rule(seconds=st.sampled_from([0.0001, 0.05, 0.4, 1.0, 2.9]))
    def time_passes(self, seconds: float) -> None:
        self.server.now = round(self.server.now + seconds, 6)
        # Waiting processes are heard of at least every 0.9 s: no lease ends here.
        for process in PROCESSES:
            wants = [1] if process in self.model.waiting else []
            self.both(process, wants)

    @rule()
    def clock_goes_back(self) -> None:
        """A server whose clock was set back answers as if no time had passed."""
        self.server.now -= 1.0
        reply = self.scripts.ask("a", [])
        self.server.now += 1.0
        assert reply.now <= round(self.server.now * 1e6)
        self.model.ask("a", round(self.server.now * 1e6), [])

    @invariant()
    def keys_expire(self) -> None:
        if hasattr(self, "scripts"):
            client = self.server.client
            for key in self.scripts.keys[:3]:
                assert not client.exists(key) or client.ttl(key) > 0


def test_the_scripts_do_what_the_model_says(valkey: ValkeyServer) -> None:
    """Random histories of three processes: starts, cooldowns and the day agree."""
    ScriptsAgainstModel.server = VirtualRedis(valkey.url)
    ScriptsAgainstModel.TestCase.settings = settings(
        max_examples=60,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    ScriptsAgainstModel.TestCase("runTest").runTest()


@pytest.fixture
def server(valkey: ValkeyServer) -> Iterator[VirtualRedis]:
    virtual = VirtualRedis(valkey.url)
    yield virtual
    virtual.client.close()


def test_the_same_question_twice_gets_the_same_answer(server: VirtualRedis) -> None:
    """A retried question spends nothing."""
    limits = QuotaLimits(requests_per_minute=600, requests_per_day=10)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    first = scripts.ask("a", [1, 1, 1], sequence=7)
    server.now += 1
    assert scripts.ask("a", [1, 1, 1], sequence=7) == first
    assert len(scripts.ask("a", [1] * 10, sequence=8).starts_in) <= 7


def pass_while_heard(scripts: Scripts, seconds: float) -> None:
    """Time passes, in which a process that wants nothing is heard of every second."""
    end = scripts.server.now + seconds
    while scripts.server.now < end:
        scripts.server.now = min(scripts.server.now + 1.0, end)
        scripts.ask("bystander", [])


def test_calls_of_a_dead_process_free_their_slots(server: VirtualRedis) -> None:
    """After ten seconds of silence a process has no calls in flight."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(max_concurrency=3)))
    assert len(scripts.ask("dead", [1, 1, 1]).starts_in) == 3
    pass_while_heard(scripts, 9.5)
    assert scripts.ask("alive", [1]).starts_in == ()
    pass_while_heard(scripts, 2.0)
    assert len(scripts.ask("alive", [1]).starts_in) == 1


@pytest.mark.parametrize("away", [13.0, 3600.0])
def test_calls_in_flight_count_while_redis_was_away(server: VirtualRedis, away: float) -> None:
    """Silence of everybody is no death: whoever speaks first does not get the others' slots."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(max_concurrency=3)))
    assert len(scripts.ask("busy", [1, 1, 1]).starts_in) == 3
    server.now += away
    assert scripts.ask("first", [1, 1, 1]).starts_in == ()
    server.now += 1.0
    scripts.ask("busy", [], in_flight=3)
    pass_while_heard(scripts, 9.0)
    assert scripts.ask("first", [1, 1, 1]).starts_in == ()


@pytest.mark.parametrize("known", [True, False])
def test_a_clock_that_was_ahead_for_a_while_is_not_waited_for(
    server: VirtualRedis, known: bool
) -> None:
    """Redis' clock jumps ahead by an hour and is set back: the fleet goes on within seconds."""
    limits = (
        QuotaLimits(requests_per_minute=600, requests_per_day=1_000) if known else QuotaLimits()
    )
    scripts = Scripts(server, Quota(name="q", limits=limits, horizon_seconds=2.0))
    assert scripts.ask("a", [1] * 5).starts_in
    server.now += 3600
    scripts.ask("a", [], in_flight=5, refused=True, retry_after=30)
    ahead = scripts.ask("b", [1] * 5)
    assert ahead.starts_in == ()
    server.now -= 3599
    back = scripts.ask("a", [1] * 5, in_flight=5)
    assert back.generation > ahead.generation  # tickets dated by the wrong clock are void
    assert back.starts_in == ()
    assert back.cooldown <= 30
    server.now += 30.5
    given = scripts.ask("a", [1] * 5, in_flight=5)
    assert len(given.starts_in) >= 1
    assert max(given.starts_in) < 1


def test_a_days_end_told_by_a_clock_that_was_ahead_is_set_back_too(server: VirtualRedis) -> None:
    """Exhausted for an hour on a clock that is a month ahead: not for a month and an hour."""
    scripts = Scripts(server, Quota(name="q"))
    scripts.ask("a", [1])
    server.now += 30 * 86_400
    assert scripts.ask("a", [1], in_flight=1, day_exhausted=3600.0).exhausted_until
    server.now -= 30 * 86_400 - 60
    assert scripts.ask("a", [1]).exhausted_until <= (server.now + 3600) * 1e6
    server.now += 3600
    assert len(scripts.ask("a", [1]).starts_in) == 1


def test_nothing_starts_for_a_while_after_redis_restarted(server: VirtualRedis) -> None:
    """Another run id: a new generation, and no start before horizon + 1 s."""
    limits = QuotaLimits(requests_per_minute=600)
    scripts = Scripts(server, Quota(name="q", limits=limits, horizon_seconds=2.0))
    before = scripts.ask("a", [1, 1])
    server.now, server.run_id = server.now + 0.5, "second"
    after = scripts.ask("a", [1])
    assert after.generation > before.generation
    assert after.starts_in == ()
    assert after.cooldown == pytest.approx(3.0)
    server.now += 3.0
    assert len(scripts.ask("a", [1]).starts_in) == 1


@pytest.mark.parametrize("size", [100, 200, 400])
def test_first_guesses_never_empty_the_providers_second(server: VirtualRedis, size: int) -> None:
    """What a provider's bucket of a second did not take, it does not hold on top of its second."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    bucket = Bucket(60_000, 1.0, server.now)
    scripts.ask("a", [900] * 2)
    bucket.charge(100, server.now)
    server.now += 0.9
    bucket.charge(100, server.now)
    scripts.ask("a", [], idle=-1600)
    wants = [size] * (800 // size) + [890, 890]
    while wants:
        for delay, tokens in zip(scripts.ask("a", wants).starts_in, list(wants), strict=False):
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
        for delay in scripts.ask("a", [980] * left).starts_in:
            assert bucket.wait(980, server.now + delay) == 0
            bucket.charge(980, server.now + delay)
            left -= 1


def test_a_first_guess_of_minutes_holds_nobody_up_for_minutes(server: VirtualRedis) -> None:
    """Of 100,000 reserved tokens all that were not used come back, but for a second's worth.

    While they held the fleet up, the provider's bucket was full and took in no more.
    """
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    assert scripts.ask("a", [100_000]).starts_in
    server.now += 0.5
    assert not scripts.ask("a", [100]).starts_in
    scripts.ask("a", [], idle=-99_950)
    server.now += 0.9
    assert not scripts.ask("a", [100]).starts_in
    server.now += 0.2
    assert scripts.ask("a", [100]).starts_in


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
        for delay in scripts.ask("a", [600] * 4, tokens_owed=owed).starts_in:
            more = draw.choice([-500, 500])
            ends.append((server.now + delay + 0.5, more))
            used += 600 + more
        server.now += 0.05
    assert used / (server.now - begun) / 1000 > 0.96


def test_a_large_request_starts_beside_small_ones_that_use_less(server: VirtualRedis) -> None:
    """What small ones of another process give back is not theirs alone."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    for _ in range(40):
        scripts.ask("small", [50] * 8, tokens_owed=-20)
        server.now += 0.05
    waited = 0.0
    while not scripts.ask("large", [900]).starts_in:
        scripts.ask("small", [50] * 8, tokens_owed=-20)
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
    tickets: dict[str, list[float]] = {name: [] for _, name in asks}
    while asks[0][0] < begun + 240:
        server.now, name = heapq.heappop(asks)
        held = sum(start > server.now for start in tickets[name])
        reply = scripts.ask(name, [draw.randint(*tokens) for _ in range(8)], held=held)
        tickets[name] += [server.now + delay for delay in reply.starts_in]
        away = distance if name == "p0" else 0.001 + draw.expovariate(1 / 0.003)
        heapq.heappush(asks, (server.now + reply.again_in + away, name))
    far, *near = (len(starts) for starts in tickets.values())
    assert 0.45 <= far / (far + sum(near) / len(near)) <= 0.55


def test_who_is_not_next_does_not_ask_at_the_moment_there_is_room(server: VirtualRedis) -> None:
    """Everybody would; the first in line is served without waiting."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    assert len(scripts.ask("first", [260] * 4).starts_in) == 2
    server.now += 0.26
    other = scripts.ask("other", [100])
    assert not other.starts_in
    assert other.again_in == pytest.approx(0.05)
    assert scripts.ask("first", [260] * 2).starts_in


def test_a_raised_quota_is_used_at_once(server: VirtualRedis) -> None:
    """What a large request owed at the old rate is paid at the new one."""
    low, high = (Quota(name="q", limits=QuotaLimits(tokens_per_minute=n)) for n in (6_000, 600_000))
    scripts = Scripts(server, low)
    assert scripts.ask("a", [6_000]).starts_in
    server.now += 1
    assert not scripts.ask("a", [100]).starts_in
    scripts.configure(high)
    server.now += 0.6
    assert scripts.ask("a", [100]).starts_in


def test_the_first_answer_after_tokens_were_limited_gives_no_start(server: VirtualRedis) -> None:
    """Who asks without estimates would get as many as it wants."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(requests_per_minute=600)))
    scripts.ask("a", [1], unaware=True)
    scripts.configure(Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    server.now += 1
    reply = scripts.ask("a", [1000] * 50, unaware=True)
    assert (reply.starts_in, reply.by_tokens, reply.again_in) == ((), True, 0.001)
    assert len(scripts.ask("a", [1000] * 50).starts_in) == 1


def test_a_changed_quota_is_tried_again_on_the_day_that_was_over(server: VirtualRedis) -> None:
    """Who raised it, or has paid, does not wait for the old one's reset."""
    scripts = Scripts(server, Quota(name="q"))
    assert scripts.ask("a", [1], day_exhausted=3600.0).exhausted_until
    scripts.configure(Quota(name="q", limits=QuotaLimits(requests_per_minute=600)))
    server.now += 1
    assert scripts.ask("a", [1]).starts_in


def test_what_one_has_no_use_for_goes_to_the_next_at_once(server: VirtualRedis) -> None:
    """The first in line hears of a free slot, has its share already, and tells the one behind."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(max_concurrency=2)))
    assert scripts.ask("ends", [1]).starts_in
    assert scripts.ask("first", [1]).starts_in
    server.now += 0.01
    assert not scripts.ask("first", [1], in_flight=1).starts_in
    server.now += 0.01
    assert not scripts.ask("second", [1]).starts_in
    with server.client.pubsub(ignore_subscribe_messages=True) as channel:
        channel.subscribe(scripts.keys[3])
        channel.get_message(timeout=5)
        scripts.ask("ends", [])
        assert channel.get_message(timeout=5)["data"] == b"f:first"
        server.now += 0.01
        assert not scripts.ask("first", [1], in_flight=1).starts_in
        assert channel.get_message(timeout=5)["data"] == b"f:second"
        assert scripts.ask("second", [1]).starts_in


def test_a_question_repeated_after_its_process_was_given_up_counts_once(
    server: VirtualRedis,
) -> None:
    """Redis answered, the answer was lost, and the link was away for longer than the lease."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(tokens_per_minute=60_000)))
    scripts.ask("a", [10])
    first = scripts.ask("a", [], tokens_owed=30_000, in_flight=1, sequence=7)
    pass_while_heard(scripts, 12.0)
    owed = numbers_of(scripts)["tat_t"]
    assert scripts.ask("a", [], tokens_owed=30_000, in_flight=1, sequence=7) == first
    assert numbers_of(scripts)["tat_t"] == owed


def test_a_redis_that_lost_the_last_cooldown_is_noticed(server: VirtualRedis) -> None:
    """A copy that was behind took over: whoever knows more says so, and all begins anew, once."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(requests_per_minute=600)))
    scripts.ask("a", [1])
    scripts.ask("b", [])
    before = server.client.hget(scripts.keys[0], "live")
    assert isinstance(before, bytes)
    server.now += 1
    known = scripts.ask("a", [], refused=True, retry_after=1.0).generation
    server.client.hset(scripts.keys[0], "live", before)
    server.now += 0.001
    noticed = scripts.ask("a", [1])
    assert noticed.generation > known
    assert noticed.starts_in == ()
    server.now += 3.1
    again = scripts.ask("a", [1])
    assert again.generation == noticed.generation
    assert again.starts_in


def test_a_newer_version_may_add_to_the_state_of_a_quota(server: VirtualRedis) -> None:
    """What it appends is not read: both versions share a quota while workers are replaced."""
    limits = QuotaLimits(tokens_per_minute=60_000)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    scripts.ask("a", [900])
    live = server.client.hget(scripts.keys[0], "live")
    assert isinstance(live, bytes)
    server.client.hset(scripts.keys[0], "live", live + struct.pack("<d", 7.0))
    server.now += 0.5
    [start] = scripts.ask("a", [900, 900]).starts_in
    assert start == pytest.approx(0.9 / 0.995 - 0.5, abs=0.001)
    server.client.hset(scripts.keys[0], "live", live + struct.pack("<d", 7.0))
    scripts.state()
    scripts.configure(Quota(name="q", limits=QuotaLimits(tokens_per_minute=70_000)))


def test_a_quota_that_redis_lost_starts_carefully(server: VirtualRedis) -> None:
    """A process that knows a vanished quota makes the fleet wait; a new process does not."""
    scripts = Scripts(server, Quota(name="q"))
    known = scripts.ask("a", [1]).generation
    server.client.delete(*scripts.keys[:3])
    server.now += 0.1
    reply = scripts.ask("a", [1], generation=known)
    assert reply.generation > known
    assert reply.starts_in == ()


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
    assert len(probe.starts_in) == 1
    assert scripts.ask("b", [1]).starts_in == ()
    pass_while_heard(scripts, 11)
    assert len(scripts.ask("b", [1]).starts_in) == 1
    scripts.ask("b", [], in_flight=1, successes=1, probe_ended=1)
    assert len(scripts.ask("b", [1, 1, 1]).starts_in) == 3


def test_overloads_open_no_cooldown_but_the_breaker(server: VirtualRedis) -> None:
    """503s: the generation stays, and after five in a row calls go one at a time."""
    limits = QuotaLimits(requests_per_minute=6_000)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    before = scripts.ask("a", [1] * 6)
    reply = scripts.ask("a", [], overloads=5)
    assert reply.generation == before.generation
    assert reply.cooldown == 0
    server.now += 2
    assert len(scripts.ask("a", [1] * 6, in_flight=1).starts_in) == 1


def test_nobody_overtakes_the_last_step_of_a_slow_start(server: VirtualRedis) -> None:
    """What is asked for together with it starts after it."""
    policy = CooldownPolicy(kind="slow_start", cooldowns=(1.0,), ramp=(0.5, 0.4, 0.2))
    scripts = Scripts(server, Quota(name="q", policy=policy))
    scripts.ask("a", [1])
    scripts.ask("a", [], refused=True)
    server.now += 1.0
    scripts.ask("a", [1])
    server.now += 0.4
    starts = scripts.ask("a", [1, 1, 1]).starts_in
    assert sorted(starts) == list(starts)
    assert starts[1] == starts[2] == pytest.approx(0.2, abs=1e-5)


def test_a_late_refusal_opens_no_second_cooldown(server: VirtualRedis) -> None:
    """A 429 of an older generation changes nothing."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits(requests_per_minute=6_000)))
    scripts.ask("a", [1])
    old = scripts.generation
    first = scripts.ask("a", [], refused=True, retry_after=3.0)
    scripts.generation = old
    late = scripts.ask("b", [], refused=True, retry_after=30.0)
    assert late.generation == first.generation
    assert late.consecutive == 1
    assert late.cooldown <= 3.0


def numbers_of(scripts: Scripts) -> dict[str, float]:
    """What `status` would read."""
    _, _, _, *flat = scripts.server.call("state.lua", [scripts.keys[0], scripts.keys[2]], [])
    return {k.decode(): float(v) for k, v in zip(flat[::2], flat[1::2], strict=True)}


@pytest.mark.parametrize("rate", [10.0, None])
def test_after_a_cut_the_rate_follows_the_curve(server: VirtualRedis, rate: float | None) -> None:
    """Down to 3/4 (known) and up again along the cubic, over time in which somebody waits."""
    limits = QuotaLimits(requests_per_minute=rate and rate * 60)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    scripts.ask("a", [1] * 20)
    scripts.ask("a", [], successes=8)
    grown = numbers_of(scripts)["rate"]
    scripts.ask("a", [], refused=True, retry_after=1.0)
    ceiling = numbers_of(scripts)["ceiling"]
    assert ceiling == pytest.approx(1.0 if rate else grown * 0.6, rel=0.01)
    k = (0.25 / 1e-5) ** (1 / 3)
    for step in range(1, 240):
        server.now += 0.25
        scripts.ask("a", [1] * 10)
        seen = numbers_of(scripts)
        curve = ceiling * max(0.75, 1 + 1e-5 * (seen["active"] - k) ** 3)
        assert seen["pace"] == pytest.approx(min(curve, 1.0) if rate else curve)
        assert step * 0.25 - 3 <= seen["active"] <= max(step * 0.25 - 1, 0)


def test_refusals_before_any_success_do_not_end_the_search(server: VirtualRedis) -> None:
    """They say that the quota is used up, not how large it is: somebody else may have used it."""
    scripts = Scripts(server, Quota(name="q"))
    scripts.ask("a", [1] * 3)
    for _ in range(3):
        scripts.ask("a", [], refused=True, retry_after=20.0)
    seen = numbers_of(scripts)
    assert (seen["ceiling"], seen["rate"]) == (0, 5.0)  # one cut for all three
    server.now += 21
    for _ in range(6):
        scripts.ask("a", [1] * 9, successes=4)
        server.now += 0.5
    assert numbers_of(scripts)["rate"] >= 8.0


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
        assert len(given.starts_in) == 50
        assert max(given.starts_in) < 0.001
        server.now += 1.0
    scripts.ask("a", [], refused=True, retry_after=1.0)
    assert 20 <= numbers_of(scripts)["ceiling"] <= 50
    server.now += 1.1
    starts = [delay for _ in range(3) for delay in scripts.ask("a", [1] * 200).starts_in]
    assert len(starts) < 60  # of the 200, in the half second ahead


def test_full_speed_that_is_refused_at_once_starts_as_any_quota_does(server: VirtualRedis) -> None:
    """Before any success there is nothing to go by."""
    scripts = Scripts(server, Quota(name="q", limits=QuotaLimits.unlimited()))
    assert len(scripts.ask("a", [1] * 50).starts_in) == 50
    scripts.ask("a", [], refused=True, retry_after=1.0)
    seen = numbers_of(scripts)
    assert (seen["ceiling"], seen["rate"]) == (0, 5.0)


def test_a_known_rate_beside_unlimited_tokens_limits(server: VirtualRedis) -> None:
    """Unlimited is said of one dimension, not of the others."""
    limits = QuotaLimits(requests_per_minute=60, tokens_per_minute=math.inf)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    scripts.full_speed = True
    assert len(scripts.ask("a", [1] * 50).starts_in) <= 2


def test_a_quota_set_to_unlimited_is_so_at_once(server: VirtualRedis) -> None:
    """And back again: what the search had found, or its absence, is not kept."""
    scripts = Scripts(server, Quota(name="q"))
    assert len(scripts.ask("a", [1] * 50).starts_in) < 10
    scripts.configure(Quota(name="q", limits=QuotaLimits.unlimited()))
    assert len(scripts.ask("a", [1] * 50).starts_in) == 50
    scripts.configure(Quota(name="q", limits=QuotaLimits(requests_per_minute=600)))
    scripts.configure(Quota(name="q"))
    server.now += 10
    assert len(scripts.ask("a", [1] * 50).starts_in) < 10


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
    assert numbers_of(scripts)["ceiling"] == pytest.approx(100 / 60, rel=0.1)


@pytest.mark.parametrize(
    "limits", [QuotaLimits(requests_per_minute=6_000), QuotaLimits(tokens_per_minute=6_000)]
)
def test_what_a_cooldown_has_voided_is_not_given_back_again(
    server: VirtualRedis, limits: QuotaLimits
) -> None:
    """Tickets returned by a process that has not heard of the cooldown: no burst follows it."""
    scripts = Scripts(server, Quota(name="q", limits=limits))
    scripts.ask("a", [1] * 40)
    old = scripts.generation
    scripts.ask("b", [], refused=True, retry_after=1.0)
    new, scripts.generation = scripts.generation, old
    scripts.ask("a", [], unused=30, reusable=30, reusable_tokens=30)
    scripts.generation = new
    server.now += 0.9
    starts = microseconds(scripts.ask("a", [1] * 14))
    assert min(later - sooner for sooner, later in pairwise(starts)) > 5_000


def test_time_in_which_nobody_waits_does_not_raise_the_rate(server: VirtualRedis) -> None:
    """Ten minutes of little load raise nothing, and a rate that was found is approached anew."""
    scripts = Scripts(server, Quota(name="q"))
    scripts.ask("a", [1] * 20)
    scripts.ask("a", [], successes=8)
    scripts.ask("a", [], refused=True, retry_after=1.0)
    for _ in range(240):
        server.now += 0.25
        scripts.ask("a", [1] * 10)
    found = numbers_of(scripts)["pace"]
    for _ in range(600):
        server.now += 1.0
        scripts.ask("a", [1])
    assert numbers_of(scripts)["pace"] <= found
    for _ in range(8):
        server.now += 0.25
        scripts.ask("a", [1] * 10)
    seen = numbers_of(scripts)
    assert seen["pace"] == pytest.approx(0.75 * seen["ceiling"], rel=0.05)


def test_slots_are_shared_among_those_who_wait(server: VirtualRedis) -> None:
    """Concurrency is one number for the fleet: no process takes another's share, none is lost."""
    limits = QuotaLimits(max_concurrency=6, requests_per_minute=60_000)
    scripts = Scripts(server, Quota(name="q", limits=limits))
    assert len(scripts.ask("a", [1] * 9).starts_in) == 6
    server.now += 0.01
    assert scripts.ask("b", [1] * 9).starts_in == ()
    server.now += 0.01
    assert scripts.ask("a", [1] * 3, in_flight=3, successes=3).starts_in == ()  # it has its share
    assert len(scripts.ask("b", [1] * 9).starts_in) == 3
    scripts.ask("a", [], in_flight=0, successes=3)
    assert len(scripts.ask("b", [1] * 6, in_flight=3).starts_in) == 3
