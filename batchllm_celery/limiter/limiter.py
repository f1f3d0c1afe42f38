"""One process's side of the fleet-wide limiter.

Each quota in use has a waiting line and at most one question to Redis under way. A question carries
what has ended since the last one and the wishes of all waiters; the answer is start times.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Self

from redis.asyncio.client import PubSub
from redis.exceptions import ResponseError

from batchllm_celery.connection import Connection, Script, is_broken, readable
from batchllm_celery.errors import QuotaConflictError, QuotaUnavailableError
from batchllm_celery.events import (
    CooldownEnded,
    CooldownStarted,
    Events,
    QuotaOversize,
    RateLimitHit,
)
from batchllm_celery.keys import Keys, QuotaKeys
from batchllm_celery.limiter.line import LATE, Line, Question, Waiter
from batchllm_celery.limiter.permit import CallOutcome, Estimate, Permit
from batchllm_celery.limiter.state import QuotaState, read_state
from batchllm_celery.limiter.wire import Reply, ServerClock
from batchllm_celery.models import Quota, TokenUsage

logger = logging.getLogger("batchllm_celery")


_PACKAGE = "batchllm_celery.limiter"
ACQUIRE = Script.load(_PACKAGE, "acquire.lua", shared="live.lua")
CONFIGURE = Script.load(_PACKAGE, "configure.lua", shared="live.lua")
STATE = Script.load(_PACKAGE, "state.lua", shared="live.lua")

#: Seconds that closing may take to tell Redis what ended; then it is left to the lease.
FAREWELL = 1.0
#: ... and between a question that failed and the next.
AFTER_FAILURE = 0.5
_MONTH = 30 * 24 * 3600


class Limiter:
    """Start times for provider calls, shared by the fleet. One per process; a context manager.

    async with Limiter(connection, Keys(), process_id="host-1") as limiter:
        await limiter.configure(Quota(name="gemini", limits=QuotaLimits(requests_per_minute=600)))
        permit = await limiter.acquire("gemini", Estimate(1_200, 300))
        ...                                       # call the provider now
        limiter.settle(permit, CallOutcome.SUCCEEDED, usage=usage)
    """

    def __init__(
        self, connection: Connection, keys: Keys, *, process_id: str, events: Events | None = None
    ) -> None:
        self._connection = connection
        self._keys = keys
        self._process = process_id
        self._events = Events() if events is None else events
        self._desks: dict[str, _Desk] = {}
        self._full_speed: set[str] = set()
        self._listener: asyncio.Task[None] | None = None
        self._subscribe = asyncio.Event()
        self._background: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._listener = asyncio.create_task(self._listen(), name="limiter-listener")
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        tasks = [*self._background, *([self._listener] if self._listener else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(desk.close() for desk in self._desks.values()))

    async def configure(self, quota: Quota, *, update: bool = False) -> Quota:
        """Create the quota, or make sure that it is what the fleet already uses.

        With `update` a differing one is replaced, for everybody within a second.

        Raises:
            QuotaConflictError: it exists with other limits or another policy.
        """
        keys = self._keys.quota(quota.name)
        json = quota.model_dump_json()
        raw: bytes = await self._connection.patiently(
            lambda: CONFIGURE(
                self._connection.client,
                [keys.state, keys.channel],
                [json, int(update), *script_fields(quota)],
            )
        )
        await self._remember(quota.name)
        if raw.decode() != json:
            found = Quota.model_validate_json(raw)
            if found != quota:
                raise QuotaConflictError(_differences(found, quota))
        return quota

    def begin_at_full_speed(self, quota: str) -> None:
        """Where nobody has set this quota: start with as many calls as there are slots, and find a
        rate from above once a call is refused. Say so before the first `acquire`."""
        self._full_speed.add(quota)

    async def acquire(
        self, quota: str, estimate: Estimate | Callable[[], Estimate], *, again: bool = False
    ) -> Permit:
        """Wait for this call's turn and return at its start time: the caller starts it at once.

        First come, first served within the process. Cancelling gives the place back.

        Args:
            quota: its name.
            estimate: what the call will probably use; a function is asked anew while it waits.
            again: the caller had its turn already and was refused, or its permit went stale: it
                comes before all who had none. (At the tail, each item of a long line could be
                refused once, with no success in between, and the cooldowns grow to their longest.)

        Raises:
            QuotaUnavailableError: the day's quota is used up; raised at once, not waited for.
        """
        desk = self._desks.get(quota) or self._open(quota)
        guess = estimate if callable(estimate) else lambda: estimate
        return await desk.acquire(guess, again)

    def may_start(self, permit: Permit) -> bool:
        """Whether a call with this permit may (still) start now.

        For callers that had to await something between `acquire` and the call: if not, settle the
        permit as UNUSED and acquire again.
        """
        return self._desks[permit.quota].line.usable(permit, time.monotonic())

    def is_void(self, permit: Permit) -> bool:
        """Whether a cooldown has begun, or the limits have changed, since it was handed out."""
        return self._desks[permit.quota].line.is_void(permit)

    def settle(
        self,
        permit: Permit,
        outcome: CallOutcome,
        *,
        usage: TokenUsage | None = None,
        retry_after: float | None = None,
    ) -> None:
        """Say how a permitted call ended; its actual tokens replace the estimate. Never blocks.

        The first call for a permit counts, further ones are ignored.
        """
        if permit.settled:
            return
        permit.settled = True
        self._desks[permit.quota].settle(permit, outcome, usage, retry_after)
        if outcome is CallOutcome.REFUSED:
            self._events.emit(RateLimitHit(permit.quota, retry_after))

    async def state(self, quota: str) -> QuotaState:
        """The quota as it is now, for `status`."""
        keys = self._keys.quota(quota)
        now, waiting, config, *flat = await self._connection.patiently(
            lambda: STATE(self._connection.client, [keys.state, keys.waiting], [])
        )
        numbers = {
            name.decode(): float(value) for name, value in zip(flat[::2], flat[1::2], strict=True)
        }
        return read_state(quota, now, waiting, config, numbers)

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
                pipe.zremrangebyscore(self._keys.quotas, 0, time.time() - _MONTH)
                pipe.expire(self._keys.quotas, _MONTH)
                await pipe.execute()

        await self._connection.patiently(add)

    def _open(self, quota: str) -> _Desk:
        desk = _Desk(self._connection, self._keys.quota(quota), quota, self._process, self._events)
        desk.full_speed = quota in self._full_speed
        self._desks[quota] = desk
        self._subscribe.set()
        task = asyncio.create_task(self._remember(quota), name="limiter-remember")
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return desk

    # -- the channel: a fast path only, the proof of the generation is the guarantee

    async def _listen(self) -> None:
        while True:
            try:
                await self._follow_channels()
            except asyncio.CancelledError:
                raise
            except Exception as error:
                logger.debug("limiter.channel_lost error=%s", type(error).__name__)
                await asyncio.sleep(0.5)

    async def _follow_channels(self) -> None:
        if not self._desks:
            await self._subscribe.wait()
        async with self._connection.pubsub(ignore_subscribe_messages=True) as pubsub:
            known: set[str] = set()
            while True:
                self._subscribe.clear()
                for name in self._desks.keys() - known:
                    await pubsub.subscribe(self._keys.quota(name).channel)
                    known.add(name)
                await self._hear(pubsub)

    async def _hear(self, pubsub: PubSub) -> None:
        """Messages, until a quota is used for the first time."""
        desks = {
            self._keys.quota(name).channel.encode(): desk for name, desk in self._desks.items()
        }
        wake = asyncio.create_task(self._subscribe.wait())
        try:
            while not wake.done():
                read = asyncio.create_task(pubsub.get_message(timeout=None))
                try:
                    await asyncio.wait({wake, read}, return_when=asyncio.FIRST_COMPLETED)
                    if read.done() and (message := read.result()):
                        desks[message["channel"]].hear(message["data"])
                finally:
                    if not read.done():
                        read.cancel()
                        await asyncio.gather(read, return_exceptions=True)
        finally:
            wake.cancel()


class _Desk:
    """One quota in this process: its line, a timer, and at most one question under way."""

    def __init__(
        self, connection: Connection, keys: QuotaKeys, quota: str, process: str, events: Events
    ) -> None:
        self.line = Line(quota)
        self.full_speed = False
        self._connection = connection
        self._keys = [keys.state, keys.procs, keys.waiting, keys.channel]
        self._process = process
        self._events = events
        self._loop = asyncio.get_running_loop()
        self._clock = ServerClock()
        # A sequence that no earlier life of this process id has used.
        self._sequence = time.time_ns() // 1_000
        self._asking: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf
        self._cooling: asyncio.TimerHandle | None = None
        self._closed = False

    async def acquire(self, guess: Callable[[], Estimate], again: bool) -> Permit:
        line = self.line
        permit = line.at_once(time.monotonic(), guess())
        if permit is not None:
            return permit
        waiter = Waiter(guess, self._loop.create_future())
        line.join(waiter, first=again)
        while True:
            self._wake(min(line.next_ask(), line.next_start()))
            permit = await self._granted(waiter)
            if line.usable(permit, time.monotonic()):
                return permit
            # The loop was late: the call would start after its time, or in a cooldown.
            permit.settled = True
            self.settle(permit, CallOutcome.UNUSED)
            waiter = Waiter(guess, self._loop.create_future())
            line.join(waiter, first=True)

    async def _granted(self, waiter: Waiter) -> Permit:
        try:
            return await waiter.granted
        except asyncio.CancelledError:
            granted = waiter.granted
            if granted.done() and not granted.cancelled() and granted.exception() is None:
                granted.result().settled = True
                self.settle(granted.result(), CallOutcome.UNUSED)
            elif granted.cancelled() and not self._closed:
                self.line.leave(waiter)
            raise

    def settle(
        self,
        permit: Permit,
        outcome: CallOutcome,
        usage: TokenUsage | None = None,
        retry_after: float | None = None,
    ) -> None:
        self.line.pending.add(permit, outcome, time.monotonic(), usage, retry_after)
        self.line.settle(permit, outcome)
        self._wake(self.line.next_ask())

    def hear(self, message: bytes) -> None:
        """`g:generation`, or `f:process`: a slot is free for that process."""
        kind, _, rest = message.partition(b":")
        if kind == b"g" and rest.isdigit() and len(rest) < 20:
            self.line.hear_generation(int(rest), time.monotonic())
        elif kind == b"f" and rest == self._process.encode() and self.line.waiting:
            self.line.urgent = True
        self._wake(self.line.next_ask())

    async def close(self) -> None:
        """Stop waiting, and give back what was not started."""
        self._closed = True
        self._cancel_timers()
        for waiter in list(self.line.alive()):
            waiter.granted.cancel()
        self.line.waiting = 0
        try:
            async with asyncio.timeout(FAREWELL):
                await self._say_goodbye()
        except TimeoutError:
            logger.debug("limiter.farewell_timeout quota=%s", self.line.quota)
        except Exception as error:
            self._log_failure(error)
        finally:
            if self._asking is not None:
                self._asking.cancel()

    async def _say_goodbye(self) -> None:
        if self._asking is not None:
            await asyncio.wait({self._asking})
        self.line.give_back_all(time.monotonic())
        if self.line.pending.since is not None or self.line.last is not None:
            await self._ask()

    def _cancel_timers(self) -> None:
        for timer in (self._timer, self._cooling):
            if timer is not None:
                timer.cancel()

    # -- one timer for everything that has a time

    def _wake(self, at: float) -> None:
        if at >= self._timer_at or self._closed:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        # call_at in the past runs in the next turn of the loop: callers of this one are gathered.
        self._timer = self._loop.call_at(max(at, 0.0), self._tick)

    def _tick(self) -> None:
        self._timer, self._timer_at = None, math.inf
        now = time.monotonic()
        line = self.line
        line.release(now)
        if self._asking is None:
            if line.next_ask() <= now + 1e-4:
                self._asking = self._loop.create_task(self._ask_and_go_on(), name="limiter-ask")
            else:
                self._wake(line.next_ask())
        start = line.next_start()
        if start > now or now - line.proof <= 0.25:
            self._wake(start)

    async def _ask_and_go_on(self) -> None:
        try:
            await self._ask()
        except Exception as error:
            self._fail_waiters(error)
            await asyncio.sleep(AFTER_FAILURE)
        finally:
            self._asking = None
        if not self._closed:
            self._wake(0.0)

    async def _ask(self) -> None:
        self._sequence += 1
        sent = time.monotonic()
        question = self.line.question(self._process, self._sequence, sent)
        arguments = [*question.arguments, int(self.full_speed)]
        raw = await self._connection.patiently(lambda: self._call(arguments))
        received = time.monotonic()
        reply = Reply.parse(raw)
        self._tell(reply, received)
        at = self._clock.local(sent, received, reply.now)
        self.line.take(question, reply, sent, at, received)
        if reply.exhausted_until:
            self._day_is_over(reply.exhausted_until * 1e-6)
        if reply.oversize:
            self._warn_of_oversize(question)

    async def _call(self, arguments: Sequence[bytes | str | int | float]) -> bytes:
        raw: bytes = await ACQUIRE(self._connection.client, self._keys, arguments)
        return raw

    def _day_is_over(self, resets_at: float) -> None:
        """Nobody here will be served today. While tickets are held, or permits that may not have
        begun, the next answer will say so again: the first item that hears of it may park the
        batch, and their calls are still due."""
        line = self.line
        if line.tickets:
            return
        if time.monotonic() < line.permitted_at + LATE:
            line.ask_after = line.permitted_at + LATE
            return
        for waiter in list(line.alive()):
            line.waiting -= 1
            waiter.granted.set_exception(QuotaUnavailableError(line.quota, resets_at))

    def _log_failure(self, error: Exception) -> None:
        logger.error("limiter.failed quota=%s error=%s", self.line.quota, type(error).__name__)

    def _fail_waiters(self, error: Exception) -> None:
        self._log_failure(error)
        for waiter in list(self.line.alive()):
            self.line.waiting -= 1
            waiter.granted.set_exception(error)

    def _tell(self, reply: Reply, now: float) -> None:
        last = self.line.last
        if last is not None and reply.generation == last.generation:
            return
        if reply.cooldown <= 0 or (last is None and not self._events):
            return
        quota, generation, seconds = self.line.quota, reply.generation, reply.cooldown
        self._events.emit(CooldownStarted(quota, generation, seconds, reply.consecutive))
        if self._cooling is not None:
            self._cooling.cancel()
        self._cooling = self._loop.call_later(
            seconds, self._events.emit, CooldownEnded(quota, generation, seconds)
        )

    def _warn_of_oversize(self, question: Question) -> None:
        largest = max((e.input_tokens + e.output_tokens for e in question.reserved), default=0)
        logger.warning("limiter.oversize quota=%s tokens=%d", self.line.quota, largest)
        self._events.emit(QuotaOversize(self.line.quota, "tokens", largest, 0.0))


def script_fields(quota: Quota) -> list[str | int | float]:
    """ARGV of configure.lua, from the third on: rates a second, durations in microseconds."""
    limits, policy = quota.limits.finite(), quota.policy
    fields: dict[str, int | float] = {
        "rate_r": limits.get("requests_per_minute", 0) / 60,
        "rate_t": limits.get("tokens_per_minute", 0) / 60,
        "rate_i": limits.get("input_tokens_per_minute", 0) / 60,
        "rate_o": limits.get("output_tokens_per_minute", 0) / 60,
        "per_day": limits.get("requests_per_day", 0),
        "concurrency": limits.get("max_concurrency", 0),
        "full_speed": int(quota.limits.full_speed),
        "burst": int(quota.burst_seconds * 1e6),
        "horizon": int(quota.horizon_seconds * 1e6),
        "adaptive": int(policy.kind == "adaptive"),
        "max_cooldown": int(policy.max_cooldown * 1e6),
        "ramp_n": len(policy.ramp),
        "ramp_repeats": int(policy.ramp_repeats),
    }
    lists = [",".join(map(repr, seconds)) for seconds in (policy.cooldowns, policy.ramp)]
    return [*lists, *(part for pair in fields.items() for part in pair)]


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
