"""A fleet before a simulated provider, in virtual time: what it serves, and what is refused.

Real limiters (each a process with so many slots) and the real scripts. A row that is refused waits
for its backoff in its slot, as the item runner has it, and is asked again.
"""

from __future__ import annotations

import asyncio
import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any

from batchllm_celery.dialects.headers import rate_limits_of
from batchllm_celery.keys import Keys
from batchllm_celery.limiter import CallOutcome, Estimator, Limiter
from batchllm_celery.limiter.quota_state import configure_arguments
from batchllm_celery.limiter.scripts import CONFIGURE
from batchllm_celery.models import Quota, TokenUsage
from batchllm_celery.simulation.config import SimulationConfig
from batchllm_celery.simulation.replies import GenerateRequest
from tests.integration.virtual_redis import VirtualRedis
from tests.integration.virtual_time import VirtualConnection
from tests.virtual_loop import VirtualLoop, virtual_provider

#: Seconds after the loop's beginning, in Unix time.
BEGAN = 1_800_000_000.0
_namespaces = iter(range(10**9))


@dataclass(frozen=True)
class Load:
    """Rows of one tenant.

    Args:
        rows: how many; None: without end.
        prompt: characters of a row's prompt (4 a token), drawn for each.
        start: second at which they come.
    """

    tenant: str = "batch"
    rows: int | None = None
    prompt: Callable[[random.Random], int] = lambda draw: 400
    start: float = 0.0


@dataclass
class Seen:
    """What happened."""

    served: list[tuple[float, int, float, str]] = field(default_factory=list)
    """(end, tokens of answer and prompt, seconds of the call, tenant) of each success."""
    refused: list[float] = field(default_factory=list)
    worst_row: int = 0
    """The most refusals that one row saw."""
    round_trips: int = 0

    def rate(self, since: float, until: float, *, tokens: bool = False) -> float:
        """Answers (or tokens) a second."""
        inside = [one for one in self.served if since <= one[0] < until]
        return (sum(one[1] for one in inside) if tokens else len(inside)) / (until - since)

    def refused_share(self, since: float, until: float) -> float:
        refused = sum(since <= at < until for at in self.refused)
        return refused / max(refused + sum(since <= one[0] < until for one in self.served), 1)

    def latency(self, since: float, until: float) -> float:
        """The median call's, in seconds."""
        times = sorted(one[2] for one in self.served if since <= one[0] < until)
        return times[len(times) // 2] if times else float("nan")

    def reached(self, goal: float, since: float, until: float, span: float = 10.0) -> float:
        """Seconds after `since` at whose end the mean of `span` seconds had reached `goal`."""
        at = since
        while at + span <= until:
            if self.rate(at, at + span) >= goal:
                return at + span - since
            at += 1.0
        return float("inf")


def run(
    server: VirtualRedis,
    provider: SimulationConfig,
    quota: Quota,
    seconds: float,
    *,
    loads: Sequence[Load] = (Load(),),
    processes: int = 4,
    slots: int = 100,
    changes: Sequence[tuple[float, dict[str, Any]]] = (),
    round_trip: float = 0.001,
    seed: int = 1,
) -> Seen:
    """Run a fleet for so many virtual seconds, or until all rows are done.

    `changes`: settings of the provider from a second on.
    """
    fleet = _Fleet(server, quota, loads, seconds, random.Random(seed))

    async def main() -> None:
        await fleet.run(provider, processes, slots, changes, round_trip)

    VirtualLoop().run(main())
    server.now += seconds + 1000
    return fleet.seen


class _Fleet:
    def __init__(
        self,
        server: VirtualRedis,
        quota: Quota,
        loads: Sequence[Load],
        seconds: float,
        draw: random.Random,
    ) -> None:
        self.server, self.quota, self.loads, self.seconds = server, quota, loads, seconds
        self.draw = draw
        self.keys = Keys(f"fleet{next(_namespaces)}-{draw.random()}")
        self.seen = Seen()
        self.given = [0] * len(loads)

    async def run(
        self,
        config: SimulationConfig,
        processes: int,
        slots: int,
        changes: Sequence[tuple[float, dict[str, Any]]],
        round_trip: float,
    ) -> None:
        keys = self.keys.quota(self.quota.name)
        self.server.call(CONFIGURE, [keys.state, keys.channel], configure_arguments(self.quota))
        self.provider = virtual_provider(config)
        loop = asyncio.get_running_loop()
        for at, settings in changes:
            loop.call_at(at, functools.partial(self.provider.change, **settings))
        connection = VirtualConnection(self.server, round_trip)
        work = [self.process(connection, f"p{i}", slots) for i in range(processes)]
        await asyncio.wait([asyncio.ensure_future(one) for one in work], timeout=self.seconds)
        self.seen.round_trips = connection.calls

    async def process(self, connection: VirtualConnection, name: str, slots: int) -> None:
        async with Limiter(
            connection,  # type: ignore[arg-type]  # all that a limiter needs of one
            self.keys,
            process_id=name,
            clock=asyncio.get_running_loop().time,
        ) as limiter:
            estimator = Estimator()
            await asyncio.gather(*(self.slot(limiter, estimator) for _ in range(slots)))

    def next_row(self) -> tuple[Load, str] | None:
        now = asyncio.get_running_loop().time()
        for number, load in enumerate(self.loads):
            if load.start <= now and (load.rows is None or self.given[number] < load.rows):
                self.given[number] += 1
                size = load.prompt(self.draw)
                return load, f"{load.tenant} {self.given[number]} ".ljust(size, "x")
        return None

    async def slot(self, limiter: Limiter, estimator: Estimator) -> None:
        while True:
            row = self.next_row()
            if row is None:
                return
            refusals = 0
            while not await self.call(limiter, estimator, *row):
                refusals += 1
                self.seen.worst_row = max(self.seen.worst_row, refusals)
                await asyncio.sleep(min(2.0 ** (refusals - 1), 60) * self.draw.uniform(0.5, 1))

    async def call(self, limiter: Limiter, estimator: Estimator, load: Load, prompt: str) -> bool:
        loop = asyncio.get_running_loop()
        permit = await limiter.acquire(
            self.quota.name, lambda: estimator.estimate(load.tenant, prompt)
        )
        began = loop.time()
        call, _ = await self.provider.answer("openai", GenerateRequest("m", prompt))
        took = loop.time() - began
        date = format_datetime(datetime.fromtimestamp(call.time, UTC), usegmt=True)
        limits = rate_limits_of({**call.headers, "date": date})
        if limits is not None:
            limits = limits.model_copy(update={"quota": self.quota.name})
        if call.status == 200:
            usage = TokenUsage(input_tokens=call.input_tokens, output_tokens=call.output_tokens)
            estimator.observe(load.tenant, prompt, usage)
            limiter.settle(permit, CallOutcome.SUCCEEDED, usage=usage, latency=took, limits=limits)
            self.seen.served.append((loop.time(), usage.total_tokens, took, load.tenant))
            return True
        await asyncio.sleep(0.005)
        outcome = CallOutcome.REFUSED if call.status == 429 else CallOutcome.OVERLOADED
        limiter.settle(permit, outcome, retry_after=call.retry_after, limits=limits)
        self.seen.refused.append(loop.time())
        return False
