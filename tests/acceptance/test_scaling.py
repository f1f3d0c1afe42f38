"""A fleet that grows and shrinks in mid-run, its queues, and an urgent batch behind a large one."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from batchllm_celery import Producer
from batchllm_celery.models import Quota, QuotaLimits
from batchllm_celery.settings import Settings
from tests.acceptance.conftest import StartProvider
from tests.acceptance.fleet import Fleet, assert_one_line_each, write_rows
from tests.support import wait_until

GEMINI = ("--model", "gemini:gemini-2.5-flash")
STRATEGIES = """
import asyncio
from batchllm_celery import CallableStrategy, strategy


async def answer(prompt: str) -> str:
    await asyncio.sleep(0.05)
    return prompt


@strategy("nap")
def nap() -> CallableStrategy:
    return CallableStrategy(answer)
"""


def workers_of(fleet: Fleet) -> list[dict[str, Any]]:
    """What `batchllm status` says of the workers."""
    seen = fleet.run("status", "--json")
    assert seen.returncode == 0, seen.stderr
    workers: list[dict[str, Any]] = json.loads(seen.stdout)["workers"]
    return workers


def with_strategies(fleet: Fleet) -> Path:
    """A module that registers `nap` beside the fleet's files."""
    module = fleet.folder / "strategies.py"
    module.write_text(STRATEGIES)
    fleet.env["BATCHLLM_APP"] = "strategies"
    return module


def producer_of(fleet: Fleet, redis_url: str) -> Producer:
    return Producer(Settings(redis_url=redis_url, namespace=fleet.env["BATCHLLM_NAMESPACE"]))


def test_workers_join_and_leave_in_mid_run(
    fleet: Fleet, provide: StartProvider, redis_url: str
) -> None:
    """A second worker has work within 5 s of being ready; told to stop, it finishes its calls,
    hands over the rest and exits with 0; every row is answered by exactly one call."""
    provider = provide(latency=0.2)
    fleet.env["GOOGLE_GEMINI_BASE_URL"] = provider.url
    rows = 1200
    write_rows(fleet.folder / "rows.jsonl", rows)
    fleet.start("worker", name="first")
    fleet.start("submit", "rows.jsonl", *GEMINI, "--rpm", "1200", "--batch-id", "b")
    wait_until(lambda: len(provider.calls) > 40, timeout=60)
    second = fleet.start("worker", name="second")
    with producer_of(fleet, redis_url) as producer:
        wait_until(lambda: " ready." in fleet.said("second"), timeout=60)
        wait_until(
            lambda: len([one for one in producer.workers() if one.running]) == 2, timeout=5.0
        )
    told = time.monotonic()
    second.send_signal(signal.SIGTERM)

    assert second.wait(timeout=40) == 0
    assert time.monotonic() - told < 10  # no call takes longer than 0.2 s, so there is no need
    assert len(provider.calls) < rows
    # The rest may go fast: what counts is that nothing of it was lost.
    faster = fleet.run("quota", "set", "gemini:gemini-2.5-flash", "--rpm", "30000")
    assert faster.returncode == 0, faster.stderr
    followed = fleet.run("results", "b", "-o", "out.jsonl", "--follow")
    assert followed.returncode == 0, followed.stderr
    assert_one_line_each(fleet.folder / "out.jsonl", rows)
    assert set(Counter(call.prompt for call in provider.calls).values()) == {1}
    assert len(workers_of(fleet)) == 1


def test_a_lane_is_served_by_its_own_workers(fleet: Fleet, redis_url: str) -> None:
    """A worker of one queue leaves the others' batches alone; `status` tells who serves what."""
    with_strategies(fleet)
    fleet.start("worker", "--queue", "express", name="express")
    with producer_of(fleet, redis_url) as producer:
        usual = producer.submit(["a", "b"], strategy="nap")
        express = producer.submit(["c", "d"], strategy="nap", queue="express")
        assert {result.output for result in express.results()} == {"c", "d"}
        assert usual.progress().finished == 0
        fleet.start("worker", "--queue", "default,express", name="both")
        assert {result.output for result in usual.results()} == {"a", "b"}
    queues = {worker["queues"] for worker in workers_of(fleet)}
    assert queues == {"express", "default,express"}


def test_an_urgent_batch_overtakes_a_large_one(fleet: Fleet, redis_url: str) -> None:
    """20 urgent items behind 5,000 running ones on the same quota are done in less than a tenth
    of the time that the 5,000 take."""
    with_strategies(fleet)
    fleet.start("worker", "--processes", "2", name="worker")
    quota = Quota(name="shared", limits=QuotaLimits(requests_per_minute=16_000))
    with producer_of(fleet, redis_url) as producer:
        large = producer.submit(map(str, range(5_000)), strategy="nap", quota=quota)
        wait_until(lambda: large.progress().finished >= 1, timeout=60)
        started = time.monotonic()
        wait_until(lambda: large.progress().finished >= 600, timeout=60)
        asked = time.monotonic()
        urgent = producer.submit(map(str, range(20)), strategy="nap", quota=quota, priority=9)
        urgent.wait(timeout=60)
        took = time.monotonic() - asked
        assert urgent.progress().succeeded == 20
        assert large.progress().finished < 4_000
        large.wait(timeout=100)
        whole = time.monotonic() - started
        assert large.progress().succeeded == 5_000
    print(f"20 urgent items: {took:.2f} s; 5,000 usual ones: {whole:.1f} s")
    assert took < whole / 10
