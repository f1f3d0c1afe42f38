"""The limiter as one process sees it: acquire and settle on any quota, configure and read them."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable
from typing import Self

from redis.asyncio.client import PubSub
from redis.exceptions import ResponseError

from batchllm_celery.connection import Connection, is_broken, readable
from batchllm_celery.errors import QuotaConflictError
from batchllm_celery.event_loop import Unending
from batchllm_celery.events import Events, RateLimitHit
from batchllm_celery.keys import Keys
from batchllm_celery.limiter.permit import (
    CallOutcome,
    Estimate,
    Permit,
    SettledCall,
)
from batchllm_celery.limiter.quota_client import QuotaClient
from batchllm_celery.limiter.quota_state import QuotaState, configure_arguments, read_state
from batchllm_celery.limiter.scripts import CONFIGURE, STATE
from batchllm_celery.models import Quota, TokenUsage
from batchllm_celery.models.rate_limits import RateLimits

logger = logging.getLogger("batchllm_celery")

#: How long, in seconds, the name of a quota is listed after its last use.
_NAMES_KEPT = 30 * 24 * 3600
#: How long, in seconds, after its channel was lost a process subscribes again.
_SUBSCRIBE_AGAIN_AFTER = 0.5


class Limiter:
    """Start times for provider calls, shared by the fleet. One per process; a context manager.

    `clock` is the running loop's: seconds of `time.monotonic`, but where time is not the real one.

    async with Limiter(connection, Keys(), process_id="host-1") as limiter:
        await limiter.configure(Quota(name="gemini", limits=QuotaLimits(requests_per_minute=600)))
        permit = await limiter.acquire("gemini", Estimate(1_200, 300))
        ...                                       # call the provider now
        limiter.settle(permit, CallOutcome.SUCCEEDED, usage=usage)
    """

    def __init__(
        self,
        connection: Connection,
        keys: Keys,
        *,
        process_id: str,
        events: Events | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._process = process_id
        self._events = Events() if events is None else events
        self._clock = clock
        self._clients: dict[str, QuotaClient] = {}
        self._full_speed: set[str] = set()
        self._listener: Unending | None = None
        self._opened = asyncio.Event()
        """A quota is used for the first time: its channel is not subscribed to yet."""
        self._background: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = Unending(self._listen)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._listener is not None:
            await self._listener.end()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await asyncio.gather(*(client.close() for client in self._clients.values()))

    async def configure(self, quota: Quota, *, update: bool = False) -> Quota:
        """Create the quota, or make sure that it is what the fleet already uses.

        With `update` a differing one is replaced, for everybody within a second.

        Raises:
            QuotaConflictError: it exists with other limits or another policy.
        """
        keys, arguments = self._keys.quota(quota.name), configure_arguments(quota, update=update)
        raw: bytes = await self._connection.patiently(
            lambda: CONFIGURE(self._connection.client, [keys.state, keys.channel], arguments)
        )
        await self._remember(quota.name)
        found = Quota.model_validate_json(raw)
        if found != quota:
            raise QuotaConflictError(_differences(found, quota))
        return quota

    def begin_at_full_speed(self, quota: str) -> None:
        """Where nobody has set this quota: start with as many calls as there are slots, and find a
        rate from above once a call is refused. Say so before the first `acquire`."""
        self._full_speed.add(quota)

    async def acquire(
        self,
        quota: str,
        estimate: Estimate | Callable[[], Estimate],
        *,
        priority: int = 0,
        retry: bool = False,
        tried: int = 0,
    ) -> Permit:
        """Wait for a permit, and return at its start time: the caller starts its call at once.

        Within the process the highest priority comes first, then first come, first served.
        Cancelling gives the place back.

        Args:
            quota: its name.
            estimate: what the call will probably use; a function is called whenever it counts.
            priority: 0 is usual, higher ones go first.
            retry: the caller had a permit already, and its call was refused or the permit went
                stale: it goes before others of its priority. (Behind them, each item of a long
                queue could be refused once, with no success in between, and the cooldowns would
                grow to their longest.)
            tried: calls that were made for the caller already. While the breaker is open, its one
                call at a time goes to whoever has the fewest.

        Raises:
            QuotaUnavailableError: the day's quota is used up; raised at once, not waited for.
        """
        client = self._clients.get(quota) or self._open(quota)
        function = estimate if callable(estimate) else lambda: estimate
        return await client.acquire(function, priority, is_retry=retry, tried=tried)

    def may_start(self, permit: Permit) -> bool:
        """Whether a call with this permit may (still) start now.

        For callers that had to await something between `acquire` and the call: if not, settle the
        permit as UNUSED and acquire again.
        """
        return self._clients[permit.quota].queue.may_start(permit, self._clock())

    def is_void(self, permit: Permit) -> bool:
        """Whether a cooldown has begun, or the limits have changed, since it was given."""
        return self._clients[permit.quota].queue.is_void(permit)

    def settle(
        self,
        permit: Permit,
        outcome: CallOutcome,
        *,
        usage: TokenUsage | None = None,
        retry_after: float | None = None,
        latency: float = 0.0,
        limits: RateLimits | None = None,
    ) -> None:
        """Say how a permitted call ended. Never blocks; only the first call for a permit counts.

        Args:
            permit: what `acquire` returned.
            outcome: how the call ended.
            usage: its actual tokens replace the estimate; None: they are not known.
            retry_after: seconds that the provider asked to wait.
            latency: seconds from the call's start to its end; 0: not measured.
            limits: what the provider's headers said; None: nothing.
        """
        if permit.settled:
            return
        permit.settled = True
        call = SettledCall(permit, outcome, usage, retry_after, latency, limits)
        self._clients[permit.quota].settle(call)
        if outcome is CallOutcome.REFUSED:
            self._events.emit(RateLimitHit(permit.quota, retry_after))

    def beside_successes(self, quota: str) -> bool:
        """Whether calls of the fleet have succeeded lately, by the newest reply after an overload:
        then overloads are a matter of how many calls there are."""
        client = self._clients.get(quota)
        reply = None if client is None else client.queue.last_reply
        return reply is not None and reply.beside_successes

    async def state(self, quota: str) -> QuotaState:
        """The quota as it is now, for `status`."""
        keys = self._keys.quota(quota)
        found = await self._connection.patiently(
            lambda: STATE(self._connection.client, [keys.state, keys.waiting])
        )
        return read_state(quota, *found)

    async def states(self) -> list[QuotaState]:
        """All quotas of the namespace that were used in the last month."""
        client, broken = self._connection.client, self._connection.broken
        try:
            names: list[bytes] = await self._connection.patiently(
                lambda: client.execute_command("ZRANGE", self._keys.quotas, 0, -1)
            )
        except ResponseError as error:
            if not is_broken(error):
                raise
            broken.add("list", self._keys.quotas, error)
            return []
        found = []
        for name in readable(names, "quota", broken):
            try:
                found.append(await self.state(name))
                broken.mended("quota", name)
            except Exception as error:
                if not is_broken(error):
                    raise
                broken.add("quota", name, error)
        return found

    async def _remember(self, quota: str) -> None:
        async def add() -> None:
            async with self._connection.client.pipeline(transaction=False) as pipe:
                pipe.zadd(self._keys.quotas, {quota: time.time()})
                pipe.zremrangebyscore(self._keys.quotas, 0, time.time() - _NAMES_KEPT)
                pipe.expire(self._keys.quotas, _NAMES_KEPT)
                await pipe.execute()

        await self._connection.patiently(add)

    def _open(self, quota: str) -> QuotaClient:
        keys = self._keys.quota(quota)
        client = QuotaClient(
            self._connection, keys, quota, self._process, self._events, self._clock
        )
        client.queue.full_speed = quota in self._full_speed
        self._clients[quota] = client
        self._opened.set()
        task = asyncio.create_task(self._remember(quota), name="limiter-remember")
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return client

    # -- the channels: a fast path only, the freshness lease is the guarantee

    async def _listen(self) -> None:
        while True:
            try:
                await self._subscribe()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.debug("limiter.channel_lost error=%s", type(error).__name__)
                await asyncio.sleep(_SUBSCRIBE_AGAIN_AFTER)

    async def _subscribe(self) -> None:
        """Follow the channels of all quotas in use, also of those that come later."""
        if not self._clients:
            await self._opened.wait()
        async with self._connection.pubsub(ignore_subscribe_messages=True) as pubsub:
            followed: dict[bytes, QuotaClient] = {}
            while True:
                self._opened.clear()
                for name, client in self._clients.items():
                    channel = self._keys.quota(name).channel
                    if channel.encode() not in followed:
                        await pubsub.subscribe(channel)
                        followed[channel.encode()] = client
                await self._notify(pubsub, followed)

    async def _notify(self, pubsub: PubSub, followed: dict[bytes, QuotaClient]) -> None:
        """Pass messages on, until a quota is used for the first time."""
        opened = asyncio.create_task(self._opened.wait())
        try:
            while not opened.done():
                read = asyncio.create_task(pubsub.get_message(timeout=None))
                try:
                    await asyncio.wait({opened, read}, return_when=asyncio.FIRST_COMPLETED)
                    if read.done() and (message := read.result()):
                        followed[message["channel"]].notified(message["data"])
                finally:
                    if not read.done():
                        read.cancel()
                        await asyncio.gather(read, return_exceptions=True)
        finally:
            opened.cancel()


def _differences(found: Quota, wanted: Quota) -> str:
    old, new = found.model_dump(), wanted.model_dump()
    rows = [
        f"{field}{'.' + name if name else ''}: {_shown(a)} is in force, {_shown(b)} was asked for"
        for field in old
        for name, a, b in _pairs(old[field], new[field])
        if a != b
    ]
    return (
        f"quota {wanted.name!r} exists with other values. "
        + "; ".join(rows)
        + ". Use the same, another quota name, or --quota-update to change it for everybody."
    )


def _shown(value: object) -> str:
    return "unlimited" if value == math.inf else repr(value)


def _pairs(old: object, new: object) -> list[tuple[str, object, object]]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [(name, old[name], new[name]) for name in old]
    return [("", old, new)]
