"""`ParallelBatchProcessor`: batch-llm's API in one process, on a worker's runner and limiter."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Generic

from redis.exceptions import RedisError

from batchllm_celery.compat.middleware import Middleware, MiddlewareChain
from batchllm_celery.compat.observers import ObserverFeed, ProcessorObserver
from batchllm_celery.compat.progress import ProgressCallback, ProgressReporter
from batchllm_celery.compat.rate_limits import RateLimitStrategy, policy_from
from batchllm_celery.connection import Connection
from batchllm_celery.embedded import resolve_url
from batchllm_celery.errors import FailureKind, UsageError, describe
from batchllm_celery.events import (
    BatchFinished,
    BatchStarted,
    Event,
    Events,
    RateLimitHit,
    WorkerStarted,
    WorkerStopped,
)
from batchllm_celery.execution import ItemJob, ItemRunner, OpenGate, Prices, Stopped, Unrunnable
from batchllm_celery.files.parts import PartReader
from batchllm_celery.keys import Keys
from batchllm_celery.limiter import Estimator
from batchllm_celery.models import (
    FAILURE_POLICIES,
    BatchResult,
    BatchState,
    LLMWorkItem,
    ProcessorConfig,
    Quota,
    QuotaLimits,
    Request,
    StrategySpec,
    TContext,
    TInput,
    TOutput,
    WorkItemResult,
)
from batchllm_celery.observability.logging import LogListener
from batchllm_celery.services import Services
from batchllm_celery.settings import Settings
from batchllm_celery.strategies.base import LLMCallStrategy
from batchllm_celery.strategies.registry import Registry, catalog

logger = logging.getLogger("batchllm_celery")

#: Seconds that a post-processor may take.
POST_PROCESSOR_TIMEOUT = 75.0
#: Seconds that cancelled items get to clean up.
CANCEL_TIMEOUT = 2.0

PostProcessor = Callable[[WorkItemResult[Any, Any]], Awaitable[None] | None]


@dataclass(slots=True)
class ProcessingStats:
    """Running figures of one `process_all`."""

    total: int = 0
    processed: int = 0
    succeeded: int = 0
    failed: int = 0
    start_time: float = 0.0
    """Unix time; 0 before the start."""
    error_counts: dict[str, int] = field(default_factory=dict)
    rate_limit_count: int = 0
    total_input_tokens: int = 0
    total_output_tokens: int = 0
    total_tokens: int = 0
    cached_input_tokens: int = 0
    duration: float = 0.0
    """Seconds of processing, so far or in all."""

    def add(self, result: WorkItemResult[Any, Any]) -> None:
        """Count one result."""
        self.processed += 1
        usage = result.token_usage
        self.total_input_tokens += usage.input_tokens
        self.total_output_tokens += usage.output_tokens
        self.total_tokens += usage.total_tokens
        self.cached_input_tokens += usage.cached_input_tokens
        if result.success:
            self.succeeded += 1
            return
        self.failed += 1
        error = (result.error or "Unknown").partition(":")[0]
        self.error_counts[error] = self.error_counts.get(error, 0) + 1

    def listen(self, event: Event) -> None:
        """Count the provider's refusals."""
        if isinstance(event, RateLimitHit):
            self.rate_limit_count += 1

    def as_dict(self) -> dict[str, Any]:
        """All figures under batch-llm's names, plus `duration`."""
        figures = {name: getattr(self, name) for name in self.__slots__}
        figures["error_counts"] = dict(self.error_counts)
        figures["total_cached_tokens"] = self.cached_input_tokens
        return figures


@dataclass(frozen=True, slots=True)
class _Engine:
    """What is open while items are processed."""

    runner: ItemRunner
    registry: Registry
    loop: asyncio.AbstractEventLoop
    close: Callable[[], Awaitable[None]]


@dataclass(slots=True)
class _Gate(OpenGate):
    """Closed for a strategy whose key or account the provider refuses: every call would fail."""

    strategy: int = 0
    refused: set[int] = field(default_factory=set)

    async def begin(self) -> FailureKind | BatchState | None:
        if self.strategy in self.refused:
            return FailureKind.ABORTED
        return await OpenGate.begin(self)


class ParallelBatchProcessor(Generic[TInput, TOutput, TContext]):
    """Processes work items concurrently in this process, in the caller's own event loop.

        async with ParallelBatchProcessor[str, str, None](config=config) as processor:
            await processor.add_work(LLMWorkItem(item_id="1", strategy=strategy, prompt="Hello"))
            result = await processor.process_all()

    Outside `async with`, each `process_all` opens what it needs and closes it, strategies included.

    Args:
        config: concurrency, attempts, time limits; default `ProcessorConfig()`.
        post_processor: called with every result, failures too; may be a coroutine function (75 s).
            What it raises is logged. A plain function runs on the event loop, so it must be quick.
        rate_limit_strategy: what follows a 429, in place of `config.rate_limit`.
        middlewares: hooks around each item.
        observers: notified of what happens (`MetricsObserver`).
        progress_callback: `(completed, total, current_item_id)` every `progress_interval` items.
        quota: a `Quota`, or the name of one that others share; default one of its own.
        settings: Redis, prices file; default from the environment. Without a Redis URL the
            embedded Valkey is started or attached to.

    Raises:
        UsageError: where `quota` and other limits contradict each other.
    """

    def __init__(
        self,
        config: ProcessorConfig | None = None,
        *,
        post_processor: PostProcessor | None = None,
        rate_limit_strategy: RateLimitStrategy | None = None,
        middlewares: Sequence[Middleware] | None = None,
        observers: Sequence[ProcessorObserver] | None = None,
        progress_callback: ProgressCallback | None = None,
        quota: Quota | str | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.config = config or ProcessorConfig()
        self.rate_limit_strategy = rate_limit_strategy
        self._post_processor = post_processor
        self._chain = MiddlewareChain(middlewares or ())
        self._settings = settings or Settings()
        self._quota = self._own_quota(quota)
        self._private = quota is None
        self._feed = ObserverFeed(observers or ())
        level = logging.DEBUG if self.config.enable_detailed_logging else logging.INFO
        self._events = Events(self._count_event, LogListener(level=level))
        if observers:
            self._events.listen(self._feed)
        self._progress_callback = progress_callback
        self._progress = self._new_reporter()
        self._prices = Prices.from_settings(self._settings)
        self._engine: _Engine | None = None
        self._entered = False
        self._starting = asyncio.Lock()
        self._workers: list[asyncio.Task[None]] = []
        self._refused: set[int] = set()
        self._batch_id = ""
        self._added = 0
        self._started: float | None = None
        self._queue = self._new_queue()
        self._results: list[WorkItemResult[TOutput, TContext]] = []
        self._stats = ProcessingStats()

    def _own_quota(self, quota: Quota | str | None) -> Quota:
        if isinstance(quota, Quota):
            if self.config.max_requests_per_minute or self._policy_source() is not None:
                raise UsageError(
                    f"quota {quota.name!r} has its own limits and policy: leave out "
                    "max_requests_per_minute, rate_limit and rate_limit_strategy"
                )
            return quota
        return Quota(
            name=quota or f"local-{uuid.uuid4().hex}",
            limits=QuotaLimits(requests_per_minute=self.config.max_requests_per_minute),
            policy=policy_from(self._policy_source()),
            day_exhausted="fail",  # no process waits here until the reset
        )

    def _policy_source(self) -> Any:
        return self.rate_limit_strategy or self.config.rate_limit

    def _count_event(self, event: Event) -> None:
        self._stats.listen(event)

    def _new_queue(self) -> asyncio.Queue[tuple[int, float, LLMWorkItem[Any, Any, Any]]]:
        return asyncio.Queue(self.config.max_queue_size)

    def _new_reporter(self) -> ProgressReporter:
        config = self.config
        return ProgressReporter(
            self._progress_callback, config.progress_interval, config.progress_callback_timeout
        )

    # -- what users call

    async def add_work(self, work_item: LLMWorkItem[TInput, TOutput, TContext]) -> None:
        """Queue an item. With `max_queue_size` items waiting, processing starts by itself and this
        waits for a free place.

        Raises:
            UsageError: if its strategy is neither registered nor an instance.
            PartError: (a ValueError) a file that its request names can't be used.
        """
        _check_strategy(work_item)
        if isinstance(work_item.prompt, Request):
            work_item.prompt = PartReader().read(work_item.prompt)
        entry = (self._added, time.monotonic(), work_item)
        self._added += 1
        if self._queue.full():
            await self._start()
            self._stats.total += 1
            await self._while_working(self._queue.put(entry))
        else:
            self._stats.total += 1
            self._queue.put_nowait(entry)

    async def process_all(self) -> BatchResult[TOutput, TContext]:
        """Process what was added and return the results in completion order.

        May be called again after more `add_work`: results and statistics start from zero.

        Raises:
            RedisUnavailableError: if Redis can't be reached.
        """
        try:
            await self._start()
            await self._while_working(self._queue.join())
        finally:
            await self._stop_workers()
            await self._progress.finish()
            if not self._entered:
                await self._close_engine()
        return self._finish()

    async def get_stats(self) -> dict[str, Any]:
        """Figures of the run under way, or of the last one: `total`, `processed`, `succeeded`,
        `failed`, `start_time` (Unix), `duration` (s), `error_counts`, `rate_limit_count` (refused
        calls), `total_input_tokens`, `total_output_tokens`, `total_tokens`, `total_cached_tokens`.
        """
        if self._started is not None:
            self._stats.duration = time.monotonic() - self._started
        return self._stats.as_dict()

    async def shutdown(self) -> None:
        """Cancel what runs (2 s), drop what waits, close strategies and connections. May be
        repeated."""
        self._entered = False
        await self._stop_workers()
        await self._progress.cancel()
        self._queue = self._new_queue()
        await self._close_engine()

    async def cleanup(self) -> None:
        """`shutdown` under batch-llm's other name."""
        await self.shutdown()

    async def __aenter__(self) -> ParallelBatchProcessor[TInput, TOutput, TContext]:
        self._entered = True
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.shutdown()

    # -- a run: from the first worker's start to the results

    async def _start(self) -> None:
        async with self._starting:
            if not self._workers:
                await self._open_engine()
                self._begin()

    def _begin(self) -> None:
        waiting = self._queue.qsize()
        self._results = []
        self._refused = set()
        self._progress = self._new_reporter()
        self._stats = ProcessingStats(total=waiting, start_time=time.time())
        self._started = time.monotonic()
        self._batch_id = f"local-{uuid.uuid4().hex[:12]}"
        self._events.emit(BatchStarted(self._batch_id))
        count = self.config.max_workers
        self._workers = [asyncio.create_task(self._work(f"worker-{n}")) for n in range(count)]

    def _finish(self) -> BatchResult[TOutput, TContext]:
        result = BatchResult(list(self._results))
        self._added = self._queue.qsize()
        return result

    async def _stop_workers(self) -> None:
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.cancel()
        if workers:
            await asyncio.wait(workers, timeout=CANCEL_TIMEOUT)
            self._events.emit(
                BatchFinished(self._batch_id, self._stats.succeeded, self._stats.failed)
            )
            await self._feed.drain()
        if self._started is not None:
            self._stats.duration = time.monotonic() - self._started
            self._started = None

    async def _while_working(self, awaitable: Any) -> None:
        """Await it, unless a worker dies first: then raise what killed it."""
        wanted = asyncio.ensure_future(awaitable)
        try:
            await asyncio.wait({wanted, *self._workers}, return_when=asyncio.FIRST_COMPLETED)
            if not wanted.done():
                for worker in self._workers:
                    if worker.done():
                        worker.result()
            await wanted
        finally:
            wanted.cancel()

    async def _work(self, name: str) -> None:
        self._events.emit(WorkerStarted(name))
        try:
            while True:
                index, since, item = await self._queue.get()
                await self._handle(index, since, item)
                self._queue.task_done()
        finally:
            self._events.emit(WorkerStopped(name))

    # -- one item

    async def _handle(self, index: int, since: float, item: LLMWorkItem[Any, Any, Any]) -> None:
        result = await self._chain.after(await self._result_of(index, since, item))
        self._results.append(result)
        self._stats.add(result)
        await self._post_process(result)
        self._progress.report(self._stats.processed, self._stats.total, result.item_id)

    async def _result_of(
        self, index: int, since: float, item: LLMWorkItem[Any, Any, Any]
    ) -> WorkItemResult[Any, Any]:
        changed = await self._chain.before(item)
        if changed is None:
            return _unprocessed(item, index, FailureKind.SKIPPED, "Skipped by middleware")
        engine = self._engine
        assert engine is not None
        try:
            job = await self._job(engine, index, since, changed)
        except UsageError as error:  # parameters that the strategy's factory does not take
            return _unprocessed(item, index, FailureKind.INVALID_INPUT, describe(error))
        outcome = await engine.runner.run(job)
        assert not isinstance(outcome, Unrunnable)  # an OpenGate hands nothing back
        if isinstance(outcome, Stopped):  # a shared quota that parks: here it fails
            why = "QuotaExhausted: the day's quota is used up"
            return _unprocessed(item, index, FailureKind.QUOTA_EXHAUSTED, why)
        if outcome.success or job.error is None:
            return outcome
        if outcome.error_kind and FAILURE_POLICIES[outcome.error_kind].stops_batch:
            self._refused.add(id(job.strategy))
        return await self._chain.on_error(changed, job.error) or outcome

    async def _job(
        self, engine: _Engine, index: int, since: float, item: LLMWorkItem[Any, Any, Any]
    ) -> ItemJob:
        strategy = item.strategy
        if not isinstance(strategy, LLMCallStrategy):
            strategy = await engine.registry.get(_spec(strategy))

        async def prepare() -> None:
            await engine.registry.prepare(strategy)

        if self._private and strategy.full_speed:
            engine.runner.limiter.begin_at_full_speed(self._quota.name)
        return ItemJob(
            batch_id=self._batch_id,
            item_id=item.item_id,
            index=index,
            prompt=item.prompt,
            context=item.context,
            strategy=strategy,
            prepare=prepare,
            quota=self._quota.name,
            config=self.config,
            gate=_Gate(
                most_calls=self.config.most_calls + 1,
                strategy=id(strategy),
                refused=self._refused,
            ),
            queued_seconds=time.monotonic() - since,
            parks=False,
        )

    async def _post_process(self, result: WorkItemResult[Any, Any]) -> None:
        if self._post_processor is None:
            return
        try:
            answer = self._post_processor(result)
            if inspect.isawaitable(answer):
                async with asyncio.timeout(POST_PROCESSOR_TIMEOUT):
                    await answer
        except Exception as error:
            logger.warning(
                "post_processor_failed item_id=%s error=%s", result.item_id, describe(error)
            )

    # -- what a run needs

    async def _open_engine(self) -> None:
        loop = asyncio.get_running_loop()
        if self._engine is not None:
            if self._engine.loop is loop:
                return
            self._engine = None  # its loop is gone, and its connections with it
        self._queue = self._moved_queue()
        async with AsyncExitStack() as stack:
            runner, registry = await self._parts(stack)
            self._engine = _Engine(runner, registry, loop, stack.pop_all().aclose)

    def _moved_queue(self) -> asyncio.Queue[tuple[int, float, LLMWorkItem[Any, Any, Any]]]:
        # A queue belongs to the first loop that waits on it; a processor may see several.
        fresh, old = self._new_queue(), self._queue
        while not old.empty():
            fresh.put_nowait(old.get_nowait())
        return fresh

    async def _parts(self, stack: AsyncExitStack) -> tuple[ItemRunner, Registry]:
        settings = self._settings
        # Starting the embedded server takes a moment, and blocks.
        url: str = await asyncio.to_thread(resolve_url, settings)
        await stack.enter_async_context(self._feed)
        services = await stack.enter_async_context(
            Services(
                settings.model_copy(update={"slots": self.config.max_workers}),
                url,
                events=self._events,
                process_id=f"local-{os.getpid()}-{uuid.uuid4().hex[:8]}",
            )
        )
        await services.connection.ping()
        if self._private:
            services.stack.push_async_callback(
                _forget_quota, services.connection, services.keys, self._quota.name
            )
        limiter = await services.enter(services.limiter)
        if not self.config.dry_run:
            await limiter.configure(self._quota)
        registry = services.registry
        runner = ItemRunner(limiter, Estimator(), self._events, self._prices, json_output=False)
        return runner, registry

    async def _close_engine(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None and engine.loop is asyncio.get_running_loop():
            await engine.close()


async def _forget_quota(connection: Connection, keys: Keys, name: str) -> None:
    """Nobody else draws on a private quota, so it need not show in `status` until its TTL."""
    quota = keys.quota(name)
    try:
        await connection.client.delete(quota.state, quota.procs, quota.waiting)
        await connection.client.zrem(keys.quotas, name)
    except RedisError as error:
        logger.debug("forget_quota_failed error=%s", type(error).__name__)


def _spec(strategy: Any) -> StrategySpec:
    return strategy if isinstance(strategy, StrategySpec) else StrategySpec(name=strategy)


def _check_strategy(item: LLMWorkItem[Any, Any, Any]) -> None:
    if not isinstance(item.strategy, LLMCallStrategy | StrategySpec | str):
        raise UsageError(
            f"strategy of item {item.item_id!r} must be an LLMCallStrategy instance or a "
            f"registered name, not {type(item.strategy).__name__}"
        )
    if not isinstance(item.strategy, LLMCallStrategy):
        catalog.lookup(_spec(item.strategy).name)


def _unprocessed(
    item: LLMWorkItem[Any, Any, Any], index: int, kind: FailureKind, error: str
) -> WorkItemResult[Any, Any]:
    return WorkItemResult(
        item_id=item.item_id,
        index=index,
        success=False,
        error=error,
        error_kind=kind,
        context=item.context,
    )
