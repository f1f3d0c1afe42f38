"""What the benchmarks share: a server, workers of the product, their CPU time, one table."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import redis

from batchllm_celery import Batch, ProcessorConfig, Producer, Quota, QuotaLimits
from batchllm_celery.keys import Keys
from tests.support import ValkeyServer

ROOT = Path(__file__).parents[1]
BENCH = ROOT / ".bench"
NAMESPACE = "bench"
PATIENCE_SECONDS = 900.0
QUIET = ("--without-mingle", "--without-gossip", "--without-heartbeat", "-l", "warning")

#: A limit that holds nobody up: the limiter does all its work, and never says no.
UNHINDERED = Quota(name="bench", limits=QuotaLimits(requests_per_minute=60e9))


@dataclass(frozen=True)
class Notes:
    """What one worker process told: see `bench_app`."""

    pid: int
    first: float
    cpu: float
    last: float
    calls: int
    most_in_flight: int


class Lab:
    """A Valkey of its own and the workers on it; a context manager that ends them all.

    Args:
        url: where workers find Redis, in place of the Valkey's own (a proxy, say).
    """

    def __init__(self, url: Callable[[ValkeyServer], str] | None = None) -> None:
        self.server = ValkeyServer()
        self._url = url or (lambda server: server.url)
        self.folder = Path(tempfile.mkdtemp(prefix="bench-"))
        self.workers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Lab:
        self.server.start()
        self.url = self._url(self.server)
        self.client = redis.Redis.from_url(self.server.url)
        self.producer = Producer(redis_url=self.server.url, namespace=NAMESPACE)
        return self

    def __exit__(self, *_: object) -> None:
        self.stop_workers()
        self.producer.close()
        self.client.close()
        self.server.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- workers

    def start_worker(self, *options: str, slots: int, **environ: str) -> subprocess.Popen[bytes]:
        """A worker as `batchllm worker` starts it; with options a plain `celery worker`."""
        name = f"w{len(self.workers)}"
        command = [sys.executable, "-m", "batchllm_celery.worker", name, "WARNING"]
        if options:
            plain = [sys.executable, "-m", "celery", "-A", "batchllm_celery", "worker", *QUIET]
            command = [*plain, "-n", f"{name}@bench", *options]
        ours = {
            "BATCHLLM_REDIS_URL": self.url,
            "BATCHLLM_NAMESPACE": NAMESPACE,
            "BATCHLLM_APP": "benchmarks.bench_app",
            "BATCHLLM_SLOTS": str(slots),
            "BENCH_NOTES": str(self.folder),
            "PYTHONPATH": str(ROOT),
        }
        worker = subprocess.Popen(
            command,
            env=os.environ | ours | environ,
            cwd=self.folder,
            start_new_session=True,
            stdout=subprocess.DEVNULL,
        )
        self.workers.append(worker)
        return worker

    def wait_for_workers(self, count: int) -> None:
        """Until so many have said that they are there."""
        wait(lambda: len(self.producer.workers()) >= count, self.workers, interval=0.2)

    def stop_workers(self) -> None:
        for worker in self.workers:
            if worker.poll() is None:
                worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            try:
                worker.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        self.workers.clear()

    def notes(self) -> list[Notes]:
        """What the worker processes have told so far."""
        return [_notes(path) for path in sorted(self.folder.glob("*.notes"))]

    # -- batches

    def submit(
        self,
        items: int,
        *,
        seconds: float,
        items_per_task: int | None = None,
        quota: Quota = UNHINDERED,
        **options: Any,
    ) -> Batch:
        """`items` prompts of some hundred characters for the strategy `sleepy`."""
        return self.producer.submit(
            prompts(items),
            strategy="sleepy",
            params={"seconds": seconds},
            quota=quota,
            items_per_task=items_per_task,
            max_outstanding=10_000_000,
            config=ProcessorConfig(),
            **options,
        )

    def finished(self, batch: Batch) -> int:
        """Outcomes in the stream: a command that costs no script call."""
        return int(self.client.xlen(Keys(NAMESPACE).batch(batch.id).out))

    def wait(self, batch: Batch, items: int) -> None:
        wait(lambda: self.finished(batch) >= items, self.workers)

    def script_calls(self) -> int:
        """Scripts that Redis ran since `forget_calls`: round trips of our own."""
        stats = self.client.info("commandstats").get("cmdstat_evalsha", {})
        return int(stats.get("calls", 0))

    def forget_calls(self) -> None:
        self.client.config_resetstat()


def _notes(path: Path) -> Notes:
    pid, first, cpu, last, calls, most = path.read_text().split()
    return Notes(int(pid), float(first), float(cpu), float(last), int(calls), int(most))


def prompts(count: int) -> Iterable[str]:
    filler = "Say in one sentence what this text is about. " * 5
    return (f"{index}: {filler}" for index in range(count))


def cpu(pid: int) -> float:
    """CPU seconds of a process since it began."""
    spent = psutil.Process(pid).cpu_times()
    return float(spent.user + spent.system)


def memory(pid: int) -> float:
    """Resident MiB of a process."""
    return float(psutil.Process(pid).memory_info().rss) / 2**20


def wait(
    predicate: Callable[[], Any],
    processes: Sequence[subprocess.Popen[Any]] = (),
    interval: float = 0.02,
) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not predicate():
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing happened for {PATIENCE_SECONDS:.0f} s")
        if any(process.poll() is not None for process in processes):
            raise SystemExit("a worker ended early")
        time.sleep(interval)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown; the first row is the head."""
    lines = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
