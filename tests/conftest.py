"""Fixtures of the whole suite: a real Valkey, a key prefix of its own for every test."""

from __future__ import annotations

import signal
import uuid
from collections.abc import AsyncIterator, Iterator

import pytest

from batchllm_celery.connection import Connection
from tests.support import ValkeyServer, keys_without_ttl

# A shell that starts us in the background has Ctrl-C ignored, here and in all that we start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def valkey() -> Iterator[ValkeyServer]:
    """One real Valkey for the session."""
    server = ValkeyServer().start()
    yield server
    server.stop()


@pytest.fixture
def redis_url(valkey: ValkeyServer) -> str:
    return valkey.url


@pytest.fixture
def namespace(redis_url: str) -> Iterator[str]:
    """A fresh key prefix; afterwards every key left under it must have a TTL."""
    name = f"t{uuid.uuid4().hex[:10]}"
    yield name
    assert keys_without_ttl(redis_url, name) == []


@pytest.fixture
async def connection(redis_url: str) -> AsyncIterator[Connection]:
    async with Connection(redis_url) as opened:
        yield opened
