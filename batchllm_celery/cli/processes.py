"""Processes that `run` and `worker` start: workers and the simulated provider.

Each runs in a session of its own, under the parent-death watch of `parent_death_watch.py`.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from batchllm_celery.errors import BatchLLMError, UsageError
from batchllm_celery.settings import Settings

#: Seconds. A worker that ends earlier is restarted with a growing backoff.
QUICK_DEATH_SECONDS = 10.0
#: Quick deaths that end the command, if no item gets an outcome between them. More than
#: `max_deliveries` (5): after so many deaths an item that kills its workers is quarantined.
MAX_QUICK_DEATHS = 12
#: Deaths before the worker was ready that end the command: the set-up is wrong, not an item.
MAX_UNREADY_DEATHS = 3
_READY = " ready."
#: Seconds before a restart.
_FIRST_BACKOFF, _MAX_BACKOFF = 0.5, 10.0


class FleetError(UsageError):
    """Workers die as soon as they start."""


class ParentPipe:
    """A pipe whose writing end only this process holds: its readers see its end when we die."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def popen(
        self,
        module: str,
        arguments: list[str],
        environment: Mapping[str, str],
        *,
        stdout: IO[bytes] | int | None = None,
        stderr: IO[bytes] | int | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start `python -m MODULE` in a session of its own, so that Ctrl-C reaches only us."""
        return subprocess.Popen(
            [sys.executable, "-m", "batchllm_celery.cli.parent_death_watch", module, *arguments],
            stdin=self._read,
            stdout=stdout,
            stderr=stderr,
            env=dict(environment),
            start_new_session=True,
        )

    def close(self) -> None:
        for end in (self._read, self._write):
            with contextlib.suppress(OSError):
                os.close(end)


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment of this process, with these settings.

    Without a Redis URL each process attaches to the embedded Valkey, and so keeps it running while
    it drains after our death.
    """
    environment = {**os.environ}
    for name, value in settings:
        variable = f"BATCHLLM_{name.upper()}"
        environment.pop(variable, None)
        if value is not None:
            environment[variable] = str(value)
    return environment


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


@dataclass(slots=True)
class _Worker:
    number: int
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restart_at: float = math.inf
    """Monotonic time of the next start; infinity before the first one."""
    quick_deaths: int = 0
    log_start: int = 0
    has_lived: bool = False
    """Whether a process of it lived `QUICK_DEATH_SECONDS`: its module can be imported then."""


class Fleet:
    """Worker processes, restarted when they die, until they are drained.

    Args:
        count: the number of workers.
        environment: returns the environment of worker `i`, counted from 1.
        log_dir: the folder of the logs `worker-I.log`. Default: our own standard error.
        name: prefix of the Celery nodes' names; our process id follows it.
        clock: monotonic time in seconds; for tests.
    """

    def __init__(
        self,
        count: int,
        environment: Callable[[int], Mapping[str, str]],
        *,
        log_dir: Path | None = None,
        name: str = "batchllm",
        loglevel: str = "INFO",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.deaths = 0
        self.log_dir = log_dir
        self._environment = environment
        self._name = name
        self._loglevel = loglevel
        self._clock = clock
        self._pipe = ParentPipe()
        self._workers = [_Worker(number) for number in range(1, count + 1)]
        self._draining = False
        self._quick_deaths = 0
        self._unready_deaths = 0
        self.started = False

    @property
    def pids(self) -> list[int]:
        """Process ids of the living workers."""
        return [process.pid for process in self._living()]

    def _living(self) -> list[subprocess.Popen[bytes]]:
        started = [worker.process for worker in self._workers if worker.process is not None]
        return [process for process in started if process.poll() is None]

    def start(self, count: int | None = None) -> None:
        """Start workers until `count` have been started; default all. Repeating it is harmless."""
        self.started = True
        for worker in self._workers[:count]:
            if worker.restart_at == math.inf:
                self._start(worker)

    def _start(self, worker: _Worker) -> None:
        worker.started = self._clock()
        worker.restart_at = 0.0
        # Queues, slots and pool come from the settings.
        arguments = [f"{self._name}-{os.getpid()}-{worker.number}", self._loglevel]
        with self._log(worker) as log:
            worker.process = self._pipe.popen(
                "batchllm_celery.worker",
                arguments,
                self._environment(worker.number),
                stdout=log,
                stderr=log,
            )

    @contextlib.contextmanager
    def _log(self, worker: _Worker) -> Iterator[IO[bytes] | None]:
        if self.log_dir is None:
            yield None
            return
        self.log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(self._log_file(worker), "ab", opener=_open_private) as log:
            worker.log_start = log.tell()
            yield log

    def _log_file(self, worker: _Worker) -> Path:
        assert self.log_dir is not None
        return self.log_dir / f"worker-{worker.number}.log"

    def _log_text(self, worker: _Worker) -> str:
        """The log of the worker's latest process; empty if it does not log to a file."""
        if self.log_dir is None or not self._log_file(worker).exists():
            return ""
        with self._log_file(worker).open("rb") as log:
            log.seek(worker.log_start)
            return log.read().decode(errors="replace")

    def progressed(self) -> None:
        """Note that items got outcomes: the set-up works, whatever kills workers."""
        self._quick_deaths = self._unready_deaths = 0

    def poll(self) -> None:
        """Restart dead workers, after a backoff.

        Raises:
            FleetError: they die again and again, without progress.
        """
        if self._draining or not self.started:
            return
        for worker in self._workers:
            if worker.process is not None and worker.process.poll() is not None:
                self._note_death(worker)
            if worker.process is None and self._clock() >= worker.restart_at:
                self._start(worker)

    def _note_death(self, worker: _Worker) -> None:
        assert worker.process is not None
        quick = self._clock() - worker.started < QUICK_DEATH_SECONDS
        if worker.process.returncode == os.EX_CONFIG and not worker.has_lived:
            raise FleetError(f"a worker can't import its --app{self._last_line(worker)}")
        worker.has_lived |= not quick
        worker.quick_deaths = worker.quick_deaths + 1 if quick else 0
        self._quick_deaths += quick
        self._unready_deaths += self.log_dir is not None and _READY not in self._log_text(worker)
        self.deaths += 1
        worker.process = None
        if (
            max(self._quick_deaths / MAX_QUICK_DEATHS, self._unready_deaths / MAX_UNREADY_DEATHS)
            >= 1
        ):
            raise FleetError(f"the workers die as soon as they start{self._last_line(worker)}")
        backoff = min(_FIRST_BACKOFF * 2 ** max(0, worker.quick_deaths - 1), _MAX_BACKOFF)
        worker.restart_at = self._clock() + backoff

    def _last_line(self, worker: _Worker) -> str:
        """The last line of the worker's log, and the log's path."""
        lines = [line.strip() for line in self._log_text(worker).splitlines() if line.strip()]
        return f": {lines[-1][:200]} (log: {self._log_file(worker)})" if lines else ""

    def drain(self) -> None:
        """Send SIGTERM to all workers: calls in flight finish, no new call starts."""
        self._draining = True
        self._signal(signal.SIGTERM)

    def ended(self) -> bool:
        """Whether all workers have ended."""
        return not self._living()

    def wait(self, timeout: float) -> bool:
        """Wait for all workers to end. Returns False if some run after `timeout` seconds."""
        deadline = self._clock() + timeout
        while not self.ended():
            if self._clock() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """Send SIGKILL to all workers and to the children of their pools."""
        self._draining = True
        self._signal(signal.SIGKILL)
        for worker in self._workers:
            if worker.process is not None:
                worker.process.wait()
        self._pipe.close()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._living():
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                else:
                    process.send_signal(number)


class SimulatedProviderProcess:
    """The simulated provider of `--model simulated`, ended together with this process.

    Args:
        config: the JSON of a `SimulationConfig`.
    """

    def __init__(self, config: str) -> None:
        self._pipe = ParentPipe()
        self._process = self._pipe.popen(
            "batchllm_celery.simulation", [config], os.environ, stdout=subprocess.PIPE
        )

    def wait_for_url(self, timeout: float = 10.0) -> str:
        """Where it listens.

        Raises:
            UsageError: it did not start within `timeout` seconds.
        """
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        words = self._process.stdout.readline().decode().split() if ready else []
        if not words or not words[-1].startswith("http"):
            self.close()
            raise UsageError("the simulated provider did not start")
        return words[-1]

    def check(self) -> None:
        """Check that it runs: without it every call would fail, and so its row.

        Raises:
            BatchLLMError: it has ended.
        """
        if (code := self._process.poll()) is not None:
            raise BatchLLMError(f"the simulated provider has ended (exit code {code})")

    def close(self) -> None:
        """Stop it."""
        self._process.terminate()
        try:
            self._process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._pipe.close()
