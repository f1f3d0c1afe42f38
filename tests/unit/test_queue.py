"""Where batches are kept for those who hand in a Celery app of their own."""

from __future__ import annotations

import pytest
from celery import Celery

from batchllm_celery import Producer
from batchllm_celery.errors import UsageError
from batchllm_celery.queue import redis_of
from batchllm_celery.settings import Settings
from batchllm_celery.worker import install

NO_SINGLE_REDIS = [
    "amqp://user:secret@host//",
    "sentinel://:secret@a:26379;sentinel://:secret@b:26379",
    "redis://:secret@a/5;redis://:secret@b/5",
    "sqs://",
    "memory://",
    None,
]


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCHLLM_REDIS_URL", raising=False)
    monkeypatch.delenv("CELERY_BROKER_URL", raising=False)


@pytest.mark.parametrize(
    ("broker", "url"),
    [
        ("redis://host:6379/3", "redis://host:6379/3"),
        (
            "rediss://:pw@host/0?ssl_cert_reqs=required",
            "rediss://:pw@host/0?ssl_cert_reqs=required",
        ),
        ("redis+socket:///run/v.sock", "unix:///run/v.sock?db=0"),
        ("redis+socket://:pw@/run/v.sock?virtual_host=2", "unix://:pw@/run/v.sock?db=2"),
    ],
)
def test_the_apps_broker_is_the_ledgers_redis(broker: str, url: str) -> None:
    """Messages and ledger in one Redis, for the producer as for the worker."""
    app = Celery("host", broker=broker, set_as_current=False)
    assert redis_of(app, Settings()) == url
    with Producer(app=app) as producer:
        assert producer.url == url
    assert install(app) is app


@pytest.mark.parametrize("broker", NO_SINGLE_REDIS)
def test_another_broker_needs_a_redis_url(broker: str | None) -> None:
    """Never a Redis of our own that the other side does not know of; the password is not shown."""
    app = Celery("host", broker=broker, set_as_current=False)
    with pytest.raises(UsageError, match="give redis_url") as caught:
        redis_of(app, Settings())
    assert "secret" not in str(caught.value)
    with Producer(app=app) as producer, pytest.raises(UsageError, match="give redis_url"):
        producer.check()
    if broker is not None:  # else it may still be configured
        with pytest.raises(UsageError, match="give redis_url"):
            install(app)


@pytest.mark.parametrize("broker", NO_SINGLE_REDIS)
def test_what_is_said_goes_before_the_broker(broker: str | None) -> None:
    """As an argument or in the settings."""
    app = Celery("host", broker=broker, set_as_current=False)
    assert redis_of(app, Settings(), "redis://here") == "redis://here"
    assert redis_of(app, Settings(redis_url="redis://there")) == "redis://there"
    assert install(app, redis_url="redis://here") is app
