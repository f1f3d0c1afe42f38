"""Runs cases through a real producer, ledger and runtime, and checks what must hold for all."""

from __future__ import annotations

import asyncio
import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from batchllm_celery import Batch, Producer, event_loop
from batchllm_celery.limiter import Limiter
from batchllm_celery.models import (
    MAX_OVERLOADS,
    ProcessorConfig,
    Quota,
    QuotaLimits,
    RetryConfig,
    WorkItemResult,
)
from batchllm_celery.settings import Settings
from batchllm_celery.worker.process import Runtime
from tests.unit.test_item_runner import FakeLimiter

CONFIG = ProcessorConfig(
    timeout_per_item=0.25,
    item_timeout=20,
    max_rate_limit_retries=3,
    retry=RetryConfig(initial_wait=0.001, max_wait=0.002, jitter=False),
)
#: A day's refusal fails its item: parked, it would hold up the other cases of its batch.
QUOTA = Quota(name="wide", limits=QuotaLimits(requests_per_minute=1_000_000), day_exhausted="fail")
SLOTS = 64
#: Times that messages bring the same items; each outcome needs one, and a hand-back one more.
ROUNDS = 60
_UNPRINTABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]")


class Violation(AssertionError):
    """A case for which something does not hold; its message replays it."""


def require(holds: bool, problem: str) -> None:
    if not holds:
        raise Violation(problem)


class Logged(logging.Handler):
    """All that any logger says from INFO on, as text."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@contextmanager
def all_logs() -> Iterator[Logged]:
    root, logged = logging.getLogger(), Logged()
    level = root.level
    root.addHandler(logged)
    root.setLevel(logging.INFO)
    try:
        yield logged
    finally:
        root.removeHandler(logged)
        root.setLevel(level)


class Bench:
    """A producer and one worker process' runtime, on the process' own event loop thread."""

    def __init__(self, redis_url: str, namespace: str, *, real_limiter: bool = False) -> None:
        # Nothing goes back for another worker: there is none.
        self.settings = Settings(
            redis_url=redis_url, namespace=namespace, unrunnable_after=0, max_deliveries=5
        )
        self.runtime = Runtime(self.settings, redis_url, lambda *_: None, slots=SLOTS)
        self.producer = Producer(redis_url=redis_url, namespace=namespace)
        self._real_limiter = real_limiter

    def __enter__(self) -> Bench:
        event_loop.run(self.runtime.open())
        if not self._real_limiter:
            # The real one waits while nobody succeeds: for minutes, where everything is refused.
            self.runtime.items.runner.limiter = cast(Limiter, FakeLimiter())
        return self

    def __exit__(self, *_: object) -> None:
        event_loop.run(self.runtime.close())
        self.producer.__exit__(None, None, None)

    def run(
        self, rows: Sequence[Any], strategy: str, seconds: float = 60.0, **options: Any
    ) -> list[WorkItemResult[Any, Any]]:
        """Bring the rows again and again, as messages do, until each has its outcome."""
        config = {"config": CONFIG, "quota": QUOTA, **options}
        batch = self.producer.submit(rows, strategy=strategy, **config)
        event_loop.run(self._bring(batch, seconds))
        results = list(batch.results())
        self._nothing_is_held(batch)
        return results

    async def _bring(self, batch: Batch, seconds: float) -> None:
        total = batch.spec.batch_id, (await self._progress(batch)).fed
        async with asyncio.timeout(seconds):
            for _ in range(ROUNDS):
                try:
                    await self.runtime.run_items(total[0], range(total[1]))
                except Exception as error:  # what Celery would show; the items went back
                    logging.getLogger("bench").info("a message failed: %s", type(error).__name__)
                if (await self._progress(batch)).is_over:
                    return
        raise Violation(f"not over after {ROUNDS} rounds: {await self._progress(batch)}")

    async def _progress(self, batch: Batch) -> Any:
        return await self.runtime.services.ledger.batches.progress(batch.spec.batch_id)

    def _nothing_is_held(self, batch: Batch) -> None:
        held = [claim.index for claim in self.runtime.services.ledger.claims.holding]
        if held:
            raise Violation(f"still held here: {held[:10]}")
        progress = batch.progress()
        if progress.in_flight:
            raise Violation(f"Redis holds {progress.in_flight} items")


def most_calls() -> int:
    """The bound of calls of one item."""
    return CONFIG.retry.max_attempts + CONFIG.max_rate_limit_retries + MAX_OVERLOADS + 1 + 5


def one_outcome_each(
    results: Sequence[WorkItemResult[Any, Any]], expected: Sequence[str]
) -> dict[str, WorkItemResult[Any, Any]]:
    counted = Counter(result.item_id for result in results)
    if counted != Counter(expected):
        twice = [name for name, times in counted.items() if times > 1]
        missing = sorted(set(expected) - set(counted))
        strange = sorted(set(counted) - set(expected))
        raise Violation(f"twice {twice[:5]}, missing {missing[:5]}, strange {strange[:5]}")
    return {result.item_id: result for result in results}


def check_texts(result: WorkItemResult[Any, Any], secrets: Sequence[str]) -> None:
    """No key and no control character leaves in an error."""
    error = result.error or ""
    for secret in secrets:
        if secret in error:
            raise Violation(f"the error holds a secret: {error[:200]!r}")
    if found := _UNPRINTABLE.search(error):
        raise Violation(f"the error holds {found[0]!r}: {error[:200]!r}")
    if len(error) > 1000:
        raise Violation(f"an error of {len(error)} characters")


def check_logs(logged: Logged, secrets: Sequence[str]) -> None:
    for line in logged.lines:
        for secret in secrets:
            if secret in line:
                raise Violation(f"a log holds {secret!r}: {line[:600]!r}")


def count(default: int) -> int:
    """Cases of one area in this run."""
    if os.environ.get("BOUNDARY_CASES"):
        return 1
    return int(os.environ.get("BOUNDARY_COUNT") or default)


def chosen(area: str, numbers: Sequence[int]) -> list[int]:
    """`numbers`, or those that BOUNDARY_CASES names for this area (as in `strategies:17,42`)."""
    only = os.environ.get("BOUNDARY_CASES")
    if not only:
        return list(numbers)
    name, _, listed = only.partition(":")
    return [int(number) for number in listed.split(",")] if name == area else []


SEED = int(os.environ.get("BOUNDARY_SEED") or 0)


def replay(area: str, number: int) -> str:
    return f"make boundary SEED={SEED} CASES={area}:{number}"
