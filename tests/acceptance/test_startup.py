"""Workers and their probes while Redis is away: before the start, and in mid-run."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.acceptance.conftest import StartProvider
from tests.acceptance.fleet import Fleet, read_results, write_rows
from tests.support import ValkeyServer, wait_until

COMMANDS = {
    "batchllm worker": lambda fleet: fleet.start("worker", "--slots", "20", name="worker"),
    "celery worker": lambda fleet: fleet.start_celery_worker(name="worker"),
    "celery worker -P processes": lambda fleet: fleet.start_celery_worker(
        "-P", "processes", "-c", "2", name="worker"
    ),
    "celery worker -P threads": lambda fleet: fleet.start_celery_worker(
        "-P", "threads", "-c", "4", name="worker"
    ),
}

Start = Callable[[Fleet], subprocess.Popen[str]]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    """A Valkey of the test's own that has not been started."""
    folder = tmp_path / "valkey"
    folder.mkdir()
    server = ValkeyServer(folder)
    yield server
    server.stop()


@pytest.fixture
def waiting(tmp_path: Path, server: ValkeyServer, provide: StartProvider) -> Iterator[Fleet]:
    """A fleet whose Redis is that Valkey, and whose workers touch files for probes."""
    fleet = Fleet(
        tmp_path,
        server.url,
        "startup",
        BATCHLLM_HEARTBEAT_FILE=str(tmp_path / "alive"),
        BATCHLLM_HEARTBEAT_SECONDS="0.2",
        BATCHLLM_LEASE_SECONDS="2",
        BATCHLLM_SIMULATED_URL=provide().url,
    )
    yield fleet
    fleet.stop()


def touched(path: Path, times: int = 3) -> None:
    """Wait until a file has been touched so many times more."""
    seen: set[int] = set()

    def look() -> bool:
        if path.exists():
            seen.add(path.stat().st_mtime_ns)
        return len(seen) > times

    wait_until(look)


def rests(path: Path) -> None:
    """Wait until a file is 2 s older than its neighbour, which goes on."""
    alive = path.with_name(path.name.removesuffix(".ready"))
    wait_until(lambda: alive.stat().st_mtime - path.stat().st_mtime > 2)


def answers(fleet: Fleet, count: int, batch_id: str) -> list[dict[str, Any]]:
    """Submit rows and read their results: somebody works."""
    rows = write_rows(fleet.folder / f"{batch_id}.jsonl", count)
    submitted = fleet.run("submit", str(rows), "--model", "simulated", "--batch-id", batch_id)
    assert submitted.returncode == 0, submitted.stderr
    out = fleet.folder / f"{batch_id}.out.jsonl"
    ended = fleet.run("results", batch_id, "--follow", "-o", str(out))
    assert ended.returncode == 0, ended.stderr
    return read_results(out)


@pytest.mark.parametrize("start", COMMANDS.values(), ids=COMMANDS)
def test_a_worker_started_before_redis_waits_for_it(
    start: Start, waiting: Fleet, server: ValkeyServer
) -> None:
    """It lives for probes, is not ready, logs one warning, and works once Redis has come."""
    alive = waiting.folder / "alive"
    worker = start(waiting)
    wait_until(lambda: "redis.waiting" in waiting.said("worker"))
    touched(alive, times=10)
    assert not alive.with_name("alive.ready").exists()
    assert waiting.said("worker").count("redis.waiting") == 1
    assert "Cannot connect" not in waiting.said("worker")
    server.start()
    assert len(answers(waiting, 20, "late")) == 20
    assert worker.poll() is None
    touched(alive.with_name("alive.ready"))
    touched(alive)


@pytest.mark.parametrize("name", ["batchllm worker", "celery worker"])
def test_a_worker_that_waits_for_redis_can_be_stopped(name: str, waiting: Fleet) -> None:
    """SIGTERM ends the wait at once; what had nothing to do ends in order."""
    worker = COMMANDS[name](waiting)
    wait_until(lambda: "redis.waiting" in waiting.said("worker"))
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(timeout=20) == 0


def test_redis_away_in_mid_run_restarts_no_worker(waiting: Fleet, server: ValkeyServer) -> None:
    """The file for liveness is touched on, the one for readiness rests until Redis is back."""
    server.start()
    worker = COMMANDS["batchllm worker"](waiting)
    alive = waiting.folder / "alive"
    assert len(answers(waiting, 5, "before")) == 5
    server.kill()
    rests(alive.with_name("alive.ready"))
    touched(alive, times=10)
    server.start()
    touched(alive.with_name("alive.ready"))
    assert worker.poll() is None
    assert len(answers(waiting, 5, "after")) == 5
    assert "workers die" not in waiting.said("worker")


@pytest.mark.parametrize("name", ["batchllm worker", "celery worker"])
def test_what_waiting_cannot_cure_ends_the_worker(
    name: str, waiting: Fleet, server: ValkeyServer
) -> None:
    """A Redis that wants a password says so in one line, and the worker ends."""
    server.start()
    with redis.Redis.from_url(server.url) as client:
        client.config_set("requirepass", "Open-Sesame-1")
    worker = COMMANDS[name](waiting)
    assert worker.wait(timeout=60) != 0
    told = [line for line in waiting.said("worker").splitlines() if "can't be used" in line]
    assert len(told) == 1
    assert "uthentication" in told[0]
    with redis.Redis.from_url(server.url, password="Open-Sesame-1") as client:
        client.config_set("requirepass", "")


def test_a_silent_redis_is_waited_for_too(waiting: Fleet) -> None:
    """A port that accepts and never answers is a Redis that is away."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        waiting.env["BATCHLLM_REDIS_URL"] = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        worker = COMMANDS["batchllm worker"](waiting)
        wait_until(lambda: "redis.waiting" in waiting.said("worker"))
        touched(waiting.folder / "alive")
        assert worker.poll() is None


def test_a_file_that_cannot_be_touched_is_named_once(waiting: Fleet, server: ValkeyServer) -> None:
    """The worker works on, and says why its probe will fail."""
    server.start()
    waiting.env["BATCHLLM_HEARTBEAT_FILE"] = os.fspath(waiting.folder / "nowhere" / "alive")
    COMMANDS["celery worker"](waiting)
    assert len(answers(waiting, 5, "blind")) == 5
    assert waiting.said("worker").count("heartbeat_file.failed") == 2  # alive, and alive.ready
