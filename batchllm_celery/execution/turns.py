"""Whose turn it is at the limiter: urgent items of a process go before its usual ones."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias

from batchllm_celery.limiter import CallOutcome, Estimate, Limiter, Permit

#: What a call will probably use, or who knows it.
Guess: TypeAlias = Estimate | Callable[[], Estimate]


@dataclass(order=True, slots=True)
class _Turn:
    """An urgent item that waits; the smallest is the next one."""

    rank: tuple[int, int]
    permit: asyncio.Future[Permit] = field(compare=False)


class Turns:
    """Permits of a limiter, the highest priority first.

    The limiter serves a process first come, first served, and hundreds may wait there. So an item
    that gets a permit while a more urgent one of the same quota waits hands it on, and asks anew.
    A permit is as good for one call as for another: its estimate is settled by what the call used.
    """

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._urgent: dict[str, list[_Turn]] = {}
        self._order = count()

    async def acquire(
        self, quota: str, estimate: Guess, priority: int = 0, *, again: bool = False
    ) -> Permit:
        """`Limiter.acquire`, with a priority: 0 is usual, higher ones go first."""
        if priority <= 0:
            return await self._usual(quota, estimate, again=again)
        turn = _Turn((-priority, next(self._order)), asyncio.get_running_loop().create_future())
        waiting = self._urgent.setdefault(quota, [])
        heapq.heappush(waiting, turn)
        own = asyncio.ensure_future(self._usual(quota, estimate, turn.rank, again=again))
        used: Permit | None = None
        try:
            await asyncio.wait({own, turn.permit}, return_when=asyncio.FIRST_COMPLETED)
            used = turn.permit.result() if turn.permit.done() else own.result()
            return used
        finally:
            for one in (turn.permit, own):
                one.cancel()  # a cancelled turn is passed over by those who look for an heir
                one.add_done_callback(lambda ended: self._give_back(ended, used))
            self._forget(quota)

    async def _usual(
        self,
        quota: str,
        estimate: Guess,
        rank: tuple[int, int] = (1, 0),
        *,
        again: bool = False,
    ) -> Permit:
        while True:
            permit = await self._limiter.acquire(quota, estimate, again=again)
            heir = self._heir(quota, rank)
            if heir is None:
                return permit
            heir.permit.set_result(permit)
            again = True  # it had its turn, and goes before those who had none

    def _heir(self, quota: str, rank: tuple[int, int]) -> _Turn | None:
        """The most urgent one that waits, if it goes before `rank`."""
        waiting = self._urgent.get(quota)
        while waiting and waiting[0].permit.done():
            heapq.heappop(waiting)
        if not waiting or waiting[0].rank >= rank:
            return None
        return heapq.heappop(waiting)

    def _forget(self, quota: str) -> None:
        waiting = self._urgent.get(quota)
        if waiting is not None and all(one.permit.done() for one in waiting):
            del self._urgent[quota]

    def _give_back(self, ended: asyncio.Future[Permit], used: Permit | None) -> None:
        """A permit that came at the last moment, to an item that has one or is gone."""
        if ended.cancelled() or ended.exception() is not None or ended.result() is used:
            return
        self._limiter.settle(ended.result(), CallOutcome.UNUSED)
