"""Celery's other pools, and what our own refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.pool_support import PoolLab
from tests.support import ValkeyServer, wait_until


@pytest.fixture
def lab(valkey: ValkeyServer) -> Iterator[PoolLab]:
    with PoolLab(valkey) as lab:
        yield lab


def test_event_loop_run_works_in_every_pool(lab: PoolLab) -> None:
    """threads, solo and prefork reach one event loop per process; forks start their own."""
    pools = ("threads", "solo", "prefork")
    workers = [lab.start("-P", pool, "-c", "2", "-Q", pool) for pool in pools]
    for worker in workers:
        worker.ready()
    for number, pool in enumerate(pools):
        for _ in range(10):
            lab.send("crossing", number, queue=pool)
    wait_until(lambda: lab.count("crossing") == 30)
    assert sorted(lab.told("crossing")) == [[n, 2 * n] for n in range(3) for _ in range(10)]


def test_what_the_pool_cannot_do_it_refuses_with_a_reason(lab: PoolLab) -> None:
    """--autoscale and USE_FAST_LOCALS end the worker at its start with a word on what to do."""
    scaled = lab.start("--autoscale", "10,2")
    fast = lab.start(USE_FAST_LOCALS="1")
    assert scaled.wait(60) != 0
    assert "does not autoscale" in scaled.log()
    assert fast.wait(60) != 0
    assert "USE_FAST_LOCALS" in fast.log()


def test_the_pool_is_chosen_by_the_worker_pool_setting(lab: PoolLab) -> None:
    """Without -P the app's worker_pool setting names the pool."""
    conf = {"worker_pool": "batchllm_celery.worker.pool:AsyncioPool"}
    lab.worker("-P", "prefork", "-c", "5", conf=conf)
    lab.send("nap", 0.01)
    wait_until(lambda: lab.count("nap") == 1)
