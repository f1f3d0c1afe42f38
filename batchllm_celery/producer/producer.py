"""The producer: streams work into a fleet, and finds its batches again."""

from __future__ import annotations

import asyncio
import difflib
import json
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, Self

from batchllm_celery.connection import BrokenEntry
from batchllm_celery.errors import (
    BatchConflictError,
    BatchNotFoundError,
    FailureKind,
    StrategyNotFoundError,
)
from batchllm_celery.events import Events
from batchllm_celery.ledger import WorkerInfo
from batchllm_celery.ledger.workers import list_workers
from batchllm_celery.limiter import QuotaState
from batchllm_celery.models import (
    BatchProgress,
    BatchSpec,
    ProcessorConfig,
    Quota,
    StrategySpec,
    WorkItemResult,
)
from batchllm_celery.models.names import check_batch_id
from batchllm_celery.producer.batch import Batch, late_words
from batchllm_celery.producer.continuing import (
    Answered,
    ChangedRowsError,
    Outcomes,
    Questions,
    look,
    moved,
    refusal,
    rerun_of,
)
from batchllm_celery.producer.rows import Row, default_strategy
from batchllm_celery.producer.session import Session
from batchllm_celery.queue import App
from batchllm_celery.settings import Settings

#: Added to the places of results that are being replaced.
_ELSEWHERE = 2**40
#: How long, in seconds, a submission looks for workers that know its strategy.
LOOK_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class Found:
    """A batch that is there: what it runs with, its counters, 8 bytes for each row that was fed."""

    spec: BatchSpec
    progress: BatchProgress
    fed: bytes


class Producer:
    """Submits batches to a fleet. A context manager; every method may be called from any thread.

        with Producer() as producer:
            batch = producer.submit(["First text", "Second text"], strategy="summarise")
            for result in batch.results():
                ...

    From a coroutine: `await asyncio.to_thread(producer.submit, ...)`, then `async for`.

    Args:
        settings: default: from the environment.
        redis_url: in place of the settings'; with neither, the broker of `app`, else the embedded
            Valkey.
        namespace: in place of the settings'.
        app: an existing Celery app (see `install`) to send the messages with.
        events: hears of a Redis that is lost and found again.
    """

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

    @property
    def url(self) -> str:
        """The Redis in use.

        Raises:
            EmbeddedServerError: the embedded one did not start.
        """
        return self._session.url

    def check(self) -> None:
        """Return if Redis answers, within about 3 s.

        Raises:
            RedisUnavailableError: in one clear line.
        """
        self._session.run(lambda session: session.services.connection.ping())

    # -- submitting -------------------------------------------------------------------------------

    def submit(
        self,
        items: Iterable[Row],
        *,
        strategy: str | StrategySpec | None = None,
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
        max_outstanding: int | None = None,
        rerun: str | Collection[str] | None = None,
        known: Iterable[WorkItemResult[Any, Any] | Mapping[str, Any]] | None = None,
    ) -> Batch:
        """Store and enqueue all items, and return the batch; its results stay readable for
        `settings.result_ttl_seconds`.

        Blocks while more than `max_outstanding` items are unfinished; `stream` does not. Where it
        raises, the batch is cancelled; the same id goes on with it.

        Args:
            items: strings, mappings with `prompt` (and `item_id`, `context`), or `LLMWorkItem`s;
                any iterable, consumed lazily.
            strategy: a registered name; default: the first item's own.
            params: parameters of the strategy's factory.
            batch_id: the same id goes on with a batch: rows are recognised by their ids, else by
                what stands in them, wherever they stand now. New rows run, finished ones do not.
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
            max_outstanding: default `settings.max_outstanding`.
            rerun: what becomes of finished rows: `changed` runs those that ask another question
                now, `none` keeps their answers, `failed` runs failed rows again, `all` everything.
            known: results that need not be paid for again; default: those that Redis has kept.

        Raises:
            ChangedRowsError: finished rows ask another question now, and `rerun` does not say
                what becomes of them; nothing has changed.
            UsageError: an item can't be taken (its place and id are named), or a strategy is
                missing.
            StrategyNotFoundError: live workers serve the lane, and none of them knows the strategy.
            BatchConflictError: the id belongs to another job that is still running.
            QuotaConflictError: the quota exists with other limits.
            RedisDeniedError: Redis denies a right, or the password.
            TimeoutError: Redis or the broker was away until the `deadline`.
        """
        spec_of_strategy, rows = default_strategy(items, strategy)
        if params:
            spec_of_strategy = StrategySpec(name=spec_of_strategy.name, params=params)
        spec = BatchSpec(
            batch_id=new_batch_id() if batch_id is None else check_batch_id(batch_id),
            strategy=spec_of_strategy,
            quota=quota.name if isinstance(quota, Quota) else quota,
            config=config or ProcessorConfig(),
            queue=queue,
            priority=priority,
            items_per_task=items_per_task,
            deadline=deadline,
            max_cost=max_cost,
            token_budget=token_budget,
            fail_fast=tuple(FailureKind(kind) for kind in fail_fast),
        )
        self.check_runnable(spec)
        limits = quota if isinstance(quota, Quota) else None
        renew = False
        feed: Iterable[Row | Answered] = rows
        found = self.find(spec.batch_id) if batch_id is not None else None
        if found is not None or known is not None:
            spec, renew, feed = self.prepare(spec, found, rows, rerun=rerun, known=known)
        batch = self.open(spec, quota=limits, quota_update=quota_update, renew=renew)
        try:
            batch.feed(feed, max_outstanding=max_outstanding)
        except BaseException:
            # Nobody has the batch: what was fed of it must not be paid for.
            batch.give_up()
            raise
        return batch

    def prepare(
        self,
        spec: BatchSpec,
        found: Found | None,
        rows: Iterable[Row],
        *,
        rerun: str | Collection[str] | None = None,
        known: Iterable[WorkItemResult[Any, Any] | Mapping[str, Any]] | None = None,
    ) -> tuple[BatchSpec, bool, Iterator[Row | Answered]]:
        """How to go on with a batch whose results Redis keeps: the specification and `renew` for
        `open`, and the rows for `feed`. See `submit`.

        Raises:
            ChangedRowsError: finished rows ask another question now.
        """
        """What to open and feed, where the batch or some of its results are there already."""
        rows = list(rows)  # it is looked at before anything changes
        if found is not None and found.spec.config.dry_run != spec.config.dry_run:
            return spec, False, iter(rows)  # `open` says why not
        lines: list[bytes] = []
        outcomes = Outcomes()
        for line in self._lines(found, spec.batch_id) if known is None else map(_as_line, known):
            outcomes.add(line, len(lines))
            lines.append(json.dumps(line).encode())
        questions = Questions(spec, self.settings.openai_base_url)
        seen = look(
            rows,
            outcomes,
            questions,
            spec.strategy,
            found.fed if found is not None else b"",
            rerun_of(rerun),
        )
        if seen.refused:
            cost = sum(json.loads(lines[number])["cost"] or 0.0 for _, number in seen.changed)
            raise ChangedRowsError(refusal(len(seen.changed), cost) + "rerun='changed' or 'none'")
        if found is not None and not seen.renews and known is None:
            return spec.model_copy(update={"generation": found.spec.generation}), False, iter(rows)
        if found is not None and known is None and found.progress.finished > len(outcomes):
            raise BatchConflictError(
                f"batch {spec.batch_id!r}: its rows differ from those that it has, and its results "
                "are with whoever took them: give them as known=..., or take another batch id"
            )
        before = found.spec.generation if found is not None else 0
        spec = spec.model_copy(update={"generation": before + 1})

        def delivered(place: int, row: Row, number: int) -> bytes:
            line = moved(json.loads(lines[number]), place, row, questions, spec.strategy)
            return json.dumps(line).encode()

        return spec, found is not None, seen.feed(rows, delivered)

    def _lines(self, found: Found | None, batch_id: str) -> Iterator[dict[str, Any]]:
        """The kept results of a batch. Those of a generation that was being replaced when its
        producer ended have places that no row has."""
        if found is None:
            return
        until = self._session.run(lambda s: s.services.ledger.batches.superseded(batch_id))
        batch = Batch(self._session, found.spec, resumed=True)
        after, old = "0", until is not None
        while taken := batch.read(after):
            for one in taken:
                line = dict(one.line)
                if old:
                    line["index"] = one.index + _ELSEWHERE
                    old = one.receipt != until
                yield line
            after = taken[-1].receipt

    def stream(
        self, items: Iterable[Row], *, spec: BatchSpec | None = None, **options: Any
    ) -> Iterator[WorkItemResult[Any, Any]]:
        """Feed `items` and yield their results at the same time, in bounded memory: results leave
        Redis when they have been yielded.

        Args:
            items: as for `submit`.
            spec: the whole batch, in place of `options`.
            options: as for `submit`.
        """
        batch, rows = self._open_stream(items, spec, options)
        stop, failure = threading.Event(), []

        def feed() -> None:
            try:
                batch.feed(rows, stop=stop, max_outstanding=options.get("max_outstanding"))
            except BaseException as error:
                failure.append(error)
                batch.cancel()

        feeder = threading.Thread(target=feed, name="batchllm-feeder", daemon=True)
        feeder.start()
        try:
            yield from self._until_over(batch, feeder)
        finally:
            stop.set()
            feeder.join()
        if failure:
            raise failure[0]

    def _open_stream(
        self, items: Iterable[Row], spec: BatchSpec | None, options: dict[str, Any]
    ) -> tuple[Batch, Iterable[Row]]:
        options = {name: value for name, value in options.items() if name != "max_outstanding"}
        chosen, rows = default_strategy(
            items, spec.strategy if spec else options.pop("strategy", None)
        )
        params, quota = options.pop("params", None), options.pop("quota", None)
        update, batch_id = options.pop("quota_update", False), options.pop("batch_id", None)
        if spec is None:
            spec = BatchSpec(
                batch_id=new_batch_id() if batch_id is None else check_batch_id(batch_id),
                strategy=StrategySpec(name=chosen.name, params=params) if params else chosen,
                quota=quota.name if isinstance(quota, Quota) else quota,
                keep_results=False,
                **options,
            )
        self.check_runnable(spec)
        limits = quota if isinstance(quota, Quota) else None
        return self.open(spec, quota=limits, quota_update=update), rows

    def _until_over(
        self, batch: Batch, feeder: threading.Thread
    ) -> Iterator[WorkItemResult[Any, Any]]:
        while True:
            fed_all = not feeder.is_alive()
            over = fed_all and (progress := batch.progress()).finished >= progress.fed
            taken = batch.take(timeout=0.0 if over else 0.5)
            for delivered in taken:
                yield WorkItemResult.from_json(delivered.line)
            if taken:
                batch.acknowledge(taken[-1].receipt)
            elif over:
                return

    def open(
        self,
        spec: BatchSpec,
        *,
        quota: Quota | None = None,
        quota_update: bool = False,
        renew: bool = False,
    ) -> Batch:
        """Make a batch without rows yet, or continue the one of this id; then `feed` it.

        A batch that was stopped goes on in a new round: items that the stop ended run again,
        failed ones do not (see `Batch.retry_failed`).

        Args:
            spec: what it runs with.
            quota: limits to set first.
            quota_update: change a quota whose limits differ.
            renew: forget the rows of a batch that is there: a new generation of its input follows.

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
        resumed = self._session.run(create_in_time)
        batch = Batch(self._session, spec, resumed=resumed, feeding=feeding)
        if resumed and batch.progress().state in ("paused", "parked"):
            batch.resume()
        return batch

    def check_runnable(self, spec: BatchSpec) -> None:
        """Return if a live worker of the batch's queue knows its strategy. Return, too, if there is
        no worker yet, or if Redis does not answer within `LOOK_SECONDS`.

        Raises:
            StrategyNotFoundError: none of them does; with the names that are near.
        """

        async def look(session: Session) -> list[WorkerInfo]:
            async with asyncio.timeout(min(LOOK_SECONDS, spec.deadline or LOOK_SECONDS)):
                return await list_workers(session.services.connection, session.services.keys)

        try:
            found = self._session.run(look)
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

    def attach(self, batch_id: str) -> Batch:
        """A batch that somebody submitted.

        Raises:
            UsageError: for what can't be an id.
            BatchNotFoundError: for an unknown id.
        """
        check_batch_id(batch_id)
        spec = self._session.run(lambda session: session.services.ledger.batches.spec(batch_id))
        return Batch(self._session, spec, resumed=True)

    def find(self, batch_id: str) -> Found | None:
        """What Redis knows of a batch; None where there is none."""

        async def find(session: Session) -> Found | None:
            batches = session.services.ledger.batches
            try:
                spec, progress = await batches.spec(batch_id), await batches.progress(batch_id)
            except BatchNotFoundError:
                return None
            return Found(spec, progress, await batches.fingerprints(batch_id))

        return self._session.run(find)

    def quiesce(self, batch_id: str) -> None:
        """Pause a batch, and return when no living worker holds items of it.

        Raises:
            BatchConflictError: workers go on holding some.
        """
        self._session.run(lambda session: session.services.ledger.feeding.quiesce(batch_id))

    def batches(self) -> list[BatchProgress]:
        """All batches of this namespace, the youngest first."""
        return self._session.run(lambda session: session.services.ledger.batches.newest())

    def workers(self) -> list[WorkerInfo]:
        """The worker processes seen within the last minute."""
        return self._session.run(
            lambda session: list_workers(session.services.connection, session.services.keys)
        )

    def quotas(self) -> list[QuotaState]:
        """The quotas in use, with their limiter's state."""
        return self._session.run(lambda session: session.services.limiter.states())

    def broken(self) -> list[BrokenEntry]:
        """What `batches`, `quotas` and `workers` have met so far and could not read."""

        async def found(session: Session) -> list[BrokenEntry]:
            return session.services.connection.broken.all()

        return self._session.run(found)

    def quota(self, name: str) -> QuotaState | None:
        """One quota's limiter state; None if nobody has used it."""
        found = [state for state in self.quotas() if state.name == name]
        return found[0] if found else None

    def set_quota(self, quota: Quota, *, update: bool = True) -> Quota:
        """Configure a quota; a change reaches the whole fleet within a second.

        Raises:
            QuotaConflictError: it differs and `update` is false.
        """
        return self._session.run(
            lambda session: session.services.limiter.configure(quota, update=update)
        )

    def close(self) -> None:
        """Give back locks and connections; batches go on without us. Idempotent."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


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
