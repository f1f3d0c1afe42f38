"""Chaos, the short form: real processes, every kind of fault once, judged by the provider's books.

`make chaos` is the long one (test_chaos_long.py).
"""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator

import pytest

from tests.acceptance.chaos import Cut, Proxy, Stage, staged
from tests.acceptance.fleet import read_results
from tests.support import wait_until

pytestmark = pytest.mark.xdist_group("chaos")  # its tests share what they start

LATENCY = 0.3


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """A fleet for the whole module: leases of 2 s, offers after 1 s."""
    settings = {
        "BATCHLLM_LEASE_SECONDS": "2",
        "BATCHLLM_OFFER_SECONDS": "1",
        "BATCHLLM_SLOTS": "4",
        "CHAOS_VISIBILITY": "3",
    }
    with staged(tmp_path_factory.mktemp("chaos"), latency=LATENCY, **settings) as stage:
        yield stage


@pytest.fixture
def stage(standing: Stage) -> Iterator[Stage]:
    """The fleet, with the provider as usual; after every test no message and no key stays."""
    standing.provider.change(latency=LATENCY, error_rate=0.0)
    yield standing
    standing.assert_nothing_stays()


@pytest.mark.parametrize("ends", ["success", "failure"])
def test_a_worker_frozen_beyond_its_lease_brings_one_outcome(stage: Stage, ends: str) -> None:
    """SIGSTOP in mid-call for longer than the lease. Its late success is taken as long as nothing
    is recorded; its late failure is refused, and the other worker's answer counts. One line."""
    batch_id = f"frozen-{ends}"
    stage.rows(batch_id, 1)
    fails = {"error_rate": 1.0, "error_statuses": [400]} if ends == "failure" else {}
    stage.provider.change(latency=0.8, **fails)
    first, second = stage.ensure_workers(2)
    run = stage.start_run(batch_id)
    wait_until(lambda: stage.caller(batch_id) is not None, timeout=40)
    if stage.caller(batch_id) is second:
        first, second = second, first
    with stage.frozen(first):
        stage.provider.change(latency=5.0 if ends == "success" else 1.5, error_rate=0.0)
        wait_until(lambda: stage.has_called(second, batch_id=batch_id), timeout=40)
        assert stage.written(batch_id) == 0
    continued = time.monotonic()
    stage.finish(run, batch_id)

    (line,) = read_results(stage.out(batch_id))
    assert line["success"]
    assert stage.assert_books_balance(batch_id, 1)["maybe_billed"] == 1
    if ends == "success":  # it did not wait for the second call's five seconds
        assert time.monotonic() - continued < 3.5
    assert len(stage.journal.calls(batch_id)) == 2


def test_a_partitioned_worker_costs_only_its_calls_in_flight(stage: Stage) -> None:
    """One worker reaches Redis through a slow network that breaks for longer than the lease: its
    items go to others, what it says afterwards changes no outcome."""
    rows = 100
    stage.rows("net", rows)
    with Proxy(stage.valkey.folder, stage.valkey.socket) as proxy:
        proxy.delay = 0.01
        near = stage.ensure_workers(1)
        far = stage.start_worker(BATCHLLM_REDIS_URL=proxy.url)
        wait_until(lambda: " ready." in stage.said(far), timeout=40)
        run = stage.start_run("net")
        wait_until(lambda: all(map(stage.has_called, [*near, far])), timeout=40)
        since = time.time()
        with proxy.partitioned():
            stage.finish(run, "net")
        stage.cuts.append(Cut(far.pid, since, time.time(), "partition"))

        print(f"\n{stage.judge('net', rows)}")
        wait_until(lambda: not stage.messages_left(), timeout=30)
        stage.judge("net", rows)  # what the far worker had still to say has changed nothing
        stage.drain(far)


def test_a_full_disk_stops_the_run_and_costs_no_call(stage: Stage) -> None:
    """When the result file can't grow, `run` says so and stops with whole lines only; with room
    again the same command goes on, and no call is repeated."""
    rows = 60
    stage.rows("full", rows)
    stage.ensure_workers(1)
    run = stage.start_run("full")
    wait_until(lambda: stage.written("full") > 0, timeout=40)
    room = stage.out("full").stat().st_size + 1000
    resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (room, room))
    assert run.wait(timeout=60) in (2, 3)
    said = stage.fleet.said("run-full")
    assert "full.out" in said
    assert "--batch-id full" in said
    assert 0 < stage.written("full") < rows
    assert stage.out("full").read_bytes().endswith(b"\n")

    stage.finish(stage.start_run("full"), "full")

    assert stage.judge("full", rows).repeats == 0


def test_a_worker_told_to_end_while_it_has_lost_the_broker_ends(stage: Stage) -> None:
    """SIGTERM in the moment when its connections were cut: its calls in flight end and are
    recorded, the worker ends with 0, another one does the rest."""
    rows = 240  # workers of the tests before run some, too
    stage.rows("bye", rows)
    ending = stage.start_worker()
    run = stage.start_run("bye")
    wait_until(lambda: stage.has_called(ending, 4, "bye"), timeout=40)
    stage.cut_connections()
    stage.drain(ending)
    stage.ensure_workers(1)
    stage.finish(run, "bye")

    assert stage.judge("bye", rows).repeats == 0


def test_kills_of_workers_producer_and_valkey_lose_nothing(stage: Stage) -> None:
    """kill -9 of workers in mid-call, of the producer, of Valkey, all connections cut, a drain and
    a cold shutdown, in one batch: every row is answered once, only calls that were cut off are
    repeated, and each of those is counted."""
    rows = 300
    stage.rows("storm", rows)
    killed, quitted, drained = stage.ensure_workers(3)[:3]
    run = stage.start_run("storm")
    wait_until(lambda: stage.has_called(killed, 3, "storm"), timeout=40)

    stage.kill(killed)
    stage.start_worker()
    run.kill()
    run.wait()
    stage.kill_valkey()
    run = stage.start_run("storm")
    wait_until(lambda: stage.has_called(quitted, 20, "storm"), timeout=40)
    assert stage.cut_connections() > 0
    stage.kill(quitted, signal.SIGQUIT)
    wait_until(lambda: stage.has_called(drained, 20, "storm"), timeout=40)
    stage.drain(drained)
    stage.finish(run, "storm")

    verdict = stage.judge("storm", rows)
    print(f"\n{verdict}")
    assert verdict.repeats > 0
