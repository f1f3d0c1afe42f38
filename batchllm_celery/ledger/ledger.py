"""The ledger of one process: worker side, producer side, and the search for lost work.

What a batch of 10 million items keeps in Redis besides the items in work: 80 MB of fingerprints
and three bitmaps of 1.25 MB. Neither side keeps anything per item that is done.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Self

from redis.exceptions import NoPermissionError, ResponseError

from batchllm_celery.connection import Connection, is_broken, readable
from batchllm_celery.errors import BatchNotFoundError, BatchUnreadableError
from batchllm_celery.events import Events
from batchllm_celery.keys import Keys
from batchllm_celery.ledger import scripts
from batchllm_celery.ledger.calls import Argument, text
from batchllm_celery.ledger.claims import Claim
from batchllm_celery.ledger.locks import died_here
from batchllm_celery.ledger.observer import Observer
from batchllm_celery.ledger.producer_side import ProducerSide
from batchllm_celery.ledger.worker_side import CALL_ITEMS, RECORD_FIELDS, REOFFER, WorkerSide
from batchllm_celery.models import BatchState
from batchllm_celery.settings import Settings

logger = logging.getLogger("batchllm_celery")

#: Batches that one look goes through, a script call each.
BATCHES_A_LOOK = 1000


class Ledger(WorkerSide, ProducerSide):
    """What Redis knows of every item; one of these per process.

    An async context manager; closing it ends its own background work only.

    Args:
        connection: the process's Redis.
        keys: the fleet's names.
        process_id: unique for ever (see `new_process_id`): never one that has been used before.
        settings: lease, slots, limits.
        events: listeners.
    """

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
        self._observer = Observer(settings.lease_seconds)
        self._run_id: str | None = None
        self._looked_until: dict[str, int] = {}
        self._loose: set[Claim] = set()
        self._reconciled_at = time.monotonic()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def offer(
        self,
        queue: str,
        n: int,
        *,
        lost_only: bool = False,
        skips: Callable[[str], bool] = lambda batch_id: False,
    ) -> list[tuple[str, list[int]]]:
        """Up to `n` items of a queue's batches that no message has brought, to be enqueued.

        What was lost or given back comes first; with `lost_only` nothing else does (for workers
        that are busy: lost work must not wait for an idle one). It also looks after the dead and
        the stopped, so call it every sixth of a lease or so, with `n` = 0 when nothing is free.
        Nothing is taken of batches that `skips` says yes to: this process can't run them.
        """
        client: Any = self._connection.client
        key, patiently = self._keys.queue(queue), self._connection.patiently
        batch_ids = await self._some_batches(queue, key)
        if not batch_ids:
            return []
        run_id = await patiently(self._server_run)
        if self._run_id not in (None, run_id):
            await self._after_restart(await self._range_of(key, 0, -1))
        self._run_id = run_id
        offered = []
        for batch_id in batch_ids:
            try:
                most = 0 if skips(batch_id) else n
                indexes, over = await self._offer_of(batch_id, most, lost_only, run_id)
            except BatchUnreadableError:
                continue  # `status` names it; the others go on
            except Exception as error:
                if not is_broken(error):
                    raise
                self._connection.broken.add("batch", batch_id, error)
                continue
            n -= len(indexes)
            if indexes:
                offered.append((batch_id, indexes))
            if over:
                await patiently(partial(client.zrem, key, batch_id))
                self._observer.forget(batch_id)
        await patiently(lambda: client.expire(key, self._settings.result_ttl_seconds))
        return offered

    async def reconcile(self, runs: Callable[[Claim], bool]) -> None:
        """Give back what Redis believes this process has, or what it has, and does not run.

        A living process renews all that it holds, so nobody else would ever take it over. Call it
        every sixth of a lease or so. Each lease it goes through what Redis knows, and at once for a
        batch after a call that failed; of its own what was not running at the last look either.

        Args:
            runs: whether a claim is being worked on here.
        """
        loose = {claim for claim in self.holding if not claim.settled and not runs(claim)}
        if left := loose & self._loose:
            logger.warning("ledger.reconciled items=%d", len(left))
            await self.release(list(left))
        self._loose = loose
        now, batch_ids = time.monotonic(), set(self._unsure)
        if now - self._reconciled_at >= self._settings.lease_seconds:
            self._reconciled_at = now
            batch_ids.update(self.holding.batches())
        for batch_id in batch_ids:
            with contextlib.suppress(BatchNotFoundError):
                await self._release_strays(batch_id)
            self._unsure.discard(batch_id)

    async def _server_run(self) -> str:
        """The name of the Redis process; always the same where INFO is denied: then a restart that
        cost its last second is found out by the leases alone."""
        client: Any = self._connection.client
        try:
            return str((await client.info("server"))["run_id"])
        except NoPermissionError:
            return ""

    async def _some_batches(self, queue: str, key: str) -> list[str]:
        """The batches to look after now: of a very long list one part after another."""
        first = self._looked_until.get(queue, 0)
        found = await self._range_of(key, first, first + BATCHES_A_LOOK - 1)
        full = len(found) == BATCHES_A_LOOK
        self._looked_until[queue] = first + BATCHES_A_LOOK if full else 0
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

    async def _offer_of(
        self, batch_id: str, n: int, lost_only: bool, run_id: str
    ) -> tuple[list[int], bool]:
        """Items of one batch, and whether it is over (or gone)."""
        try:
            indexes, procs, over = await self._ask_offer(batch_id, n, lost_only)
            freed = 0
            dead = {process: procs[process] for process in procs if died_here(process)}
            silent = self._observer.look(batch_id, procs, run_id)
            for process, counter in {**silent, **dead}.items():
                freed += await self._expire(batch_id, process, counter)
            if freed and len(indexes) < n:
                more, _, over = await self._ask_offer(batch_id, n - len(indexes), lost_only)
                indexes += more
        except BatchNotFoundError:
            return [], True
        return indexes, over

    async def _ask_offer(
        self, batch_id: str, n: int, lost_only: bool
    ) -> tuple[list[int], dict[str, str], bool]:
        again = round(self._settings.offer_seconds * REOFFER * 1000)
        reply = await self._run(scripts.OFFER, batch_id, [max(0, n), again, int(lost_only)])
        state, indexes, ready, unfinished, procs = reply
        if ready:
            self._note(batch_id, BatchState(text(state)))
        return [int(index) for index in indexes], _counters(procs), unfinished <= 0

    async def _expire(self, batch_id: str, process: str, counter: str) -> int:
        """Set free what a silent process holds; how many items."""
        cursor, freed = "0", 0
        while True:
            reply = await self._run(scripts.EXPIRE, batch_id, [process, counter, cursor])
            cursor = text(reply[0])
            freed += max(0, int(reply[1]))
            if cursor == "0":
                return freed

    async def _after_restart(self, batch_ids: Sequence[str]) -> None:
        """Make good what a Redis that came back without its last second has forgotten: outcomes
        (recorded again, for they are paid for), claims, and that claims had ended."""
        forgotten: dict[str, list[Argument]] = {}
        for _, batch_id, values in self._recent:
            forgotten.setdefault(batch_id, []).extend(values)
        for batch_id in {*forgotten, *self.holding.batches(), *batch_ids}:
            try:
                await self._record_again(batch_id, forgotten.get(batch_id, []))
                await self._adopt(batch_id)
                await self._release_strays(batch_id)
            except (BatchNotFoundError, BatchUnreadableError):
                continue

    async def _record_again(self, batch_id: str, values: Sequence[Argument]) -> None:
        size = RECORD_FIELDS * CALL_ITEMS
        for first in range(0, len(values), size):
            request = [self.process_id, secrets.token_hex(8)]
            await self._run(scripts.RECORD, batch_id, [*request, *values[first : first + size]])

    async def _release_strays(self, batch_id: str) -> None:
        """Give back what Redis says this process has, and it has not."""
        client: Any = self._connection.client
        key = self._keys.batch(batch_id).held
        cursor: int | None = None
        while cursor != 0:
            at = cursor or 0
            scan = partial(client.hscan, key, at, count=1000)
            cursor, held = await self._connection.patiently(scan)
            strays = [
                (int(index), token)
                for index, token in _held_by(self.process_id, held)
                if token not in self._claiming and not self.holding.has(batch_id, int(index))
            ]
            arguments = [part for index, token in strays for part in (index, token, 0, "")]
            if arguments:
                await self._run(scripts.RELEASE, batch_id, [self.process_id, 0, *arguments])


def _held_by(process: str, held: Mapping[bytes, bytes]) -> Iterator[tuple[bytes, str]]:
    """Index and token of each item of one process; a value is `phase token process`."""
    end = f" {process}".encode()
    for index, value in held.items():
        if value.endswith(end):
            yield index, value.decode().split(" ", 2)[1]


def _counters(procs: Sequence[Any]) -> dict[str, str]:
    """Process -> counter, without the scripts' own notes (their names hold a space)."""
    pairs = zip(procs[::2], procs[1::2], strict=True)
    return {text(name): text(value) for name, value in pairs if b" " not in name}
