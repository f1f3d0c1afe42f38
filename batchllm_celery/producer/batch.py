"""A submitted batch: follow it, steer it, take its results."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

from batchllm_celery.connection import Reminder
from batchllm_celery.errors import FailureKind, InputError, UsageError, describe
from batchllm_celery.files.item_ids import SeenIds
from batchllm_celery.files.requests import Requests
from batchllm_celery.files.tables import to_arrow, to_pandas, to_polars
from batchllm_celery.ledger import Ledger, Outcome
from batchllm_celery.ledger import Row as Stored
from batchllm_celery.ledger.workers import list_workers
from batchllm_celery.models import (
    BadRow,
    BatchProgress,
    BatchResult,
    BatchSpec,
    TContext,
    TOutput,
    WorkItemResult,
)
from batchllm_celery.producer.continuing import (
    Answered,
    Questions,
    as_json,
    identity_of_bad,
    key_of,
    known_of,
)
from batchllm_celery.producer.outputs import Outputs
from batchllm_celery.producer.requests import prepare
from batchllm_celery.producer.rows import Row, as_payload, refuse_single
from batchllm_celery.producer.session import Session
from batchllm_celery.producer.steps import (
    Blocking,
    NextRows,
    Sleep,
    Step,
    aiterate,
    awaitable,
    blocking,
    iterate,
    warn_on_loop,
)
from batchllm_celery.queue import items_per_task
from batchllm_celery.redaction import printable

logger = logging.getLogger("batchllm_celery")

T = TypeVar("T")

#: Rows that go to the ledger together: few at first, so that work starts at once.
FIRST_CHUNK = 20
CHUNK = 500
#: A chunk is sent although it is not full when its rows took this many seconds to come.
CHUNK_SECONDS = 0.2
READ_COUNT = 1000
READ_BLOCK = 1.0
#: Giving back the right to feed may take so many seconds.
GIVE_BACK_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Delivered:
    """One outcome, and what to acknowledge once it is safe with the consumer."""

    index: int
    line: dict[str, Any]
    """`WorkItemResult.to_json` form."""
    receipt: str


#: How long, in seconds, a submission that failed tries to tell Redis.
GIVE_UP_SECONDS = 5.0


class BatchSteps(Generic[TOutput, TContext]):
    """What a batch's handle does, as coroutines of steps: `Batch` blocks, `AsyncBatch` awaits."""

    def __init__(
        self,
        session: Session,
        spec: BatchSpec,
        *,
        resumed: bool,
        feeding: AsyncExitStack | None = None,
    ) -> None:
        self.id = spec.batch_id
        self.spec = spec
        self.resumed = resumed
        """Whether it existed before it was opened here."""
        self._session = session
        self._outputs = Outputs()
        self._feeding = feeding  # the right to feed, given back when all is fed
        self._cursor = "0"
        # A Redis that is away is waited for until no call may start any more.
        self._feed_until = time.monotonic() + (math.inf if spec.deadline is None else spec.deadline)
        self._locked = False
        self._questions = Questions(spec, session.settings.openai_base_url)

    def type_outputs(self, output_type: Any) -> None:
        """Say what the results' outputs are to be; `Any`: their JSON form."""
        self._outputs = Outputs(output_type)

    def result_of(self, line: Mapping[str, Any]) -> WorkItemResult[TOutput, TContext]:
        """A `Delivered.line` as a result."""
        return self._outputs.read(line)

    # -- feeding ----------------------------------------------------------------------------------

    async def _feed(
        self,
        rows: Iterable[Any] | AsyncIterable[Any],
        *,
        stop: threading.Event | None = None,
        on_fed: Callable[[int], None] | None = None,
        max_outstanding: int | None = None,
    ) -> int | None:
        """Store all rows in the ledger and enqueue them; an index is a row's place in `rows`.

        Blocks while `max_outstanding` items are unfinished (or, under `keep_results=False`,
        unread). Feeding the same rows again is harmless: finished ones are not run again.

        Args:
            rows: strings, mappings with `prompt`, `LLMWorkItem`s, or rows that were bad already;
                an `AsyncBatch` takes an async iterable too.
            stop: set it to end the feeding early, within about 0.2 s.
            on_fed: told the number of rows fed so far, after each chunk.
            max_outstanding: default `settings.max_outstanding`.

        Returns:
            The total; None when it was stopped (the batch then still waits for more rows).

        Raises:
            UsageError: a row can't be taken (its place and id are named), names a strategy
                instance, or has the id of an earlier one.
            BatchConflictError: another process feeds this batch.
        """
        try:
            return await self._feed_all(rows, stop or threading.Event(), on_fed, max_outstanding)
        finally:
            if (feeding := self._feeding) is not None:
                await self._session.step(lambda _: _give_back(feeding))

    async def _feed_all(
        self,
        rows: Iterable[Row | Answered] | AsyncIterable[Row | Answered],
        stop: threading.Event,
        on_fed: Callable[[int], None] | None,
        max_outstanding: int | None,
    ) -> int | None:
        refuse_single(rows)
        iterator = rows.__aiter__() if isinstance(rows, AsyncIterable) else iter(rows)
        fed, size, seen, requests = 0, FIRST_CHUNK, SeenIds(), Requests()
        while not stop.is_set():
            # Chunks grow, and are cut short when the rows come slowly.
            chunk: list[Row | Answered] = await NextRows(iterator, size, CHUNK_SECONDS)
            if not chunk:
                break
            size = min(CHUNK, size * 2)
            stored = [self._stored(row, fed + n, seen, requests) for n, row in enumerate(chunk)]
            wake = await self._until(stop, fed, stored, max_outstanding)
            if wake is None or not await Blocking(partial(self._enqueue, wake, stop)):
                return None
            fed += len(chunk)
            if on_fed is not None:
                on_fed(fed)
        if stop.is_set():
            return None
        await self._on_ledger(lambda ledger: ledger.feeding.seal(self.id, fed))
        return fed

    async def _store(self, first: int, rows: list[Any], max_outstanding: int | None) -> list[int]:
        return await self._session.services.ledger.feeding.feed(
            self.id, first, rows, max_outstanding=max_outstanding
        )

    def _stored(self, row: Row | Answered, index: int, seen: SeenIds, requests: Requests) -> Stored:
        answered, row = (row, row.row) if isinstance(row, Answered) else (None, row)
        try:
            payload = as_payload(row, index, self.spec.strategy)
        except UsageError:
            raise
        except Exception as error:  # a mapping of the program's own, say
            raise InputError(f"item {index} can't be read: {describe(error)}") from error
        if isinstance(payload, BadRow):
            bad = _bad(payload, index)
            return bad if answered is None else known_of(answered, bad.metadata["row"])
        own = payload.item_id == str(index)
        if not (seen.add_index(index) if own else seen.add(payload.item_id)):
            raise InputError(f"item {index}: an earlier row has its item_id {payload.item_id!r}")
        prepare(requests, payload, index, self.spec.strategy)
        with as_json(index, payload.item_id):
            payload.identity = self._questions.identity(payload, key_of(row))
        return payload if answered is None else known_of(answered, payload.identity)

    def _until(
        self, stop: threading.Event, first: int, rows: list[Any], max_outstanding: int | None
    ) -> Step[list[int] | None]:
        async def watched(_: Session) -> list[int] | None:
            task = asyncio.ensure_future(self._store(first, rows, max_outstanding))
            while not task.done():
                await asyncio.wait([task], timeout=0.1)
                late = (
                    time.monotonic() > self._feed_until and self._session.services.connection.lost
                )
                if (stop.is_set() or late) and not task.done():
                    task.cancel()
                    await asyncio.wait([task])
                    if late:
                        raise TimeoutError(late_words(self.spec))
                    return None
            return task.result()

        return self._session.step(watched)

    def _enqueue(self, indexes: list[int], stop: threading.Event | None = None) -> bool:
        """Send the messages; False when it was stopped before all were sent."""
        spec, done = self.spec, 0

        def give_up() -> bool:
            return (stop is not None and stop.is_set()) or time.monotonic() > self._feed_until

        while done < len(indexes):
            size = items_per_task(spec.items_per_task, indexes[done])
            some = indexes[done : done + size]
            if not self._session.publish(
                self.id, some, spec.queue, spec.priority, give_up, spec.strategy.name
            ):
                if time.monotonic() > self._feed_until:
                    raise TimeoutError(late_words(spec))
                return False
            done += size
        return True

    # -- following --------------------------------------------------------------------------------

    async def _progress(self) -> BatchProgress:
        """The batch's counters at this moment.

        Raises:
            BatchNotFoundError: its keys have expired.
        """
        return await self._on_ledger(lambda ledger: ledger.batches.progress(self.id))

    async def _wait(self, timeout: float | None = None) -> BatchProgress:
        """Return when every item has its outcome. A wait without any worker is said in the log.

        Raises:
            TimeoutError: after `timeout` seconds, whether Redis answers or not.
        """
        give_up = math.inf if timeout is None else time.monotonic() + timeout
        pause, reminder = 0.05, Reminder()
        seen = "Redis has not answered"
        while True:
            try:
                progress = await self._session.step(lambda _: self._progress_by(give_up))
            except TimeoutError:
                break
            if progress.is_over:
                return progress
            seen = f"{progress.finished} of {progress.total} items finished"
            await self._session.step(
                lambda session: say_what_is_missing(session, self.spec, reminder)
            )
            if time.monotonic() >= give_up:
                break
            await Sleep(min(pause, max(give_up - time.monotonic(), 0.0)))
            pause = min(pause * 1.5, 0.5)
        raise TimeoutError(f"batch {self.id!r}: {seen} within {timeout:g} s")

    async def _progress_by(self, give_up: float) -> BatchProgress:
        left = None if give_up == math.inf else max(give_up - time.monotonic(), 0.05)
        async with asyncio.timeout(left):
            return await self._session.services.ledger.batches.progress(self.id)

    async def _collect(self, timeout: float | None = None) -> BatchResult[TOutput, TContext]:
        """Wait until every item has its outcome, and return all of them with their sums; for
        batches whose results fit into memory.

        Raises:
            TimeoutError: after `timeout` seconds.
        """
        await self._wait(timeout)
        found = [result async for result in self._results(False, Reminder())]
        return BatchResult(found)

    async def _to_pandas(self) -> Any:
        """The results so far as a pandas DataFrame: the source row's columns, output, its fields,
        error, tokens, cost."""
        return to_pandas(await self._lines())

    async def _to_polars(self) -> Any:
        """The same as a polars DataFrame."""
        return to_polars(await self._lines())

    async def _to_arrow(self) -> Any:
        """The same as an Arrow table."""
        return to_arrow(await self._lines())

    async def _lines(self) -> list[Mapping[str, Any]]:
        """The latest result line of each row, in the order of the rows."""
        lines: dict[int, Mapping[str, Any]] = {}
        after = "0"
        while taken := await self._read(after):
            lines.update((one.index, one.line) for one in taken)
            after = taken[-1].receipt
        return [lines[index] for index in sorted(lines)]

    async def _results(
        self, follow: bool, reminder: Reminder
    ) -> AsyncGenerator[WorkItemResult[TOutput, TContext], None]:
        after = "0"
        while True:
            found, over = await self._session.step(partial(self._next, after, follow, reminder))
            for outcome in found:
                yield self._outputs.read(outcome.line)
            if found:
                after = found[-1].stream_id
            elif over:
                return

    async def _next(
        self, after: str, follow: bool, reminder: Reminder, session: Session
    ) -> tuple[list[Outcome], bool]:
        """The next outcomes, and whether there can be no more after them.

        The counters are read before the stream: an outcome and its count are written in one step.
        """
        batches = session.services.ledger.batches
        over = not follow or (await batches.progress(self.id)).is_over
        if not over:
            await say_what_is_missing(session, self.spec, reminder)
        block = 0.0 if over else READ_BLOCK
        return await batches.results(self.id, after, READ_COUNT, block), over

    async def _read(
        self, after: str = "0", max: int = READ_COUNT, timeout: float = 0.0
    ) -> list[Delivered]:
        """Outcomes after the receipt `after`; a look that changes nothing."""
        return await self._on_ledger(lambda ledger: _read(ledger, self.id, after, max, timeout))

    async def _consume(self) -> None:
        """Become the batch's one consumer, as the first `take` does.

        Raises:
            BatchConflictError: another process is consuming this batch.
        """
        if not self._locked:
            await self._session.step(
                lambda s: s.services.enter(
                    s.services.ledger.batches.lock(self.id, "consumer", wait=1.0)
                )
            )
            self._locked = True

    async def _take(self, max: int = READ_COUNT, timeout: float = 0.25) -> list[Delivered]:
        """The next outcomes, as the batch's one consumer; [] when none came in `timeout` seconds.

        Raises:
            BatchConflictError: another process is consuming this batch.
        """
        await self._consume()
        taken = await self._read(self._cursor, max, timeout)
        if taken:
            self._cursor = taken[-1].receipt
        return taken

    async def _acknowledge(self, receipt: str) -> None:
        """Say that everything up to and including `receipt` is safe with the consumer; without
        `keep_results` it leaves Redis now."""
        await self._on_ledger(lambda ledger: ledger.batches.trim(self.id, receipt))

    # -- steering ---------------------------------------------------------------------------------

    async def _cancel(self) -> BatchProgress:
        """Start no further call; what waits becomes a failure of kind `cancelled`."""
        await self._on_ledger(lambda ledger: ledger.batches.cancel(self.id))
        return await self._progress()

    async def _give_up(self) -> None:
        """Cancel a batch whose rows did not all come: what was fed is all that it has. Says
        nothing where Redis can't be told within `GIVE_UP_SECONDS`."""

        async def end(ledger: Ledger) -> None:
            async with asyncio.timeout(GIVE_UP_SECONDS):
                await ledger.batches.cancel(self.id)
                await ledger.feeding.seal(self.id, 0)

        with contextlib.suppress(Exception):
            await self._on_ledger(end)

    async def _pause(self) -> BatchProgress:
        """Start no further call until `resume`."""
        await self._on_ledger(lambda ledger: ledger.batches.pause(self.id))
        return await self._progress()

    async def _resume(self) -> BatchProgress:
        """Go on after a pause, a parking or a stop; items that a stop ended run again.

        Raises:
            UsageError: the budget is spent.
        """
        await self._on_ledger(lambda ledger: ledger.batches.resume(self.id, self._republish))
        return await self._progress()

    async def _retry_failed(self) -> int:
        """Run the failed items again; how many."""
        reopened = await self._on_ledger(
            lambda ledger: ledger.batches.retry(self.id, self._republish)
        )
        return reopened.items

    async def _republish(self, indexes: list[int]) -> None:
        await asyncio.to_thread(self._enqueue, indexes)

    def _on_ledger(self, work: Callable[[Ledger], Coroutine[Any, Any, T]]) -> Step[T]:
        return self._session.step(lambda session: work(session.services.ledger))


class Batch(BatchSteps[TOutput, TContext]):
    """A batch in Redis. Get one from `Producer.submit`, `Producer.open` or `Producer.attach`.

    Its methods block, and may be called from any thread. On an event loop use `AsyncBatch`.
    """

    feed = blocking(BatchSteps._feed)
    progress = blocking(BatchSteps._progress)
    wait = blocking(BatchSteps._wait)
    collect = blocking(BatchSteps[TOutput, TContext]._collect)
    to_pandas = blocking(BatchSteps._to_pandas)
    to_polars = blocking(BatchSteps._to_polars)
    to_arrow = blocking(BatchSteps._to_arrow)
    read = blocking(BatchSteps._read)
    consume = blocking(BatchSteps._consume)
    take = blocking(BatchSteps._take)
    acknowledge = blocking(BatchSteps._acknowledge)
    cancel = blocking(BatchSteps._cancel)
    give_up = blocking(BatchSteps._give_up)
    pause = blocking(BatchSteps._pause)
    resume = blocking(BatchSteps._resume)
    retry_failed = blocking(BatchSteps._retry_failed)

    def results(self, *, follow: bool = True) -> Results[TOutput, TContext]:
        """Results in completion order, by `for` or by `async for`; reading takes nothing away.

        Args:
            follow: wait for those that are still to come; False: what there is now.
        """
        return Results(self, follow)


class AsyncBatch(BatchSteps[TOutput, TContext]):
    """A batch in Redis, for event loops. Get one from an `AsyncProducer`."""

    feed = awaitable(BatchSteps._feed)
    progress = awaitable(BatchSteps._progress)
    wait = awaitable(BatchSteps._wait)
    collect = awaitable(BatchSteps[TOutput, TContext]._collect)
    to_pandas = awaitable(BatchSteps._to_pandas)
    to_polars = awaitable(BatchSteps._to_polars)
    to_arrow = awaitable(BatchSteps._to_arrow)
    cancel = awaitable(BatchSteps._cancel)
    pause = awaitable(BatchSteps._pause)
    resume = awaitable(BatchSteps._resume)
    retry_failed = awaitable(BatchSteps._retry_failed)

    def results(self, *, follow: bool = True) -> AsyncIterator[WorkItemResult[TOutput, TContext]]:
        """Results in completion order, by `async for`; reading takes nothing away.

        Args:
            follow: wait for those that are still to come; False: what there is now.
        """
        return aiterate(self._results(follow, Reminder()))


class Results(Generic[TOutput, TContext]):
    """The results of a batch as they come. Iterate once, by `for` or by `async for`."""

    def __init__(self, batch: BatchSteps[TOutput, TContext], follow: bool) -> None:
        self._batch = batch
        self._follow = follow
        self._reminder = Reminder()

    def __iter__(self) -> Iterator[WorkItemResult[TOutput, TContext]]:
        warn_on_loop("results")
        return iterate(self._batch._results(self._follow, self._reminder))

    def __aiter__(self) -> AsyncIterator[WorkItemResult[TOutput, TContext]]:
        return aiterate(self._batch._results(self._follow, self._reminder))


async def _give_back(feeding: AsyncExitStack) -> None:
    # Of a Redis that is away the right to feed expires by itself.
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(GIVE_BACK_SECONDS):
            await feeding.aclose()


def late_words(spec: BatchSpec) -> str:
    """One line about a submission that Redis or the broker kept beyond the batch's deadline."""
    return (
        f"batch {spec.batch_id!r} is not submitted completely: Redis or the broker was away until "
        f"its deadline of {spec.deadline:g} s"
    )


async def say_what_is_missing(session: Session, spec: BatchSpec, reminder: Reminder) -> None:
    """A word for whoever waits for a batch that nobody works for."""
    if not reminder.due():
        return
    workers = await list_workers(session.services.connection, session.services.keys)
    if not any(spec.queue in worker.queues.split(",") for worker in workers):
        logger.warning(
            "batch.no_worker batch_id=%s queue=%s seconds=%.0f: no worker serves this queue; start "
            "one: batchllm worker --queue %s",
            spec.batch_id, spec.queue, reminder.seconds, spec.queue,
        )  # fmt: skip


async def _read(
    ledger: Ledger, batch_id: str, after: str, count: int, timeout: float
) -> list[Delivered]:
    found = await ledger.batches.results(batch_id, after, count, timeout)
    return [Delivered(one.index, json.loads(one.line), one.stream_id) for one in found]


def _bad(row: BadRow, index: int) -> WorkItemResult[Any, Any]:
    return WorkItemResult(
        item_id=row.item_id,
        index=index,
        success=False,
        error=f"InputError: {printable(row.message)}",
        error_kind=FailureKind.INVALID_INPUT,
        metadata={"row": identity_of_bad(row)},
    )
