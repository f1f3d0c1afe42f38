"""Processes that `run` and `worker` start: each in its own session, tethered to us by a pipe."""

from __future__ import annotations

import contextlib
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

#: A worker that lives shorter than this is started again more and more slowly.
QUICK_DEATH_SECONDS = 10.0
#: So many quick deaths without any progress between them, and we give up. It must be more than an
#: item that kills its workers may cause before it is quarantined (`max_deliveries`, 5).
MAX_QUICK_DEATHS = 12
#: So many deaths before the worker was ready: the set-up is wrong, no item is to blame.
MAX_UNREADY_DEATHS = 3
_READY = " ready."
_FIRST_BACKOFF, _MAX_BACKOFF = 0.5, 10.0


class FleetError(UsageError):
    """Workers die as soon as they start."""


class Tether:
    """A pipe whose writing end only we hold: its readers see the end of file when we are gone."""

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
        """Start `python -m MODULE`, in its own session so that Ctrl-C is ours alone to handle."""
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
    """Our environment, with these settings. Without a Redis URL each process attaches to the
    embedded Valkey itself, and so keeps it up while it drains after our death."""
    environment = {**os.environ}
    for name, value in settings:
        variable = f"BATCHLLM_{name.upper()}"
        environment.pop(variable, None)
        if value is not None:
            environment[variable] = str(value)
    return environment


def worker_arguments(name: str, *, loglevel: str = "INFO") -> list[str]:
    """The command line of one Celery worker: lanes, slots and pool come from its settings."""
    return [
        *("-A", "batchllm_celery", "worker", "-n", f"{name}@%h", "--loglevel", loglevel),
        *("--without-mingle", "--without-gossip"),
    ]


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


@dataclass(slots=True)
class _Worker:
    number: int
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restart_at: float = 0.0
    quick_deaths: int = 0
    log_start: int = 0
    has_lived: bool = False
    """Whether a process of it lived long enough: its module could be imported then."""


class Fleet:
    """Worker processes, kept alive until drained.

    Args:
        count: how many.
        environment: of worker `i` (from 1).
        log_dir: where each writes `worker-I.log`; None: to our own standard error.
        name: of the Celery nodes; made unique by our process id.
        clock: for tests.
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
        self._tether = Tether()
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

    def start(self) -> None:
        """Start all workers."""
        self.started = True
        for worker in self._workers:
            self._start(worker)

    def _start(self, worker: _Worker) -> None:
        worker.started = self._clock()
        worker.restart_at = 0.0
        arguments = worker_arguments(
            f"{self._name}-{os.getpid()}-{worker.number}", loglevel=self._loglevel
        )
        with self._log(worker) as log:
            worker.process = self._tether.popen(
                "celery", arguments, self._environment(worker.number), stdout=log, stderr=log
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

    def _words(self, worker: _Worker) -> str:
        """What the worker's latest process has logged; empty where it logs elsewhere."""
        if self.log_dir is None or not self._log_file(worker).exists():
            return ""
        with self._log_file(worker).open("rb") as log:
            log.seek(worker.log_start)
            return log.read().decode(errors="replace")

    def progressed(self) -> None:
        """Items get their outcomes: whatever kills workers, it is not the set-up."""
        self._quick_deaths = self._unready_deaths = 0

    def poll(self) -> None:
        """Start dead workers again, after a backoff.

        Raises:
            FleetError: when they only die.
        """
        if self._draining or not self.started:
            return
        for worker in self._workers:
            if worker.process is not None and worker.process.poll() is not None:
                self._bury(worker)
            if worker.process is None and self._clock() >= worker.restart_at:
                self._start(worker)

    def _bury(self, worker: _Worker) -> None:
        assert worker.process is not None
        quick = self._clock() - worker.started < QUICK_DEATH_SECONDS
        if worker.process.returncode == os.EX_CONFIG and not worker.has_lived:
            raise FleetError(f"a worker can't import its --app{self._last_words(worker)}")
        worker.has_lived |= not quick
        worker.quick_deaths = worker.quick_deaths + 1 if quick else 0
        self._quick_deaths += quick
        self._unready_deaths += self.log_dir is not None and _READY not in self._words(worker)
        self.deaths += 1
        worker.process = None
        if (
            max(self._quick_deaths / MAX_QUICK_DEATHS, self._unready_deaths / MAX_UNREADY_DEATHS)
            >= 1
        ):
            raise FleetError(f"the workers die as soon as they start{self._last_words(worker)}")
        backoff = min(_FIRST_BACKOFF * 2 ** max(0, worker.quick_deaths - 1), _MAX_BACKOFF)
        worker.restart_at = self._clock() + backoff

    def _last_words(self, worker: _Worker) -> str:
        """The last line of a worker's log, and where the rest is."""
        lines = [line.strip() for line in self._words(worker).splitlines() if line.strip()]
        return f": {lines[-1][:200]} (log: {self._log_file(worker)})" if lines else ""

    def drain(self) -> None:
        """Tell all workers to end: calls in flight may finish, nothing new starts."""
        self._draining = True
        self._signal(signal.SIGTERM)

    def ended(self) -> bool:
        """Whether no worker is left."""
        return not self._living()

    def wait(self, timeout: float) -> bool:
        """Wait for all workers to end; False if some are left after `timeout` seconds."""
        deadline = self._clock() + timeout
        while not self.ended():
            if self._clock() >= deadline:
                return False
            time.sleep(0.05)
        return True

    def kill(self) -> None:
        """End all workers at once, children of their pools included."""
        self._draining = True
        self._signal(signal.SIGKILL)
        for worker in self._workers:
            if worker.process is not None:
                worker.process.wait()
        self._tether.close()

    def _signal(self, number: signal.Signals) -> None:
        for process in self._living():
            with contextlib.suppress(ProcessLookupError):
                if number == signal.SIGKILL:
                    os.killpg(process.pid, number)
                else:
                    process.send_signal(number)


class SimulatedProviderProcess:
    """The simulated provider that `--model simulated` runs against, for as long as we live.

    Args:
        config: the JSON of a `SimulationConfig`.
    """

    def __init__(self, config: str) -> None:
        self._tether = Tether()
        self._process = self._tether.popen(
            "batchllm_celery.simulation", [config], os.environ, stdout=subprocess.PIPE
        )
        self.url = self._read_url()

    def _read_url(self, timeout: float = 10.0) -> str:
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout)
        words = self._process.stdout.readline().decode().split() if ready else []
        if not words or not words[-1].startswith("http"):
            self.close()
            raise UsageError("the simulated provider did not start")
        return words[-1]

    def check(self) -> None:
        """Notice its end: every further call would fail, and count as a failure of its row.

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
        self._tether.close()
