"""A million rows through `producer.stream`: how fast they are taken, how much memory they need.

    python -m benchmarks.stream_million [ROWS]      default 1,000,000

One worker process whose strategy answers at once; the rows never exist all at once. Prints how
fast rows are enqueued and answered, and the peak memory of producer, worker and Valkey, at a
quarter of the rows and at the end: what is bounded does not grow between the two.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import redis

from batchllm_celery import LLMCallStrategy, Producer, strategy
from batchllm_celery.settings import Settings
from batchllm_celery.testing import mock_strategy
from tests.support import ValkeyServer

ROWS = 1_000_000
SLOTS = 500
MAX_OUTSTANDING = 20_000
MEGABYTE = 1024 * 1024


@strategy("instant")
def instant() -> LLMCallStrategy[str]:
    return mock_strategy()


@dataclass
class Peaks:
    """Peak memory of the three, sampled; in bytes."""

    producer: int = 0
    worker: int = 0
    valkey: int = 0
    stopping: threading.Event = field(default_factory=threading.Event)

    def watch(self, worker: int, url: str) -> None:
        processes = psutil.Process(), psutil.Process(worker)
        with redis.Redis.from_url(url) as client:
            while not self.stopping.wait(0.5):
                self.producer = max(self.producer, processes[0].memory_info().rss)
                self.worker = max(self.worker, processes[1].memory_info().rss)
                self.valkey = max(self.valkey, client.info("memory")["used_memory"])

    def __str__(self) -> str:
        parts = ("producer", self.producer), ("worker", self.worker), ("Valkey", self.valkey)
        return ", ".join(f"{name} {size / MEGABYTE:.0f} MiB" for name, size in parts)


class Feeding:
    """Rows made on demand; knows how many were taken, and when the last one was."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.taken = 0
        self.ended = 0.0

    def __iter__(self) -> Iterator[str]:
        for index in range(self.count):
            self.taken = index + 1
            yield f"question number {index}, padded to what a short prompt has {'.' * 150}"
        self.ended = time.monotonic()


def main() -> None:
    """Run it and print the figures."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    valkey = ValkeyServer().start()
    worker = _start_worker(valkey)
    peaks = Peaks()
    watcher = threading.Thread(target=peaks.watch, args=(worker.pid, valkey.url))
    watcher.start()
    try:
        _stream(rows, valkey, peaks)
    finally:
        peaks.stopping.set()
        watcher.join()
        worker.terminate()
        worker.wait(timeout=60)
        valkey.stop()


def _stream(rows: int, valkey: ValkeyServer, peaks: Peaks) -> None:
    settings = Settings(redis_url=valkey.url, namespace="million", max_outstanding=MAX_OUTSTANDING)
    feeding, seen, began = Feeding(rows), 0, time.monotonic()
    with Producer(settings) as producer:
        _enqueue_alone(producer)
        began = time.monotonic()
        for result in producer.stream(feeding, strategy="instant"):
            assert result.success
            seen += 1
            if seen == rows // 4:
                print(f"{seen:>11,} rows  {peaks}", flush=True)
    took = time.monotonic() - began
    assert seen == rows
    print(f"{seen:>11,} rows  {peaks}")
    print(f"{rows / took:,.0f} rows/s from the first row to the last result, {took:.0f} s; "
          f"max_outstanding {MAX_OUTSTANDING:,}")  # fmt: skip


def _enqueue_alone(producer: Producer, rows: int = 20_000) -> None:
    """How fast rows are stored and enqueued when nobody works on them meanwhile."""
    began = time.monotonic()
    batch = producer.submit(Feeding(rows), strategy="instant", queue="nobody")
    print(f"{rows:,} rows enqueued at {rows / (time.monotonic() - began):,.0f}/s, no worker busy")
    batch.cancel()


def _start_worker(valkey: ValkeyServer) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[1]
    environment = {
        **os.environ,
        "BATCHLLM_REDIS_URL": valkey.url,
        "BATCHLLM_NAMESPACE": "million",
        "BATCHLLM_APP": "benchmarks.stream_million",
        "BATCHLLM_SLOTS": str(SLOTS),
        "PYTHONPATH": str(root),
    }
    command = [sys.executable, "-m", "celery", "-A", "batchllm_celery", "worker"]
    with (Path(tempfile.gettempdir()) / "stream_million.log").open("wb") as log:
        return subprocess.Popen(
            [*command, "--without-mingle", "--without-gossip", "--loglevel", "WARNING"],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip


if __name__ == "__main__":
    main()
