"""A provider without a quota: room for so many calls, or a speed that falls with their number.

Fleets of real limiters in virtual time, and single histories of the script.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

from batchllm_celery.limiter.protocol import EndedCalls
from batchllm_celery.limiter.quota_state import Congestion
from batchllm_celery.models import Quota, QuotaLimits
from batchllm_celery.simulation.config import SimulationConfig
from tests.integration.test_limiter_model import Scripts
from tests.integration.virtual_fleet import Load, run
from tests.integration.virtual_redis import VirtualRedis
from tests.support import ValkeyServer

UNLIMITED = Quota(name="q", limits=QuotaLimits.unlimited())
ADAPTIVE = UNLIMITED.model_copy(update={"adaptive_concurrency": True})


@pytest.fixture
def server(valkey: ValkeyServer) -> Iterator[VirtualRedis]:
    virtual = VirtualRedis(valkey.url)
    yield virtual
    virtual.client.close()


# -- fleets


@pytest.mark.parametrize("quota", [UNLIMITED, ADAPTIVE], ids=["refusals", "adaptive"])
def test_room_that_changes_is_found_and_used(server: VirtualRedis, quota: Quota) -> None:
    """Beyond 10, 24, then 4 in flight it refuses: 90 % of it used from 60 s on, few refused."""
    provider = SimulationConfig(refuse_beyond=10, latency=0.5)
    changes: list[tuple[float, dict[str, Any]]] = [
        (50.0, {"refuse_beyond": 24}),
        (125.0, {"refuse_beyond": 4}),
    ]
    seen = run(server, provider, quota, 215, changes=changes, processes=3, slots=12)
    for room, since, until in ((10, 35, 50), (24, 110, 125), (4, 185, 215)):
        assert seen.rate(since, until) >= 0.9 * room / 0.5
        assert seen.refused_share(since, until) <= 0.05
    assert seen.worst_row <= 10  # of the 20 that cost no attempt


def test_rows_far_beyond_the_room_are_all_answered(server: VirtualRedis) -> None:
    """300 rows at once before a server that takes 4: none sees more than a few refusals."""
    provider = SimulationConfig(refuse_beyond=4, latency=0.2)
    seen = run(server, provider, UNLIMITED, 120, loads=[Load(rows=300)], processes=1, slots=64)
    assert len(seen.served) == 300
    assert seen.worst_row <= 6
    assert max(one[0] for one in seen.served) <= 1.5 * 300 / 4 * 0.2


def test_a_few_overloads_whatever_the_load_are_no_reason_to_slow_down(
    server: VirtualRedis,
) -> None:
    """3 % of 529s, always: all slots stay busy."""
    provider = SimulationConfig(
        latency=1.0, burst_every=10.0, burst_seconds=10.0, burst_share=0.03, overload_status=529
    )
    seen = run(server, provider, UNLIMITED, 100, processes=2, slots=50)
    assert seen.rate(20, 100) >= 0.9 * 100


def test_room_is_used_again_after_bursts_of_overload(server: VirtualRedis) -> None:
    """Half is refused for 20 of 60 s: between the bursts nine tenths are served again."""
    provider = SimulationConfig(latency=0.5, burst_every=60.0, burst_seconds=20.0)
    seen = run(server, provider, UNLIMITED, 160, processes=2, slots=20)
    assert seen.rate(85, 100) >= 0.9 * 40 / 0.5
    assert seen.rate(145, 160) >= 0.9 * 40 / 0.5


def mixed_prompts(draw: random.Random) -> int:
    """100 to 10,000 tokens, as many short as long."""
    return round(4 * 10 ** draw.uniform(2, 4))


@pytest.mark.parametrize("mixed", [False, True], ids=["alike", "mixed"])
def test_a_server_that_slows_down_is_used_at_its_best(server: VirtualRedis, mixed: bool) -> None:
    """8 calls decode together, the others would queue: found by throughput, without a refusal."""
    load = Load(prompt=mixed_prompts) if mixed else Load()
    provider = SimulationConfig(
        decode_slots=8,
        output_tokens=100,
        output_tail=0.8,
        input_seconds=0.1 if mixed else 0.0,
        decode_slowdown=0.05,
    )
    limits = QuotaLimits.unlimited().model_copy(update={"max_concurrency": 8})
    best = run(
        server, provider, Quota(name="q", limits=limits), 400, loads=[load], processes=2, slots=20
    )
    seen = run(server, provider, ADAPTIVE, 400, loads=[load], processes=2, slots=20)
    assert seen.rate(150, 500, tokens=True) >= 0.95 * best.rate(150, 500, tokens=True)
    assert seen.latency(150, 500) <= 1.3 * best.latency(150, 500)


# -- histories of the script, each of which breaks a simpler rule


class Room(Scripts):
    """One process before a quota; `room` is what the fleet may have in flight."""

    def __init__(self, server: VirtualRedis, quota: Quota = UNLIMITED) -> None:
        super().__init__(server, quota)
        self.ask("a", [])

    @property
    def room(self) -> float:
        found = self.state().room
        return math.inf if found is None else found

    def end(self, in_flight: int, *ended: EndedCalls) -> None:
        """Calls end; so many others are in flight."""
        overloads = sum(one.overloads for one in ended)
        successes = sum(one.successes for one in ended)
        self.ask(
            "a",
            [],
            in_flight=in_flight,
            overloads=overloads,
            successes=successes,
            ended=list(ended),
        )

    def succeed(self, in_flight: int, calls: int, seconds: float = 1.0) -> None:
        """Calls of the present version, each of 100 tokens."""
        sums = EndedCalls(self.version, calls, 0, calls * seconds, calls * 100.0)
        sums.squares = calls * seconds**2 / 100
        self.end(in_flight, sums)

    def overload(self, in_flight: int, calls: int = 1, version: int | None = None) -> None:
        version = self.version if version is None else version
        self.end(in_flight, EndedCalls(version, overloads=calls))


def test_a_quota_without_overloads_has_no_limit_of_this_kind(server: VirtualRedis) -> None:
    """Nothing is kept and nothing is reported: it pays nothing."""
    room = Room(server)
    room.ask("a", [1] * 5, successes=3)
    assert room.version == -1
    assert not server.client.hexists(room.keys[0], "congestion")


def test_a_burst_cuts_once_to_what_is_in_flight_beside_it(server: VirtualRedis) -> None:
    """Of 64 at once 20 are refused: the other 44 have their room, however the refusals arrive."""
    room = Room(server)
    version = room.version
    room.overload(59, 5)
    for in_flight in (54, 49, 44):
        room.overload(in_flight, 5, version)
    assert room.room == pytest.approx(44.8, abs=1)


def test_a_refusal_of_before_the_cut_is_no_news(server: VirtualRedis) -> None:
    """The limit stays up, and the breaker closed, though dozens of them come in late."""
    room = Room(server)
    room.succeed(56, 4)
    version = room.version
    room.overload(50, 6)
    before = room.room
    room.succeed(44, 6)
    for _ in range(40):
        room.overload(44, 1, version)
    assert room.room >= before - 7
    assert not room.state().probing


def test_at_one_call_in_flight_the_limit_comes_back(server: VirtualRedis) -> None:
    """Every success is a round then: a refusal right after the cut must not hold it down."""
    room = Room(server)
    room.succeed(3, 1)
    for _ in range(12):
        room.overload(0, 3)
    assert room.room == 1
    for _ in range(60):
        server.now += 0.2
        room.succeed(int(room.room) - 1, 1)
    assert room.room >= 4


def test_the_breaker_counts_overloads_without_a_recent_success_only(server: VirtualRedis) -> None:
    """Dozens beside successes open nothing; an outage opens it after ten seconds."""
    room = Room(server)
    room.succeed(4, 2)
    for _ in range(9):
        server.now += 1.0
        room.overload(2, 3)
    assert not room.state().probing
    assert room.ask("a", [], overloads=1).beside_successes
    for _ in range(8):
        server.now += 2.0
        room.overload(0, 3)
    assert room.state().probing
    assert not room.ask("a", [], overloads=1).beside_successes


def test_slow_calls_are_given_time_to_succeed(server: VirtualRedis) -> None:
    """Calls of a minute: half a minute without a success is no outage."""
    room = Room(server)
    room.succeed(4, 40, seconds=60.0)
    room.overload(4)
    room.succeed(4, 40, seconds=60.0)
    for _ in range(20):
        server.now += 3.0
        room.overload(4, 3)
    assert not room.state().probing


def test_the_breakers_probe_is_one_more_call(server: VirtualRedis) -> None:
    """Long calls are in flight: it does not wait for them to end."""
    room = Room(server)
    for _ in range(8):
        server.now += 2.0
        room.overload(4, 3)
    assert room.state().probing
    server.now += 40.0
    assert len(room.ask("a", [1] * 3, in_flight=4).starts_us) == 1


def test_a_place_that_was_refused_is_not_used_again_at_once(server: VirtualRedis) -> None:
    """A full server that says no in milliseconds is not asked hundreds of times a second."""
    room = Room(server)
    room.succeed(2, 2)
    starts = 0
    for _ in range(200):
        server.now += 0.01
        starts += len(room.ask("a", [1], in_flight=1).starts_us)
        room.overload(1, 1)
    assert starts <= 40


def test_a_refused_trial_upwards_does_not_put_off_the_one_downwards(server: VirtualRedis) -> None:
    """Else a server that grew slow and refuses now and then is never asked for less."""
    room = Room(server, ADAPTIVE)
    lowest = math.inf
    for _ in range(400):
        server.now += 1.0
        limit = int(room.room)
        lowest = min(lowest, limit) if limit >= 10 else lowest
        if limit > 20:
            room.overload(20, 3)
        # Above 10 in flight a server gains nothing: only latency grows.
        room.succeed(limit - 1, limit, seconds=max(limit, 10) / 10)
    assert room.room <= 14


def test_a_changed_quota_forgets_what_was_learnt(server: VirtualRedis) -> None:
    """It may be another server now."""
    room = Room(server)
    room.overload(2, 5)
    assert room.room < math.inf
    room.configure(ADAPTIVE)
    assert room.room == math.inf
    room.ask("a", [1])
    assert room.room == Congestion().limit


def test_the_room_is_bound_by_the_configured_one(server: VirtualRedis) -> None:
    """`max_concurrency` holds whatever is learnt."""
    limits = QuotaLimits.unlimited().model_copy(update={"max_concurrency": 2})
    room = Room(server, Quota(name="q", limits=limits, adaptive_concurrency=True))
    assert len(room.ask("a", [1] * 9).starts_us) == 2
