"""A server without a quota: room for so many calls, and a speed that falls with their number.

Apart from the wire formats, and on the running loop's clock alone: a loop with a clock of its own
drives it through hours in seconds.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import deque

from batchllm_celery.simulation.config import SimulationConfig

#: What each call costs beside its answer, in tokens of output.
_OVERHEAD_TOKENS = 5


class Decoder:
    """Calls that decode together, as in a batching inference server (vLLM, SGLang, llama.cpp).

    `decode_slots` of them run; each token of each takes `decode_seconds`, and `decode_slowdown` of
    that more for each other call. The rest waits in a queue. All that run advance by the same
    tokens, so that one clock of tokens orders their ends.
    """

    def __init__(self, config: SimulationConfig) -> None:
        self.config = config
        self._loop = asyncio.get_running_loop()
        self._tokens = 0.0
        """The clock: tokens that a call would have by now, had it run from the beginning."""
        self._at = self._loop.time()
        self._order = itertools.count()
        self._running: list[tuple[float, int, asyncio.Future[None]]] = []
        self._waiting: deque[tuple[float, asyncio.Future[None]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    async def decode(self, tokens: float) -> None:
        """Wait until a call of so many tokens of work is answered."""
        done: asyncio.Future[None] = self._loop.create_future()
        self._waiting.append((tokens + _OVERHEAD_TOKENS, done))
        self._advance()
        try:
            await done
        finally:
            if done.cancelled():  # its client went away: the place is free
                self._running = [one for one in self._running if one[2] is not done]
                heapq.heapify(self._running)
                self._waiting = deque(one for one in self._waiting if one[1] is not done)
                self._advance()

    def change(self, config: SimulationConfig) -> None:
        """Other slots or another speed, from now on."""
        self._advance()
        self.config = config
        self._advance()

    def _seconds_per_token(self) -> float:
        others = max(len(self._running) - 1, 0)
        return self.config.decode_seconds * (1 + self.config.decode_slowdown * others)

    def _advance(self) -> None:
        """Move the clock to now, end what is done, and let others begin."""
        now = self._loop.time()
        if self._running:
            self._tokens += (now - self._at) / self._seconds_per_token()
        self._at = now
        while self._running and self._running[0][0] <= self._tokens + 1e-6:
            done = heapq.heappop(self._running)[2]
            if not done.done():
                done.set_result(None)
        while self._waiting and len(self._running) < (self.config.decode_slots or 1):
            tokens, done = self._waiting.popleft()
            heapq.heappush(self._running, (self._tokens + tokens, next(self._order), done))
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            left = max(self._running[0][0] - self._tokens, 0.0)
            self._timer = self._loop.call_later(left * self._seconds_per_token(), self._advance)


class Serving:
    """Whether a server has room for a call, and how long it takes to answer it.

    Args:
        config: its room and speed.
        now: seconds of a steady clock; bursts of overload are counted from here.
    """

    def __init__(self, config: SimulationConfig, now: float) -> None:
        self._config = config
        self._began = now
        self._in_flight = 0
        self._decoder: Decoder | None = None

    def change(self, config: SimulationConfig) -> None:
        """Change it in mid-run; calls in it stay."""
        self._config = config
        if self._decoder is not None and config.decode_slots is not None:
            self._decoder.change(config)

    def is_full(self, now: float, chance: float) -> bool:
        """Whether a call that comes now is refused; `chance` is uniform in [0, 1)."""
        config = self._config
        if self._in_flight >= self._room():
            return True
        if not config.burst_every:
            return False
        since = (now - self._began) % config.burst_every
        return since >= config.burst_every - config.burst_seconds and chance < config.burst_share

    def _room(self) -> float:
        config = self._config
        room = math.inf if config.refuse_beyond is None else config.refuse_beyond
        if config.decode_slots is not None and config.decode_queue is not None:
            room = min(room, config.decode_slots + config.decode_queue)
        return room

    async def serve(self, latency: float, input_tokens: int, output_tokens: int) -> None:
        """Wait as long as an answer takes, `latency` included."""
        config = self._config
        reading = config.input_seconds * input_tokens / 1000
        self._in_flight += 1
        try:
            if config.decode_slots is None:
                latency += reading + config.output_seconds * output_tokens / 1000
            if latency > 0:
                await asyncio.sleep(latency)
            if config.decode_slots is not None:
                self._decoder = self._decoder or Decoder(config)
                await self._decoder.decode(output_tokens + reading / config.decode_seconds)
        finally:
            self._in_flight -= 1
