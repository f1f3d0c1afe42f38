"""A plain Python model of acquire.lua: known rates, cooldown and escalation, day and concurrency.

Written from the protocol, not from the script: one process after another, times in microseconds.
What it leaves out: the adaptive curve (benchmarks/adaptive_trial.py), leases and the breaker.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

LOOK = 500_000
TURN = 150_000
HEADROOM = 0.995
SECOND = 800_000
IDLE = 1_000_000
DAY = 86_400_000_000


@dataclass
class Bucket:
    """One dimension: `per` microseconds a unit; `tat` when all that was started is paid."""

    per: float
    tat: float | None = None

    def settle(self, now: float, burst: float, units: float, idle: float = 0.0) -> None:
        self.tat = now if self.tat is None else max(self.tat, now - burst)
        self.tat = max(self.tat + units * self.per, now - burst)
        if self.tat > now + LOOK + IDLE:
            self.tat = max(self.tat + idle * self.per, now + LOOK + IDLE)

    def pay(self, start: float, burst: float, units: float) -> None:
        assert self.tat is not None
        cost = units * self.per
        ahead = max(max(burst, SECOND) - cost, 0.0)
        self.tat = max(self.tat, start - min(burst, ahead)) + cost


@dataclass
class Answer:
    generation_grew: bool
    starts: list[int]
    exhausted: bool
    consecutive: int


@dataclass
class Model:
    """The fleet's view of one quota with a slow_start policy (so that rates stay as configured)."""

    requests: float = 0.0
    tokens: float = 0.0
    per_day: int = 0
    concurrency: int = 0
    burst: float = 100_000
    cooldowns: tuple[float, ...] = (1.0, 2.0, 5.0)
    ramp: tuple[float, ...] = ()
    generation: int = 0
    cool_until: float = 0.0
    consecutive: int = 0
    ramp_i: int = -1
    ramp_next: float = 0.0
    day_used: int = 0
    day_reset: float = 0.0
    waiting: dict[str, float] = field(default_factory=dict)
    """Since when; a process that was served stands at the end of the line."""
    mine: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.buckets: dict[str, Bucket] = {}
        if self.requests:
            self.buckets["r"] = Bucket(1e6 / (self.requests * HEADROOM))
        if self.tokens:
            self.buckets["t"] = Bucket(1e6 / (self.tokens * HEADROOM))

    def ask(
        self,
        process: str,
        now: float,
        wants: list[int],
        *,
        held: int = 0,
        in_flight: int = 0,
        successes: int = 0,
        unused: int = 0,
        reusable: int = 0,
        reusable_tokens: int = 0,
        tokens_owed: int = 0,
        idle: int = 0,
        refused: bool = False,
        retry_after: float | None = None,
    ) -> Answer:
        """Settle (all of the current generation), then give start times for `wants` (tokens)."""
        if successes:
            self.consecutive = 0
        if refused:
            self._cool_down(now, retry_after)
        self._new_day(now, unused)
        for name, bucket in self.buckets.items():
            if name == "r":
                bucket.settle(now, self.burst, -reusable)
            else:
                bucket.settle(now, self.burst, tokens_owed - reusable_tokens, idle)
        starts = self._grant(process, now, wants, held, in_flight)
        return Answer(refused, starts, self._exhausted(now, wants, starts), self.consecutive)

    def _cool_down(self, now: float, retry_after: float | None) -> None:
        self.consecutive += 1
        listed = self.cooldowns[min(self.consecutive, len(self.cooldowns)) - 1]
        self.cool_until = max(self.cool_until, now + max(listed, retry_after or 0) * 1e6)
        for bucket in self.buckets.values():
            if bucket.tat is not None:
                bucket.tat = max(self.cool_until, bucket.tat - LOOK)
        self.ramp_i, self.ramp_next = 0, self.cool_until

    def _new_day(self, now: float, unused: int) -> None:
        if not self.per_day:
            return
        if now >= self.day_reset:
            self.day_used, self.day_reset = 0, now - now % DAY + DAY
        self.day_used = max(self.day_used - unused, 0)

    def _exhausted(self, now: float, wants: list[int], starts: list[int]) -> bool:
        return bool(self.per_day and wants and self._day_room <= 0)

    def _room(self, process: str, wanted: int, in_flight: int) -> int:
        room = wanted
        self._day_room = self.per_day - self.day_used if self.per_day else wanted
        room = min(room, max(self._day_room, 0))
        others = sum(n for name, n in self.mine.items() if name != process)
        if self.concurrency:
            room = min(room, max(self.concurrency - others - in_flight, 0))
        return room

    def _grant(
        self, process: str, now: float, wants: list[int], held: int, in_flight: int
    ) -> list[int]:
        queued = process in self.waiting
        first = queued and min((at, name) for name, at in self.waiting.items())[1] == process
        sharers = len(self.waiting) + (not queued) if wants else 1
        waits = sharers > 1 and not first and self.buckets
        frontier = now + LOOK - (max(LOOK / sharers, TURN) if waits else 0)
        room = self._room(process, len(wants), in_flight)
        starts: list[int] = []
        spent = 0.0
        for tokens in wants[:room]:
            start = self._start(now)
            if start > frontier:
                break
            step = max(
                (b.per * self._units(name, tokens) for name, b in self.buckets.items()), default=0
            )
            n = len(starts)
            if sharers > 1 and n + held and (n + held) * (spent + step) / (n + 1) >= LOOK / sharers:
                break
            spent += step
            for name, bucket in self.buckets.items():
                bucket.pay(start, self.burst, self._units(name, tokens))
            self._step_ramp(start)
            starts.append(math.ceil(start - now))
        if len(starts) == len(wants):
            self.waiting.pop(process, None)
        elif starts or not queued:
            self.waiting[process] = now
        self.mine[process] = in_flight + len(starts)
        self.day_used += len(starts) if self.per_day else 0
        return starts

    @staticmethod
    def _units(name: str, tokens: int) -> int:
        return 1 if name == "r" else tokens

    def _start(self, now: float) -> float:
        paid = (bucket.tat or 0.0 for bucket in self.buckets.values())
        start = max(now, self.cool_until, self.ramp_next, *paid)
        if 0 < self.ramp_i < len(self.ramp):
            start = max(start, self.ramp_next + self.ramp[self.ramp_i] * 1e6)
        return start

    def _step_ramp(self, start: float) -> None:
        if 0 <= self.ramp_i < len(self.ramp):
            self.ramp_i, self.ramp_next = self.ramp_i + 1, start
