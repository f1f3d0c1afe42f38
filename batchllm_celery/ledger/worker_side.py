"""Claim, begin, save, record, release: what a worker process asks of the ledger."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import defaultdict, deque
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from redis.exceptions import ResponseError

from batchllm_celery.connection import Coalescer, Connection
from batchllm_celery.errors import BatchNotFoundError, FailureKind, UsageError, describe
from batchllm_celery.events import Events
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import scripts
from batchllm_celery.ledger.calls import Argument, LedgerCalls, text, unreadable
from batchllm_celery.ledger.claims import Claim, ClaimReply, Holding, Tries
from batchllm_celery.ledger.payload import Stored
from batchllm_celery.ledger.results import encode_result
from batchllm_celery.models import BatchSpec, BatchState, RetryState, TokenUsage, WorkItemResult
from batchllm_celery.settings import Settings

T = TypeVar("T")

logger = logging.getLogger("batchllm_celery")

#: Items in one script call at most (Lua's stack, and milliseconds that Redis is busy).
CALL_ITEMS = 1000
#: Seconds between two calls for a batch at least, by kind: under load an item waits half of it on
#: average, and the calls are several times fewer. `begin` and `record` keep a slot waiting.
CLAIM_GAP = 0.02
#: Short: an answer that waits to be recorded is lost with its process.
BEGIN_GAP = RECORD_GAP = 0.005
#: Calls that end together are dealt with in groups: as a whole they would stay together for ever,
#: their slots empty until the last of them is recorded and the last of the next ones is let in.
GROUP = 16
#: Arguments of one outcome in `record.lua`.
RECORD_FIELDS = 12
#: Batches whose spec and coalescers are kept; more is only slower.
KNOWN_BATCHES = 64
#: Outcomes that are kept for a Redis that comes back without its last second, and how long.
RECENT_OUTCOMES = 20_000
RECENT_SECONDS = 30.0
#: Redis takes so much as one value whatever its configuration, and so much by default.
LEAST_VALUE_BYTES, DEFAULT_VALUE_BYTES = 1024**2, 512 * 1024**2
#: An offered item is offered again after this many idle times of a worker.
REOFFER = 5

_Record = tuple[Claim, tuple[Argument, ...]]
_Save = tuple[Claim, bytes, int]
_Recent = tuple[float, str, tuple[Argument, ...]]


class _BatchCalls:
    """The coalesced calls of one batch, and its spec as last seen."""

    def __init__(self, ledger: WorkerSide, batch_id: str) -> None:
        self.batch_id = batch_id
        self.revision = -1
        self.spec: BatchSpec | None = None
        self.claim: Coalescer[Sequence[int], ClaimReply] = Coalescer(
            lambda requests: ledger._claim_all(self, requests), gap=CLAIM_GAP
        )
        self.begin: Coalescer[Claim, FailureKind | BatchState | None] = Coalescer(
            lambda claims: ledger._begin_all(batch_id, claims), gap=BEGIN_GAP, group=GROUP
        )
        self.save: Coalescer[_Save, bool] = Coalescer(
            lambda saves: ledger._save_all(batch_id, saves), gap=RECORD_GAP
        )
        # One at a time: the script remembers the reply to this process's last record.
        self.record: Coalescer[_Record, bool] = Coalescer(
            lambda records: ledger._record_all(batch_id, records),
            concurrency=1,
            gap=RECORD_GAP,
            group=GROUP,
        )


class WorkerSide(LedgerCalls):
    """The ledger as a worker process sees it."""

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        process_id: str,
        settings: Settings,
        events: Events | None = None,
    ) -> None:
        super().__init__(connection, keys, process_id=process_id, settings=settings, events=events)
        self.holding = Holding()
        self._calls: dict[str, _BatchCalls] = {}
        self._unsure: set[str] = set()  # batches of which Redis may believe that we hold more
        self._claiming: set[str] = set()  # tokens of claims whose reply is not here yet
        self._value_bytes: int | None = None
        self._recent: deque[_Recent] = deque(maxlen=RECENT_OUTCOMES)
        self._moving = asyncio.Lock()  # adopt must not bring back what is being released

    async def claim(self, batch_id: str, indexes: Sequence[int]) -> ClaimReply:
        """Take the items that a message named.

        Cancelled, it gives back what it gets.

        Raises:
            BatchNotFoundError: the batch's keys are gone; the message has nothing to say.
        """
        asked = self._of(batch_id).claim.submit(indexes)
        self._outlive(asked)
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            asked.add_done_callback(self._give_back)
            raise

    def held_here(self, batch_id: str, index: int) -> bool:
        """Whether this very process has the item."""
        return self.holding.has(batch_id, index)

    async def begin(self, claim: Claim) -> FailureKind | BatchState | None:
        """Ask, just before a provider call, whether it may start.

        Returns:
            None: go. A `FailureKind`: the batch is stopped, or the item's calls are used up
            (`EXHAUSTED`): that is its outcome. `PAUSED`
            or `PARKED`: give the item back. `FINISHED`: it is no longer this process's, leave it.
        """
        claim.unused = True  # cancelled while it asks, it may be let in and makes no call
        answer = await self._of(claim.batch_id).begin(claim)
        claim.calling, claim.unused = answer is None, False
        return answer

    async def save_attempt(
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
        entry = Tries(attempts, refusals, state, usage, overloads, last_error, back).encode()
        try:
            await self._of(claim.batch_id).save((claim, entry, cut_off))
        except asyncio.CancelledError:  # handed back before it was told: `release` tells it
            claim.given_up += cut_off
            raise

    async def fitting(
        self, result: WorkItemResult[Any, Any]
    ) -> tuple[WorkItemResult[Any, Any], bytes]:
        """The result and its line; a failure that says so in place of one that is larger than what
        Redis takes as one value: sent all the same, it would end the connection."""
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
            client: Any = self._connection.client
            try:
                found = await self._connection.patiently(
                    lambda: client.config_get("proto-max-bulk-len")
                )
                values = [int(value) for value in found.values()]
            except (ResponseError, ValueError):  # CONFIG is not for us: Redis' default
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

        Goes on when its caller is cancelled: the answer is paid for. `line` is the result's, where
        the caller has made it (see `fitting`).

        Returns:
            False where it was refused: the item has its outcome, changed, or (a failure)
            belongs to another process; or the batch was resumed before its stop came to here.
        """
        line = encode_result(result) if line is None else line
        entry = (claim, _record_arguments(claim, result, line, spent_tokens, cost))
        claim.settled = True
        recorded = self._of(claim.batch_id).record.submit(entry)
        self._outlive(recorded)
        recorded.add_done_callback(lambda answer: self._recorded(claim, answer))
        try:
            return await asyncio.shield(recorded)
        except BatchNotFoundError:
            return False

    def _recorded(self, claim: Claim, answer: asyncio.Future[bool]) -> None:
        if not answer.cancelled() and answer.exception() is not None:
            self._unsure.add(claim.batch_id)
        refused = not answer.cancelled() and answer.exception() is None and not answer.result()
        if not refused:
            self.holding.discard(claim)
            return
        # Adopted while its refusal travelled, it would be ours for ever, and nobody would know.
        claim.calling, claim.given_up = False, 0
        self._spawn(self._release(claim.batch_id, [claim]))

    async def release(self, claims: Sequence[Claim], *, delay: float = 0.0) -> None:
        """Give items back (drain, pause), to be requeued at once or after `delay` seconds. One
        whose call is cut off counts as maybe billed; one whose outcome is being recorded is left
        alone."""
        by_batch: dict[str, list[Claim]] = defaultdict(list)
        for claim in claims:
            if not claim.settled:
                by_batch[claim.batch_id].append(claim)
        for batch_id, group in by_batch.items():
            for first in range(0, len(group), CALL_ITEMS):
                some = group[first : first + CALL_ITEMS]
                await self._surely(self._release(batch_id, some, delay))

    async def heartbeat(self) -> dict[str, BatchState]:
        """Renew everything that this process holds, and hear the states of its batches."""
        states = {}
        for batch_id in self.holding.batches():
            try:
                state, lost = await self._run(scripts.BEAT, batch_id, [self.process_id])
            except BatchNotFoundError:
                states[batch_id] = BatchState.CANCELLED
                continue
            states[batch_id] = BatchState(text(state))
            await self.heard(batch_id, states[batch_id], lost=bool(lost))
        return states

    async def heard(self, batch_id: str, state: BatchState, *, lost: bool) -> None:
        """Act on a heartbeat's reply (on the loop): sweep what is stopped; `lost`: take back what
        this process was given up for and nobody took."""
        self._note(batch_id, state)
        if lost:
            await self._adopt(batch_id)

    # -- the calls, many items each ---------------------------------------------------------

    def _of(self, batch_id: str) -> _BatchCalls:
        calls = self._calls.get(batch_id)
        if calls is None:
            if len(self._calls) >= KNOWN_BATCHES:
                self._calls.pop(next(iter(self._calls)))
            calls = self._calls[batch_id] = _BatchCalls(self, batch_id)
        return calls

    async def _surely(self, work: Coroutine[Any, Any, T]) -> T:
        """Await work that goes on to its end even if this caller is cancelled."""
        return await asyncio.shield(self._spawn(work))

    def _give_back(self, asked: asyncio.Future[ClaimReply]) -> None:
        if not asked.cancelled() and asked.exception() is None and asked.result().claims:
            self._spawn(self.release(asked.result().claims))

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
        limits = (self._settings.slots, *self.holding.suspects())
        self._claiming.add(token)
        arguments: list[Argument] = [self.process_id, token, calls.revision, *limits, *indexes]
        try:
            reply = await self._run(scripts.CLAIM, calls.batch_id, arguments)
            back = self._take_in(calls, token, reply, found)
            if back:
                later = round(self._settings.offer_seconds * REOFFER * 1000)
                arguments = [self.process_id, later, *back]
                await self._run(scripts.RELEASE, calls.batch_id, arguments)
        except BaseException:
            self._unsure.add(calls.batch_id)
            raise
        finally:
            self._claiming.discard(token)

    def _take_in(self, calls: _BatchCalls, token: str, reply: Any, found: _Found) -> list[Argument]:
        """Hold what was claimed. Returns the arguments of `release.lua` for what can't be read:
        it goes back, behind all else, for a process of another version; its neighbours run."""
        unreadable: list[Argument] = []
        state, revision, spec, now, claims, _, gone = reply
        found.state = BatchState(text(state))
        self._note(calls.batch_id, found.state)
        if spec is not None:
            try:
                calls.spec, calls.revision = BatchSpec.model_validate_json(spec), revision
            except ValueError as error:
                self._connection.broken.add("batch", calls.batch_id, error)
                found.unreadable = True
        if found.unreadable:  # of a newer version, say: for another process
            return [part for entry in claims for part in (entry[0], token, 0)]
        found.gone.update(gone)
        for entry in claims:
            try:
                claim = _claim(calls.batch_id, token, now / 1000, entry)
            except (UsageError, ValueError, TypeError, KeyError) as error:
                self._tell_unreadable(calls.batch_id, int(entry[0]), error)
                unreadable += (entry[0], token, 0, "")
                continue
            self.holding.add(claim)
            found.claims[claim.index] = claim
        return unreadable

    def _tell_unreadable(self, batch_id: str, index: int, error: Exception) -> None:
        # Other errors than ours may quote the row.
        what = describe(error) if isinstance(error, UsageError) else type(error).__name__
        logger.error("ledger.unreadable batch_id=%s index=%d error=%s", batch_id, index, what)

    async def _begin_all(
        self, batch_id: str, claims: list[Claim]
    ) -> list[FailureKind | BatchState | None]:
        arguments: list[Argument] = [self.process_id]
        for claim in claims:
            arguments += (claim.index, claim.token)
        try:
            word, owned = await self._run(scripts.BEGIN, batch_id, arguments)
        except BatchNotFoundError:
            return [BatchState.FINISHED] * len(claims)
        state = BatchState(text(word))
        self._note(batch_id, state)
        verdict = _verdict(state)
        return [
            FailureKind.EXHAUSTED if own < 0 else verdict if own else BatchState.FINISHED
            for own in owned
        ]

    async def _save_all(self, batch_id: str, saves: list[_Save]) -> list[bool]:
        arguments: list[Argument] = [self.process_id]
        for claim, entry, cut_off in saves:
            arguments += (claim.index, claim.token, entry, cut_off, int(claim.unused))
            claim.unused = False
        try:
            return [bool(kept) for kept in await self._run(scripts.SAVE, batch_id, arguments)]
        except BatchNotFoundError:
            return [False] * len(saves)

    async def _record_all(self, batch_id: str, records: list[_Record]) -> list[bool]:
        arguments: list[Argument] = [self.process_id, secrets.token_hex(8)]
        for _, values in records:
            arguments += values
        word, recorded = await self._run(scripts.RECORD, batch_id, arguments)
        self._note(batch_id, BatchState(text(word)))
        self._remember(batch_id, records)
        return [bool(one) for one in recorded]

    def _remember(self, batch_id: str, records: list[_Record]) -> None:
        now = time.monotonic()
        self._recent.extend((now, batch_id, values) for _, values in records)
        while now - self._recent[0][0] > RECENT_SECONDS:
            self._recent.popleft()

    async def _release(self, batch_id: str, claims: list[Claim], delay: float = 0.0) -> None:
        arguments: list[Argument] = [self.process_id, round(delay * 1000)]
        for claim in claims:
            cut_by = claim.cut_by if claim.calling else "back" if claim.unused else ""
            lost = max(claim.given_up, int(claim.calling))
            arguments += (claim.index, claim.token, lost, cut_by)
        async with self._moving:
            try:
                word, _ = await self._run(scripts.RELEASE, batch_id, arguments)
                self._note(batch_id, BatchState(text(word)))
            except BatchNotFoundError:
                pass
            for claim in claims:
                self.holding.discard(claim)

    async def _adopt(self, batch_id: str) -> None:
        async with self._moving:
            held = self.holding.of(batch_id)
            for first in range(0, len(held), CALL_ITEMS):
                arguments: list[Argument] = [self.process_id]
                for claim in held[first : first + CALL_ITEMS]:
                    phase = "p" if claim.calling else "c"
                    arguments += (claim.index, claim.token, claim.round, claim.version, phase)
                try:
                    await self._run(scripts.ADOPT, batch_id, arguments)
                except BatchNotFoundError:
                    return


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
    stored, tries = Stored.decode(data), Tries.decode(rest)
    return Claim(
        batch_id,
        int(index),
        token,
        round_,
        stored.version,
        stored.payload,
        attempts=tries.attempts,
        refusals=tries.refusals,
        overloads=tries.overloads,
        losses=losses,
        state=tries.state,
        usage=tries.usage,
        last_error=tries.last_error,
        handed_back_at=tries.handed_back_at,
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


def _verdict(state: BatchState) -> FailureKind | BatchState | None:
    if state in (BatchState.FEEDING, BatchState.RUNNING):
        return None
    return FailureKind(state.value) if state.stopped else state
