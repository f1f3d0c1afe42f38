"""The pool under a broker that has no event loop of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from celery import Celery
from celery.contrib.testing.worker import start_worker

from tests.support import loop_of_its_own, wait_until

POOL = "batchllm_celery.worker.pool:AsyncioPool"


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("memory", broker="memory://", backend="cache+memory://", set_as_current=False)
    with loop_of_its_own():
        yield app
        app.close()


def test_tasks_run_on_a_broker_without_a_hub(app: Celery) -> None:
    """With Celery's synchronous loop, as on a broker in memory, tasks run and are reported too."""
    done: list[int] = []

    @app.task
    async def work(number: int) -> None:
        await asyncio.sleep(0.01)
        done.append(number)

    with start_worker(app, pool=POOL, concurrency=3, perform_ping_check=False):
        for number in range(20):
            work.delay(number)
        wait_until(lambda: len(done) == 20)
    assert sorted(done) == list(range(20))
    assert asyncio.iscoroutinefunction(work.run)
