"""One item's life in a worker process: from its claim to its recorded outcome, or back to Redis."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import cached_property
from typing import Any

from batchllm_celery.dialects.blobs import BlobMissingError
from batchllm_celery.errors import (
    FailureKind,
    StrategyNotFoundError,
    StrategyParametersError,
    UsageError,
    describe,
)
from batchllm_celery.execution import ItemJob, ItemRunner, Prices, Stopped, Unrunnable
from batchllm_celery.execution.pricing import given_prices
from batchllm_celery.ledger import Claim, able, list_workers
from batchllm_celery.limiter import Estimator
from batchllm_celery.models import (
    NO_TOKENS,
    BatchSpec,
    BatchState,
    Failure,
    Prompt,
    Quota,
    RetryState,
    StrategySpec,
    TokenUsage,
    WorkItemResult,
)
from batchllm_celery.services import Services
from batchllm_celery.strategies import LLMCallStrategy
from batchllm_celery.strategies.failures import log_bug, status_of
from batchllm_celery.worker.admission import Admission
from batchllm_celery.worker.prompts import Prompts
from batchllm_celery.worker.slots import Slots
from batchllm_celery.worker.unrunnable import (
    MOST_DELAY,
    Faults,
    is_missing,
    is_of_the_process,
    reason_of,
)

#: Seconds until parameters that no live worker takes fail their items. They are a typing error
#: more often than a deploy.
PARAMETERS_AFTER = 30.0
#: Where a live worker could run it so many seconds ago, an item waits no longer than this.
ABLE_SECONDS, ABLE_DELAY = 10.0, 2.0
#: A key that is refused is this process' own if its quota had a success anywhere in so many seconds
#: before, or has one in so many after.
CREDENTIAL_SECONDS, CREDENTIAL_WAIT = 60.0, 5.0
_CREDENTIAL_LOOK = 0.5

_Result = WorkItemResult[Any, Any]


class Items:
    """The items that this process has claimed and not ended.

    Args:
        services: the process' ledger, limiter and registry; they are used on its event loop.
        slots: limit the calls in flight.
        faults: the strategies that this process can't run.
        admission: its end ends the start of further calls.
        queues: the lanes that this process serves.
    """

    def __init__(
        self,
        services: Services,
        slots: Slots,
        faults: Faults,
        admission: Admission,
        queues: Sequence[str],
    ) -> None:
        self.services = services
        self.slots = slots
        self.faults = faults
        self.admission = admission
        self.queues = queues
        self._running: dict[tuple[str, int], Item] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._refused_keys: dict[str, float] = {}
        """Quota -> when a refused key was found to be no matter of this process."""

    def __len__(self) -> int:
        return len(self._running)

    @cached_property
    def runner(self) -> ItemRunner:
        services = self.services
        prices = Prices(services.settings.prices_file)
        return ItemRunner(services.limiter, Estimator(), services.events, prices)

    @cached_property
    def prompts(self) -> Prompts:
        return Prompts(self.services.ledger.claims)

    def start(self, spec: BatchSpec, claim: Claim) -> asyncio.Task[_Result | None]:
        """Run a claimed item; the task's result is None for one that went back to Redis."""
        item = Item(self, spec, claim)
        self._running[claim.batch_id, claim.index] = item
        item.task.add_done_callback(item.ended)
        return item.task

    def remove(self, item: Item) -> None:
        key = (item.claim.batch_id, item.claim.index)
        if self._running.get(key) is item:
            del self._running[key]

    def runs(self, claim: Claim) -> bool:
        """Whether an item of this process still holds `claim`."""
        item = self._running.get((claim.batch_id, claim.index))
        return item is not None and item.claim is claim

    def hand_back(self, wanted: Callable[[Item], bool], why: str = "a_shutdown") -> None:
        """Cancel items, which releases them; `why` is what cut their calls off, if in one."""
        for item in list(self._running.values()):
            if wanted(item):
                item.handed_back = True
                item.claim.cut_by = why
                item.task.cancel()

    async def hand_back_all(self, timeout: float) -> None:
        """Cancel every item and wait at most `timeout` seconds until they are released."""
        self.hand_back(lambda item: True)
        tasks = [item.task for item in self._running.values()]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout)

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something in the background that nobody waits for."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def credential_is_ours(self, quota: str, claim: Claim) -> bool:
        """Whether a key that a provider refused is this process' own: the quota's calls succeed
        elsewhere, or did a moment ago. Else the key is the fleet's, and the batch stops."""
        refused = self._refused_keys.get(quota, -math.inf)
        known = time.monotonic() - refused < CREDENTIAL_SECONDS
        waits = not known and await self._has_neighbours()
        ends = time.monotonic() + CREDENTIAL_WAIT if waits else -math.inf
        services = self.services
        while True:
            at = await able.succeeded_at(services.connection, services.keys, quota)
            if claim.server_now - at < CREDENTIAL_SECONDS:
                return True
            if time.monotonic() >= ends:
                self._refused_keys[quota] = time.monotonic()
                return False
            await asyncio.sleep(_CREDENTIAL_LOOK)

    async def _has_neighbours(self) -> bool:
        """Whether another live worker serves a queue of ours."""
        services = self.services
        workers = await list_workers(services.connection, services.keys)
        return any(
            worker.worker_id != services.process_id
            and not set(self.queues).isdisjoint(worker.queues.split(","))
            for worker in workers
        )


class Item:
    """One claimed item of this process, and the gate that its runner asks (`execution.Gate`).

    The runner's questions are methods here: with thousands of items in flight, a closure for each
    question would weigh more than all that this holds.
    """

    __slots__ = (
        "_begun",
        "_chosen",
        "_items",
        "_quota",
        "_spec",
        "_strategy",
        "claim",
        "handed_back",
        "task",
    )

    def __init__(self, items: Items, spec: BatchSpec, claim: Claim) -> None:
        self._items = items
        self._spec = spec
        self._chosen: StrategySpec = claim.payload.strategy or spec.strategy
        self._strategy: LLMCallStrategy[Any]
        self._quota = ""
        self._begun = False
        self.claim = claim
        self.handed_back = False
        self.task: asyncio.Task[_Result | None] = asyncio.ensure_future(self._run())

    def ended(self, _: object) -> None:
        """For `Task.add_done_callback`."""
        self._items.remove(self)
        if not self._begun:  # cancelled at once: `_run` never saw it
            self._items.spawn(self._release())

    async def _release(self) -> None:
        await self._items.services.ledger.claims.release([self.claim])

    async def _run(self) -> _Result | None:
        self._begun = True
        slots = self._items.slots
        try:
            await slots.take(self._spec.priority)
            try:
                outcome = await self._outcome()
                # Inside: what a budget can be overshot by is what the slots hold.
                if isinstance(outcome, WorkItemResult):
                    return await self._record(outcome)
            finally:
                slots.give()
            if isinstance(outcome, Unrunnable):
                return await self._hand_back_or_fail(outcome)
            if outcome.until is not None:
                ledger = self._items.services.ledger
                await ledger.batches.defer(self.claim.batch_id, outcome.until)
            await self._release()
        except asyncio.CancelledError:
            await asyncio.shield(self._release())
            if self.handed_back:
                return None
            raise
        except GeneratorExit:  # the loop is closed: nothing can be awaited
            raise
        except BaseException:
            # A fault of ours or of Redis, not the item's: held any longer it would hang for ever.
            await asyncio.shield(self._release())
            raise
        return None

    async def _outcome(self) -> _Result | Stopped | Unrunnable:
        items, claim, chosen = self._items, self.claim, self._chosen
        faults, registry = items.faults, items.services.registry
        if claim.payload.problem is not None:
            problem = f"InvalidInput: {claim.payload.problem}"
            return self._without_call(FailureKind.INVALID_INPUT, problem)
        expires = claim.payload.expires_at
        if expires is not None and claim.server_now > expires:
            return self._without_call(FailureKind.DEADLINE, "Expired: before it was run")
        if faults.found and (fault := faults.waiting(chosen)):
            return Unrunnable(fault.reason, parameters=fault.parameters)
        try:
            prompt = await items.prompts.of(claim)
        except BlobMissingError:
            gone = "InvalidInput: a part of its request is no longer in Redis: submit it again"
            return self._without_call(FailureKind.INVALID_INPUT, gone)
        except (ValueError, LookupError, TypeError) as error:
            unread = f"InvalidInput: its request can't be read here ({type(error).__name__})"
            return self._without_call(FailureKind.INVALID_INPUT, unread)
        try:
            strategy = self._strategy = await registry.get(chosen)
            job = self._job(strategy, prompt)
        except UsageError as error:
            return self._not_built(error)
        except BaseException as error:  # a property of it fails: it would each time
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            log_bug("strategy.unusable", error, strategy=chosen.name)
            return self._without_call(FailureKind.LOGIC_ERROR, describe(error))
        with registry.using(strategy):
            outcome = await items.runner.run(job)
        await registry.close_surplus()
        if isinstance(outcome, WorkItemResult):
            if faults.found:
                faults.ran(chosen)
            if self._spec.config.dry_run:
                return _rehearsed(outcome)
        elif isinstance(outcome, Unrunnable):
            claim.usage, claim.last_error = job.usage, job.last_error
        return outcome

    def _job(self, strategy: LLMCallStrategy[Any], prompt: Prompt) -> ItemJob:
        spec, claim = self._spec, self.claim
        payload = claim.payload
        quota = self._quota = spec.quota or strategy.quota or spec.strategy.name
        # The runner asks for them, too, where a failure would be taken for one of Redis.
        _ = strategy.max_output_tokens, strategy.models()
        # Where it has its default name nobody has chosen it.
        if strategy.full_speed and quota in (strategy.model_name, spec.strategy.name):
            self._items.services.limiter.begin_at_full_speed(quota)
        return ItemJob(
            batch_id=claim.batch_id,
            item_id=payload.item_id,
            index=claim.index,
            prompt=prompt,
            context=payload.context,
            strategy=strategy,
            prepare=self.prepare,
            quota=quota,
            config=spec.config,
            state=claim.state,
            attempts=claim.attempts,
            refusals=claim.refusals,
            overloads=claim.overloads,
            last_error=claim.last_error,
            usage=claim.usage,
            queued_seconds=claim.queued_seconds + time.monotonic() - claim.claimed_at,
            priority=spec.priority,
            prices=given_prices(spec.prices),
            needs_prices=spec.max_cost is not None,
            estimate_usage=spec.token_budget is not None,
            keep_raw=spec.keep_raw,
            gate=self,
            parks=self.parks,
        )

    # -- what the runner asks ---------------------------------------------------------------------

    async def prepare(self) -> None:
        await self._items.services.registry.prepare(self._strategy)
        if self._items.faults.found:
            self._items.faults.was_prepared(self._chosen)

    async def parks(self) -> bool:
        """What the quota says when its day is over; one that nobody configured parks."""
        services = self._items.services
        connection, key = services.connection, services.keys.quota(self._quota).state
        client: Any = connection.client
        config: bytes | None = await connection.patiently(lambda: client.hget(key, "config"))
        return config is None or Quota.model_validate_json(config).day_exhausted == "park"

    async def begin(self) -> FailureKind | BatchState | None:
        if self._items.admission.closed:
            return BatchState.PAUSED
        return await self._items.services.ledger.claims.begin(self.claim)

    async def save(
        self,
        attempts: int,
        refusals: int,
        state: RetryState,
        usage: TokenUsage,
        *,
        overloads: int,
        last_error: str,
    ) -> None:
        await self._items.services.ledger.claims.save(
            self.claim,
            attempts,
            refusals,
            state,
            usage,
            overloads=overloads,
            last_error=last_error,
        )

    def gave_up(self) -> None:
        self.claim.given_up += 1

    def calls(self, under_way: bool) -> None:
        self.claim.calling, self.claim.unused = under_way, not under_way

    async def hands_back(self, failure: Failure, error: Exception, *, called: bool) -> bool:
        items, claim = self._items, self.claim
        if not items.services.settings.unrunnable_after:
            return False
        if called and not items.faults.may_hand_back(claim.batch_id, claim.index):
            return False
        if failure.kind is FailureKind.AUTHENTICATION and (called or status_of(error) is not None):
            return await items.credential_is_ours(self._quota, claim)
        return is_missing(error) if called else is_of_the_process(failure, error)

    # -- its end ----------------------------------------------------------------------------------

    async def _record(self, result: _Result) -> _Result:
        # It arrives even if this task is cancelled now: the answer is paid for.
        claims = self._items.services.ledger.claims
        result, line = await claims.fitting(self.claim.payload.signed(result))
        tokens = result.token_usage.total_tokens
        await claims.record(self.claim, result, spent_tokens=tokens, cost=result.cost, line=line)
        return result

    def _without_call(self, kind: FailureKind, error: str) -> _Result:
        return WorkItemResult(
            item_id=self.claim.payload.item_id,
            index=self.claim.index,
            success=False,
            error=error,
            error_kind=kind,
            context=self.claim.payload.context,
        )

    def _not_built(self, error: UsageError) -> _Result | Unrunnable:
        of_the_job = Failure(FailureKind.INVALID_REQUEST, describe(error))
        if self._items.services.settings.unrunnable_after and (
            isinstance(error, StrategyNotFoundError) or is_of_the_process(of_the_job, error)
        ):
            return Unrunnable(
                reason_of(error), parameters=isinstance(error, StrategyParametersError)
            )
        return self._without_call(of_the_job.kind, of_the_job.message)

    async def _hand_back_or_fail(self, outcome: Unrunnable) -> _Result | None:
        """Hand the item back that this process can't run; or end it, where nobody can."""
        items, claim, chosen = self._items, self.claim, self._chosen
        faults, services = items.faults, items.services
        fault = faults.add(chosen, outcome.reason, claim.batch_id, called=outcome.called)
        fault.parameters = outcome.parameters
        asyncio.get_running_loop().call_later(
            max(0.0, fault.retry_at - time.monotonic()) + 0.01, items.admission.on_room
        )
        first = claim.handed_back_at or claim.server_now
        last = await able.able_at(services.connection, services.keys, chosen)
        after = services.settings.unrunnable_after
        if outcome.parameters:
            after = min(after, PARAMETERS_AFTER)
        fault.hopeless = claim.server_now - max(first, last) > after
        if fault.hopeless:
            if outcome.parameters:
                return await self._record(
                    self._without_call(FailureKind.INVALID_REQUEST, outcome.reason)
                )
            why = f"Unrunnable: no worker could run strategy {chosen.name!r} for {after:g} s; "
            why += f"the last one that tried: {outcome.reason}"
            return await self._record(self._without_call(FailureKind.UNRUNNABLE, why))
        if outcome.called or not claim.handed_back_at:
            claim.handed_back_at = first
            await services.ledger.claims.save(
                claim,
                claim.attempts,
                claim.refusals,
                claim.state,
                claim.usage,
                overloads=claim.overloads,
                last_error=claim.last_error,
            )
        delay = faults.delay(fault, claim.batch_id, claim.index)
        if claim.server_now - last < ABLE_SECONDS and delay <= MOST_DELAY:
            delay = min(delay, ABLE_DELAY)
        await services.ledger.claims.release([claim], delay=delay)
        return None


def _rehearsed(result: _Result) -> _Result:
    """A rehearsal's result: marked as one, and without tokens that nobody spent."""
    metadata = {**result.metadata, "dry_run": True}
    changes = {"token_usage": NO_TOKENS, "cost": None, "metadata": metadata}
    return result.model_copy(update=changes)
