"""Claim, begin, save, record, release: what a worker process does to items."""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from functools import partial
from typing import Any

from redis.exceptions import ResponseError

from batchllm_celery.errors import BatchNotFoundError, FailureKind, UsageError, describe
from batchllm_celery.ledger import scripts
from batchllm_celery.ledger.background import BackgroundWork
from batchllm_celery.ledger.batches import Batches
from batchllm_celery.ledger.batching import Coalescer
from batchllm_celery.ledger.codec import Attempts, Stored, encode_result
from batchllm_celery.ledger.holding import Claim, ClaimReply, Holding
from batchllm_celery.ledger.scripts import Argument, ScriptRunner, text, unreadable
from batchllm_celery.models import BatchSpec, BatchState, RetryState, TokenUsage, WorkItemResult
from batchllm_celery.settings import Settings

logger = logging.getLogger("batchllm_celery")

#: Seconds between two checks, by `claim` or `begin`, that a batch's keys are of their types.
CHECK_SECONDS = 1.0
#: Items in one script call at most: more would exceed Lua's stack, and keep Redis busy for long.
CALL_ITEMS = 1000
#: Seconds between the starts of two claim calls for a batch at least. Under load an item waits half
#: of it on average, and there are several times fewer calls.
CLAIM_GAP = 0.02
#: The same for `begin` and `record`. Both keep a slot waiting, and an answer that waits to be
#: recorded is lost with its process, so it is short.
BEGIN_GAP = RECORD_GAP = 0.005
#: Calls that end together are recorded, and begun again, in groups of this many. As one crowd they
#: would stay together for ever: all slots empty until the last one is recorded and begun.
GROUP = 16
#: Arguments of one outcome in `record.lua`.
RECORD_FIELDS = 12
#: Batches whose spec and coalescers are kept in this process.
KNOWN_BATCHES = 64
#: Outcomes that are kept for a Redis that comes back without its last second, and for how long.
RECENT_OUTCOMES = 20_000
RECENT_SECONDS = 30.0
#: Bytes that every Redis takes as one value, and what it takes by default.
LEAST_VALUE_BYTES, DEFAULT_VALUE_BYTES = 1024**2, 512 * 1024**2
#: An item that was requeued is requeued again after this many times `offer_seconds`.
REQUEUE_AGAIN = 5

_Record = tuple[Claim, tuple[Argument, ...]]
_Save = tuple[Claim, bytes, int]
_Recent = tuple[float, str, tuple[Argument, ...]]


class _BatchCalls:
    """The coalesced calls of one batch, and its spec as last seen."""

    def __init__(self, claims: Claims, batch_id: str) -> None:
        self.batch_id = batch_id
        self.revision = -1
        self.spec: BatchSpec | None = None
        self.checked_at = -math.inf
        self.claim: Coalescer[Sequence[int], ClaimReply] = Coalescer(
            partial(claims._claim_all, self), gap=CLAIM_GAP
        )
        self.begin: Coalescer[Claim, FailureKind | BatchState | None] = Coalescer(
            partial(claims._begin_all, self), gap=BEGIN_GAP, group=GROUP
        )
        self.save: Coalescer[_Save, bool] = Coalescer(
            partial(claims._save_all, batch_id), gap=RECORD_GAP
        )
        # One at a time: the script remembers the reply to this process's last record.
        self.record: Coalescer[_Record, bool] = Coalescer(
            partial(claims._record_all, batch_id), concurrency=1, gap=RECORD_GAP, group=GROUP
        )

    def check_due(self) -> bool:
        """Whether the next script is to check the types of all keys: a second after a check that
        found nothing broken."""
        return time.monotonic() - self.checked_at >= CHECK_SECONDS


class Claims:
    """The items that this process runs, in its memory (`holding`) and in Redis."""

    def __init__(
        self,
        runner: ScriptRunner,
        batches: Batches,
        background: BackgroundWork,
        settings: Settings,
    ) -> None:
        self._runner = runner
        self._batches = batches
        self._background = background
        self._settings = settings
        self._calls: dict[str, _BatchCalls] = {}
        self._value_bytes: int | None = None
        self.holding = Holding()
        self.unsure: set[str] = set()
        """Batches of which Redis may believe that this process holds more than it does."""
        self.claiming: set[str] = set()
        """Tokens of claims whose reply is still to come."""
        self.recent: deque[_Recent] = deque(maxlen=RECENT_OUTCOMES)
        """Outcomes of the last 30 seconds: when, batch id, arguments of `record.lua`."""
        self.moving = asyncio.Lock()
        """Held while items are released or reclaimed: one must not undo the other."""

    def known_spec(self, batch_id: str) -> BatchSpec | None:
        """What a batch runs with, as this process saw it last; None where it has not."""
        calls = self._calls.get(batch_id)
        return None if calls is None else calls.spec

    async def claim(self, batch_id: str, indexes: Sequence[int]) -> ClaimReply:
        """Take the items that a message named.

        A cancelled call releases what it claims.

        Raises:
            BatchNotFoundError: the batch's keys are gone; the message has nothing to say.
        """
        asked = self._of(batch_id).claim.submit(indexes)
        self._background.keep(asked)
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            asked.add_done_callback(self._release_claimed)
            raise

    async def begin(self, claim: Claim) -> FailureKind | BatchState | None:
        """Ask, just before a provider call, whether it may start.

        Returns:
            None: it may start. A `FailureKind`: this is the item's outcome (the batch is stopped,
            or the item's calls are used up: `EXHAUSTED`). `PAUSED` or `PARKED`: release the item.
            `FINISHED`: the item is no longer this process's, leave it.
        """
        claim.unused = True  # cancelled while it waits, it may be admitted and makes no call
        answer = await self._of(claim.batch_id).begin.submit(claim)
        claim.calling, claim.unused = answer is None, False
        return answer

    async def blobs(self, batch_id: str, shas: Sequence[str]) -> dict[str, bytes]:
        """Large values of payloads by hex SHA-256; those that are gone are missing."""
        connection = self._runner.connection
        client: Any = connection.client
        key, fields = self._runner.keys.batch(batch_id).blob, [bytes.fromhex(sha) for sha in shas]
        found = await connection.patiently(partial(client.hmget, key, fields))
        return {sha: data for sha, data in zip(shas, found, strict=True) if data is not None}

    async def save(
        self,
        claim: Claim,
        attempts: int,
        refusals: int,
        state: RetryState,
        usage: TokenUsage,
        *,
        overloads: int = 0,
        last_error: str = "",
    ) -> None:
        """Note, after a call, what the next attempt must know wherever it runs.

        Raises:
            TypeError, ValueError, RecursionError: for a retry state that can't be kept.
        """
        claim.calling = False
        cut_off, claim.given_up = claim.given_up, 0
        back = claim.handed_back_at
        entry = Attempts(attempts, refusals, state, usage, overloads, last_error, back).encode()
        try:
            await self._of(claim.batch_id).save.submit((claim, entry, cut_off))
        except asyncio.CancelledError:  # not written yet: `release` writes it
            claim.given_up += cut_off
            raise

    async def fitting(
        self, result: WorkItemResult[Any, Any]
    ) -> tuple[WorkItemResult[Any, Any], bytes]:
        """The result and its line, or a failure in place of a result that is larger than what Redis
        takes as one value: Redis would end the connection."""
        line = encode_result(result)
        if len(line) < LEAST_VALUE_BYTES or len(line) <= await self._largest_value():
            return result, line
        limit = await self._largest_value()
        logger.error("result.too_large item_id=%s bytes=%d", result.item_id, len(line))
        failed: dict[str, Any] = {
            "success": False,
            "output": None,
            "metadata": {},
            "error_kind": FailureKind.LOGIC_ERROR,
            "error": f"AnswerTooLarge: its result has {len(line):,} bytes, and Redis takes "
            f"{limit:,} in one value (proto-max-bulk-len)",
        }
        small = result.model_copy(update=failed)
        line = encode_result(small)
        if len(line) > limit:
            small = small.model_copy(update={"context": None})
            line = encode_result(small)
        return small, line

    async def _largest_value(self) -> int:
        """Bytes that this Redis takes as one value."""
        if self._value_bytes is None:
            connection = self._runner.connection
            client: Any = connection.client
            try:
                found = await connection.patiently(partial(client.config_get, "proto-max-bulk-len"))
                values = [int(value) for value in found.values()]
            except (ResponseError, ValueError):  # CONFIG is denied: Redis' default
                values = []
            self._value_bytes = min(values, default=DEFAULT_VALUE_BYTES)
        return self._value_bytes

    async def record(
        self,
        claim: Claim,
        result: WorkItemResult[Any, Any],
        *,
        spent_tokens: int,
        cost: float | None,
        line: bytes | None = None,
    ) -> bool:
        """Write the item's outcome; the first one wins.

        It goes on when its caller is cancelled, because the answer is paid for. `line` is the
        result's line, if the caller has made it (see `fitting`).

        Returns:
            False where it was refused: the item has its outcome, changed, or (a failure)
            belongs to another process; or the batch was resumed before its stop came to here.
        """
        line = encode_result(result) if line is None else line
        entry = (claim, _record_arguments(claim, result, line, spent_tokens, cost))
        claim.settled = True
        recorded = self._of(claim.batch_id).record.submit(entry)
        self._background.keep(recorded)
        recorded.add_done_callback(partial(self._recorded, claim))
        try:
            return await asyncio.shield(recorded)
        except BatchNotFoundError:
            return False

    def _recorded(self, claim: Claim, answer: asyncio.Future[bool]) -> None:
        failed = not answer.cancelled() and answer.exception() is not None
        if failed:
            self.unsure.add(claim.batch_id)
        if failed or answer.cancelled() or answer.result():
            self.holding.discard(claim)
            return
        # Reclaimed while the refusal travelled, the item would stay this process's for ever.
        claim.calling, claim.given_up = False, 0
        self._background.start(self._release(claim.batch_id, [claim]))

    async def release(self, claims: Sequence[Claim], *, delay: float = 0.0) -> None:
        """Let others run these items (drain, pause), at once or after `delay` seconds. One whose
        call is cut off counts as maybe billed. One whose outcome is being recorded is left alone.
        """
        by_batch: dict[str, list[Claim]] = defaultdict(list)
        for claim in claims:
            if not claim.settled:
                by_batch[claim.batch_id].append(claim)
        for batch_id, group in by_batch.items():
            for first in range(0, len(group), CALL_ITEMS):
                some = group[first : first + CALL_ITEMS]
                await asyncio.shield(self._background.start(self._release(batch_id, some, delay)))

    # -- the calls, many items each ---------------------------------------------------------

    def _of(self, batch_id: str) -> _BatchCalls:
        calls = self._calls.get(batch_id)
        if calls is None:
            if len(self._calls) >= KNOWN_BATCHES:
                self._calls.pop(next(iter(self._calls)))
            calls = self._calls[batch_id] = _BatchCalls(self, batch_id)
        return calls

    def _release_claimed(self, asked: asyncio.Future[ClaimReply]) -> None:
        if not asked.cancelled() and asked.exception() is None and asked.result().claims:
            self._background.start(self.release(asked.result().claims))

    async def _claim_all(
        self, calls: _BatchCalls, requests: list[Sequence[int]]
    ) -> list[ClaimReply]:
        owner: dict[int, int] = {}  # item -> the first request that names it
        for number, indexes in enumerate(requests):
            for index in indexes:
                if not self.holding.has(calls.batch_id, index):
                    owner.setdefault(index, number)
        wanted, found = list(owner), _Found()
        for first in range(0, max(1, len(wanted)), CALL_ITEMS):
            await self._claim_some(calls, wanted[first : first + CALL_ITEMS], found)
        if found.unreadable:
            raise unreadable(calls.batch_id, "its spec is corrupted or of a newer version")
        return [
            _reply(calls, number, indexes, owner, found) for number, indexes in enumerate(requests)
        ]

    async def _claim_some(self, calls: _BatchCalls, indexes: list[int], found: _Found) -> None:
        token = secrets.token_hex(8)
        check = calls.check_due()
        limits = (int(check), self._settings.slots, *self.holding.poison_candidates())
        self.claiming.add(token)
        arguments: list[Argument] = [
            self._runner.process_id,
            token,
            calls.revision,
            *limits,
            *indexes,
        ]
        try:
            reply = await self._runner.run(scripts.CLAIM, calls.batch_id, arguments)
            if check:
                calls.checked_at = time.monotonic()
            unread = self._hold(calls, token, reply, found)
            if unread:
                later = round(self._settings.offer_seconds * REQUEUE_AGAIN * 1000)
                arguments = [self._runner.process_id, later, *unread]
                await self._runner.run(scripts.RELEASE, calls.batch_id, arguments)
        except BaseException:
            self.unsure.add(calls.batch_id)
            raise
        finally:
            self.claiming.discard(token)

    def _hold(self, calls: _BatchCalls, token: str, reply: Any, found: _Found) -> list[Argument]:
        """Hold what was claimed. Returns the arguments of `release.lua` for items that can't be
        read here: a process of another version may, after all others."""
        unread: list[Argument] = []
        state, revision, spec, now, claims, _, gone = reply
        found.state = BatchState(text(state))
        self._batches.sweep_if_stopped(calls.batch_id, found.state)
        if spec is not None:
            try:
                calls.spec, calls.revision = BatchSpec.model_validate_json(spec), revision
            except ValueError as error:
                self._runner.connection.broken.add("batch", calls.batch_id, error)
                found.unreadable = True
        if found.unreadable:  # of a newer version, for example: another process may read it
            return [part for entry in claims for part in (entry[0], token, 0, "")]
        found.gone.update(gone)
        for entry in claims:
            try:
                claim = _claim(calls.batch_id, token, now / 1000, entry)
            except (UsageError, ValueError, TypeError, KeyError) as error:
                # The texts of other errors than ours may quote the row.
                what = describe(error) if isinstance(error, UsageError) else type(error).__name__
                where = (calls.batch_id, int(entry[0]))
                logger.error("ledger.unreadable batch_id=%s index=%d error=%s", *where, what)
                unread += (entry[0], token, 0, "")
                continue
            self.holding.add(claim)
            found.claims[claim.index] = claim
        return unread

    async def _begin_all(
        self, calls: _BatchCalls, claims: list[Claim]
    ) -> list[FailureKind | BatchState | None]:
        check = calls.check_due()
        arguments: list[Argument] = [self._runner.process_id, int(check)]
        for claim in claims:
            arguments += (claim.index, claim.token)
        try:
            answered, owned = await self._runner.run(scripts.BEGIN, calls.batch_id, arguments)
        except BatchNotFoundError:
            return [BatchState.FINISHED] * len(claims)
        if check:
            calls.checked_at = time.monotonic()
        state = BatchState(text(answered))
        self._batches.sweep_if_stopped(calls.batch_id, state)
        decision: FailureKind | BatchState | None = state
        if state in (BatchState.FEEDING, BatchState.RUNNING):
            decision = None
        elif state.stopped:
            decision = FailureKind(state.value)
        return [
            FailureKind.EXHAUSTED if own < 0 else decision if own else BatchState.FINISHED
            for own in owned
        ]

    async def _save_all(self, batch_id: str, saves: list[_Save]) -> list[bool]:
        arguments: list[Argument] = [self._runner.process_id]
        for claim, entry, cut_off in saves:
            arguments += (claim.index, claim.token, entry, cut_off, int(claim.unused))
            claim.unused = False
        try:
            saved = await self._runner.run(scripts.SAVE, batch_id, arguments)
        except BatchNotFoundError:
            return [False] * len(saves)
        return [bool(one) for one in saved]

    async def _record_all(self, batch_id: str, records: list[_Record]) -> list[bool]:
        arguments: list[Argument] = [self._runner.process_id, secrets.token_hex(8)]
        for _, values in records:
            arguments += values
        state, recorded = await self._runner.run(scripts.RECORD, batch_id, arguments)
        self._batches.sweep_if_stopped(batch_id, BatchState(text(state)))
        now = time.monotonic()
        self.recent.extend((now, batch_id, values) for _, values in records)
        while now - self.recent[0][0] > RECENT_SECONDS:
            self.recent.popleft()
        return [bool(one) for one in recorded]

    async def _release(self, batch_id: str, claims: list[Claim], delay: float = 0.0) -> None:
        arguments: list[Argument] = [self._runner.process_id, round(delay * 1000)]
        for claim in claims:
            cut_by = claim.cut_by if claim.calling else "back" if claim.unused else ""
            lost = max(claim.given_up, int(claim.calling))
            arguments += (claim.index, claim.token, lost, cut_by)
        async with self.moving:
            try:
                state, _ = await self._runner.run(scripts.RELEASE, batch_id, arguments)
                self._batches.sweep_if_stopped(batch_id, BatchState(text(state)))
            except BatchNotFoundError:
                pass
            for claim in claims:
                self.holding.discard(claim)


class _Found:
    """What the claims of one flush brought."""

    def __init__(self) -> None:
        self.state = BatchState.RUNNING
        self.claims: dict[int, Claim] = {}
        self.gone: set[int] = set()
        self.unreadable = False
        """Whether the spec of the batch can't be read here."""


def _reply(
    calls: _BatchCalls, number: int, indexes: Sequence[int], owner: dict[int, int], found: _Found
) -> ClaimReply:
    assert calls.spec is not None  # the first reply brings it
    reply = ClaimReply(calls.spec, found.state)
    for index in dict.fromkeys(indexes):
        if index in found.gone:
            reply.gone.append(index)
        elif index in found.claims and owner.get(index) == number:
            reply.claims.append(found.claims[index])
        else:
            reply.held.append(index)
    return reply


def _claim(batch_id: str, token: str, now: float, entry: Sequence[Any]) -> Claim:
    index, data, losses, round_, rest = entry
    stored, earlier = Stored.decode(data), Attempts.decode(rest)
    return Claim(
        batch_id,
        int(index),
        token,
        round_,
        stored.version,
        stored.payload,
        attempts=earlier.attempts,
        refusals=earlier.refusals,
        overloads=earlier.overloads,
        losses=losses,
        state=earlier.state,
        usage=earlier.usage,
        last_error=earlier.last_error,
        handed_back_at=earlier.handed_back_at,
        queued_seconds=max(0.0, now - stored.fed_at),
        fed_at=stored.fed_at,
    )


def _record_arguments(
    claim: Claim,
    result: WorkItemResult[Any, Any],
    line: bytes,
    spent_tokens: int,
    cost: float | None,
) -> tuple[Argument, ...]:
    usage = result.token_usage
    kind = "" if result.success else (result.error_kind or FailureKind.UNKNOWN).value
    return (
        claim.index,
        claim.token,
        claim.round,
        claim.version,
        kind,
        line,
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_input_tokens,
        spent_tokens,
        "" if cost is None else repr(float(cost)),
        claim.given_up,
    )
