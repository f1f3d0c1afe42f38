"""`quota(...)`: the limiter for code that makes its own calls, on the same fleet-wide quotas."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batchllm_celery import (
    BlockingCallWarning,
    CallableStrategy,
    LLMCallStrategy,
    Producer,
    ProviderError,
    Quota,
    QuotaLimits,
    QuotaUnavailableError,
    UsageError,
    quota,
    strategy,
)
from batchllm_celery.errors import FailureKind
from batchllm_celery.settings import Settings
from tests.integration.in_process import in_process_worker
from tests.integration.quota_user import note
from tests.support import assert_within_rate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(redis_url: str, namespace: str) -> Settings:
    return Settings(redis_url=redis_url, namespace=namespace, offer_seconds=0.05)


@pytest.fixture
def producer(settings: Settings) -> Iterator[Producer]:
    with Producer(settings) as opened:
        yield opened


def _limits(producer: Producer, **limits: Any) -> None:
    producer.set_quota(Quota(name="shared", limits=QuotaLimits(**limits)))


@strategy("quota-alone", quota="shared")
def journaling(journal: str) -> LLMCallStrategy[str]:
    async def call(prompt: str) -> str:
        note(Path(journal))
        return prompt

    return CallableStrategy(call)


@pytest.mark.timeout(90)
def test_own_calls_and_a_batch_stay_within_one_quota(
    producer: Producer, settings: Settings, tmp_path: Path
) -> None:
    """Four processes of their own beside a worker: the provider sees the quota kept by all
    together, and everybody gets a share."""
    rate = 40
    _limits(producer, requests_per_minute=rate * 60)
    environment = os.environ | {
        "BATCHLLM_REDIS_URL": str(settings.redis_url),
        "BATCHLLM_NAMESPACE": settings.namespace,
        "PYTHONPATH": str(ROOT),
    }
    journals = [tmp_path / f"{n}.log" for n in range(5)]
    with in_process_worker(settings):
        batch = producer.submit(
            ["x"] * 16, strategy="quota-alone", params={"journal": str(journals[4])}
        )
        users = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.integration.quota_user", str(journal), "16"],
                env=environment,
            )
            for journal in journals[:4]
        ]
        assert batch.wait(timeout=60).succeeded == 16
        assert [user.wait(60) for user in users] == [0] * 4
    moments = [[float(line) for line in journal.read_text().split()] for journal in journals]
    assert [len(one) for one in moments] == [16] * 5
    whole = [moment for one in moments for moment in one]
    # What a process notes late was started in time: a scheduler's delay on a busy machine.
    assert_within_rate(whole, (1.0, 3.0), rate, 0.1, lambda *_: 0.25)


async def test_a_429_cools_the_fleet_down(producer: Producer) -> None:
    """Told by the permit with its seconds, or by an exception that carries them."""
    await asyncio.to_thread(_limits, producer, requests_per_minute=60_000)
    async with quota("shared", producer=producer):
        pass
    async with quota("shared", producer=producer) as permit:
        permit.refused(retry_after=0.4)
    started = time.monotonic()
    async with quota("shared", producer=producer):
        assert time.monotonic() - started >= 0.35
    refusal = ProviderError(
        "429: slow down", kind=FailureKind.RATE_LIMITED, status=429, retry_after=0.4
    )
    with pytest.raises(ProviderError):
        async with quota("shared", producer=producer):
            raise refusal
    started = time.monotonic()
    async with quota("shared", producer=producer):
        assert time.monotonic() - started >= 0.35


async def test_used_tokens_replace_the_reserved_ones(producer: Producer) -> None:
    """A call that used little gives back what it had reserved, and the next need not wait."""
    await asyncio.to_thread(_limits, producer, tokens_per_minute=60_000)  # 1,000 a second
    started = time.monotonic()
    for _ in range(4):
        async with quota("shared", tokens=2_000, producer=producer) as permit:
            permit.used({"prompt_tokens": 10, "completion_tokens": 5})
    assert time.monotonic() - started < 4.0  # 8 s, if each had used what it reserved


async def test_waits_end(producer: Producer) -> None:
    """At their timeout; one that blocks a loop says so."""
    await asyncio.to_thread(_limits, producer, requests_per_minute=1)
    async with quota("shared", producer=producer):
        pass
    with pytest.raises(TimeoutError, match=r"no permit of quota 'shared' within 0\.1 s"):
        async with quota("shared", timeout=0.1, producer=producer):
            raise AssertionError("entered")
    with (
        pytest.warns(BlockingCallWarning, match="use `async with quota"),
        pytest.raises(TimeoutError),
    ):
        quota("shared", timeout=0.1, producer=producer).__enter__()


def test_synchronous_code_waits_too(producer: Producer) -> None:
    """And hears that the day's requests are used up."""
    _limits(producer, requests_per_minute=60_000, requests_per_day=1)
    with quota("shared", producer=producer) as permit:
        permit.overloaded()
    with pytest.raises(QuotaUnavailableError), quota("shared", producer=producer):
        raise AssertionError("entered")  # pragma: no cover


async def test_calls_in_flight_are_counted(producer: Producer) -> None:
    """One object entered by many tasks at once is as many permits; each is settled by its own."""
    await asyncio.to_thread(_limits, producer, max_concurrency=3, requests_per_minute=60_000)
    shared, now, most = quota("shared", producer=producer), 0, 0

    async def call() -> None:
        nonlocal now, most
        async with shared:
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.01)
            now -= 1

    await asyncio.wait_for(asyncio.gather(*(call() for _ in range(12))), 20)
    assert most == 3


async def test_a_call_that_is_cut_off_gives_its_slot_back(producer: Producer) -> None:
    """A cancelled block is settled: the next caller gets the slot."""
    await asyncio.to_thread(_limits, producer, max_concurrency=1)

    async def hang() -> None:
        async with quota("shared", producer=producer):
            inside.set()
            await asyncio.sleep(60)

    inside = asyncio.Event()
    task = asyncio.create_task(hang())
    await asyncio.wait_for(inside.wait(), 10)
    task.cancel()
    await asyncio.wait([task])
    async with quota("shared", timeout=10, producer=producer):
        pass


@pytest.mark.parametrize(
    ("name", "options"), [("", {}), ("a b", {}), ("x", {"tokens": -1}), ("x", {"output_tokens": 5})]
)
def test_what_can_not_be_is_refused(name: str, options: dict[str, int]) -> None:
    with pytest.raises(UsageError):
        quota(name, **options)  # type: ignore[arg-type]


def test_a_usage_without_tokens_is_refused(producer: Producer) -> None:
    _limits(producer, requests_per_minute=60_000)
    with (
        pytest.raises(UsageError, match="no tokens can be read"),
        quota("shared", producer=producer) as permit,
    ):
        permit.used(object())
