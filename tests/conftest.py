"""Fixtures of the whole suite: a real Valkey, a key prefix of its own for every test."""

from __future__ import annotations

import logging
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from importlib.metadata import entry_points

import hypothesis
import pytest

from batchllm_celery.connection import Connection
from tests.support import ValkeyServer, keys_without_ttl

if not entry_points(group="pytest11", name="batchllm"):
    # The package was installed before it had the plugin.
    pytest_plugins = ["batchllm_celery.testing.plugin"]

# A shell that starts us in the background has Ctrl-C ignored, here and in all that we start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# What the caller's terminal and language are decides nothing, here and in all that we start.
for name in (
    *("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLORTERM"),
    *("TTY_COMPATIBLE", "TTY_INTERACTIVE", "CI", "LANG", "LANGUAGE", "TZ"),
    *(name for name in os.environ if name.startswith("LC_")),
):
    os.environ.pop(name, None)
os.environ |= {"TERM": "xterm", "LC_ALL": "C.UTF-8"}

# A slow machine is no failure: pytest's own timeout ends what hangs.
hypothesis.settings.register_profile(
    "suite", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("suite")


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What `--dist loadgroup` keeps on one process: each file of quick tests. Tests that start
    processes wait a lot, and are spread one by one, unless their file names a group."""
    for item in items:
        path = item.nodeid.partition("::")[0]
        quick = path.split("/")[1] not in ("acceptance", "integration")
        if quick and item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(path))


@pytest.fixture(autouse=True)
def _as_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The log names a bug once a minute for each place, and blanks each secret that was in use: no
    test finds what another one left."""
    monkeypatch.setattr("batchllm_celery.strategies.failures._logged", {})
    monkeypatch.setattr("batchllm_celery.redaction._kept", set())


@pytest.fixture(autouse=True)
def _log_levels_as_they_were() -> Iterator[None]:
    """A worker in a test's thread sets the root logger to ERROR, and leaves it so."""
    loggers = [logging.getLogger(name) for name in (None, "celery", "batchllm_celery")]
    before = [(logger.level, logger.disabled, logger.propagate) for logger in loggers]
    yield
    for logger, (level, disabled, propagate) in zip(loggers, before, strict=True):
        logger.setLevel(level)
        logger.disabled, logger.propagate = disabled, propagate


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
