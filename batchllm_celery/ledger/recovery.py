"""Dead workers and lost messages: whose items run again, and how they are found."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from redis.exceptions import NoPermissionError, ResponseError

from batchllm_celery.connection import is_broken, readable
from batchllm_celery.errors import BatchNotFoundError, BatchUnreadableError
from batchllm_celery.ledger import scripts
from batchllm_celery.ledger.batches import Batches
from batchllm_celery.ledger.claims import CALL_ITEMS, RECORD_FIELDS, REQUEUE_AGAIN, Claims
from batchllm_celery.ledger.failure_detector import FailureDetector
from batchllm_celery.ledger.holding import Claim
from batchllm_celery.ledger.locks import died_here
from batchllm_celery.ledger.scripts import Argument, ScriptRunner, text
from batchllm_celery.models import BatchState
from batchllm_celery.settings import Settings

logger = logging.getLogger("batchllm_celery")

#: Batches that one `requeue` goes through, a script call each.
BATCHES_AT_ONCE = 1000


class Recovery:
    """Finds items that nobody runs, and makes them run again.

    Whatever a message, a worker or Redis has lost: each worker process calls `requeue` and
    `reconcile` every sixth of a lease or so, and `on_heartbeat` after each heartbeat.
    """

    def __init__(
        self, runner: ScriptRunner, batches: Batches, claims: Claims, settings: Settings
    ) -> None:
        self._runner = runner
        self._connection = runner.connection
        self._batches = batches
        self._claims = claims
        self._settings = settings
        self._detector = FailureDetector(settings.lease_seconds)
        self._run_id: str | None = None
        self._seen_until: dict[str, int] = {}
        self._not_running: set[Claim] = set()
        self._reconciled_at = time.monotonic()
        self.ended: list[tuple[str, int]] = []
        """Batches whose end somebody is to be told, and their rounds; as `owed`."""
        self.owed: list[tuple[str, int, bytes]] = []
        """Celery tasks that wait although their items are done: batch, index, task. `requeue` finds
        them; whoever called it sends them again, and empties this."""

    async def requeue(
        self,
        queue: str,
        n: int,
        *,
        lost_only: bool = False,
        skips: Callable[[str], bool] = lambda batch_id: False,
    ) -> list[tuple[str, list[int]]]:
        """Up to `n` items of a queue's batches that no message has brought, by batch: the caller
        sends messages for them.

        Items that were lost or released come first; with `lost_only` no others do (for workers that
        are busy: lost items must not wait for an idle one). This also finds stalled processes and
        sweeps stopped batches, so call it with `n` = 0 when no slot is free.

        Nothing is taken of batches for which `skips` is true: this process can't run them.
        """
        client: Any = self._connection.client
        key, patiently = self._runner.keys.queue(queue), self._connection.patiently
        batch_ids = await self._some_batches(queue, key)
        if not batch_ids:
            return []
        run_id = await patiently(self._server_run)
        if self._run_id not in (None, run_id):
            await self._after_restart(await self._range_of(key, 0, -1))
        self._run_id = run_id
        requeued = []
        for batch_id in batch_ids:
            try:
                most = 0 if skips(batch_id) else n
                indexes, over = await self._requeue_of(batch_id, most, lost_only, run_id)
            except BatchUnreadableError:
                continue  # `status` names it; the others go on
            except Exception as error:
                if not is_broken(error):
                    raise
                self._connection.broken.add("batch", batch_id, error)
                continue
            n -= len(indexes)
            if indexes:
                requeued.append((batch_id, indexes))
            if over:
                await patiently(partial(client.zrem, key, batch_id))
                self._detector.forget(batch_id)
        await patiently(lambda: client.expire(key, self._settings.result_ttl_seconds))
        return requeued

    async def reconcile(self, runs: Callable[[Claim], bool]) -> None:
        """Release items that are held here, in Redis or in memory, and do not run.

        A living process renews all that it holds, so nobody else would ever run them. What Redis
        says is read once in a lease, and at once for a batch after a call that failed. A claim in
        memory is released if it did not run at the call before either.

        Args:
            runs: whether a claim is being worked on here.
        """
        holding = self._claims.holding
        not_running = {claim for claim in holding if not claim.settled and not runs(claim)}
        if left := not_running & self._not_running:
            logger.warning("ledger.reconciled items=%d", len(left))
            await self._claims.release(list(left))
        self._not_running = not_running
        now, batch_ids = time.monotonic(), set(self._claims.unsure)
        if now - self._reconciled_at >= self._settings.lease_seconds:
            self._reconciled_at = now
            batch_ids.update(holding.batches())
        for batch_id in batch_ids:
            with contextlib.suppress(BatchNotFoundError):
                await self._release_orphans(batch_id)
            self._claims.unsure.discard(batch_id)

    async def on_heartbeat(self, batch_id: str, state: BatchState, *, lost: bool) -> None:
        """Act on a heartbeat's reply, on the loop: sweep a stopped batch; where this process had
        been given up (`lost`), reclaim those of its items that nobody has claimed."""
        self._batches.sweep_if_stopped(batch_id, state)
        if lost:
            await self._reclaim(batch_id)

    async def expire(self, batch_id: str, process: str, counter: str) -> int:
        """Let others claim the items of a stalled process, unless its heartbeat `counter` has
        changed; how many items."""
        cursor, freed = "0", 0
        while True:
            reply = await self._runner.run(scripts.EXPIRE, batch_id, [process, counter, cursor])
            cursor = text(reply[0])
            freed += max(0, int(reply[1]))
            if cursor == "0":
                return freed

    async def _server_run(self) -> str:
        """The id of the Redis process. Where INFO is denied it is empty, and a restart that cost
        Redis its last second is noticed by the leases alone."""
        client: Any = self._connection.client
        try:
            return str((await client.info("server"))["run_id"])
        except NoPermissionError:
            return ""

    async def _some_batches(self, queue: str, key: str) -> list[str]:
        """The batches of this call: a very long list is gone through part by part."""
        first = self._seen_until.get(queue, 0)
        found = await self._range_of(key, first, first + BATCHES_AT_ONCE - 1)
        full = len(found) == BATCHES_AT_ONCE
        self._seen_until[queue] = first + BATCHES_AT_ONCE if full else 0
        return found

    async def _range_of(self, key: str, first: int, last: int) -> list[str]:
        client: Any = self._connection.client
        try:
            found = await self._connection.patiently(lambda: client.zrange(key, first, last))
        except ResponseError as error:
            if not is_broken(error):
                raise
            self._connection.broken.add("list", key, error)
            return []
        return readable(found, "batch", self._connection.broken)

    async def _requeue_of(
        self, batch_id: str, n: int, lost_only: bool, run_id: str
    ) -> tuple[list[int], bool]:
        """Items of one batch, and whether it is over (or gone)."""
        try:
            indexes, procs, over = await self._run_requeue(batch_id, n, lost_only)
            freed = 0
            dead = {process: procs[process] for process in procs if died_here(process)}
            stalled = self._detector.stalled(batch_id, procs, run_id)
            for process, counter in {**stalled, **dead}.items():
                freed += await self.expire(batch_id, process, counter)
            if freed and len(indexes) < n:
                more, _, over = await self._run_requeue(batch_id, n - len(indexes), lost_only)
                indexes += more
        except BatchNotFoundError:
            return [], True
        return indexes, over

    async def _run_requeue(
        self, batch_id: str, n: int, lost_only: bool
    ) -> tuple[list[int], dict[str, str], bool]:
        again = round(self._settings.offer_seconds * REQUEUE_AGAIN * 1000)
        arguments = [max(0, n), again, int(lost_only)]
        reply = await self._runner.run(scripts.REQUEUE, batch_id, arguments)
        state, indexes, ready, unfinished, procs, owed, ended = reply
        if ended >= 0:
            self.ended.append((batch_id, ended))
        tasks = zip(owed[::2], owed[1::2], strict=True)
        self.owed += [(batch_id, int(index), task) for index, task in tasks if task]
        if ready:
            self._batches.sweep_if_stopped(batch_id, BatchState(text(state)))
        pairs = zip(procs[::2], procs[1::2], strict=True)
        # The scripts' own notes have a space in their names; processes have none.
        counters = {text(name): text(value) for name, value in pairs if b" " not in name}
        return [int(index) for index in indexes], counters, unfinished <= 0

    async def _after_restart(self, batch_ids: Sequence[str]) -> None:
        """Restore what a Redis that came back without its last second has lost: outcomes (paid for,
        so recorded again), claims, and that claims had ended."""
        forgotten: dict[str, list[Argument]] = {}
        for _, batch_id, values in self._claims.recent:
            forgotten.setdefault(batch_id, []).extend(values)
        for batch_id in {*forgotten, *self._claims.holding.batches(), *batch_ids}:
            try:
                await self._record_again(batch_id, forgotten.get(batch_id, []))
                await self._reclaim(batch_id)
                await self._release_orphans(batch_id)
            except (BatchNotFoundError, BatchUnreadableError):
                continue

    async def _reclaim(self, batch_id: str) -> None:
        """Hold again, in Redis, what this process holds in memory and nobody else has claimed."""
        async with self._claims.moving:
            held = self._claims.holding.of(batch_id)
            for first in range(0, len(held), CALL_ITEMS):
                arguments: list[Argument] = [self._runner.process_id]
                for claim in held[first : first + CALL_ITEMS]:
                    phase = "p" if claim.calling else "c"
                    arguments += (claim.index, claim.token, claim.round, claim.version, phase)
                try:
                    await self._runner.run(scripts.RECLAIM, batch_id, arguments)
                except BatchNotFoundError:
                    return

    async def _record_again(self, batch_id: str, values: Sequence[Argument]) -> None:
        size = RECORD_FIELDS * CALL_ITEMS
        for first in range(0, len(values), size):
            arguments: list[Argument] = [self._runner.process_id, secrets.token_hex(8)]
            arguments += values[first : first + size]
            await self._runner.run(scripts.RECORD, batch_id, arguments)

    async def _release_orphans(self, batch_id: str) -> None:
        """Release what Redis says this process holds, and its memory does not."""
        client: Any = self._connection.client
        key = self._runner.keys.batch(batch_id).held
        process, claims = self._runner.process_id, self._claims
        cursor: int | None = None
        while cursor != 0:
            scan = partial(client.hscan, key, cursor or 0, count=1000)
            cursor, held = await self._connection.patiently(scan)
            arguments: list[Argument] = []
            for index, token in _held_by(process, held):
                if token not in claims.claiming and not claims.holding.has(batch_id, int(index)):
                    arguments += (index, token, 0, "")
            if arguments:
                await self._runner.run(scripts.RELEASE, batch_id, [process, 0, *arguments])


def _held_by(process: str, held: Mapping[bytes, bytes]) -> Iterator[tuple[bytes, str]]:
    """Index and token of each item of one process; a value is `phase token process`."""
    end = f" {process}".encode()
    for index, value in held.items():
        if value.endswith(end):
            yield index, value.decode().split(" ", 2)[1]
