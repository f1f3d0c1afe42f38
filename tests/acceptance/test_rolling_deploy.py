"""What is wrong with a worker process costs no item while another one can run it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from batchllm_celery import FailureKind, Producer
from batchllm_celery.errors import StrategyNotFoundError
from batchllm_celery.models import BatchState, WorkItemResult
from batchllm_celery.settings import Settings
from tests.acceptance.fleet import Fleet
from tests.support import wait_until

APP = "tests.acceptance.deploy_app"
pytestmark = pytest.mark.timeout(400)  # six worker processes start on a busy machine
Results = list[WorkItemResult[Any, Any]]
Deploy = Callable[..., None]


@pytest.fixture
def producer(redis_url: str, namespace: str) -> Iterator[Producer]:
    with Producer(Settings(redis_url=redis_url, namespace=namespace)) as opened:
        yield opened


@pytest.fixture
def deploy(fleet: Fleet, producer: Producer) -> Deploy:
    """Starts workers, the named faults' first; returns when all are there."""
    fleet.env |= {"BATCHLLM_OFFER_SECONDS": "0.5", "BATCHLLM_HEARTBEAT_SECONDS": "0.5"}

    def start(good: int = 1, unrunnable_after: float = 600.0, **faults: int) -> None:
        fleet.env["BATCHLLM_UNRUNNABLE_AFTER"] = str(unrunnable_after)
        wanted = {**faults, "": good}
        for fault, count in wanted.items():
            if count:
                name = fault or "good"
                fleet.env["DEPLOY_FAULT"] = fault.replace("_", " ")
                arguments = ("--processes", str(count), "--slots", "8", "--app", APP)
                fleet.start("worker", *arguments, name=name)
        wait_until(lambda: len(producer.workers()) == sum(wanted.values()), timeout=120)

    return start


def run(producer: Producer, count: int, **options: Any) -> Results:
    batch = producer.submit(
        (f"text {n}" for n in range(count)), strategy="summarise", items_per_task=2, **options
    )
    return list(batch.results())


def test_a_rolling_deploy_costs_no_item(fleet: Fleet, producer: Producer, deploy: Deploy) -> None:
    """Half the workers lack the strategy, one lacks its key, one has a broken package: 300 of 300
    succeed, each of the broken says so in one line, and `status` shows it."""
    deploy(good=1, no_strategy=3, no_key=1, no_package=1)
    results = run(producer, 300)
    assert sum(result.success for result in results) == 300
    assert {result.attempts for result in results} == {1}
    shown = fleet.run("status").stdout
    assert re.search(r"unrunnable here: summarise: .* of 6 workers, since \d\d:\d\d\)", shown)
    for name, count in (("no_strategy", 3), ("no_key", 1), ("no_package", 1)):
        assert fleet.said(name).count("strategy.unrunnable strategy=summarise") <= count
    assert "a_package_that_nobody_has" in fleet.said("no_package")


def test_a_worker_with_a_wrong_key_or_without_memory_costs_no_item(
    producer: Producer, deploy: Deploy
) -> None:
    """The provider's 401 is that worker's while the quota's calls succeed elsewhere."""
    deploy(good=1, wrong_key=1, no_memory=1)
    batch = producer.submit(
        (f"text {n}" for n in range(100)), strategy="summarise", items_per_task=2
    )
    results = list(batch.results())
    assert [result.error for result in results if not result.success] == []
    assert batch.progress().state == BatchState.FINISHED


def test_a_worker_of_the_version_before_costs_no_item(producer: Producer, deploy: Deploy) -> None:
    """Its factory does not take the parameters yet."""
    deploy(good=1, older_parameters=2)
    results = run(producer, 60, params={"style": "long"})
    assert [result.error for result in results if not result.success] == []


def test_what_no_live_worker_can_run_fails_in_the_end(
    fleet: Fleet, producer: Producer, deploy: Deploy
) -> None:
    """As `unrunnable`, with the reason, and not before the time that is set."""
    deploy(good=0, unrunnable_after=6.0, no_key=1, no_package=1)
    results = run(producer, 30)
    assert {result.error_kind for result in results} == {FailureKind.UNRUNNABLE}
    assert all("no worker could run strategy 'summarise' for 6 s" in str(r.error) for r in results)
    assert min(result.timing.total for result in results) == 0  # never called


def test_a_key_that_no_worker_has_right_stops_the_batch(producer: Producer, deploy: Deploy) -> None:
    """Nothing succeeds anywhere: the batch stops, as for one worker alone."""
    deploy(good=0, wrong_key=2)
    batch = producer.submit((f"text {n}" for n in range(40)), strategy="summarise")
    kinds = {result.error_kind for result in batch.results()}
    assert kinds == {FailureKind.AUTHENTICATION, FailureKind.ABORTED}


def test_a_name_that_no_live_worker_knows_is_refused(
    fleet: Fleet, producer: Producer, deploy: Deploy
) -> None:
    """At once, with the names that are near; without a live worker it is taken."""
    producer.submit(["waits"], strategy="sumarise").cancel()
    deploy(good=1)
    with pytest.raises(StrategyNotFoundError, match="did you mean 'summarise'"):
        producer.submit(["text"], strategy="sumarise")
    rows = fleet.folder / "rows.jsonl"
    rows.write_text('{"prompt": "text"}\n')
    said = fleet.run("submit", str(rows), "--strategy", "sumarise")
    assert said.returncode == 2
    assert "did you mean 'summarise'" in said.stderr


def test_parameters_that_no_worker_takes_fail_soon(
    fleet: Fleet, producer: Producer, deploy: Deploy
) -> None:
    """A typing error does not wait for `unrunnable_after`: its items fail as `invalid_request`."""
    fleet.env["DEPLOY_PARAMETERS_AFTER"] = "2"
    deploy(good=1, unrunnable_after=600.0)
    results = run(producer, 20, params={"stile": "long"})
    assert {result.error_kind for result in results} == {FailureKind.INVALID_REQUEST}
