"""Look at batches, steer them, read their results: for anybody."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from redis.exceptions import ResponseError

from batchllm_celery.connection import is_broken, readable, why
from batchllm_celery.errors import (
    BatchConflictError,
    BatchNotFoundError,
    BatchUnreadableError,
    UsageError,
)
from batchllm_celery.ledger import scripts
from batchllm_celery.ledger.background import BackgroundWork
from batchllm_celery.ledger.codec import Outcome, decode_entry
from batchllm_celery.ledger.locks import BatchLock
from batchllm_celery.ledger.scripts import ScriptRunner, text, unreadable
from batchllm_celery.models import BatchProgress, BatchSpec, BatchState
from batchllm_celery.settings import Settings

logger = logging.getLogger("batchllm_celery")

Publish = Callable[[list[int]], Awaitable[None]]

#: Bytes of a bitmap that one call of `reopen.lua` looks at: 1,024 items.
REOPEN_BYTES = 128
#: Items, and bytes of their payloads, that one call of `sweep.lua` takes: a few milliseconds.
SWEEP_ITEMS = 1000
SWEEP_BYTES = 8 * 1024 * 1024
#: Longest wait of one read, in seconds: below the connection's socket timeout.
LONGEST_BLOCK = 2.0


@dataclass(frozen=True, slots=True)
class Reopened:
    """What a resume or a retry brought back.

    `missing` items stay failed because their payload is gone (a bad row, or the byte cap): feed
    the rows again, then retry.
    """

    state: BatchState
    items: int = 0
    missing: int = 0


class Batches:
    """The batches of one namespace."""

    def __init__(
        self, runner: ScriptRunner, background: BackgroundWork, settings: Settings
    ) -> None:
        self._runner = runner
        self._connection = runner.connection
        self._keys = runner.keys
        self._background = background
        self._settings = settings
        self._sweeps: dict[str, asyncio.Task[None]] = {}

    def close(self) -> None:
        """Stop sweeps in the background: any process may go on with them."""
        for sweep in self._sweeps.values():
            sweep.cancel()

    async def spec(self, batch_id: str) -> BatchSpec:
        """What the batch runs with.

        Raises:
            BatchNotFoundError: for an unknown batch.
        """
        client: Any = self._connection.client
        meta = self._keys.batch(batch_id).meta
        try:
            stored = await self._connection.patiently(lambda: client.hget(meta, "spec"))
        except ResponseError as error:
            self._connection.broken.add("batch", batch_id, error)
            raise unreadable(batch_id, why(error)) from error
        if stored is None:
            raise BatchNotFoundError(f"batch {batch_id!r} is unknown")
        try:
            return BatchSpec.model_validate_json(stored)
        except ValueError as error:
            self._connection.broken.add("batch", batch_id, error)
            raise unreadable(batch_id, "its spec is corrupted or of a newer version") from None

    async def progress(self, batch_id: str) -> BatchProgress:
        """The counters at this moment.

        Raises:
            BatchNotFoundError: for an unknown batch.
        """
        reply = [
            text(part) if isinstance(part, bytes) else part
            for part in await self._runner.run(scripts.PROGRESS, batch_id)
        ]
        values = dict(zip(reply[::2], reply[1::2], strict=True))
        progress = _progress(batch_id, values)
        if values["ready"]:  # where no worker runs, nobody else would sweep a stopped batch
            self.sweep_if_stopped(batch_id, progress.state)
        return progress

    async def fingerprints(self, batch_id: str) -> bytes:
        """8 bytes of each row that was fed, in the order of the input."""
        client: Any = self._connection.client
        key = self._keys.batch(batch_id).fp
        return await self._connection.patiently(lambda: client.get(key)) or b""

    async def superseded(self, batch_id: str) -> str | None:
        """The last entry of the results that a new generation supersedes, until it is sealed."""
        client: Any = self._connection.client
        key = self._keys.batch(batch_id).meta
        found = await self._connection.patiently(lambda: client.hget(key, "superseded"))
        return None if found is None else text(found)

    async def newest(self, limit: int = 1000) -> list[BatchProgress]:
        """The batches of this namespace, the youngest first."""
        client: Any = self._connection.client
        listed = self._keys.batches
        broken = self._connection.broken
        try:
            ids = await self._connection.patiently(lambda: client.zrevrange(listed, 0, limit - 1))
        except ResponseError as error:
            if not is_broken(error):
                raise
            broken.add("list", listed, error)
            return []
        broken.mended("list", listed)
        found = []
        for batch_id in readable(ids, "batch", broken):
            try:
                await self.spec(batch_id)
                found.append(await self.progress(batch_id))
                broken.mended("batch", batch_id)
            except BatchNotFoundError:
                await client.zrem(listed, batch_id)  # expired
                broken.mended("batch", batch_id)
            except BatchUnreadableError:
                continue
            except Exception as error:
                if not is_broken(error):
                    raise
                broken.add("batch", batch_id, error)
        return found

    async def pause(self, batch_id: str) -> BatchState:
        """Start no further calls until `resume`; those in flight end as they do."""
        return (await self._control(batch_id, "pause"))[0]

    async def cancel(self, batch_id: str) -> BatchState:
        """Stop the batch: no call starts any more, every item that waits gets its outcome."""
        state, _ = await self._control(batch_id, "cancel")
        return await self.sweep(batch_id) if state.stopped else state

    async def defer(self, batch_id: str, until: float) -> BatchState:
        """Start no calls before `until` (Unix time of the Redis server), when a spent quota is
        reset. People see the state `parked`."""
        return (await self._control(batch_id, "defer", round(until * 1000)))[0]

    async def resume(self, batch_id: str, publish: Publish | None = None) -> Reopened:
        """Go on after a pause or a stop. What a stop left unanswered runs again, in a new round.

        `publish` gets the reopened indexes, 1,024 at a time at most; without it idle workers
        find them.

        Raises:
            UsageError: the batch's budget is spent.
        """
        return await self._reopening(batch_id, "resume", publish)

    async def retry(self, batch_id: str, publish: Publish | None = None) -> Reopened:
        """Run all failed items again, in a new round, with fresh attempts. See `resume`."""
        return await self._reopening(batch_id, "retry", publish)

    async def reopen(self, batch_id: str, publish: Publish | None = None) -> tuple[int, int]:
        """Go on with a reopening that is under way, wherever it began; items, missing ones."""
        items, missing, more = 0, 0, 1
        while more:
            more, indexes, gone = await self._runner.run(scripts.REOPEN, batch_id, [REOPEN_BYTES])
            items, missing = items + len(indexes), missing + gone
            if publish is not None and indexes:
                await publish(indexes)
        return items, missing

    async def results(
        self, batch_id: str, after: str = "0", count: int = 500, block: float = 0.0
    ) -> list[Outcome]:
        """Outcomes after the entry `after` ("0": from the start), oldest first.

        Waits up to `block` seconds (2 at most) for the first one; empty if none came.
        """
        out = self._keys.batch(batch_id).out
        milliseconds = int(min(block, LONGEST_BLOCK) * 1000) or None
        client = self._connection.client
        reply: Any = await self._connection.patiently(
            lambda: client.xread({out: after}, count=count, block=milliseconds)
        )
        streams = reply.items() if isinstance(reply, dict) else reply
        return [decode_entry(entry) for _, entries in streams or () for entry in entries]

    async def trim(self, batch_id: str, upto: str) -> None:
        """Say that everything up to the entry `upto` is safe with the consumer.

        Under `keep_results=False` it leaves Redis.

        Raises:
            BatchConflictError: this process does not hold the consumer lock.
        """
        milliseconds, sequence = upto.split("-")
        following = f"{milliseconds}-{int(sequence) + 1}"
        arguments = [self._runner.process_id, upto, following]
        if not await self._runner.run(scripts.TRIM, batch_id, arguments):
            raise BatchConflictError(f"another process takes the results of batch {batch_id!r} now")

    def lock(
        self,
        batch_id: str,
        role: Literal["consumer", "producer"],
        *,
        lease: float = 10.0,
        wait: float = 0.0,
    ) -> BatchLock:
        """The right to trim (consumer) or to feed (producer): `async with batches.lock(...): ...`

        `lease` and `wait` are seconds; see `BatchLock`.
        """
        return BatchLock(self._runner, batch_id, role, lease, wait)

    async def told(self, batch_id: str, round_: int) -> None:
        """Whoever was to be told that this round is over has been told."""
        await self._runner.run(scripts.TOLD, batch_id, [round_])

    async def sweep(self, batch_id: str) -> BatchState:
        """Write the outcome of every item of a stopped batch that nobody holds, 1,000 at a time.

        Any process may call it at any time: it does nothing to a batch that is not stopped.
        """
        while True:
            arguments = [SWEEP_ITEMS, SWEEP_BYTES]
            state, left = await self._runner.run(scripts.SWEEP, batch_id, arguments)
            if not left:
                return BatchState(text(state))

    def sweep_if_stopped(self, batch_id: str, state: BatchState) -> None:
        """Sweep, in the background, a batch whose state in a reply is a stopped one."""
        if state.stopped and batch_id not in self._sweeps:
            task = self._background.start(self._sweep_quietly(batch_id))
            self._sweeps[batch_id] = task
            task.add_done_callback(lambda _: self._sweeps.pop(batch_id, None))

    async def announce(self, spec: BatchSpec) -> None:
        """List the batch where people and workers look for work; workers take it off that list
        when it is over. Repeatable.

        These keys have other hash tags than the batch's own, so no script of the batch writes them.
        """
        ttl, now = self._settings.result_ttl_seconds, time.time()
        queue = self._keys.queue(spec.queue)

        async def call() -> None:
            async with self._connection.client.pipeline(transaction=False) as pipeline:
                pipeline.zadd(self._keys.batches, {spec.batch_id: now}, nx=True)
                # Urgent batches first, then first come, first served.
                pipeline.zadd(queue, {spec.batch_id: now - spec.priority * 1e10})
                pipeline.expire(self._keys.batches, ttl)
                pipeline.expire(queue, ttl)
                await pipeline.execute()

        await self._connection.patiently(call)

    async def _sweep_quietly(self, batch_id: str) -> None:
        try:
            await self.sweep(batch_id)
        except (BatchNotFoundError, BatchUnreadableError):
            return
        except Exception:
            logger.exception("ledger.sweep_failed batch_id=%s", batch_id)

    async def _control(
        self, batch_id: str, action: str, *arguments: int
    ) -> tuple[BatchState, bool]:
        """The state after `action`, and whether items are to be reopened."""
        state, _, reopening, spent = await self._runner.run(
            scripts.CONTROL, batch_id, [action, *arguments]
        )
        if spent:
            raise UsageError(
                f"batch {batch_id!r} has spent its budget: submit the same input with the same "
                f"--batch-id and a larger --token-budget or --max-cost"
            )
        client, channel = self._connection.client, self._keys.control
        await self._connection.patiently(lambda: client.publish(channel, batch_id))
        return BatchState(text(state)), bool(reopening)

    async def _reopening(self, batch_id: str, action: str, publish: Publish | None) -> Reopened:
        state, reopening = await self._control(batch_id, action)
        if not reopening:
            return Reopened(state)
        await self.announce(await self.spec(batch_id))
        items, missing = await self.reopen(batch_id, publish)
        return Reopened((await self.progress(batch_id)).state, items, missing)


def _progress(batch_id: str, values: dict[str, str | int]) -> BatchProgress:
    def whole(name: str) -> int:
        return int(values.get(name, 0))

    def moment(name: str) -> float | None:
        return int(values[name]) / 1000 if name in values else None

    return BatchProgress(
        batch_id=batch_id,
        state=BatchState(str(values["state"])),
        total=whole("total") if "total" in values else None,
        fed=whole("fed"),
        succeeded=whole("ok"),
        failed=whole("failed"),
        in_flight=whole("held"),
        input_tokens=whole("input"),
        output_tokens=whole("output"),
        cached_input_tokens=whole("cached"),
        cost=float(values["cost"]) if whole("priced") else None,
        maybe_billed=whole("maybe_billed"),
        submitted_at=moment("submitted_at") or 0.0,
        parked_until=moment("parked_until"),
        unread=whole("out_count") - whole("read_count"),
    )
