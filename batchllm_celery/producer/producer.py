"""The producer: streams work into a fleet, and finds its batches again."""

from __future__ import annotations

import asyncio
import atexit
import difflib
import json
import math
import secrets
import threading
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Collection,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

from typing_extensions import TypedDict, Unpack

from batchllm_celery.connection import BrokenEntry, Reminder
from batchllm_celery.errors import (
    BatchConflictError,
    BatchNotFoundError,
    FailureKind,
    StrategyNotFoundError,
)
from batchllm_celery.events import Events
from batchllm_celery.ledger import Outcome, WorkerInfo
from batchllm_celery.ledger.standing import ItemPlace
from batchllm_celery.ledger.workers import list_workers
from batchllm_celery.limiter import QuotaState
from batchllm_celery.models import (
    BatchProgress,
    BatchSpec,
    ProcessorConfig,
    Quota,
    StrategySpec,
    TContext,
    TOutput,
    WorkItemResult,
)
from batchllm_celery.models.names import check_batch_id
from batchllm_celery.producer.batch import (
    AsyncBatch,
    Batch,
    BatchSteps,
    late_words,
    say_what_is_missing,
)
from batchllm_celery.producer.continuing import (
    ELSEWHERE,
    Answered,
    ChangedRowsError,
    Outcomes,
    Questions,
    look,
    moved,
    refusal,
    rerun_of,
)
from batchllm_celery.producer.item import AskOptions, AsyncItem, Item, ItemSteps, Question
from batchllm_celery.producer.outputs import Outputs
from batchllm_celery.producer.rows import (
    Row,
    RowWith,
    default_strategy,
    output_type_of,
    spec_of,
    with_params,
)
from batchllm_celery.producer.session import Session
from batchllm_celery.producer.steps import (
    Beside,
    Blocking,
    NextRows,
    aiterate,
    awaitable,
    block,
    blocking,
    iterate,
    wait,
    warn_on_loop,
)
from batchllm_celery.queue import App, host
from batchllm_celery.settings import Settings

if TYPE_CHECKING:
    from batchllm_celery.strategies.registered import TypedStrategy

#: How long, in seconds, a submission looks for workers that know its strategy.
LOOK_SECONDS = 3.0
#: Seconds for which workers that know a strategy are taken to be there.
RUNNABLE_SECONDS = 60.0
#: Seconds between two looks of somebody who asked whether any worker is there.
REMIND_SECONDS = 3.0

B = TypeVar("B", bound=BatchSteps[Any, Any])
H = TypeVar("H", bound=ItemSteps[Any])


@dataclass(frozen=True, slots=True)
class Found:
    """A batch that is there: what it runs with, its counters, 8 bytes for each row that was fed,
    and the last of its results that a new generation supersedes."""

    spec: BatchSpec
    progress: BatchProgress
    fed: bytes
    superseded: str | None


class SubmitOptions(TypedDict, total=False):
    """What `submit` and `stream` take besides rows and strategy.

    Args:
        params: parameters of the strategy's factory.
        batch_id: the same id goes on with a batch: rows are recognised by their ids, else by what
            stands in them, wherever they stand now. New rows run, finished ones do not.
        quota: name or `Quota` to draw on; default: the strategy's own.
        quota_update: change a quota whose limits differ, in place of refusing.
        config: attempts and time limits.
        queue: a queue of the fleet.
        priority: 0 (usual) to 9 (urgent).
        items_per_task: item indexes that one Celery message carries.
        deadline: seconds after which no call starts.
        max_cost: US dollars after which no call starts.
        token_budget: tokens after which no call starts.
        fail_fast: failure kinds that abort the batch.
        on_finished: a Celery task (`"shop.report"`, or a signature) that a worker of the queue
            calls with the batch's id once all items have their outcome: once for each round, by
            the ledger. Its id is `finished-BATCH-ROUND`.
        max_outstanding: items unfinished or unread at most; default `settings.max_outstanding`.
        rerun: what becomes of finished rows of a batch that goes on: `changed` runs those that ask
            another question now, `none` keeps their answers, `failed` runs failed rows again, `all`
            everything.
        known: results that need not be paid for again; default: those that Redis has kept.
    """

    params: dict[str, Any] | None
    batch_id: str | None
    quota: Quota | str | None
    quota_update: bool
    config: ProcessorConfig | None
    queue: str
    priority: int
    items_per_task: int | None
    deadline: float | None
    max_cost: float | None
    token_budget: int | None
    fail_fast: Iterable[FailureKind | str]
    on_finished: str | dict[str, Any] | None
    max_outstanding: int | None
    rerun: str | Collection[str] | None
    known: Iterable[WorkItemResult[Any, Any] | Mapping[str, Any]] | None


class _Submission:
    """The options of one `submit` or `stream`, checked."""

    def __init__(
        self,
        strategy: StrategySpec,
        keep_results: bool,
        params: dict[str, Any] | None = None,
        batch_id: str | None = None,
        quota: Quota | str | None = None,
        quota_update: bool = False,
        config: ProcessorConfig | None = None,
        queue: str = "default",
        priority: int = 0,
        items_per_task: int | None = None,
        deadline: float | None = None,
        max_cost: float | None = None,
        token_budget: int | None = None,
        fail_fast: Iterable[FailureKind | str] = (),
        on_finished: Any = None,
        max_outstanding: int | None = None,
        rerun: str | Collection[str] | None = None,
        known: Iterable[WorkItemResult[Any, Any] | Mapping[str, Any]] | None = None,
    ) -> None:
        self.rerun, self.known = rerun, known
        self.goes_on = batch_id is not None or known is not None
        self.quota = quota if isinstance(quota, Quota) else None
        self.quota_update = quota_update
        self.max_outstanding = max_outstanding
        self.spec = BatchSpec(
            batch_id=new_batch_id() if batch_id is None else check_batch_id(batch_id),
            strategy=with_params(strategy, params),
            quota=quota.name if isinstance(quota, Quota) else quota,
            config=config or ProcessorConfig(),
            queue=queue,
            priority=priority,
            items_per_task=items_per_task,
            deadline=deadline,
            max_cost=max_cost,
            token_budget=token_budget,
            fail_fast=tuple(FailureKind(kind) for kind in fail_fast),
            keep_results=keep_results,
            on_finished=on_finished,
        )


class ProducerSteps(Generic[B]):
    """What a producer does, as coroutines of steps: `Producer` blocks, `AsyncProducer` awaits.

    Args:
        settings: default: from the environment.
        redis_url: in place of the settings'; with neither, the broker of `app`, else the embedded
            Valkey.
        namespace: in place of the settings'.
        app: an existing Celery app (see `install`) to send the messages with.
        events: hears of a Redis that is lost and found again.
    """

    _batch_class: type[B]

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        redis_url: str | None = None,
        namespace: str | None = None,
        app: App | None = None,
        events: Events | None = None,
    ) -> None:
        chosen = {"redis_url": redis_url, "namespace": namespace}
        given = {name: value for name, value in chosen.items() if value is not None}
        self.settings = (settings or Settings()).model_copy(update=given)
        self._session = Session(self.settings, app, events if events is not None else Events())
        self._runnable_at: dict[tuple[str, str], float] = {}

    @property
    def url(self) -> str:
        """The Redis in use.

        Raises:
            EmbeddedServerError: the embedded one did not start.
        """
        return self._session.url

    async def _check(self) -> None:
        """Return if Redis answers, within about 3 s.

        Raises:
            RedisUnavailableError: in one clear line.
        """
        await self._session.step(lambda session: session.services.connection.ping())

    # -- submitting -------------------------------------------------------------------------------

    async def _submit(
        self, items: Any, strategy: Any = None, options: SubmitOptions | None = None
    ) -> B:
        chosen, rows = await default_strategy(items, strategy)
        submission = _Submission(chosen, True, **(options or {}))
        await self._check_runnable(submission.spec)
        spec, renew = submission.spec, False
        feed: Iterable[Row | Answered] | AsyncIterable[Row | Answered] = rows
        if submission.goes_on:
            found = await self._find(spec.batch_id)
            if found is not None or submission.known is not None:
                spec, renew, feed = await self._prepare(
                    spec, found, rows, rerun=submission.rerun, known=submission.known
                )
        batch = await self._open(
            spec, quota=submission.quota, quota_update=submission.quota_update, renew=renew
        )
        batch.type_outputs(output_type_of(strategy))
        try:
            await batch._feed(feed, max_outstanding=submission.max_outstanding)
        except BaseException:
            # Nobody has the batch: what was fed of it must not be paid for.
            await batch._give_up()
            raise
        return batch

    async def _stream(
        self, items: Any, strategy: Any, spec: BatchSpec | None, options: SubmitOptions
    ) -> AsyncGenerator[WorkItemResult[Any, Any], None]:
        chosen, rows = await default_strategy(items, spec.strategy if spec else strategy)
        most, quota, update = options.get("max_outstanding"), None, False
        if spec is None:
            submission = _Submission(chosen, False, **options)
            spec, quota, update = submission.spec, submission.quota, submission.quota_update
        await self._check_runnable(spec)
        batch = await self._open(spec, quota=quota, quota_update=update)
        batch.type_outputs(output_type_of(strategy))
        stop, failure = threading.Event(), []

        async def feed() -> None:
            try:
                await batch._feed(rows, stop=stop, max_outstanding=most)
            except BaseException as error:
                failure.append(error)
                await batch._cancel()

        feeder = await Beside(feed, "batchllm-feeder")
        try:
            while True:
                fed_all = feeder.is_over()
                over = fed_all and (progress := await batch._progress()).finished >= progress.fed
                taken = await batch._take(timeout=0.0 if over else 0.5)
                for delivered in taken:
                    yield batch.result_of(delivered.line)
                if taken:
                    await batch._acknowledge(taken[-1].receipt)
                elif over:
                    break
        finally:
            stop.set()
            await feeder.joined()
        if failure:
            raise failure[0]

    async def _find(self, batch_id: str) -> Found | None:
        """What Redis knows of a batch; None where there is none."""

        async def find(session: Session) -> Found | None:
            batches = session.services.ledger.batches
            try:
                spec, progress = await batches.spec(batch_id), await batches.progress(batch_id)
            except BatchNotFoundError:
                return None
            fed, until = await batches.fingerprints(batch_id), await batches.superseded(batch_id)
            return Found(spec, progress, fed, until)

        return await self._session.step(find)

    async def _quiesce(self, batch_id: str) -> None:
        """Pause a batch, and return when no living worker holds items of it.

        Raises:
            BatchConflictError: workers go on holding some.
        """
        await self._session.step(lambda session: session.services.ledger.feeding.quiesce(batch_id))

    async def _prepare(
        self,
        spec: BatchSpec,
        found: Found | None,
        rows: Iterable[Row] | AsyncIterable[Row],
        *,
        rerun: str | Collection[str] | None = None,
        known: Iterable[WorkItemResult[Any, Any] | Mapping[str, Any]] | None = None,
    ) -> tuple[BatchSpec, bool, Iterable[Row | Answered]]:
        """How to go on with a batch whose results Redis keeps: the specification and `renew` for
        `open`, and the rows for `feed`. See `submit`.

        Raises:
            ChangedRowsError: finished rows ask another question now.
        """
        given = await _all(rows)  # they are looked at before anything changes
        if found is not None and found.spec.config.dry_run != spec.config.dry_run:
            return spec, False, given  # `open` says why not
        lines: list[bytes] = []
        outcomes = Outcomes()
        for line in await self._kept(found) if known is None else map(_as_line, known):
            outcomes.add(line, len(lines))
            lines.append(json.dumps(line).encode())
        questions = Questions(spec, self.settings.openai_base_url)
        fed = found.fed if found is not None else b""
        seen = look(given, outcomes, questions, spec.strategy, fed, rerun_of(rerun))
        if seen.refused:
            changed = [json.loads(lines[outcomes[number][6]]) for _, number in seen.changed]
            cost = sum(line.get("cost") or 0.0 for line in changed)
            raise ChangedRowsError(refusal(len(changed), cost) + "rerun='changed' or 'none'")
        if found is not None and not seen.renews and known is None:
            return spec.model_copy(update={"generation": found.spec.generation}), False, given
        if found is not None and known is None and found.progress.finished > len(lines):
            raise BatchConflictError(
                f"batch {spec.batch_id!r}: its rows differ from those that it has, and its results "
                "are with whoever took them: give them as known=..., or take another batch id"
            )
        before = found.spec.generation if found is not None else 0
        spec = spec.model_copy(update={"generation": before + 1})

        def delivered(place: int, row: Row, number: int) -> bytes:
            old = json.loads(lines[outcomes[number][6]])
            return json.dumps(moved(old, place, row, questions, spec.strategy)).encode()

        return spec, found is not None, seen.feed(given, delivered)

    async def _kept(self, found: Found | None) -> list[dict[str, Any]]:
        """The kept results of a batch. Those of a generation that was being replaced when its
        producer ended have places that no row has."""
        lines: list[dict[str, Any]] = []
        if found is None:
            return lines
        batch = self._batch_class(self._session, found.spec, resumed=True)
        after, old = "0", found.superseded is not None
        while taken := await batch._read(after):
            for one in taken:
                line = dict(one.line)
                if old:
                    line["index"] = one.index + ELSEWHERE
                    old = one.receipt != found.superseded
                lines.append(line)
            after = taken[-1].receipt
        return lines

    # -- single items

    async def _ask(
        self, prompt: Any, strategy: Any, timeout: float | None, options: AskOptions
    ) -> WorkItemResult[Any, Any]:
        question = await self._question(prompt, strategy, options)

        async def ask(session: Session) -> Outcome:
            asked = asyncio.ensure_future(question.answer(session, timeout))
            reminder = Reminder()
            try:
                while not (await asyncio.wait([asked], timeout=REMIND_SECONDS))[0]:
                    await say_what_is_missing(session, question.template, reminder)
            finally:
                if not asked.done():
                    asked.cancel()
                    await asyncio.wait([asked])
            return asked.result()

        outcome = await self._session.step(ask)
        return Outputs(output_type_of(strategy)).read(outcome.line)

    async def _enqueue(self, handle: type[H], prompt: Any, strategy: Any, options: AskOptions) -> H:
        question = await self._question(prompt, strategy, options)
        place = await self._session.step(question.store)
        await Blocking(partial(question.publish, self._session, place))
        return handle(self._session, place, output_type_of(strategy))

    async def _question(self, prompt: Any, strategy: Any, options: AskOptions) -> Question:
        question = Question(prompt, spec_of(strategy), **options)
        known = (question.template.strategy.name, question.template.queue)
        now = time.monotonic()
        if now - self._runnable_at.get(known, -math.inf) > RUNNABLE_SECONDS:
            await self._check_runnable(question.template)
            self._runnable_at[known] = now
        return question

    async def _open(
        self,
        spec: BatchSpec,
        *,
        quota: Quota | None = None,
        quota_update: bool = False,
        renew: bool = False,
    ) -> B:
        """Make a batch without rows yet, or continue the one of this id; then `feed` it.

        A batch that was stopped goes on in a new round: items that the stop ended run again,
        failed ones do not (see `Batch.retry_failed`). With `renew` the rows of a batch that is
        there are forgotten: a new generation of its input follows.

        Raises:
            BatchConflictError: another process feeds it, it runs with another strategy, or one
                of the two is a dry run and the other is not.
            QuotaConflictError: the quota exists with other limits.
        """

        async def create(session: Session) -> bool:
            await _refuse_other_kind(session, spec)
            if quota is not None and not spec.config.dry_run:
                await session.services.limiter.configure(quota, update=quota_update)
            await session.services.enter(feeding)

            async def lock() -> None:
                lock = session.services.ledger.batches.lock(spec.batch_id, "producer", wait=1.0)
                await feeding.enter_async_context(lock)

            # First the lock: a refusal must not have changed what another process feeds.
            try:
                await lock()
            except BatchNotFoundError:
                await session.services.ledger.feeding.create(spec)
                await lock()
                return False
            if renew:
                force = await session.services.ledger.feeding.quiesce(spec.batch_id)
                await session.services.ledger.feeding.renew(spec.batch_id, force=force)
            await session.services.ledger.feeding.create(spec)
            return True

        async def create_in_time(session: Session) -> bool:
            try:
                async with asyncio.timeout(spec.deadline):
                    return await create(session)
            except TimeoutError as error:
                raise TimeoutError(late_words(spec)) from error

        feeding = AsyncExitStack()
        resumed = await self._session.step(create_in_time)
        batch = self._batch_class(self._session, spec, resumed=resumed, feeding=feeding)
        if resumed and (await batch._progress()).state in ("paused", "parked"):
            await batch._resume()
        return batch

    async def _check_runnable(self, spec: BatchSpec) -> None:
        """Return if a live worker of the batch's queue knows its strategy. Return, too, if there is
        no worker yet, or if Redis does not answer within `LOOK_SECONDS`.

        Raises:
            StrategyNotFoundError: none of them does; with the names that are near.
        """

        async def look(session: Session) -> list[WorkerInfo]:
            async with asyncio.timeout(min(LOOK_SECONDS, spec.deadline or LOOK_SECONDS)):
                return await list_workers(session.services.connection, session.services.keys)

        try:
            found = await self._session.step(look)
        except TimeoutError:
            return
        workers = [one for one in found if spec.queue in one.queues.split(",")]
        names = {name for worker in workers for name in worker.strategies.split(",") if name}
        name = spec.strategy.name
        if not names or name in names or any(not worker.strategies for worker in workers):
            return
        near = difflib.get_close_matches(name, sorted(names))
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise StrategyNotFoundError(
            f"no live worker of queue {spec.queue!r} knows the strategy {name!r}{hint} "
            f"They know {', '.join(sorted(names))}."
        )

    # -- looking ----------------------------------------------------------------------------------

    async def _attach(self, batch_id: str, strategy: Any = None) -> B:
        """A batch that somebody submitted; results are typed as `strategy` says.

        Raises:
            UsageError: for what can't be an id.
            BatchNotFoundError: for an unknown id.
        """
        check_batch_id(batch_id)
        spec = await self._session.step(
            lambda session: session.services.ledger.batches.spec(batch_id)
        )
        batch = self._batch_class(self._session, spec, resumed=True)
        batch.type_outputs(output_type_of(strategy))
        return batch

    async def _batches(self) -> list[BatchProgress]:
        """All batches of this namespace, the youngest first."""
        return await self._session.step(lambda session: session.services.ledger.batches.newest())

    async def _workers(self) -> list[WorkerInfo]:
        """The worker processes seen within the last minute."""
        return await self._session.step(
            lambda session: list_workers(session.services.connection, session.services.keys)
        )

    async def _quotas(self) -> list[QuotaState]:
        """The quotas in use, with their limiter's state."""
        return await self._session.step(lambda session: session.services.limiter.states())

    async def _broken(self) -> list[BrokenEntry]:
        """What `batches`, `quotas` and `workers` have met so far and could not read."""

        async def found(session: Session) -> list[BrokenEntry]:
            return session.services.connection.broken.all()

        return await self._session.step(found)

    async def _quota(self, name: str) -> QuotaState | None:
        """One quota's limiter state; None if nobody has used it."""
        found = [state for state in await self._quotas() if state.name == name]
        return found[0] if found else None

    async def _set_quota(self, quota: Quota, *, update: bool = True) -> Quota:
        """Configure a quota; a change reaches the whole fleet within a second.

        Raises:
            QuotaConflictError: it differs and `update` is false.
        """
        return await self._session.step(
            lambda session: session.services.limiter.configure(quota, update=update)
        )

    async def _close(self) -> None:
        """Give back locks and connections; batches go on without us. Idempotent."""
        await self._session.step_close()


class Producer(ProducerSteps[Batch[Any, Any]]):
    """Submits batches to a fleet. A context manager; every method may be called from any thread.

        with Producer() as producer:
            batch = producer.submit(["First text", "Second text"], strategy="summarise")
            for result in batch.results():
                ...

    Its methods block. On an event loop use `AsyncProducer`: a `BlockingCallWarning` says where one
    blocked it. A process that was forked opens connections of its own.

    Args:
        settings: default: from the environment.
        redis_url: in place of the settings'; with neither, the broker of `app`, else the embedded
            Valkey.
        namespace: in place of the settings'.
        app: an existing Celery app (see `install`) to send the messages with.
        events: hears of a Redis that is lost and found again.
    """

    _batch_class = Batch

    @overload
    def submit(
        self,
        items: Iterable[RowWith[TContext]],
        *,
        strategy: TypedStrategy[TOutput],
        **options: Unpack[SubmitOptions],
    ) -> Batch[TOutput, TContext]: ...
    @overload
    def submit(
        self,
        items: Iterable[Row],
        *,
        strategy: str | StrategySpec | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Batch[Any, Any]: ...
    def submit(
        self, items: Iterable[Any], *, strategy: Any = None, **options: Unpack[SubmitOptions]
    ) -> Batch[Any, Any]:
        """Store and enqueue all items, and return the batch; its results stay readable for
        `settings.result_ttl_seconds`.

        Blocks while more than `max_outstanding` items are unfinished; `stream` does not. Where it
        raises, the batch is cancelled; the same id goes on with it.

        Args:
            items: strings, mappings with `prompt` (and `item_id`, `context`), or `LLMWorkItem`s;
                any iterable, consumed lazily.
            strategy: what `@strategy` made (its results are typed), or a registered name; default:
                the first item's own.
            options: see `SubmitOptions`.

        Raises:
            UsageError: an item can't be taken (its place and id are named), or a strategy is
                missing.
            StrategyNotFoundError: live workers serve the queue, and none of them knows the
                strategy.
            ChangedRowsError: finished rows ask another question now, and `rerun` does not say
                what becomes of them; nothing has changed.
            BatchConflictError: the id belongs to another job that is still running.
            QuotaConflictError: the quota exists with other limits.
            RedisDeniedError: Redis denies a right, or the password.
            TimeoutError: Redis or the broker was away until the `deadline`.
        """
        warn_on_loop("submit")
        return block(self._submit(items, strategy, options))

    @overload
    def stream(
        self,
        items: Iterable[RowWith[TContext]],
        *,
        strategy: TypedStrategy[TOutput],
        **options: Unpack[SubmitOptions],
    ) -> Iterator[WorkItemResult[TOutput, TContext]]: ...
    @overload
    def stream(
        self,
        items: Iterable[Row],
        *,
        strategy: str | StrategySpec | None = None,
        spec: BatchSpec | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Iterator[WorkItemResult[Any, Any]]: ...
    def stream(
        self,
        items: Iterable[Any],
        *,
        strategy: Any = None,
        spec: BatchSpec | None = None,
        **options: Unpack[SubmitOptions],
    ) -> Iterator[WorkItemResult[Any, Any]]:
        """Feed `items` and yield their results at the same time, in bounded memory: results leave
        Redis when they have been yielded.

        Args:
            items: as for `submit`.
            strategy: as for `submit`.
            spec: the whole batch, in place of `options`.
            options: as for `submit`.
        """
        warn_on_loop("stream")
        return iterate(self._stream(items, strategy, spec, options))

    @overload
    def attach(self, batch_id: str, strategy: TypedStrategy[TOutput]) -> Batch[TOutput, Any]: ...
    @overload
    def attach(self, batch_id: str) -> Batch[Any, Any]: ...
    def attach(self, batch_id: str, strategy: Any = None) -> Batch[Any, Any]:
        """A batch that somebody submitted; results are typed as `strategy` says.

        Raises:
            UsageError: for what can't be an id.
            BatchNotFoundError: for an unknown id.
        """
        warn_on_loop("attach")
        return block(self._attach(batch_id, strategy))

    @overload
    def ask(
        self,
        prompt: str,
        *,
        strategy: TypedStrategy[TOutput],
        timeout: float | None = None,
        **options: Unpack[AskOptions],
    ) -> WorkItemResult[TOutput, Any]: ...
    @overload
    def ask(
        self,
        prompt: str,
        *,
        strategy: str | StrategySpec,
        timeout: float | None = None,
        **options: Unpack[AskOptions],
    ) -> WorkItemResult[Any, Any]: ...
    def ask(
        self,
        prompt: str,
        *,
        strategy: Any,
        timeout: float | None = None,
        **options: Unpack[AskOptions],
    ) -> WorkItemResult[Any, Any]:
        """One prompt, and wait for its result; a failure is a result too. The item rides on the
        standing batch of its strategy: the fleet's quotas hold, and a lost worker costs no answer.

        Args:
            prompt: the text.
            strategy: what `@strategy` made (its result is typed), or a registered name.
            timeout: seconds; None: as long as it takes.
            options: see `AskOptions`.

        Raises:
            TimeoutError: after `timeout` seconds; the item ends, unless a worker runs it.
            StrategyNotFoundError: live workers serve the queue, and none of them knows the
                strategy.
        """
        warn_on_loop("ask")
        return block(self._ask(prompt, strategy, timeout, options))

    @overload
    async def aask(
        self,
        prompt: str,
        *,
        strategy: TypedStrategy[TOutput],
        timeout: float | None = None,
        **options: Unpack[AskOptions],
    ) -> WorkItemResult[TOutput, Any]: ...
    @overload
    async def aask(
        self,
        prompt: str,
        *,
        strategy: str | StrategySpec,
        timeout: float | None = None,
        **options: Unpack[AskOptions],
    ) -> WorkItemResult[Any, Any]: ...
    async def aask(
        self,
        prompt: str,
        *,
        strategy: Any,
        timeout: float | None = None,
        **options: Unpack[AskOptions],
    ) -> WorkItemResult[Any, Any]:
        """`ask` for a coroutine, which goes on meanwhile."""
        return await wait(self._ask(prompt, strategy, timeout, options))

    @overload
    def enqueue(
        self, prompt: str, *, strategy: TypedStrategy[TOutput], **options: Unpack[AskOptions]
    ) -> Item[TOutput]: ...
    @overload
    def enqueue(
        self, prompt: str, *, strategy: str | StrategySpec, **options: Unpack[AskOptions]
    ) -> Item[Any]: ...
    def enqueue(self, prompt: str, *, strategy: Any, **options: Unpack[AskOptions]) -> Item[Any]:
        """Store and send one prompt, and return a handle: `item.result(timeout=...)`.

        Args:
            prompt: the text.
            strategy: what `@strategy` made (its result is typed), or a registered name.
            options: see `AskOptions`.

        Raises:
            StrategyNotFoundError: live workers serve the queue, and none of them knows the
                strategy.
        """
        warn_on_loop("enqueue")
        return block(self._enqueue(Item, prompt, strategy, options))

    @overload
    def item(self, item_id: str, strategy: TypedStrategy[TOutput]) -> Item[TOutput]: ...
    @overload
    def item(self, item_id: str) -> Item[Any]: ...
    def item(self, item_id: str, strategy: Any = None) -> Item[Any]:
        """The handle of an item by its `id`; nothing is asked of Redis yet.

        Raises:
            UsageError: for what is no item's id.
        """
        return Item(self._session, ItemPlace.parse(item_id), output_type_of(strategy))

    check = blocking(ProducerSteps._check)
    open = blocking(ProducerSteps[Batch[Any, Any]]._open)
    quiesce = blocking(ProducerSteps._quiesce)
    check_runnable = blocking(ProducerSteps._check_runnable)
    batches = blocking(ProducerSteps._batches)
    workers = blocking(ProducerSteps._workers)
    quotas = blocking(ProducerSteps._quotas)
    broken = blocking(ProducerSteps._broken)
    quota = blocking(ProducerSteps._quota)
    set_quota = blocking(ProducerSteps._set_quota)

    def close(self) -> None:
        """Give back locks and connections; batches go on without us. Idempotent."""
        block(self._close())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


class AsyncProducer(ProducerSteps[AsyncBatch[Any, Any]]):
    """Submits batches to a fleet from an event loop. An async context manager.

        async with AsyncProducer() as producer:
            batch = await producer.submit(texts, strategy="summarise")
            async for result in batch.results():
                ...

    One may be used from several loops. Rows come from any iterable, also an asynchronous one; a
    plain one is read on your loop, so it must not block.

    Args:
        settings: default: from the environment.
        redis_url: in place of the settings'; with neither, the broker of `app`, else the embedded
            Valkey.
        namespace: in place of the settings'.
        app: an existing Celery app (see `install`) to send the messages with.
        events: hears of a Redis that is lost and found again.
    """

    _batch_class = AsyncBatch

    @overload
    async def submit(
        self,
        items: Iterable[RowWith[TContext]] | AsyncIterable[RowWith[TContext]],
        *,
        strategy: TypedStrategy[TOutput],
        **options: Unpack[SubmitOptions],
    ) -> AsyncBatch[TOutput, TContext]: ...
    @overload
    async def submit(
        self,
        items: Iterable[Row] | AsyncIterable[Row],
        *,
        strategy: str | StrategySpec | None = None,
        **options: Unpack[SubmitOptions],
    ) -> AsyncBatch[Any, Any]: ...
    async def submit(
        self, items: Any, *, strategy: Any = None, **options: Unpack[SubmitOptions]
    ) -> AsyncBatch[Any, Any]:
        """As `Producer.submit`; `items` may be an async iterable too."""
        return await wait(self._submit(items, strategy, options))

    @overload
    def stream(
        self,
        items: Iterable[RowWith[TContext]] | AsyncIterable[RowWith[TContext]],
        *,
        strategy: TypedStrategy[TOutput],
        **options: Unpack[SubmitOptions],
    ) -> AsyncIterator[WorkItemResult[TOutput, TContext]]: ...
    @overload
    def stream(
        self,
        items: Iterable[Row] | AsyncIterable[Row],
        *,
        strategy: str | StrategySpec | None = None,
        spec: BatchSpec | None = None,
        **options: Unpack[SubmitOptions],
    ) -> AsyncIterator[WorkItemResult[Any, Any]]: ...
    def stream(
        self,
        items: Any,
        *,
        strategy: Any = None,
        spec: BatchSpec | None = None,
        **options: Unpack[SubmitOptions],
    ) -> AsyncIterator[WorkItemResult[Any, Any]]:
        """As `Producer.stream`, by `async for`."""
        return aiterate(self._stream(items, strategy, spec, options))

    @overload
    async def attach(
        self, batch_id: str, strategy: TypedStrategy[TOutput]
    ) -> AsyncBatch[TOutput, Any]: ...
    @overload
    async def attach(self, batch_id: str) -> AsyncBatch[Any, Any]: ...
    async def attach(self, batch_id: str, strategy: Any = None) -> AsyncBatch[Any, Any]:
        """As `Producer.attach`."""
        return await wait(self._attach(batch_id, strategy))

    @overload
    async def ask(
        self,
        prompt: str,
        *,
        strategy: TypedStrategy[TOutput],
        timeout: float | None = None,
        **options: Unpack[AskOptions],
    ) -> WorkItemResult[TOutput, Any]: ...
    @overload
    async def ask(
        self,
        prompt: str,
        *,
        strategy: str | StrategySpec,
        timeout: float | None = None,
        **options: Unpack[AskOptions],
    ) -> WorkItemResult[Any, Any]: ...
    async def ask(
        self,
        prompt: str,
        *,
        strategy: Any,
        timeout: float | None = None,
        **options: Unpack[AskOptions],
    ) -> WorkItemResult[Any, Any]:
        """As `Producer.ask`."""
        return await wait(self._ask(prompt, strategy, timeout, options))

    @overload
    async def enqueue(
        self, prompt: str, *, strategy: TypedStrategy[TOutput], **options: Unpack[AskOptions]
    ) -> AsyncItem[TOutput]: ...
    @overload
    async def enqueue(
        self, prompt: str, *, strategy: str | StrategySpec, **options: Unpack[AskOptions]
    ) -> AsyncItem[Any]: ...
    async def enqueue(
        self, prompt: str, *, strategy: Any, **options: Unpack[AskOptions]
    ) -> AsyncItem[Any]:
        """As `Producer.enqueue`."""
        return await wait(self._enqueue(AsyncItem, prompt, strategy, options))

    @overload
    def item(self, item_id: str, strategy: TypedStrategy[TOutput]) -> AsyncItem[TOutput]: ...
    @overload
    def item(self, item_id: str) -> AsyncItem[Any]: ...
    def item(self, item_id: str, strategy: Any = None) -> AsyncItem[Any]:
        """As `Producer.item`."""
        return AsyncItem(self._session, ItemPlace.parse(item_id), output_type_of(strategy))

    check = awaitable(ProducerSteps._check)
    batches = awaitable(ProducerSteps._batches)
    workers = awaitable(ProducerSteps._workers)
    quotas = awaitable(ProducerSteps._quotas)
    broken = awaitable(ProducerSteps._broken)
    quota = awaitable(ProducerSteps._quota)
    set_quota = awaitable(ProducerSteps._set_quota)
    close = awaitable(ProducerSteps._close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()


@cache
def default_producer() -> Producer:
    """The process's own, for `summarise.submit` and the like: of the app that `install` was called
    with, else with settings from the environment."""
    installed = host()
    if installed is None:
        producer = Producer()
    else:
        producer = Producer(installed.settings, redis_url=installed.redis_url, app=installed.app)
    atexit.register(producer.close)  # before the loop ends: what is still to be said goes out
    return producer


def find_batch(producer: Producer, batch_id: str) -> Found | None:
    """What Redis knows of a batch; None where there is none."""
    return block(producer._find(batch_id))


def prepare_batch(
    producer: Producer, spec: BatchSpec, found: Found, rows: Iterable[Row], rerun: Collection[str]
) -> tuple[BatchSpec, bool, Iterable[Row | Answered]]:
    """How `submit` goes on with a batch: the specification and `renew` for `Producer.open`, and the
    rows for `Batch.feed`.

    Raises:
        ChangedRowsError: finished rows ask another question now.
    """
    return block(producer._prepare(spec, found, rows, rerun=rerun))


async def _all(rows: Iterable[Row] | AsyncIterable[Row]) -> list[Row]:
    """All rows; a coroutine of steps."""
    iterator = rows.__aiter__() if isinstance(rows, AsyncIterable) else iter(rows)
    found: list[Row] = []
    while some := await NextRows(iterator, 1000, 1.0):
        found += some
    return found


def _as_line(result: WorkItemResult[Any, Any] | Mapping[str, Any]) -> Mapping[str, Any]:
    return result.to_json() if isinstance(result, WorkItemResult) else result


async def _refuse_other_kind(session: Session, spec: BatchSpec) -> None:
    """A rehearsal would replace paid answers by mock ones, a real run the other way round."""
    try:
        known = await session.services.ledger.batches.spec(spec.batch_id)
    except BatchNotFoundError:
        return
    if known.config.dry_run != spec.config.dry_run:
        kind = "a rehearsal (dry run)" if known.config.dry_run else "a real batch"
        raise BatchConflictError(f"{spec.batch_id!r} is {kind}; take another batch id")


def new_batch_id() -> str:
    """`b-` with the UTC time and six random digits: sorts by age, reads well in Flower."""
    return f"b-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
