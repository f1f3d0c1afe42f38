"""Create, feed, seal: what a producer does to a batch."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tenacity import AsyncRetrying, retry_if_result, wait_exponential

from batchllm_celery.errors import BatchConflictError, InputError
from batchllm_celery.ledger import scripts
from batchllm_celery.ledger.batches import Batches
from batchllm_celery.ledger.codec import (
    Known,
    Payload,
    encode_result,
    fingerprint,
    strategy_identity,
)
from batchllm_celery.ledger.scripts import Argument, ScriptRunner, text
from batchllm_celery.models import FAILURE_POLICIES, BatchSpec, BatchState, WorkItemResult
from batchllm_celery.settings import Settings

Row = Payload | Known | WorkItemResult[Any, Any]
"""A row to run, one whose outcome is known, or the failed result of one that can't be run (kind
`invalid_input`)."""

#: One feed script takes this many rows, or this many bytes, at most.
FEED_ROWS = 500
FEED_BYTES = 2 * 1024 * 1024
#: Blobs of one chunk: they are kept as long as its rows.
CHUNK_BLOB_BYTES = 16 * 1024 * 1024
#: Seconds for which fed rows are kept here: a Redis that restarts may lose its last second.
UNSYNCED_SECONDS = 3.0
#: Items or bytes: more than any batch has.
UNLIMITED = 10**15
#: Seconds that a dry run is kept.
REHEARSAL_TTL = 3600

#: Repeats a call of `feed.lua` until there is room for the chunk.
_while_full = AsyncRetrying(
    retry=retry_if_result(lambda reply: reply[1] == b"full"),
    wait=wait_exponential(multiplier=0.02, exp_base=1.5, max=0.25),
)


@dataclass(frozen=True, slots=True)
class Created:
    """What `create` found.

    `how`: `new`; `attached` to a batch that is there; `resumed`: it had been stopped, and its
    unanswered items run again in a new round. `fed` rows are known already.
    """

    how: Literal["new", "attached", "resumed"]
    round: int
    fed: int


@dataclass(frozen=True, slots=True)
class _Chunk:
    first: int
    rows: list[tuple[bytes, bytes, bytes, bytes]]
    """Fingerprint, payload, result line of a bad row, SHAs of its blobs."""
    blobs: dict[bytes, bytes] = field(default_factory=dict)
    """What the payloads need beside them, by SHA-256."""

    @property
    def end(self) -> int:
        return self.first + len(self.rows)


@dataclass(slots=True)
class _Feeding:
    identity: bytes
    recent: deque[tuple[float, _Chunk]] = field(default_factory=deque)
    """Chunks that a Redis which loses its last second would lose."""


class Feeding:
    """Creates batches and stores their rows, for a producer."""

    def __init__(self, runner: ScriptRunner, batches: Batches, settings: Settings) -> None:
        self._runner = runner
        self._batches = batches
        self._settings = settings
        self._feeding: dict[str, _Feeding] = {}

    async def create(self, spec: BatchSpec) -> Created:
        """Make the batch, or attach to the one of this id, resuming it if it was stopped.

        A new strategy is taken over once the old batch has ended; rows fed again then run again.

        Raises:
            BatchConflictError: it is still running with another strategy.
        """
        identity = strategy_identity(spec)
        how, round_, fed, known = await self._runner.run(
            scripts.CREATE, spec.batch_id, self._create_arguments(spec, identity)
        )
        if how == b"conflict":
            raise BatchConflictError(_difference(spec, BatchSpec.model_validate_json(known)))
        await self._batches.announce(spec)
        if how == b"resumed":
            await self._batches.reopen(spec.batch_id)
        self._feeding[spec.batch_id] = _Feeding(identity)
        return Created(text(how), round_, fed)  # type: ignore[arg-type]  # the script's words

    async def feed(
        self,
        batch_id: str,
        first_index: int,
        rows: Sequence[Row],
        *,
        max_outstanding: int | None = None,
    ) -> list[int]:
        """Store rows in input order, once there is room for them; repeat it freely.

        Waits while `max_outstanding` (default: the settings') items are unfinished or, under
        `keep_results=False`, unread, or payloads and unread results exceed the byte cap.

        Returns:
            indexes that need a message: new, changed, or still waiting for a worker.

        Raises:
            InputError: a row has no JSON form; nothing of `rows` was stored.
            BatchNotFoundError: the batch expired meanwhile, or Redis lost it.
            BatchConflictError: Redis has lost more rows than are kept here; feed all again.
        """
        feeding = await self._feeding_of(batch_id)
        encoded = [
            _encode(row, index, feeding.identity) for index, row in enumerate(rows, first_index)
        ]
        chunks = list(_chunks(first_index, encoded))
        limit = max_outstanding or self._settings.max_outstanding
        wake: list[int] = []
        for chunk in chunks:
            if chunk.first == first_index:  # room for all, or the first ones get no message
                room = max(0, limit - (len(rows) - len(chunk.rows)))
            else:
                room = UNLIMITED
            wake += await self._feed_chunk(batch_id, feeding, chunk, room)
        return wake

    async def quiesce(self, batch_id: str) -> bool:
        """Pause a batch and wait until no living process holds items of it.

        Returns:
            whether dead processes hold some: they were silent for a lease.

        Raises:
            BatchConflictError: living workers go on holding items.
        """
        await self._batches.pause(batch_id)
        lease = self._settings.lease_seconds
        begun = since = time.monotonic()
        last = None
        while True:
            held, said = await self._runner.run(scripts.RENEW, batch_id, ["look"])
            if not held:
                return False
            if said != last:
                last, since = said, time.monotonic()
            if time.monotonic() - since >= lease:
                return True
            if time.monotonic() - begun >= 1.5 * lease:
                raise BatchConflictError(
                    f"batch {batch_id!r}: its input has changed, and workers hold {held} of its "
                    f"items: wait until they have ended, or run batchllm cancel {batch_id}"
                )
            await asyncio.sleep(0.1)

    async def renew(self, batch_id: str, *, force: bool = False) -> None:
        """Forget all rows of a batch, so that a new generation of its input can be fed. `force`:
        though dead processes hold items of it.

        Raises:
            BatchConflictError: a process holds items.
        """
        held, _ = await self._runner.run(scripts.RENEW, batch_id, ["force" if force else "renew"])
        if held and not force:
            raise BatchConflictError(f"batch {batch_id!r}: workers hold {held} of its items")
        self._feeding.pop(batch_id, None)

    async def seal(self, batch_id: str, total: int) -> BatchState:
        """Say that `total` rows were all. The batch finishes when all have their outcome."""
        state, _ = await self._runner.run(scripts.SEAL, batch_id, [total])
        self._feeding.pop(batch_id, None)
        await self._batches.announce(await self._batches.spec(batch_id))
        return BatchState(text(state))

    def _create_arguments(self, spec: BatchSpec, identity: bytes) -> list[Argument]:
        settings = self._settings
        stopping = {kind for kind, policy in FAILURE_POLICIES.items() if policy.stops_batch}
        # The items of a standing batch have nothing to do with each other.
        kinds = [] if spec.standing else sorted({*spec.fail_fast, *stopping})
        return [
            spec.model_dump_json(),
            identity,
            "" if spec.deadline is None else round(spec.deadline * 1000),
            "" if spec.token_budget is None else spec.token_budget,
            "" if spec.max_cost is None else repr(spec.max_cost),
            "".join(f"{kind.value}," for kind in kinds),
            int(spec.keep_results),
            self._ttl(spec),
            settings.max_deliveries,
            settings.max_payload_bytes // 4,
            spec.queue,
            spec.config.most_calls + settings.max_deliveries,
            settings.result_ttl_seconds if spec.standing else "",
            "" if spec.on_finished is None else 1,
        ]

    def _ttl(self, spec: BatchSpec) -> int:
        """Seconds for which it is kept when it is over."""
        kept = self._settings.result_ttl_seconds
        if spec.config.dry_run:
            return min(kept, REHEARSAL_TTL)
        return min(kept, self._settings.item_ttl_seconds) if spec.standing else kept

    async def _feeding_of(self, batch_id: str) -> _Feeding:
        feeding = self._feeding.get(batch_id)
        if feeding is None:
            identity = strategy_identity(await self._batches.spec(batch_id))
            feeding = self._feeding[batch_id] = _Feeding(identity)
        return feeding

    async def _feed_chunk(
        self, batch_id: str, feeding: _Feeding, chunk: _Chunk, room: int
    ) -> list[int]:
        wake, again = await self._feed_once(batch_id, chunk, room)
        if again is not None:  # Redis came back from an older state: rewind
            for older in _kept_from(feeding, again, chunk.first, batch_id):
                woken, _ = await self._feed_once(batch_id, older, UNLIMITED)
                wake += woken
            woken, _ = await self._feed_once(batch_id, chunk, UNLIMITED)
            wake += woken
        now = time.monotonic()
        feeding.recent.append((now, chunk))
        while now - feeding.recent[0][0] > UNSYNCED_SECONDS:
            feeding.recent.popleft()
        return wake

    async def _feed_once(
        self, batch_id: str, chunk: _Chunk, room: int
    ) -> tuple[list[int], int | None]:
        """Indexes that need a message; or none, and the index to rewind to."""
        grace = round(self._settings.offer_seconds * 1000)
        limits = (room, self._settings.max_payload_bytes if room < UNLIMITED else UNLIMITED)
        arguments: list[Argument] = [chunk.first, *limits, grace]
        for row in chunk.rows:
            arguments += row
        while True:
            reply: Any = await _while_full(self._runner.run, scripts.FEED, batch_id, arguments)
            fed, decision, *wake = reply
            if decision != b"blobs":
                break
            await self.store_blobs(batch_id, chunk.blobs, wake[0])
        if decision == b"gap":
            return [], fed
        self._batches.sweep_if_stopped(batch_id, BatchState(text(decision)))
        return wake[0], None

    async def store_blobs(
        self, batch_id: str, blobs: Mapping[bytes, bytes], missing: Sequence[bytes]
    ) -> None:
        """Store what a script has found missing, several in a call.

        Args:
            batch_id: the batch whose payloads need them.
            blobs: bytes by their SHA-256.
            missing: the SHA-256 of each that is wanted.
        """
        arguments: list[Argument] = []
        size = 0
        for sha in missing:
            arguments += (sha, blobs[sha])
            size += len(blobs[sha])
            if size >= FEED_BYTES or sha is missing[-1]:
                await self._runner.run(scripts.BLOBS, batch_id, arguments)
                arguments, size = [], 0


_Encoded = tuple[bytes, bytes, bytes, Mapping[str, bytes]]


def _encode(row: Row, index: int, identity: bytes) -> _Encoded:
    if isinstance(row, Payload):
        try:
            payload, blobs = row.pack()
        except (TypeError, ValueError, RecursionError) as error:
            # Its own words name the type; those of the others might quote the row.
            why = f": {error}" if isinstance(error, TypeError) else f" ({type(error).__name__})"
            raise InputError(
                f"item {index} ({row.item_id}): its context can't be written as JSON{why}"
            ) from error
        return _version(row.identity) or fingerprint(payload, identity), payload, b"", blobs
    if isinstance(row, Known):
        return _version(row.identity), b"", (b"+" if row.success else b"-") + row.line, {}
    line = encode_result(row)
    version = _version(row.metadata.get("row", ""))
    return version or fingerprint(line, b"bad row"), b"", line, {}


def _version(identity: str) -> bytes:
    """A row's fingerprint: its key and its question. A changed context alone is no call."""
    return fingerprint(identity.encode(), b"row") if identity else b""


def _chunks(first: int, rows: list[_Encoded]) -> list[_Chunk]:
    chunks: list[_Chunk] = []
    bytes_left = 0
    for number, (print_, payload, line, given) in enumerate(rows):
        blobs = {bytes.fromhex(sha): data for sha, data in given.items()}
        size = len(payload) + len(line)
        held = sum(map(len, chunks[-1].blobs.values())) if chunks else 0
        full = held > CHUNK_BLOB_BYTES or (chunks and len(chunks[-1].rows) >= FEED_ROWS)
        if not chunks or full or size > bytes_left:
            chunks.append(_Chunk(first + number, []))
            bytes_left = FEED_BYTES
        chunks[-1].rows.append((print_, payload, line, b"".join(blobs)))
        chunks[-1].blobs.update(blobs)
        bytes_left -= size
    return chunks


def _kept_from(feeding: _Feeding, index: int, end: int, batch_id: str) -> list[_Chunk]:
    """Recent chunks that cover the rows from `index` up to `end`."""
    kept = {chunk.first: chunk for _, chunk in feeding.recent if chunk.end > index}
    chunks = [chunk for first, chunk in sorted(kept.items()) if first < end]
    if not chunks or chunks[0].first > index:
        raise BatchConflictError(
            f"batch {batch_id!r}: rows must be fed in input order, and Redis knows {index} "
            f"of {end} so far; feed again from row {index} (submit the same input with the same id)"
        )
    return chunks


def _difference(wanted: BatchSpec, known: BatchSpec) -> str:
    return (
        f"batch {wanted.batch_id!r} is still running with strategy "
        f"{known.strategy.name!r} {known.strategy.params!r}, not {wanted.strategy.name!r} "
        f"{wanted.strategy.params!r}: take another batch id, or cancel that batch first"
    )
