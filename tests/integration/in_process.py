"""A worker inside the test's process: a runtime that takes messages from a list, no Celery."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

from batchllm_celery import event_loop
from batchllm_celery.settings import Settings
from batchllm_celery.worker.process import Runtime


@contextlib.contextmanager
def in_process_worker(settings: Settings) -> Iterator[Runtime]:
    """Runs what free slots find, as a worker does whose messages were all lost."""

    def publish(batch_id: str, indexes: Sequence[int], queue: str, priority: int) -> None:
        asyncio.run_coroutine_threadsafe(
            runtime.run_items(batch_id, list(indexes), requeued=True), event_loop.loop()
        )

    runtime = Runtime(settings, str(settings.redis_url), publish)
    event_loop.run(runtime.open())
    try:
        yield runtime
    finally:
        event_loop.run(runtime.close())
