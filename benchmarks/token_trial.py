"""A known quota of tokens with requests of 1:20, in virtual time: hours of a fleet in a minute.

The real wait queues and estimators of four processes, and the real acquire.lua on a real Valkey;
ours are the clock, the network and the provider, which has a bucket of one second and charges at
arrival. What a run of ten minutes shows as one refusal or none is a rate here.

Run: python -m benchmarks.token_trial [--runs 20] [--minutes 10] [--jitter 0.004] [--largest 880]
Answers of very unequal length, a provider that looks at the minute:
     python -m benchmarks.token_trial --largest 100 --output 600 --sigma 1 --bucket 60
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import math
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

from batchllm_celery.keys import Keys
from batchllm_celery.limiter import CallOutcome, Estimate, Estimator, Permit
from batchllm_celery.limiter.permit import SettledCall
from batchllm_celery.limiter.protocol import AcquireReply, acquire_arguments
from batchllm_celery.limiter.quota_state import configure_arguments
from batchllm_celery.limiter.scripts import ACQUIRE, CONFIGURE
from batchllm_celery.limiter.wait_queue import Waiter, WaitQueue
from batchllm_celery.models import Quota, QuotaLimits, TokenUsage
from batchllm_celery.simulation.quotas import Bucket
from tests.integration.virtual_redis import VirtualRedis
from tests.support import ValkeyServer

TOKENS_PER_MINUTE = 60_000
LATENCY = 0.5
SLOTS = 120
PROCESSES = 4
SKIP = 5.0
#: Redis there and back; how late a channel's message comes.
ROUND_TRIP, CHANNEL = 0.001, 0.003
#: Until a refused call waits again.
HANDLED = 0.003


class Granted:
    """What `WaitQueue` needs of a future."""

    def __init__(self, then: Callable[[Permit], None]) -> None:
        self._then = then
        self._done = False

    def done(self) -> bool:
        return self._done

    def set_result(self, permit: Permit) -> None:
        self._done = True
        self._then(permit)


@dataclass
class World:
    """Virtual time, the provider and what it saw."""

    server: VirtualRedis
    keys: list[str]
    draw: random.Random
    options: argparse.Namespace
    provider: Bucket
    offset: float
    now: float = 0.0
    processes: list[Process] = field(default_factory=list)
    calls: list[tuple[float, bool, int]] = field(default_factory=list)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: itertools.count[int] = field(default_factory=itertools.count)

    def at(self, when: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(when, self.now), next(self._order), act))

    def until(self, end: float) -> None:
        while self._events and self._events[0][0] < end:
            self.now, _, act = heapq.heappop(self._events)
            act()

    def delay(self) -> float:
        """From a reserved start to the provider's door."""
        return self.draw.expovariate(1 / self.options.jitter)

    def answer_length(self) -> int:
        """Output tokens of a call: log-normal about its mean."""
        sigma = self.options.sigma
        mean = math.log(self.options.output) - sigma**2 / 2
        return max(round(self.draw.lognormvariate(mean, sigma)), 1)

    def used(self) -> float:
        took = sum(tokens for at, ok, tokens in self.calls if ok and at >= SKIP)
        return took / (self.now - SKIP) / (TOKENS_PER_MINUTE / 60)


class Process:
    """One worker: 120 items wait or are in flight; what `QuotaClient` does with asyncio's clock."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.queue = WaitQueue("q")
        self.estimator = Estimator()
        self.sequence = 0
        self.requesting = False
        self.timer = 0
        for _ in range(SLOTS):
            self.next_item()

    def next_item(self) -> None:
        self.wait("x" * 4 * self.world.draw.randint(25, self.world.options.largest), retry=False)

    def wait(self, prompt: str, *, retry: bool) -> None:
        def guess() -> Estimate:
            return self.estimator.estimate("s", prompt)

        granted = Granted(lambda permit: self.send(prompt, permit))
        waiter = Waiter(guess, granted, is_retry=retry)  # type: ignore[arg-type]  # all it needs
        self.queue.join(waiter)
        self.wake()

    def wake(self) -> None:
        self.timer += 1
        timer = self.timer
        at = min(self.queue.next_request(), self.queue.next_start())
        self.world.at(at, lambda: self.tick() if timer == self.timer else None)

    def tick(self) -> None:
        now, queue = self.world.now, self.queue
        queue.grant_due(now)
        if not self.requesting and queue.next_request() <= now + 1e-4:
            self.ask()
        at = queue.next_start() if self.requesting else queue.next_request()
        if queue.is_fresh(now) or queue.next_start() > now:
            at = min(at, queue.next_start())
        self.timer += 1
        timer = self.timer
        self.world.at(max(at, now + 1e-4), lambda: self.tick() if timer == self.timer else None)

    def ask(self) -> None:
        world, sent = self.world, self.world.now
        self.requesting = True
        self.sequence += 1
        request = self.queue.make_request(self.sequence, sent)
        arguments = acquire_arguments(self.name, request.request, request.estimates)

        def serve() -> None:
            world.server.now = world.offset + world.now
            raw = world.server.call(ACQUIRE, world.keys, arguments)
            at = world.now
            world.at(at + ROUND_TRIP / 2, lambda: accept(AcquireReply.parse(raw), at))

        def accept(reply: AcquireReply, at: float) -> None:
            self.requesting = False
            if reply.epoch > self.queue.epoch:
                for process in world.processes:
                    world.at(at + CHANNEL, lambda p=process: p.cool(reply.epoch))  # type: ignore[misc]
            self.queue.accept(request, reply, sent_at=sent, replied_at=at, now=world.now)
            self.wake()

        world.at(sent + ROUND_TRIP / 2, serve)

    def cool(self, epoch: int) -> None:
        self.queue.begin_epoch(epoch, self.world.now)
        self.wake()

    def send(self, prompt: str, permit: Permit) -> None:
        world = self.world
        usage = TokenUsage(input_tokens=len(prompt) // 4, output_tokens=world.answer_length())
        tokens = usage.input_tokens + usage.output_tokens

        def arrive() -> None:
            wait = world.provider.wait(tokens, world.now)
            if not wait:
                world.provider.charge(tokens, world.now)
            world.calls.append((world.now, not wait, tokens))
            world.at(world.now + (0.005 if wait else LATENCY), lambda: answer(wait))

        def answer(wait: float) -> None:
            queue, now = self.queue, world.now
            if wait:
                queue.settle(SettledCall(permit, CallOutcome.REFUSED, retry_after=wait), now)
                self.wake()
                world.at(now + HANDLED, lambda: self.wait(prompt, retry=True))
                return
            self.estimator.observe("s", prompt, usage)
            queue.settle(SettledCall(permit, CallOutcome.SUCCEEDED, usage), now)
            self.next_item()

        world.at(world.now + world.delay(), arrive)


def trial(server: VirtualRedis, seed: int, seconds: float, options: argparse.Namespace) -> World:
    quota = Quota(name="q", limits=QuotaLimits(tokens_per_minute=TOKENS_PER_MINUTE))
    keys = Keys(f"tokens-{seed}").quota(quota.name)
    server.call(CONFIGURE, [keys.state, keys.channel], configure_arguments(quota, update=True))
    world = World(
        server,
        [keys.state, keys.procs, keys.waiting, keys.channel],
        random.Random(seed),
        options,
        Bucket(TOKENS_PER_MINUTE, options.bucket, 0.0),
        server.now,
    )
    world.processes = [Process(world, f"p{i}") for i in range(PROCESSES)]
    world.until(seconds)
    server.now = world.offset + seconds + 100
    return world


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--jitter", type=float, default=0.004, help="mean, exponential; seconds")
    parser.add_argument("--largest", type=int, default=880, help="tokens of the largest prompt")
    parser.add_argument("--output", type=float, default=20, help="mean tokens of an answer")
    parser.add_argument("--sigma", type=float, default=0, help="of its logarithm; 0: all alike")
    parser.add_argument("--bucket", type=float, default=1.0, help="the provider's, in seconds")
    arguments = parser.parse_args()
    valkey = ValkeyServer().start()
    early = late = calls = 0
    used: list[float] = []
    try:
        server = VirtualRedis(valkey.url)
        for seed in range(arguments.runs):
            world = trial(server, seed, arguments.minutes * 60, arguments)
            times = [round(at, 2) for at, ok, _ in world.calls if not ok]
            used.append(world.used())
            early += sum(at < SKIP for at in times)
            late += sum(at >= SKIP for at in times)
            calls += len(world.calls)
            print(f"  seed {seed}: used {used[-1]:.2%}, refused at {times}", file=sys.stderr)
    finally:
        valkey.stop()
    print(
        f"{arguments.runs} runs of {arguments.minutes:g} min after {SKIP:g} s: "
        f"used {sum(used) / len(used):.2%} in the mean, {min(used):.2%} at least; "
        f"refused {late / calls:.3%} of {calls} calls, and {early} in the first {SKIP:g} s"
    )


if __name__ == "__main__":
    main()
