"""A real `celery worker` on `pool_app`, and what its tasks told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import redis
from celery.result import AsyncResult

from tests.integration import pool_app
from tests.support import ValkeyServer, wait_until

ROOT = Path(__file__).parents[2]
POOL = "batchllm_celery.worker.pool:AsyncioPool"
_QUIET = ("--without-mingle", "--without-gossip", "--without-heartbeat")


class PoolWorker:
    """One `celery worker` process.

    Args:
        lab: the broker it serves.
        options: of `celery worker`.
        conf: Celery settings of this worker.
        environ: variables of this worker.
    """

    def __init__(
        self, lab: PoolLab, *options: str, conf: dict[str, Any] | None = None, **environ: str
    ) -> None:
        self.name = f"w{uuid.uuid4().hex[:6]}@test"
        self._log = tempfile.NamedTemporaryFile(suffix=".log", delete=False)  # noqa: SIM115
        pool = () if "-P" in options else ("-P", "custom")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "celery", "-A", "tests.integration.pool_app", "worker"),
                *("-l", "info", "-n", self.name, *_QUIET, *pool, *options),
            ],
            cwd=ROOT,
            env=os.environ
            | {
                "POOL_APP_BROKER": lab.url,
                "POOL_APP_NAMESPACE": lab.namespace,
                "POOL_APP_CONF": json.dumps(conf or {}),
                "CELERY_CUSTOM_WORKER_POOL": POOL,
            }
            | environ,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def ready(self) -> PoolWorker:
        wait_until(lambda: " ready." in self.log() or self.process.poll() is not None, 60)
        assert self.process.poll() is None, self.log()
        return self

    def log(self) -> str:
        return Path(self._log.name).read_text()

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self, timeout: float = 30) -> int:
        return self.process.wait(timeout)

    def stop(self) -> None:
        """End it however it can be ended, with all its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._log.close()
        os.unlink(self._log.name)


class PoolLab:
    """A broker namespace with its workers; a context manager that ends them."""

    def __init__(self, valkey: ValkeyServer) -> None:
        self.url = valkey.url
        self.namespace = f"pool{uuid.uuid4().hex[:8]}"
        self.app = pool_app.make_app(self.url, self.namespace)
        self._client = redis.Redis.from_url(self.url, decode_responses=True)
        self._workers: list[PoolWorker] = []
        self._results: list[AsyncResult[Any]] = []

    def __enter__(self) -> PoolLab:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.stop()
        for result in self._results:
            # One that is collected later would look for the stopped server for 20 seconds.
            result.backend = None  # type: ignore[assignment]
        self.app.close()
        self._client.close()

    def start(self, *options: str, **how: Any) -> PoolWorker:
        worker = PoolWorker(self, *options, **how)
        self._workers.append(worker)
        return worker

    def worker(self, *options: str, **how: Any) -> PoolWorker:
        return self.start(*options, **how).ready()

    def send(self, task: str, *args: Any, **options: Any) -> AsyncResult[Any]:
        result = self.app.send_task(f"tests.integration.pool_app.{task}", args, **options)
        self._results.append(result)
        return result

    def send_many(self, task: str, arguments: list[tuple[Any, ...]]) -> None:
        with self.app.producer_pool.acquire(block=True) as producer:
            for args in arguments:
                self.send(task, *args, producer=producer)

    def told(self, what: str) -> list[list[Any]]:
        rows = self._client.lrange(f"{self.namespace}:celery:told:{what}", 0, -1)
        return [json.loads(row) for row in rows]

    def count(self, what: str) -> int:
        return int(self._client.llen(f"{self.namespace}:celery:told:{what}"))

    def queued(self, queue: str = "pool") -> int:
        """Messages that wait in the broker."""
        return int(self._client.llen(f"{self.namespace}:celery:{queue}"))

    def unacknowledged(self) -> int:
        """Messages that were delivered and not acknowledged."""
        return int(self._client.hlen(f"{self.namespace}:celery:unacked"))
