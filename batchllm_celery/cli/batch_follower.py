"""Follows one batch from its first row to its last result, in the process of `run`.

Three threads talk to Redis, so that the main thread never waits for it and reacts to Ctrl-C:

    feeder  rows -> ledger and queue
    writer  results -> file, fsync, acknowledge
    poller  reads the counters and the quota's state, for the display
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from batchllm_celery.cli.display.progress import Display, RateMeter, View
from batchllm_celery.cli.display.quota_view import doing
from batchllm_celery.cli.display.summary import Failures
from batchllm_celery.cli.processes import Fleet
from batchllm_celery.cli.signals import Interrupts
from batchllm_celery.events import ConnectionLost, ConnectionRestored, Event
from batchllm_celery.files.result_file import Sink
from batchllm_celery.files.rows import Rows
from batchllm_celery.models import BatchProgress

if TYPE_CHECKING:
    from batchllm_celery.limiter import QuotaState
    from batchllm_celery.producer import Batch, Producer

#: Seconds between two updates of the display and checks of the workers.
TICK_SECONDS = 0.1
#: Seconds between two reads of the counters and the quota.
POLL_SECONDS = 0.4
#: Seconds that the last results may take to arrive after the workers have ended.
LAST_RESULTS_SECONDS = 3.0


class RedisWatch:
    """Subscribes to the connection's events; knows since when Redis can't be reached."""

    def __init__(self) -> None:
        self.lost_at: float | None = None
        """Monotonic time, in seconds; None while Redis can be reached."""

    def __call__(self, event: Event) -> None:
        if isinstance(event, ConnectionLost):
            self.lost_at = self.lost_at or time.monotonic()
        elif isinstance(event, ConnectionRestored):
            self.lost_at = None


class BackgroundThread(threading.Thread):
    """A daemon thread that keeps the exception that ended it."""

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
        """Whether it has ended without an exception."""
        return self.ident is not None and not self.is_alive() and self.failure is None


@dataclass(frozen=True, slots=True)
class End:
    """How a batch ended here."""

    progress: BatchProgress
    answered_now: int
    failures: Failures
    interrupted: bool = False
    failure: Exception | None = None


class BatchFollower:
    """Feeds a batch, follows it and writes its results, until it is over, interrupted or broken.

    Args:
        producer, batch: already open.
        rows: the input.
        sink: takes the results.
        fleet: the workers of this command, not yet started.
        display: shows the progress.
        feed: the rows as they are fed, with the outcomes that are known.
        interrupts: the signals that the command has received.
        redis: subscribed to the producer's events.
        drain_seconds: how long, in seconds, calls in flight may take after the first Ctrl-C.
        rows_per_worker: rows for which one worker is enough: another one starts when more have
            been read. Default: all start at once.
        check: called every `TICK_SECONDS`; an exception of it ends the run.
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
        feed: Iterable[Any],
        interrupts: Interrupts,
        redis: RedisWatch,
        drain_seconds: float,
        rows_per_worker: int | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._producer = producer
        self._batch = batch
        self._rows = rows
        self._to_feed = feed
        self._sink = sink
        self._fleet = fleet
        self._display = display
        self._interrupts = interrupts
        self._redis = redis
        self._drain_seconds = drain_seconds
        self._rows_per_worker = rows_per_worker
        self._check = check
        self._progress: BatchProgress = batch.progress()
        self._quota: QuotaState | None = None
        self._meter = RateMeter()
        self._stop_feeding = threading.Event()
        self._stop_writing = threading.Event()
        self._written = 0
        self._answers = 0
        self._empty_reads = 0
        self._failures = Failures()
        self._feeder = BackgroundThread("feeder", self._feed)
        self._writer = BackgroundThread("writer", self._write)
        self._poller = BackgroundThread("poller", self._poll)

    # -- the three threads ------------------------------------------------------------------------

    def _feed(self) -> None:
        self._batch.feed(self._to_feed, stop=self._stop_feeding)

    def _write(self) -> None:
        while not self._take(timeout=0.25) and not self._stop_writing.is_set():
            pass

    def _take(self, timeout: float) -> bool:
        """Write the results that have arrived. Returns whether no more can arrive."""
        may_end = self._feeder.done and not self._stop_feeding.is_set()
        over = may_end and no_more(self._batch.progress())
        results = self._batch.take(max=1000, timeout=0.0 if over else timeout)
        if not results:
            self._empty_reads += 1
            return over
        self._empty_reads = 0
        self._sink.write(results)
        if (receipt := self._sink.sync()) is not None:
            self._batch.acknowledge(receipt)
        self._failures.note(result.line for result in results)
        self._written += len(results)
        self._answers += sum(result.line.get("attempts", 0) > 0 for result in results)
        self._fleet.progressed()
        return False

    def _poll(self) -> None:
        name = self._batch.spec.quota
        while not self._stop_writing.is_set():
            self._progress = self._batch.progress()
            self._quota = self._producer.quota(name) if name else None
            time.sleep(POLL_SECONDS)

    # -- the main thread --------------------------------------------------------------------------

    def follow(self) -> End:
        """Run until the batch is over, the first Ctrl-C has drained it, or a thread failed."""
        for thread in (self._feeder, self._writer, self._poller):
            thread.start()
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
        for thread in (self._feeder, self._writer, self._poller):
            if thread.failure is not None:
                raise thread.failure
        if self._check is not None:
            self._check()
        # A batch that an earlier run has finished needs no worker.
        if self._fleet.started or not (self._batch.resumed and self._progress.is_over):
            self._fleet.start(self._workers_needed())
            self._fleet.poll()
        self._display.update(self._view())
        time.sleep(TICK_SECONDS)

    def _workers_needed(self) -> int | None:
        """How many are to be started; None for all."""
        if self._rows_per_worker is None:
            return None
        return max(1, math.ceil(self._progress.fed / self._rows_per_worker))

    def _view(self) -> View:
        progress = self._progress
        # Calls alone are a rate, from the first answer on: bad rows and known answers cost no time.
        rate = self._meter.update(self._answers) if self._answers else 0.0
        quota = self._quota
        if quota is not None and quota.configured and quota.allowed_per_minute:
            rate = min(rate, quota.allowed_per_minute / 60)  # it begins with a burst
        return View(
            progress=progress,
            total=progress.total or self._estimated_total(progress),
            rate=rate,
            doing=self._doing(progress),
            estimated=progress.total is None,
            counted=self._meter.counted,
        )

    def _estimated_total(self, progress: BatchProgress) -> int | None:
        """The number of all items, estimated by the share of the input that has been read."""
        fraction = self._rows.fraction_read
        if not fraction or fraction < 0.01 or not progress.fed:
            return None
        return max(progress.fed, round(progress.fed / fraction))

    def _doing(self, progress: BatchProgress) -> str:
        if (since := self._redis.lost_at) is not None:
            return f"waiting for Redis, unreachable for {time.monotonic() - since:.0f} s"
        if self._interrupts.count:
            return "stopping: waiting for the calls in flight"
        return doing(progress, self._quota, time.time())

    # -- the end ----------------------------------------------------------------------------------

    def _drain(self, failure: Exception | None) -> None:
        """Start no call, write those in flight. A second Ctrl-C stops the waiting."""
        if failure is None:
            self._display.say(
                "Stopping: waiting for the calls in flight. Ctrl-C again stops at once."
            )
        self._stop_feeding.set()
        pause = BackgroundThread("pause", self._pause)
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
        """Pause the batch, so that workers of other machines start no call either."""
        if not self._progress.is_over and not self._progress.state.stopped:
            self._batch.pause()

    def _has_everything(self, pause: BackgroundThread, since: float) -> bool:
        """Whether the last results are written: two reads in a row returned nothing."""
        if self._writer.failure is not None or since > LAST_RESULTS_SECONDS:
            return True
        return not pause.is_alive() and not self._progress.in_flight and self._empty_reads >= 2

    def _end(self, failure: Exception | None, interrupted: bool) -> End:
        self._stop_writing.set()
        self._writer.join(timeout=LAST_RESULTS_SECONDS)
        progress = self._progress
        if self._redis.lost_at is None and self._interrupts.count < 2:
            last = BackgroundThread("last counters", self._read_counters)
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

    def _read_counters(self) -> None:
        self._progress = self._batch.progress()


def no_more(progress: BatchProgress) -> bool:
    """Whether no outcome can follow those that are in the stream now."""
    if progress.is_over:
        return True
    return progress.state.stopped and progress.total is None and progress.finished >= progress.fed
