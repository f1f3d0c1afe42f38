"""Every wait of a producer has a word after seconds, and ends at its deadline."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from batchllm_celery import Producer
from batchllm_celery.connection import reminder
from batchllm_celery.errors import RedisDeniedError
from batchllm_celery.queue import make_app
from batchllm_celery.settings import Settings
from tests.support import ValkeyServer, wait_until


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    """A Valkey that a test may spoil."""
    started = ValkeyServer().start()
    yield started
    started.stop()


@pytest.fixture
def producer(server: ValkeyServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Producer]:
    monkeypatch.setattr(reminder, "_DUE", (0.2, 60.0))
    with Producer(redis_url=server.url, namespace="waits") as opened:
        yield opened


def test_a_wait_ends_though_redis_is_away(
    server: ValkeyServer, producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    """At its deadline, with a word in the log long before."""
    batch = producer.submit(["a"], strategy="nobody")
    with pytest.raises(TimeoutError, match="0 of 1 items finished"):
        batch.wait(timeout=0.1)
    server.kill()
    with pytest.raises(TimeoutError, match="Redis has not answered"):
        batch.wait(timeout=1.0)
    assert caplog.text.count("redis.away") == 1


def test_a_submission_ends_at_its_deadline_though_redis_is_away(
    server: ValkeyServer, producer: Producer
) -> None:
    """Whether Redis goes before the batch is made or while its rows are fed."""
    producer.check()

    def rows() -> Iterator[str]:
        yield from (f"row {n}" for n in range(100))
        server.kill()
        yield from (f"row {n}" for n in range(2_000))

    with pytest.raises(TimeoutError, match="deadline of 1 s"):
        producer.submit(rows(), strategy="nobody", deadline=1.0)
    with pytest.raises(TimeoutError, match=r"deadline of 0\.5 s"):
        producer.submit(["a"], strategy="nobody", deadline=0.5)


def test_a_broker_that_is_away_is_told_and_waited_for_until_the_deadline(
    redis_url: str,
    namespace: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The ledger's Redis is there: the messages go nowhere."""
    monkeypatch.setattr(reminder, "_DUE", (0.2, 60.0))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        settings = Settings(redis_url=redis_url, namespace=namespace)
        app = make_app(settings, f"redis://:secret@127.0.0.1:{taken.getsockname()[1]}/0")
        with (
            Producer(settings, app=app) as producer,
            pytest.raises(TimeoutError, match="deadline of 1 s"),
        ):
            producer.submit(["a"], strategy="nobody", deadline=1.0)
    assert "broker.away" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize("right", ["-lpush", "-evalsha"])
def test_a_right_that_is_missing_is_told_at_once(
    server: ValkeyServer, producer: Producer, right: str
) -> None:
    """For a message or for the ledger: waiting would not help."""
    with redis.Redis.from_url(server.url) as client:
        client.execute_command("ACL", "SETUSER", "default", right)
    with pytest.raises(RedisDeniedError, match=r"Rights in Redis"):
        producer.submit(["a"], strategy="nobody")


def test_a_redis_without_a_free_connection_is_told(
    server: ValkeyServer, producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    """`maxclients` is reached: it passes, and until then the log says so."""
    with redis.Redis.from_url(server.url) as admin:
        admin.config_set("maxclients", 1)
        submitted: list[Any] = []
        thread = threading.Thread(
            target=lambda: submitted.append(producer.submit(["a"], strategy="nobody"))
        )
        thread.start()
        wait_until(lambda: "redis.away" in caplog.text)
        # Redis closes the connection as it says so: its words may be lost with it.
        assert any(word in caplog.text for word in ("max number of clients", "Connection lost"))
        admin.config_set("maxclients", 100)
        thread.join(timeout=30)
    assert submitted


def test_results_without_a_worker_say_so_once(
    producer: Producer, caplog: pytest.LogCaptureFixture
) -> None:
    """With the command that starts one."""
    batch = producer.submit(["a"], strategy="nobody", queue="express")

    def end() -> None:
        wait_until(lambda: "batch.no_worker" in caplog.text)
        heard = time.monotonic() + 1.5
        wait_until(lambda: time.monotonic() > heard)
        batch.cancel()

    ending = threading.Thread(target=end)
    ending.start()
    assert [result.success for result in batch.results()] == [False]
    ending.join()
    assert caplog.text.count("batch.no_worker") == 1
    assert "batchllm worker --queue express" in caplog.text
