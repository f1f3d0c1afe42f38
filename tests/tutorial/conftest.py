"""One real worker for the whole tutorial, and a producer that feeds it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from batchllm_celery import Producer
from tests.acceptance.fleet import Fleet
from tests.support import ValkeyServer

NAMESPACE = "tutorial"


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory, valkey: ValkeyServer) -> Iterator[None]:
    """`celery -A batchllm_celery worker`, told which module registers the strategies."""
    folder: Path = tmp_path_factory.mktemp("tutorial")
    fleet = Fleet(folder, valkey.url, NAMESPACE, BATCHLLM_APP="tests.tutorial.strategies")
    fleet.start_celery_worker()
    yield
    fleet.stop()


@pytest.fixture
def producer(worker: None, valkey: ValkeyServer) -> Iterator[Producer]:
    with Producer(redis_url=valkey.url, namespace=NAMESPACE) as producer:
        yield producer
