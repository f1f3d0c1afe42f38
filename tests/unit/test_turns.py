"""Urgent items of a process get its permits first, and no permit is lost on the way."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any, cast

import pytest

from batchllm_celery.execution.turns import Turns
from batchllm_celery.limiter import CallOutcome, Estimate, Limiter, Permit

ESTIMATE = Estimate(10, 5)


class Line:
    """A limiter that serves first come, first served, when the test says so."""

    def __init__(self) -> None:
        self.waiting: deque[asyncio.Future[Permit]] = deque()
        self.unused: list[int] = []
        self.issued = 0

    async def acquire(self, quota: str, estimate: Estimate, *, again: bool = False) -> Permit:
        turn: asyncio.Future[Permit] = asyncio.get_running_loop().create_future()
        self.waiting.append(turn)
        return await turn

    def settle(self, permit: Permit, outcome: CallOutcome, **_: Any) -> None:
        assert outcome is CallOutcome.UNUSED
        self.unused.append(permit.id)

    async def serve(self, count: int = 1) -> None:
        """Give permits to those in front, then let everybody act on it."""
        for _ in range(count):
            while self.waiting[0].done():
                self.waiting.popleft()
            self.issued += 1
            self.waiting.popleft().set_result(Permit("q", 0, 0.0, self.issued, ESTIMATE))
            await settled()


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


class Items:
    """Items that wait for a permit; `served` has their names in order."""

    def __init__(self) -> None:
        self.line = Line()
        self.turns = Turns(cast(Limiter, self.line))
        self.served: list[str] = []
        self.permits: list[int] = []
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def arrive(self, name: str, priority: int = 0, quota: str = "q") -> None:
        self.tasks[name] = asyncio.create_task(self._wait(name, priority, quota))
        await settled()

    async def _wait(self, name: str, priority: int, quota: str) -> None:
        permit = await self.turns.acquire(quota, ESTIMATE, priority)
        self.permits.append(permit.id)
        self.served.append(name)


@pytest.fixture
def items() -> Items:
    return Items()


async def test_the_first_permit_goes_to_the_most_urgent(items: Items) -> None:
    """Later but more urgent items are served first; equals in the order they came."""
    for name, priority in [("a", 0), ("b", 0), ("c", 5), ("d", 9), ("e", 5)]:
        await items.arrive(name, priority)
    while len(items.served) < 5:
        await items.line.serve()
    assert items.served[:3] == ["d", "c", "e"]
    assert set(items.served[3:]) == {"a", "b"}
    assert items.line.issued == 5 + len(items.line.unused)


async def test_usual_items_alone_keep_their_order(items: Items) -> None:
    """Without an urgent item the limiter's own order stands."""
    for name in "abc":
        await items.arrive(name)
    await items.line.serve(3)
    assert items.served == ["a", "b", "c"]


async def test_an_urgent_item_of_another_quota_takes_nothing(items: Items) -> None:
    """A permit is handed on within its quota only."""
    await items.arrive("usual")
    await items.arrive("urgent", 9, quota="other")
    await items.line.serve()
    assert items.served == ["usual"]
    await items.line.serve()
    assert items.served == ["usual", "urgent"]


async def test_a_cancelled_item_leaves_no_permit_behind(items: Items) -> None:
    """Whoever is cancelled, waiting or served in the same moment, costs the quota nothing."""
    await items.arrive("usual")
    await items.arrive("urgent", 9)
    items.line.issued += 1
    items.line.waiting.popleft().set_result(Permit("q", 0, 0.0, 1, ESTIMATE))
    await asyncio.sleep(0)  # the usual one has handed it on, the urgent one has not woken yet
    items.tasks["urgent"].cancel()
    await settled()
    assert items.tasks["urgent"].cancelled()
    assert items.line.unused == [1]
    await items.line.serve()
    assert items.served == ["usual"]
    assert items.line.issued == len(items.permits) + len(items.line.unused)


async def test_two_permits_in_one_moment_are_not_both_kept(items: Items) -> None:
    """An urgent item that gets its own permit and another's at once gives one back."""
    await items.arrive("usual")
    await items.arrive("urgent", 9)
    for number in (1, 2):
        items.line.waiting.popleft().set_result(Permit("q", 0, 0.0, number, ESTIMATE))
    await settled()
    assert items.served == ["urgent"]
    assert len(items.line.unused) == 1
