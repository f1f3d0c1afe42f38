"""What becomes of tasks in flight when a worker or its broker goes."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator

import pytest

from tests.integration.pool_support import PoolLab
from tests.support import ValkeyServer, wait_until


@pytest.fixture
def lab(valkey: ValkeyServer) -> Iterator[PoolLab]:
    with PoolLab(valkey) as lab:
        yield lab


def test_sigterm_finishes_a_thousand_tasks_in_flight(lab: PoolLab) -> None:
    """A warm shutdown waits for all that runs, acknowledges it and loses nothing."""
    worker = lab.worker("-c", "1000")
    lab.send_many("late_nap", [(4,)] * 1000)
    wait_until(lambda: lab.count("late-started") == 1000, 60)
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0
    assert lab.count("late") == 1000
    assert lab.unacknowledged() == 0
    assert lab.queued() == 0


def test_sigquit_ends_at_once_and_the_tasks_run_elsewhere(lab: PoolLab) -> None:
    """A cold shutdown cancels all that runs within 5 s; another worker runs it."""
    first = lab.worker("-c", "100")
    lab.send_many("late_nap", [(30,)] * 50 + [(3,)] * 50)
    wait_until(lambda: lab.count("late-started") == 100)
    second = lab.start("-c", "100")
    asked_at = time.monotonic()
    first.send_signal(signal.SIGQUIT)
    first.wait(20)
    assert time.monotonic() - asked_at < 5
    second.ready()
    elsewhere = [[second.process.pid]] * (100 - lab.count("late"))
    wait_until(lambda: lab.told("late-started")[100:] == elsewhere)


def test_tasks_of_a_killed_worker_run_elsewhere(lab: PoolLab) -> None:
    """With late acknowledgement a task of a worker that was killed is delivered again."""
    first = lab.worker("-c", "10", POOL_APP_VISIBILITY="2")
    lab.send("late_nap", 1)
    wait_until(lambda: lab.count("late-started") == 1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    second = lab.worker("-c", "10", POOL_APP_VISIBILITY="2")
    wait_until(lambda: lab.told("late") == [[second.process.pid]])


def test_a_soft_shutdown_lets_short_tasks_finish(lab: PoolLab) -> None:
    """worker_soft_shutdown_timeout: what ends in time is acknowledged, the rest goes back."""
    worker = lab.worker("-c", "10", conf={"worker_soft_shutdown_timeout": 2})
    lab.send("late_nap", 1)
    lab.send("late_nap", 60)
    wait_until(lambda: lab.count("late-started") == 2)
    worker.send_signal(signal.SIGQUIT)
    worker.wait(20)
    assert lab.count("late") == 1
    assert lab.queued() == 1


def test_work_goes_on_after_the_broker_was_away() -> None:
    """Tasks in flight survive a broker's restart, and new ones run after it."""
    server = ValkeyServer().start()
    try:
        with PoolLab(server) as lab:
            worker = lab.worker("-c", "10")
            lab.send("nap", 4)
            wait_until(lambda: lab.count("nap-started") == 1)
            server.kill()
            wait_until(lambda: "Connection to broker lost" in worker.log())
            server.start()
            wait_until(lambda: lab.count("nap") >= 1)
            lab.send("crossing", 1)
            wait_until(lambda: lab.told("crossing") == [[1, 2]])
    finally:
        server.stop()
