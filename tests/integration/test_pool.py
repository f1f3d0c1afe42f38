"""Celery's contract, kept by the asyncio pool in a real worker."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest

from tests.integration.pool_support import PoolLab, PoolWorker
from tests.support import ValkeyServer, wait_until

pytestmark = pytest.mark.xdist_group("pool")  # its tests share what they start

SLOTS = 1000


@pytest.fixture(scope="module")
def lab(valkey: ValkeyServer) -> Iterator[PoolLab]:
    with PoolLab(valkey) as lab:
        yield lab


@pytest.fixture(scope="module")
def worker(lab: PoolLab) -> PoolWorker:
    return lab.worker("-c", str(SLOTS), "-E")


def _state(lab: PoolLab, worker: PoolWorker) -> dict[str, Any]:
    stats = lab.app.control.inspect([worker.name], timeout=5, limit=1).stats()
    assert stats is not None
    pool: dict[str, Any] = stats[worker.name]["pool"]
    return pool


@pytest.mark.usefixtures("worker")
def test_the_request_is_right_in_each_of_5000_interleaved_tasks(lab: PoolLab) -> None:
    """Every one of 5,000 tasks sees its own request and current task after each of its awaits."""
    lab.send_many("identity", [(number,) for number in range(5000)])
    wait_until(lambda: lab.count("identity") == 5000, 60, interval=0.1)
    assert sorted(number for number, right in lab.told("identity") if right) == list(range(5000))


@pytest.mark.usefixtures("worker")
def test_context_variables_do_not_leak_between_2000_tasks(lab: PoolLab) -> None:
    """A task starts without others' context variables, keeps its own, and hands them to children.

    asyncio.timeout and TaskGroup, which need a current asyncio task, work in it.
    """
    lab.send_many("variable", [(number,) for number in range(2000)])
    wait_until(lambda: lab.count("variable") == 2000, 60, interval=0.1)
    assert {tuple(row) for row in lab.told("variable")} == {(-1, True, True)}


@pytest.mark.usefixtures("worker")
def test_a_synchronous_body_awaits_through_event_loop_run(lab: PoolLab) -> None:
    """A plain task awaits on the pool's loop through event_loop.run."""
    lab.send_many("crossing", [(number,) for number in range(50)])
    wait_until(lambda: lab.count("crossing") == 50)
    assert sorted(lab.told("crossing")) == [[number, 2 * number] for number in range(50)]


@pytest.mark.usefixtures("worker")
def test_a_task_called_from_a_coroutine_stays_a_coroutine_function(lab: PoolLab) -> None:
    """An `async def` task may await another one as the function that it is."""
    lab.send("calls_another")
    wait_until(lambda: lab.count("outer"))
    assert lab.count("inner") == 1


@pytest.mark.usefixtures("worker")
def test_retries_count_up(lab: PoolLab) -> None:
    """self.retry and autoretry_for send the task again with the next retry number."""
    lab.send("retried")
    lab.send("autoretried")
    wait_until(lambda: lab.count("retried") == 3 and lab.count("autoretried") == 2)
    assert lab.told("retried") == [[0], [1], [2]]
    assert lab.told("autoretried") == [[0], [1]]


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize(
    ("how", "error"),
    [("value", "ValueError"), ("cancel", "CancelledError"), ("exit", "WorkerLostError")],
)
def test_a_failing_task_is_reported_as_failed(lab: PoolLab, how: str, error: str) -> None:
    """An exception fails its task only, even one that would end a process or cancel a coroutine."""
    result = lab.send("failing", how, ignore_result=False)
    wait_until(lambda: result.state == "FAILURE")
    assert type(result.result).__name__ == error


@pytest.mark.usefixtures("worker")
def test_results_are_stored(lab: PoolLab) -> None:
    """What an `async def` task returns is the task's result."""
    assert lab.send("nap", 0.01, ignore_result=False).get(timeout=20) == "rested"


@pytest.mark.usefixtures("worker")
def test_a_revoked_task_is_cancelled_within_a_second(lab: PoolLab) -> None:
    """revoke(terminate=True) cancels the coroutine in flight, and Celery reports it revoked."""
    result = lab.send("cancellable", ignore_result=False)
    wait_until(lambda: [result.id] in lab.told("cancellable-started"))
    revoked_at = time.monotonic()
    lab.app.control.revoke(result.id, terminate=True)
    wait_until(lambda: [result.id] in lab.told("cancelled"), interval=0.01)
    assert time.monotonic() - revoked_at < 1
    wait_until(lambda: str(result.state) == "REVOKED")


def test_a_task_over_its_soft_limit_is_interrupted_and_cleans_up(
    lab: PoolLab, worker: PoolWorker
) -> None:
    """SoftTimeLimitExceeded is raised where the coroutine waits, and its children are cancelled."""
    lab.send("soft_limited", soft_time_limit=0.2)
    wait_until(lambda: lab.count("soft") == 1)
    assert lab.count("soft-child") == 1
    wait_until(lambda: "Soft time limit (0.2s) exceeded" in worker.log())


@pytest.mark.usefixtures("worker")
def test_a_task_over_its_hard_limit_is_cancelled_and_failed(lab: PoolLab) -> None:
    """A hard time limit cancels the coroutine and fails the task with TimeLimitExceeded."""
    result = lab.send("hard_limited", time_limit=0.2, ignore_result=False)
    wait_until(lambda: result.state == "FAILURE")
    assert type(result.result).__name__ == "TimeLimitExceeded"
    wait_until(lambda: lab.count("hard") == 1)


@pytest.mark.usefixtures("worker")
def test_task_events_tell_of_each_step(lab: PoolLab) -> None:
    """Celery's task events are sent as from any pool."""
    seen: dict[str, list[str]] = {}
    with _listening(lab, lambda event: seen.setdefault(event["uuid"], []).append(event["type"])):
        # A subscription takes effect a little later than it is made.
        wait_until(lambda: lab.send("nap", 0.01) and seen, interval=0.2)
        result = lab.send("nap", 0.05, "eventful")
        wait_until(lambda: "task-succeeded" in seen.get(result.id, []))
    assert seen[result.id] == ["task-received", "task-started", "task-succeeded"]


@contextmanager
def _listening(lab: PoolLab, handler: Callable[[dict[str, Any]], object]) -> Iterator[None]:
    """Hand each task event to `handler`, in a thread, while the block runs."""
    listening, stop = threading.Event(), threading.Event()

    def listen() -> None:
        with lab.app.connection_for_read() as connection:
            kinds = dict.fromkeys(("task-received", "task-started", "task-succeeded"), handler)
            receiver = lab.app.events.Receiver(connection, handlers=kinds)
            with receiver.consumer_context() as (bound, _, _):
                listening.set()
                while not stop.is_set():
                    with suppress(TimeoutError):
                        bound.drain_events(timeout=0.2)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        assert listening.wait(10)
        yield
    finally:
        stop.set()
        thread.join()


def test_inspect_shows_what_is_active_and_the_pools_figures(
    lab: PoolLab, worker: PoolWorker
) -> None:
    """`inspect active` lists what runs; `inspect stats` shows slots and what is in them."""
    for _ in range(3):
        lab.send("nap", 4, "inspected")
    wait_until(lambda: lab.count("inspected-started") == 3)
    active = lab.app.control.inspect([worker.name], timeout=5, limit=1).active()
    assert active is not None
    assert [task["worker_pid"] for task in active[worker.name]] == [worker.process.pid] * 3
    pool = _state(lab, worker)
    assert (pool["running"], pool["max-concurrency"]) == (3, SLOTS)
    assert pool["hub-wake-ups"] < pool["finished"]


def test_the_pool_grows_and_shrinks_by_remote_control(lab: PoolLab, worker: PoolWorker) -> None:
    """pool_grow and pool_shrink change the number of slots, but never to none."""
    lab.app.control.pool_grow(5, destination=[worker.name], reply=True, timeout=5)
    assert _state(lab, worker)["max-concurrency"] == SLOTS + 5
    lab.app.control.pool_shrink(5, destination=[worker.name], reply=True, timeout=5)
    assert _state(lab, worker)["max-concurrency"] == SLOTS
    refused = lab.app.control.pool_shrink(SLOTS, destination=[worker.name], reply=True, timeout=5)
    assert "has 1000 slots" in str(refused)
    assert _state(lab, worker)["max-concurrency"] == SLOTS


def test_code_that_blocks_the_loop_is_named_in_the_log(lab: PoolLab, worker: PoolWorker) -> None:
    """A task that blocks the loop for over a second has its stack logged."""
    lab.send("blocking", 1.6)
    wait_until(lambda: "loop.blocked" in worker.log())
    assert "time.sleep(seconds)" in worker.log()


def test_no_more_tasks_run_than_there_are_slots(valkey: ValkeyServer) -> None:
    """With 2 slots, five naps of 0.3 s run two at a time, early-acknowledged ones too."""
    with PoolLab(valkey) as lab:
        lab.worker("-c", "2", "--prefetch-multiplier", "4")
        lab.send_many("nap", [(0.3,)] * 5)
        most = 0
        while lab.count("nap") < 5:
            most = max(most, lab.count("nap-started") - lab.count("nap"))
        assert most == 2
