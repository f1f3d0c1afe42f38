"""One batch from its first row to its last result, seen from the process that runs it.

Three threads talk to Redis, so that the main one never waits for it and always hears Ctrl-C:

    feeder   rows -> ledger and queue
    writer   results -> file, fsync, acknowledge
    watcher  counters and the quota's state, for the display
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

from batchllm_celery.cli.fleet import Fleet
from batchllm_celery.cli.inputs import Rows
from batchllm_celery.cli.outfile import Sink
from batchllm_celery.cli.progress_display import Display, RateMeter, View
from batchllm_celery.cli.quota_view import doing
from batchllm_celery.cli.summary import Failures
from batchllm_celery.events import ConnectionLost, ConnectionRestored, Event
from batchllm_celery.models import BatchProgress

if TYPE_CHECKING:
    from batchllm_celery.limiter import QuotaState
    from batchllm_celery.producer import Batch, Producer

TICK_SECONDS = 0.1
WATCH_SECONDS = 0.4
#: After the workers have ended, how long their last results may take to reach us.
LAST_RESULTS_SECONDS = 3.0


class Interrupts:
    """Counts SIGINT, SIGTERM and SIGHUP, and lets nothing else happen on them."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.count = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1  # no lock, no print: a handler interrupts anything

    @contextlib.contextmanager
    def counted(self) -> Iterator[Interrupts]:
        """While inside, signals are counted."""
        before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


class RedisWatch:
    """Listens for the connection's events; knows since when Redis is away."""

    def __init__(self) -> None:
        self.away_since: float | None = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, ConnectionLost):
            self.away_since = self.away_since or time.monotonic()
        elif isinstance(event, ConnectionRestored):
            self.away_since = None


class WorkThread(threading.Thread):
    """A daemon thread that keeps what it failed with."""

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            self._work()
        except Exception as error:
            self.failure = error

    @property
    def done(self) -> bool:
        """Whether it has ended well."""
        return self.ident is not None and not self.is_alive() and self.failure is None


@dataclass(frozen=True, slots=True)
class End:
    """How a session ended."""

    progress: BatchProgress
    answered_now: int
    failures: Failures
    interrupted: bool = False
    failure: Exception | None = None


class RunSession:
    """Feeds, follows and writes one batch until it is over, interrupted or broken.

    Args:
        producer, batch: opened.
        rows: the input.
        sink: takes the results.
        fleet: our own workers, not yet started.
        display: shows how far it is.
        interrupts: counted from outside.
        redis: listens to the producer's events.
        drain_seconds: how long calls in flight may take after the first Ctrl-C.
        check: called now and then; what it raises ends the session.
    """

    def __init__(
        self,
        producer: Producer,
        batch: Batch,
        rows: Rows,
        sink: Sink,
        fleet: Fleet,
        display: Display,
        *,
        interrupts: Interrupts,
        redis: RedisWatch,
        drain_seconds: float,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._producer = producer
        self._batch = batch
        self._rows = rows
        self._sink = sink
        self._fleet = fleet
        self._display = display
        self._interrupts = interrupts
        self._redis = redis
        self._drain_seconds = drain_seconds
        self._check = check
        self._progress: BatchProgress = batch.progress()
        self._quota: QuotaState | None = None
        self._meter = RateMeter()
        self._stop_feeding = threading.Event()
        self._stop_writing = threading.Event()
        self._written = 0
        self._idle_takes = 0
        self._failures = Failures()
        self._feeder = WorkThread("feeder", self._feed)
        self._writer = WorkThread("writer", self._write)
        self._watcher = WorkThread("watcher", self._watch)

    # -- the three threads ------------------------------------------------------------------------

    def _feed(self) -> None:
        self._batch.feed(self._rows, stop=self._stop_feeding)

    def _write(self) -> None:
        while not self._take(timeout=0.25) and not self._stop_writing.is_set():
            pass

    def _take(self, timeout: float) -> bool:
        """Write what has come; whether nothing more can come."""
        may_end = self._feeder.done and not self._stop_feeding.is_set()
        over = may_end and no_more(self._batch.progress())
        results = self._batch.take(max=1000, timeout=0.0 if over else timeout)
        if not results:
            self._idle_takes += 1
            return over
        self._idle_takes = 0
        self._sink.write(results)
        if (receipt := self._sink.sync()) is not None:
            self._batch.acknowledge(receipt)
        self._failures.note(result.line for result in results)
        self._written += len(results)
        self._fleet.progressed()
        return False

    def _watch(self) -> None:
        name = self._batch.spec.quota
        while not self._stop_writing.is_set():
            self._progress = self._batch.progress()
            self._quota = self._producer.quota(name) if name else None
            time.sleep(WATCH_SECONDS)

    # -- the main thread --------------------------------------------------------------------------

    def follow(self) -> End:
        """Run until the batch is over, the first Ctrl-C has drained it, or something broke."""
        for job in (self._feeder, self._writer, self._watcher):
            job.start()
        failure: Exception | None = None
        interrupted = False
        try:
            while not self._writer.done and not interrupted:
                self._tick()
                interrupted = self._interrupts.count > 0
        except Exception as error:
            failure = error
        if failure is not None or interrupted:
            self._drain(failure)
        return self._end(failure, interrupted)

    def _tick(self) -> None:
        for job in (self._feeder, self._writer, self._watcher):
            if job.failure is not None:
                raise job.failure
        if self._check is not None:
            self._check()
        if self._fleet.started or self._needs_workers():
            self._fleet.poll()
        self._display.update(self._view())
        time.sleep(TICK_SECONDS)

    def _needs_workers(self) -> bool:
        """A batch that was finished before needs none, unless its input has changed."""
        if self._batch.resumed and self._progress.is_over:
            return False
        self._fleet.start()
        return True

    def _view(self) -> View:
        progress = self._progress
        return View(
            progress=progress,
            total=progress.total or self._estimated_total(progress),
            rate=self._meter.update(progress.finished),
            written=self._written,
            doing=self._doing(progress),
        )

    def _estimated_total(self, progress: BatchProgress) -> int | None:
        """Items in all, by how much of the input has been read."""
        fraction = self._rows.fraction_read
        if not fraction or fraction < 0.01 or not progress.fed:
            return None
        return max(progress.fed, round(progress.fed / fraction))

    def _doing(self, progress: BatchProgress) -> str:
        if (since := self._redis.away_since) is not None:
            return f"Redis is away for {time.monotonic() - since:.0f} s; waiting for it"
        if self._interrupts.count:
            return "stopping: waiting for the calls in flight"
        return doing(progress, self._quota, time.time())

    # -- the end ----------------------------------------------------------------------------------

    def _drain(self, failure: Exception | None) -> None:
        """Nothing new starts; calls in flight end and are written. A second Ctrl-C cuts it off."""
        if failure is None:
            self._display.say(
                "Stopping: waiting for the calls in flight. Ctrl-C again stops at once."
            )
        self._stop_feeding.set()
        pause = WorkThread("pause", self._pause)
        pause.start()
        self._fleet.drain()
        deadline = time.monotonic() + self._drain_seconds + LAST_RESULTS_SECONDS
        fleet_ended: float | None = None
        while time.monotonic() < deadline and self._interrupts.count < 2:
            if self._fleet.ended():
                fleet_ended = fleet_ended or time.monotonic()
                if self._has_everything(pause, time.monotonic() - fleet_ended):
                    break
            self._display.update(self._view())
            time.sleep(TICK_SECONDS)

    def _pause(self) -> None:
        """Also workers elsewhere start no further call of this batch."""
        if not self._progress.is_over and not self._progress.state.stopped:
            self._batch.pause()

    def _has_everything(self, pause: WorkThread, since: float) -> bool:
        """Whether the last results have been written: two takes in a row brought nothing."""
        if self._writer.failure is not None or since > LAST_RESULTS_SECONDS:
            return True
        return not pause.is_alive() and not self._progress.in_flight and self._idle_takes >= 2

    def _end(self, failure: Exception | None, interrupted: bool) -> End:
        self._stop_writing.set()
        self._writer.join(timeout=LAST_RESULTS_SECONDS)
        progress = self._progress
        if self._redis.away_since is None and self._interrupts.count < 2:
            last = WorkThread("last look", self._look)
            last.start()
            last.join(timeout=LAST_RESULTS_SECONDS)
            progress = self._progress
        finished = progress.is_over and self._writer.failure is None and failure is None
        return End(
            progress=progress,
            answered_now=self._written,
            failures=self._failures,
            interrupted=interrupted and not finished,
            failure=failure,
        )

    def _look(self) -> None:
        self._progress = self._batch.progress()


def no_more(progress: BatchProgress) -> bool:
    """Whether no further outcome can come once what is in the stream has been taken."""
    if progress.is_over:
        return True
    return progress.state.stopped and progress.total is None and progress.finished >= progress.fed
