"""The fleet's quota while workers die, freeze or have wrong clocks, and while Redis restarts.

Real worker processes at 20 calls a second; the provider's own journal is what the tests believe.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from batchllm_celery import Batch, Producer, Quota, QuotaLimits, RateLimitConfig
from batchllm_celery.compat.rate_limits import policy_from
from batchllm_celery.simulation import SimulationClient, spawn
from tests.acceptance.fleet import Fleet
from tests.support import Stalls, ValkeyServer, assert_within_rate, wait_until

APP = "tests.acceptance.quota_app"
RATE = 20.0
QUOTA = Quota(name="q", limits=QuotaLimits(requests_per_minute=RATE * 60), horizon_seconds=1.0)
#: How much later one call may reach the provider than another, on a machine that is busy.
ARRIVAL_JITTER = 0.15
QUIET = ("--without-mingle", "--without-gossip", "-l", "warning")


@dataclass(frozen=True)
class Call:
    """One call as the provider saw it."""

    time: float
    status: int
    pid: int


@dataclass
class Stage:
    """A Valkey and a provider of its own, a producer, and the workers of one test."""

    fleet: Fleet
    valkey: ValkeyServer
    provider: SimulationClient
    producer: Producer
    stalls: Stalls
    rate: float = RATE
    workers: list[subprocess.Popen[str]] = field(default_factory=list)

    def work(self, count: int, quota: Quota = QUOTA) -> Batch:
        prompts = (f"{index} ".ljust(40, "x") for index in range(count))
        return self.producer.submit(prompts, strategy="lite", quota=quota, items_per_task=5)

    def start(self, count: int, **env: str) -> None:
        """Workers; returns when each of them calls."""
        kept, self.fleet.env = self.fleet.env, self.fleet.env | env
        for _ in range(count):
            name = f"w{len(self.workers)}"
            self.workers.append(self.fleet.start_celery_worker(*QUIET, name=name))
        self.fleet.env = kept
        pids = {worker.pid for worker in self.workers}
        wait_until(lambda: pids <= {call.pid for call in self.calls()}, timeout=60, interval=0.2)

    def calls(self, since: float = 0.0) -> list[Call]:
        return [
            Call(call["time"], call["status"], int(call["user"].split()[0]))
            for call in self.provider.calls()
            if call["time"] >= since
        ]

    def refuse_one(self, retry_after: float) -> Call:
        """One 429; the call that got it. Returns when the fleet has heard of it: a worker killed
        before could not tell anybody."""
        before = time.time()
        self.provider.refuse(1, retry_after)
        refused = wait_until(
            lambda: [call for call in self.calls(before) if call.status == 429], interval=0.01
        )
        wait_until(self._is_cooling, interval=0.01)
        call: Call = refused[0]
        return call

    def _is_cooling(self) -> bool:
        state = self.producer.quota(QUOTA.name)
        return state is not None and state.consecutive > 0

    def share(self, since: float, until: float) -> float:
        """Used share of the quota."""
        return sum(call.time < until for call in self.calls(since)) / (until - since) / self.rate

    def wait_for(self, moment: float) -> None:
        wait_until(lambda: time.time() >= moment)

    def assert_within_quota(self, since: float = 0.0) -> None:
        """No window held more than quota + burst + 1 + rate x arrival jitter."""

        def jitter(begin: float, end: float) -> float:
            return max(ARRIVAL_JITTER, self.stalls.longest(begin - 1, end))

        times = [call.time for call in self.calls(since)]
        assert_within_rate(times, (0.5, 1.0, 3.0, 10.0), self.rate, QUOTA.burst_seconds, jitter)


MakeStage = Callable[..., Stage]


@pytest.fixture
def make_stage(tmp_path: Path) -> Iterator[MakeStage]:
    with contextlib.ExitStack() as stack:

        def make(**provider: Any) -> Stage:
            valkey = ValkeyServer().start()
            stack.callback(valkey.stop)
            client = stack.enter_context(spawn(latency=0.2, keep_calls=10**6, **provider))
            fleet = Fleet(
                tmp_path,
                valkey.url,
                "faults",
                BATCHLLM_APP=APP,
                BATCHLLM_SLOTS="40",
                QUOTA_URL=client.openai_url,
            )
            stack.callback(fleet.stop)
            producer = Producer(redis_url=valkey.url, namespace="faults")
            stack.callback(producer.close)
            stalls = stack.enter_context(Stalls(time.time).watch_process())
            return Stage(fleet, valkey, client, producer, stalls)

        yield make


@pytest.mark.parametrize("policy", ["adaptive", "slow_start"])
def test_one_refusal_stops_all_processes_though_one_is_killed(
    make_stage: MakeStage, policy: str
) -> None:
    """No call of any process starts in a cooldown (250 ms after the 429 at the latest); a worker
    killed -9 in it delays nobody, and the others go on when it ends."""
    stage, quota = make_stage(), QUOTA
    if policy == "slow_start":
        config = RateLimitConfig(
            cooldown_seconds=2.5,
            slow_start_items=10,
            slow_start_initial_delay=0.4,
            slow_start_final_delay=0.1,
        )
        quota = QUOTA.model_copy(update={"policy": policy_from(config)})
    stage.work(2_000, quota)
    stage.start(4)
    refused = stage.refuse_one(2.5)
    os.kill(refused.pid, signal.SIGKILL)
    refused_at = refused.time
    stage.wait_for(refused_at + 8)
    after = [call.time - refused_at for call in stage.calls(refused_at)][1:]
    late = stage.stalls.longest(refused_at, refused_at + 0.5)
    assert [at for at in after if 0.25 + late < at < 2.5] == []
    resumed = [at for at in after if at >= 2.5]
    assert resumed[0] < 3.1 + stage.stalls.longest(refused_at + 2, refused_at + 3.1)
    if policy == "slow_start":
        delays = config.slow_start_delays()
        for i in range(1, 10):
            at, before = resumed[i], resumed[i - 1]
            assert at >= 2.5 + sum(delays[1 : i + 1])
            late = 0.03 + stage.stalls.longest(refused_at + before - 0.5, refused_at + before)
            assert at - before >= 0.95 * delays[i] - late


def test_a_worker_killed_with_permits_costs_a_horizon(make_stage: MakeStage) -> None:
    """After kill -9 the used share is back within the horizon and a second."""
    stage = make_stage()
    stage.work(2_000)
    stage.start(3)
    begun = time.time()
    stage.wait_for(begun + 2)
    os.kill(stage.workers[0].pid, signal.SIGKILL)
    killed = time.time()
    stage.wait_for(killed + 6)
    assert stage.share(killed + 2, killed + 6) >= 0.94
    stage.assert_within_quota(begun)


def test_a_frozen_worker_fires_nothing_late(make_stage: MakeStage) -> None:
    """Stopped for three seconds with tickets in hand, it wakes up to void ones.

    At a rate at which these are many: at 20 a second they passed for its share.
    """
    stage = make_stage()
    stage.rate = 100.0
    limits = QuotaLimits(requests_per_minute=stage.rate * 60)
    stage.work(4_000, QUOTA.model_copy(update={"limits": limits}))
    stage.start(3)
    begun = time.time()
    frozen = stage.workers[0].pid
    stage.wait_for(begun + 2)
    os.kill(frozen, signal.SIGSTOP)
    stopped = time.time()
    stage.wait_for(stopped + 3)
    os.kill(frozen, signal.SIGCONT)
    woken = time.time()
    stage.wait_for(woken + 3)
    at_once = [c for c in stage.calls(woken) if c.pid == frozen and c.time < woken + 0.25]
    assert len(at_once) <= stage.rate / 3 * 0.25  # its share of the quota, as if never stopped
    assert stage.share(stopped + 2, stopped + 3) >= 0.8
    stage.assert_within_quota(begun)


def test_redis_restarting_never_lets_more_through(make_stage: MakeStage) -> None:
    """Killed and started again in mid-run: the quota holds, and the run completes."""
    stage = make_stage()
    warming = stage.work(2_000)
    stage.start(3)
    warming.cancel()
    batch = stage.work(300)
    begun = time.time()
    stage.wait_for(begun + 2)
    stage.valkey.kill()
    stage.valkey.start()
    restarted = time.time()
    assert batch.wait(timeout=90)
    times = [call.time - restarted for call in stage.calls(restarted)]
    # (The server answered before the test saw it: its second and the horizon began earlier.)
    assert [at for at in times if 0.3 < at < 1.5] == []
    stage.assert_within_quota()
    assert batch.progress().succeeded == 300


def test_wrong_clocks_of_workers_make_no_difference(make_stage: MakeStage, tmp_path: Path) -> None:
    """One worker's clock is 5 s fast and one's 5 s slow: the quota is used and never exceeded."""
    stage = make_stage()
    stage.work(2_000)
    for shift in (5, -5, 0):
        folder = tmp_path / f"clock{shift}"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(
            f"import time\n_true = time.time\ntime.time = lambda: _true() + {shift}\n"
        )
        path = f"{folder}{os.pathsep}{stage.fleet.env['PYTHONPATH']}"
        stage.start(1, PYTHONPATH=path)
    begun = time.time()
    stage.wait_for(begun + 6)
    refused_at = stage.refuse_one(1.5).time
    stage.wait_for(refused_at + 4)
    after = [call.time - refused_at for call in stage.calls(refused_at)][1:]
    late = stage.stalls.longest(refused_at, refused_at + 0.5)
    assert [at for at in after if 0.25 + late < at < 1.5] == []
    assert min(at for at in after if at >= 1.5) < 2.2
    assert stage.share(begun + 1, begun + 6) >= 0.95
    by_pid = [sum(c.pid == w.pid for c in stage.calls(begun)) for w in stage.workers]
    assert min(by_pid) > 0.5 * max(by_pid)
    stage.assert_within_quota(begun)
