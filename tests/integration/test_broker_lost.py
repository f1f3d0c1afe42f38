"""A broker that dies while messages are in hand must not take the worker with it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from batchllm_celery.queue import make_app, publish
from batchllm_celery.settings import Settings
from tests.support import ValkeyServer, wait_until


@pytest.fixture
def broker() -> Iterator[ValkeyServer]:
    server = ValkeyServer().start()
    yield server
    server.stop()


@pytest.fixture
def connection(broker: ValkeyServer) -> Any:
    """A worker's connection to the broker."""
    app = make_app(Settings(redis_url=broker.url), broker.url)
    publish(app, "b", [0])
    return app.connection_for_read()


def test_messages_in_hand_of_a_dead_broker_do_not_break_its_connection(
    broker: ValkeyServer, connection: Any
) -> None:
    """Closing the connection to a broker that was killed raises nothing, although messages can't
    be given back: Celery would end its consumer on any other error than a connection's."""
    assert wait_until(lambda: connection.default_channel.basic_get("default")) is not None
    broker.kill()

    connection.transport.client = None  # as Celery's `collect` leaves it, now and then
    connection.close()


def test_a_late_acknowledgement_on_a_closed_channel_is_a_connection_error(connection: Any) -> None:
    """A task that ends after the broker was lost acknowledges on the old channel; Celery logs a
    connection's error there, and goes on."""
    message = wait_until(lambda: connection.default_channel.basic_get("default"))
    connection.default_channel._disconnect_pools()
    message.channel.connection = None  # what Celery leaves of the channel of a lost broker

    with pytest.raises(connection.connection_errors):
        message.ack()
