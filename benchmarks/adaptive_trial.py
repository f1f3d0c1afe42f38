"""The adaptive rate against five providers whose quota nobody told it, in virtual time.

The real acquire.lua on a real Valkey decides; only its clock is ours. One process with endless work
sends at the times it is given. Prints the used share of the quota and the refused one of calls.

Run: python -m benchmarks.adaptive_trial [--latency 0.05] [--seconds 1200]
"""

from __future__ import annotations

import argparse
import collections
import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from batchllm_celery.keys import Keys
from batchllm_celery.limiter.permit import CallOutcome, Estimate, Permit, SettledCall
from batchllm_celery.limiter.protocol import AcquireReply, AcquireRequest, acquire_arguments
from batchllm_celery.limiter.quota_state import configure_arguments
from batchllm_celery.limiter.scripts import ACQUIRE, CONFIGURE
from batchllm_celery.limiter.settlements import Settlements, Unused
from batchllm_celery.models import Quota
from tests.integration.virtual_redis import VirtualRedis
from tests.support import ValkeyServer

NOTHING = Estimate()


class Provider(Protocol):
    def refuse(self, now: float) -> float:
        """0 for an accepted call, else seconds to wait."""

    def scale(self, factor: float) -> None:
        """Change the quota."""


class Bucket:
    """Token bucket: `rate` a second, `capacity` at most."""

    def __init__(self, rate: float, capacity: float) -> None:
        self.rate, self.capacity, self.level, self.at = rate, capacity, capacity, 0.0

    def scale(self, factor: float) -> None:
        self.rate *= factor
        self.capacity *= factor

    def refuse(self, now: float) -> float:
        self.level = min(self.capacity, self.level + (now - self.at) * self.rate)
        self.at = now
        if self.level >= 1:
            self.level -= 1
            return 0.0
        return (1 - self.level) / self.rate


class SlidingWindow:
    """At most `limit` calls in any `seconds`."""

    def __init__(self, limit: float, seconds: float) -> None:
        self.limit, self.seconds = limit, seconds
        self.sent: collections.deque[float] = collections.deque()

    def scale(self, factor: float) -> None:
        self.limit *= factor

    def refuse(self, now: float) -> float:
        while self.sent and self.sent[0] <= now - self.seconds:
            self.sent.popleft()
        if len(self.sent) < self.limit:
            self.sent.append(now)
            return 0.0
        return self.sent[0] + self.seconds - now


class FixedWindow:
    """At most `limit` calls in each clock minute."""

    def __init__(self, limit: float, seconds: float) -> None:
        self.limit, self.seconds, self.window, self.count = limit, seconds, -1, 0

    def scale(self, factor: float) -> None:
        self.limit *= factor

    def refuse(self, now: float) -> float:
        window = int(now // self.seconds)
        if window != self.window:
            self.window, self.count = window, 0
        if self.count < self.limit:
            self.count += 1
            return 0.0
        return (window + 1) * self.seconds - now


PROVIDERS: dict[str, tuple[Callable[[], Provider], float, float, float]] = {
    # name: maker, quota a second, used and refused share of the trial that we must match
    "bucket of 1 s, 10/s": (lambda: Bucket(10, 10), 10, 0.987, 0.004),
    "bucket of 1 s, 100/s": (lambda: Bucket(100, 100), 100, 0.995, 0.0004),
    "fixed minute, 10/s": (lambda: FixedWindow(600, 60), 10, 1.0, 0.008),
    "sliding minute, 10/s": (lambda: SlidingWindow(600, 60), 10, 0.96, 0.007),
    "sliding minute, 2/s": (lambda: SlidingWindow(120, 60), 2, 0.97, 0.021),
}


@dataclass
class Run:
    """Moments of calls: (time of start, refused)."""

    calls: list[tuple[float, bool]] = field(default_factory=list)

    def used(self, quota: float, since: float, until: float) -> float:
        accepted = sum(1 for at, refused in self.calls if since <= at < until and not refused)
        return accepted / (until - since) / quota

    def refused(self, since: float, until: float) -> float:
        calls = [refused for at, refused in self.calls if since <= at < until]
        return sum(calls) / max(len(calls), 1)


class Sender:
    """One process in virtual time: asks as `WaitQueue` does, starts on time, settles calls."""

    def __init__(
        self,
        server: VirtualRedis,
        name: str,
        provider: Provider,
        *,
        latency: float,
        whole_seconds: bool = False,
        quota: Quota | None = None,
        demand: Callable[[float], float] = lambda now: math.inf,
    ) -> None:
        self.server, self.provider, self.latency = server, provider, latency
        self.whole_seconds, self.demand = whole_seconds, demand
        keys = Keys("trial").quota(name)
        self.keys = [keys.state, keys.procs, keys.waiting, keys.channel]
        self.offset = server.now
        self.events: list[tuple[float, int, str, Permit | None, float]] = []
        self.order = itertools.count()
        self.epoch, self.sequence, self.settlements = 0, 0, Settlements()
        self.reservations: collections.deque[float] = collections.deque()
        self.in_flight, self.asks, self.ask_at, self.earned = 0, 0, 0.0, 0.0
        self.run = Run()
        if quota is not None:
            arguments = configure_arguments(quota, update=True)
            server.call(CONFIGURE, [keys.state, keys.channel], arguments)

    def until(self, end: float, scale_at: dict[float, float] | None = None) -> Run:
        for at, factor in (scale_at or {}).items():
            self._at(at, "scale", None, factor)
        self._at(0.0, "ask")
        while self.events and self.events[0][0] < end:
            at, _, kind, permit, value = heapq.heappop(self.events)
            getattr(self, f"_{kind}")(at, permit, value)
        return self.run

    def _at(self, at: float, kind: str, permit: Permit | None = None, value: float = 0.0) -> None:
        heapq.heappush(self.events, (at, next(self.order), kind, permit, value))

    def _scale(self, now: float, permit: Permit | None, factor: float) -> None:
        self.provider.scale(factor)

    def _start(self, now: float, permit: Permit | None, value: float) -> None:
        assert permit is not None
        if not self.reservations or permit.epoch != self.epoch:
            return  # void: the fleet cooled down meanwhile
        self.reservations.popleft()
        self.in_flight += 1
        wait = self.provider.refuse(now + self.latency / 2)
        self.run.calls.append((now, wait > 0))
        if wait and self.whole_seconds:
            wait = float(math.ceil(wait))
        self._at(now + self.latency, "reply", permit, wait)

    def _reply(self, now: float, permit: Permit | None, wait: float) -> None:
        assert permit is not None
        self.in_flight -= 1
        outcome = CallOutcome.REFUSED if wait else CallOutcome.SUCCEEDED
        self.settlements.add(SettledCall(permit, outcome, retry_after=wait or None), now)
        if wait and permit.epoch == self.epoch:
            self._ask(now, None, -1.0)

    def _wanted(self, now: float) -> int:
        rate = self.demand(now)
        if rate == math.inf:
            return 64
        self.earned = min(self.earned + rate * (now - self.ask_at), 5.0)
        take, self.earned = int(self.earned), self.earned % 1
        return take

    def _ask(self, now: float, permit: Permit | None, value: float) -> None:
        if value >= 0 and value < self.asks:
            return  # another request went out meanwhile
        self.sequence += 1
        self.asks += 1
        self.server.now = self.offset + now
        wanted = self._wanted(now)
        self.ask_at = now
        request = AcquireRequest(
            sequence=self.sequence,
            reserved=len(self.reservations),
            in_flight=self.in_flight,
            wanted=wanted,
            **self.settlements.request_fields(self.epoch, now),
        )
        self.settlements = Settlements(epoch=self.epoch)
        arguments = acquire_arguments("p1", request)
        reply = AcquireReply.parse(self.server.call(ACQUIRE, self.keys, arguments))
        if reply.epoch > self.epoch:
            void = (Unused(start, self.epoch, NOTHING) for start in self.reservations)
            self.settlements.unused.extend(void)
            self.epoch = reply.epoch
            self.reservations.clear()
        for start_us in reply.starts_us:
            start = now + start_us * 1e-6
            self.reservations.append(start)
            permit = Permit("q", self.epoch, start, 0, NOTHING, reply.probing)
            self._at(start, "start", permit)
        if self.reservations:
            again = max(now + 0.01, min(now + 0.19, self.reservations[-1] - 0.05))
        else:
            again = now + max(0.01, min(reply.ask_again_us * 1e-6, 0.9 if wanted else 0.19))
        self._at(again, "ask", None, self.asks)


def trials(server: VirtualRedis, latency: float, seconds: float, skip: float) -> None:
    print(f"unknown quota, latency {latency} s, {seconds:.0f} s, after the first {skip:.0f} s")
    for whole in (False, True):
        for name, (make, quota, used, refused) in PROVIDERS.items():
            key = f"{name}-{latency}-{whole}".replace(" ", "")
            sender = Sender(server, key, make(), latency=latency, whole_seconds=whole)
            run = sender.until(seconds)
            how = "whole seconds" if whole else "exact        "
            print(
                f"  {name:21} Retry-After {how} used {run.used(quota, skip, seconds):.3f} "
                f"refused {run.refused(skip, seconds):.4f}   (trial {used:.3f} {refused:.4f})"
            )
            server.now += seconds + 100


def changes(server: VirtualRedis, latency: float) -> None:
    """The provider's quota halves or doubles after 600 s."""
    for name, (make, quota, _, _) in PROVIDERS.items():
        for factor, share, within in ((0.5, 0.95, 60), (2.0, 0.9, 90)):
            sender = Sender(
                server, f"{name}-{factor}-{latency}".replace(" ", ""), make(), latency=latency
            )
            run = sender.until(900.0, {600.0: factor})
            begun = next(
                (at for at in range(600, 870) if run.used(quota * factor, at, at + 30) >= share),
                None,
            )
            when = "never" if begun is None else f"{begun - 600} s"
            print(
                f"  {name:21} quota x{factor}: {share:.0%} of the new one from {when} "
                f"(wanted {within} s)"
            )
            server.now += 1000


def application_limited(server: VirtualRedis, latency: float) -> None:
    """Ten minutes at a fifth of the quota, then full load."""
    for name, (make, quota, _, _) in PROVIDERS.items():

        def demand(now: float, quota: float = quota) -> float:
            return math.inf if now < 120 or now > 720 else quota / 5

        key = f"{name}-app-{latency}".replace(" ", "")
        run = Sender(server, key, make(), latency=latency, demand=demand).until(900.0)
        print(
            f"  {name:21} refused in the minute after: {run.refused(720, 780):.4f} (wanted < 0.02)"
        )
        server.now += 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latency", type=float, action="append")
    parser.add_argument("--seconds", type=float, default=1200.0)
    parser.add_argument("--only", choices=["trials", "changes", "limited"])
    arguments = parser.parse_args()
    valkey = ValkeyServer().start()
    try:
        server = VirtualRedis(valkey.url)
        for latency in arguments.latency or [0.05, 0.5]:
            if arguments.only in (None, "trials"):
                trials(server, latency, arguments.seconds, 60.0 if latency < 0.1 else 90.0)
            if arguments.only in (None, "changes"):
                print("the provider's quota changes in mid-run")
                changes(server, latency)
            if arguments.only in (None, "limited"):
                print("ten minutes at a fifth, then full load")
                application_limited(server, latency)
    finally:
        valkey.stop()


if __name__ == "__main__":
    main()
