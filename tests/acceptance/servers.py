"""Servers of a test beside the fleet: a Valkey on TCP, Flower, a browser to look at it."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis

from tests.acceptance.fleet import Fleet
from tests.support import server_binary, wait_until

CHROMIUM = shutil.which("chromium")
_CHROMIUM_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=8000",
    "--window-size=1900,640",
)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def valkey_on_tcp(password: str | None = None) -> Iterator[str]:
    """A Valkey on a loopback port; its URL."""
    port = free_port()
    url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{port}/0"
    config = f"port {port}\nbind 127.0.0.1\nsave ''\nmaxmemory-policy noeviction\n"
    config += f"requirepass {password}\n" if password else ""
    with subprocess.Popen(
        [str(server_binary()), "-"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdin is not None
        process.stdin.write(config)
        process.stdin.close()
        try:
            wait_until(lambda: is_up(url))
            yield url
        finally:
            process.terminate()


def is_up(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.RedisError:
        return False


@dataclass(frozen=True)
class Flower:
    """A running Flower as its users reach it."""

    port: int
    user: str = "ann"
    password: str = "FLOWERPASS-5512"

    @property
    def credentials(self) -> str:
        return f"{self.user}:{self.password}"

    def get(self, path: str, *, authorised: bool = True) -> str:
        """A page or an answer of the API."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}")
        if authorised:
            token = base64.b64encode(self.credentials.encode()).decode()
            request.add_header("Authorization", f"Basic {token}")
        with urllib.request.urlopen(request, timeout=20) as reply:
            text: str = reply.read().decode()
            return text

    def json(self, path: str) -> Any:
        return json.loads(self.get(path))

    def status(self, path: str, *, authorised: bool) -> int:
        try:
            self.get(path, authorised=authorised)
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def is_up(self) -> bool:
        try:
            return self.get("/healthcheck") == "OK"
        except OSError:
            return False

    def sees_workers(self, count: int) -> bool:
        """Whether the events of so many workers arrive."""
        workers = self.json("/workers?json=1")["data"]
        return sum(bool(worker["status"]) for worker in workers) >= count

    def tasks(self) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.json("/api/tasks?limit=100000")
        return found

    def browse(self, path: str, *arguments: str) -> str:
        """The page as a browser has it once its scripts have run."""
        assert CHROMIUM is not None
        url = f"http://{self.credentials}@127.0.0.1:{self.port}{path}"
        with tempfile.TemporaryDirectory(prefix="chromium-") as profile:
            ended = subprocess.run(
                [CHROMIUM, *_CHROMIUM_FLAGS, f"--user-data-dir={profile}", *arguments, url],
                capture_output=True,
                text=True,
                timeout=60,
                check=True,
            )
        return ended.stdout

    def screenshot(self, path: str, file: Path) -> None:
        self.browse(path, f"--screenshot={file}")


def start_flower(fleet: Fleet) -> Flower:
    """`batchllm flower` on a free port; returns when it answers."""
    flower = Flower(free_port())
    fleet.env["BATCHLLM_FLOWER_BASIC_AUTH"] = flower.credentials
    fleet.start("flower", "--port", str(flower.port), name="flower")
    wait_until(flower.is_up, timeout=40, interval=0.2)
    return flower
