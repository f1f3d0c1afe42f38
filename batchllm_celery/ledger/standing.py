"""Standing batches: items that come one by one, and those who wait for one of them.

All single items of one strategy (and parameters, queue, priority) ride on one batch, which begins
anew every hour, so that what is done expires as a whole. Everything else is that of any batch: the
claims, the limiter, exactly one outcome.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import re
import secrets
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from batchllm_celery.errors import (
    BatchConflictError,
    BatchNotFoundError,
    FailureKind,
    InputError,
    LedgerFullError,
    UsageError,
    describe,
)
from batchllm_celery.ledger import scripts
from batchllm_celery.ledger.background import BackgroundWork
from batchllm_celery.ledger.batches import Batches
from batchllm_celery.ledger.batching import Coalescer
from batchllm_celery.ledger.codec import (
    Outcome,
    Payload,
    decode_entry,
    fingerprint,
    strategy_identity,
)
from batchllm_celery.ledger.feeding import Feeding
from batchllm_celery.ledger.scripts import Argument, ScriptRunner, text
from batchllm_celery.models import BatchSpec
from batchllm_celery.settings import Settings

logger = logging.getLogger("batchllm_celery")

#: Seconds after which new items go to a new batch.
PERIOD = 3600
#: Seconds between two looks of those who wait: the channel is the fast path, not the guarantee.
LOOK_SECONDS = 1.0
#: Seconds for which a full ledger is waited for.
FULL_SECONDS = 30.0
#: Seconds for which nobody waits until a channel is left.
IDLE_SECONDS = 30.0
#: Batches that this process knows to exist.
KNOWN = 256
#: Items in one call of a script at most.
CALL_ITEMS = 200
_NO_ID = re.compile(r"[^A-Za-z0-9._-]")


@dataclass(frozen=True, slots=True)
class ItemPlace:
    """Where a single item is; `str()` of it is the item's id."""

    batch_id: str
    index: int

    def __str__(self) -> str:
        return f"{self.batch_id}:{self.index}"

    @classmethod
    def parse(cls, item_id: str) -> ItemPlace:
        """Read `str()` back.

        Raises:
            UsageError: for what is no item's id.
        """
        batch_id, _, index = item_id.rpartition(":")
        if not batch_id or not index.isdecimal() or len(index) > 10:
            raise UsageError("an item's id reads BATCH:NUMBER, as its handle says")
        return cls(batch_id, int(index))


@dataclass(frozen=True, slots=True)
class KnownItem:
    """What is known of one item."""

    outcome: Outcome | None
    task: bytes
    """The Celery task that awaits it and has not been told (JSON), or nothing."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """An item to append."""

    arguments: tuple[Argument, ...]
    """Of `append.lua`."""
    blobs: dict[bytes, bytes]
    """What its payload needs beside it, by SHA-256."""


@dataclass(slots=True)
class _Batch:
    """The calls of one standing batch, gathered."""

    spec: BatchSpec
    append: Coalescer[_Entry, int]


def standing_spec(template: BatchSpec, now: float) -> BatchSpec:
    """The standing batch for items of such a kind at such a time (Unix seconds)."""
    words = template.model_dump_json(exclude={"batch_id"}).encode()
    kind = hashlib.blake2b(words, digest_size=4).hexdigest()
    hour = time.strftime("%Y%m%d-%H", time.gmtime(now - now % PERIOD))
    name = _NO_ID.sub("_", template.strategy.name).lstrip(".-")[:60] or "_"
    return template.model_copy(update={"batch_id": f"{name}-{kind}-{hour}", "standing": True})


class Standing:
    """The single items of one namespace, for one process."""

    def __init__(
        self,
        runner: ScriptRunner,
        batches: Batches,
        feeding: Feeding,
        background: BackgroundWork,
        settings: Settings,
    ) -> None:
        self._runner = runner
        self._batches = batches
        self._feeding = feeding
        self._background = background
        self._settings = settings
        self._known: dict[str, _Batch] = {}
        self._opening: dict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._waiting: dict[str, dict[int, list[asyncio.Future[Outcome]]]] = {}
        self._followers: dict[str, asyncio.Task[None]] = {}

    async def append(
        self,
        template: BatchSpec,
        payload: Payload,
        *,
        item_id: str | None = None,
        task: bytes = b"",
        delay: float = 0.0,
    ) -> ItemPlace:
        """Store one item; the caller sends its message.

        Args:
            template: what it runs with; its batch id is chosen here.
            payload: the item.
            item_id: the same id within an hour is the same item; default a new one.
            task: the Celery task that awaits it.
            delay: seconds before which no worker looks for it by itself.

        Raises:
            InputError: it has no JSON form.
            BatchConflictError: somebody has cancelled the standing batch.
            LedgerFullError: Redis holds as many bytes of waiting payloads as it may.
        """
        spec = standing_spec(template, time.time())
        try:
            if isinstance(payload.prompt, str):
                _ = payload.prompt.isascii() or payload.prompt.encode()
            data, named = payload.pack()
        except UnicodeEncodeError as error:
            raise InputError("half a surrogate pair in the prompt is not text") from error
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(
                f"the item's context can't be written as JSON ({type(error).__name__})"
            ) from error
        blobs = {bytes.fromhex(sha): content for sha, content in named.items()}
        entry = _Entry(
            (
                item_id or secrets.token_hex(12),
                task,
                round(delay * 1000),
                fingerprint(data, strategy_identity(spec)),
                data,
                b"".join(blobs),
            ),
            blobs,
        )
        try:
            index = await (await self._open(spec)).append.submit(entry)
        except BatchNotFoundError:  # it has expired, or Redis has lost it
            self._known.pop(spec.batch_id, None)
            index = await (await self._open(spec)).append.submit(entry)
        return ItemPlace(spec.batch_id, index)

    async def look(
        self, batch_id: str, indexes: Sequence[int], *, tasks: bool = False
    ) -> list[KnownItem]:
        """What is known of these items; `tasks`: and of the Celery tasks that await them.

        Raises:
            BatchNotFoundError: the batch has expired.
        """
        arguments: list[Argument] = [int(tasks), *indexes]
        reply = await self._runner.run(scripts.LOOKUP, batch_id, arguments)
        return [KnownItem(_outcome(entry) if entry else None, task) for entry, task in reply]

    async def wait(self, place: ItemPlace, *, fresh: bool = False) -> Outcome:
        """The item's outcome, when it is there.

        Args:
            place: the item.
            fresh: its message has not been sent yet, so it can't be done.

        Raises:
            BatchNotFoundError: the batch has expired.
        """
        waiting = self._waiting.setdefault(place.batch_id, {})
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        waiting.setdefault(place.index, []).append(answer)
        if place.batch_id not in self._followers:
            follower = asyncio.create_task(self._follow(place.batch_id))
            self._followers[place.batch_id] = follower
        elif not fresh:
            self._background.start(self._serve_quietly(place))
        try:
            return await answer
        finally:
            left = waiting.get(place.index, [])
            if answer in left:
                left.remove(answer)
                if not left:
                    del waiting[place.index]

    async def told(self, batch_id: str, indexes: Sequence[int]) -> None:
        """The Celery tasks that awaited these items have been told."""
        keys, client = self._runner.keys.batch(batch_id), self._runner.connection.client

        async def call() -> None:
            async with client.pipeline(transaction=False) as pipeline:
                pipeline.hdel(keys.tasks, *map(str, indexes))
                pipeline.zrem(keys.owed, *indexes)
                await pipeline.execute()

        await self._runner.connection.patiently(call)

    async def cancel(
        self, batch_id: str, index: int, kind: FailureKind = FailureKind.CANCELLED
    ) -> bool | None:
        """End an item that no process holds; None: one holds it, False: it had its outcome."""
        reply = await self._runner.run(scripts.CANCEL_ITEM, batch_id, [index, kind.value])
        return None if reply < 0 else bool(reply)

    def close(self) -> None:
        """Follow no more."""
        for follower in self._followers.values():
            follower.cancel()

    # -- batches

    async def _open(self, spec: BatchSpec) -> _Batch:
        batch = self._known.get(spec.batch_id)
        if batch is not None:
            return batch
        async with self._opening[spec.batch_id]:
            if spec.batch_id not in self._known:
                await self._feeding.create(spec)
                if len(self._known) >= KNOWN:
                    self._opening.pop(oldest := next(iter(self._known)), None)
                    del self._known[oldest]
                self._known[spec.batch_id] = _Batch(
                    spec, Coalescer(partial(self._append_all, spec), max_batch=CALL_ITEMS)
                )
        return self._known[spec.batch_id]

    async def _append_all(self, spec: BatchSpec, entries: list[_Entry]) -> list[int]:
        grace = round(self._settings.offer_seconds * 1000)
        arguments: list[Argument] = [grace, self._settings.max_payload_bytes]
        arguments += [part for entry in entries for part in entry.arguments]
        blobs = {sha: data for entry in entries for sha, data in entry.blobs.items()}
        give_up = time.monotonic() + FULL_SECONDS
        while True:
            reply = await self._runner.run(scripts.APPEND, spec.batch_id, arguments)
            if reply[0] == b"blobs":
                await self._feeding.store_blobs(spec.batch_id, blobs, reply[1])
                continue
            if reply[0] != b"full":
                break
            if time.monotonic() >= give_up:
                raise LedgerFullError(
                    f"standing batch {spec.batch_id!r}: its waiting items hold more than "
                    f"{self._settings.max_payload_bytes:,} bytes (max_payload_bytes)"
                )
            await asyncio.sleep(0.25)
        state, was_over, indexes = reply
        if not indexes:
            raise BatchConflictError(
                f"standing batch {spec.batch_id!r} is {text(state)}: "
                f"`batchllm resume {spec.batch_id}` lets it go on"
            )
        if was_over:  # a worker may have taken it off its queue's list
            await self._batches.announce(spec)
        return [int(index) for index in indexes]

    # -- those who wait

    async def _follow(self, batch_id: str) -> None:
        """Give outcomes to those who wait for them, till nobody has for a while."""
        channel, idle_since = self._runner.keys.done(batch_id), time.monotonic()
        waiting = self._waiting[batch_id]
        try:
            while waiting or time.monotonic() - idle_since < IDLE_SECONDS:
                if waiting:
                    idle_since = time.monotonic()
                try:
                    async with self._runner.connection.pubsub(
                        ignore_subscribe_messages=True
                    ) as pubsub:
                        await pubsub.subscribe(channel)
                        await self._serve(batch_id, list(waiting))
                        idle_since = await self._listen(batch_id, pubsub, idle_since)
                except BatchNotFoundError as error:
                    _fail(waiting, error)
                except Exception as error:
                    logger.debug("standing.channel_lost error=%s", describe(error))
                    await asyncio.sleep(LOOK_SECONDS / 2)
                    with contextlib.suppress(Exception):
                        await self._serve(batch_id, list(waiting))
        finally:
            del self._followers[batch_id]
            if not waiting:
                self._waiting.pop(batch_id, None)

    async def _listen(self, batch_id: str, pubsub: Any, idle_since: float) -> float:
        waiting, looked = self._waiting[batch_id], time.monotonic()
        while waiting or time.monotonic() - idle_since < IDLE_SECONDS:
            if waiting:
                idle_since = time.monotonic()
            message = await pubsub.get_message(timeout=LOOK_SECONDS)
            done: set[int] = set()
            while message is not None:  # and all others that have come meanwhile
                done.add(int(message["data"]))
                message = await pubsub.get_message(timeout=0)
            if time.monotonic() - looked >= LOOK_SECONDS:
                looked = time.monotonic()
                done.update(waiting)
            await self._serve(batch_id, [index for index in done if index in waiting])
        return idle_since

    async def _serve_quietly(self, place: ItemPlace) -> None:
        with contextlib.suppress(BatchNotFoundError):  # the follower tells them
            await self._serve(place.batch_id, [place.index])

    async def _serve(self, batch_id: str, indexes: Sequence[int]) -> None:
        waiting = self._waiting[batch_id]
        for first in range(0, len(indexes), CALL_ITEMS):
            some = indexes[first : first + CALL_ITEMS]
            for index, found in zip(some, await self.look(batch_id, some), strict=True):
                if found.outcome is not None:
                    for answer in waiting.pop(index, ()):
                        if not answer.done():
                            answer.set_result(found.outcome)


def _fail(waiting: dict[int, list[asyncio.Future[Outcome]]], error: BatchNotFoundError) -> None:
    for answers in waiting.values():
        for answer in answers:
            if not answer.done():
                answer.set_exception(error)
    waiting.clear()


def _outcome(entry: Any) -> Outcome:
    place, flat = entry
    return decode_entry((place, dict(zip(flat[::2], flat[1::2], strict=True))))
