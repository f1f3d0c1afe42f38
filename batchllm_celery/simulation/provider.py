"""The simulated provider without its wire formats: it admits, refuses, answers and counts."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from batchllm_celery.simulation.answers import count_tokens
from batchllm_celery.simulation.caches import Caches
from batchllm_celery.simulation.config import SimulationConfig
from batchllm_celery.simulation.journal import Call, Journal
from batchllm_celery.simulation.quotas import Limits, QuotaRefusal
from batchllm_celery.simulation.replies import (
    Chance,
    GenerateRequest,
    Reply,
    ReplyOutcome,
    decide,
)
from batchllm_celery.simulation.serving import Serving
from batchllm_celery.simulation.wire import rate_limit_headers

#: OpenAI caches prompts from this many tokens on, in steps of 128.
_SHORTEST_CACHED_PROMPT = 1024
_CACHED_STEP = 128


@dataclass(slots=True)
class Stats:
    """Counts since the start or the last reset. `calls` counts requests for an answer only."""

    calls: int = 0
    in_flight: int = 0
    peak_in_flight: int = 0
    aborted: int = 0
    by_status: Counter[int] = field(default_factory=Counter)
    by_outcome: Counter[str] = field(default_factory=Counter)
    by_limit: Counter[str] = field(default_factory=Counter)
    """Refusals by the limit that refused."""
    operations: Counter[str] = field(default_factory=Counter)
    """Other requests: counting tokens, context caches, models."""
    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    first_call: float | None = None
    """Unix seconds."""
    last_call: float | None = None

    @property
    def answered(self) -> int:
        """Calls answered with status 200."""
        return self.by_status[200]

    @property
    def refused(self) -> int:
        """Calls answered with status 429."""
        return self.by_status[429]

    def count(self, call: Call) -> None:
        """Count an arrival."""
        self.calls += 1
        self.by_status[call.status] += 1
        self.by_outcome[call.outcome] += 1
        self.first_call = self.first_call or call.time
        self.last_call = call.time
        if call.limit:
            self.by_limit[call.limit] += 1
        self.input_tokens += call.input_tokens
        self.output_tokens += call.output_tokens
        self.cached_tokens += call.cached_tokens


@dataclass(slots=True)
class _Injected:
    """Refusals ordered by a test."""

    count: int = 0
    retry_after: float = 1.0


class Provider:
    """One simulated provider: its state and its decisions, without HTTP.

    Args:
        config: its limits, speed and faults.
        clock: Unix seconds; moments that calls and caches show.
        timer: seconds of a steady clock, for the limits.
    """

    def __init__(
        self,
        config: SimulationConfig,
        *,
        clock: Callable[[], float] = time.time,
        timer: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.clock = clock
        self._timer = timer
        self._journal = Journal(config.log_file)
        self.reset()

    def reset(self) -> None:
        """Forget every call, cache and charge; settings stay."""
        self.stats = Stats()
        self.calls: deque[Call] = deque(maxlen=self.config.keep_calls)
        self.caches = Caches(self.clock)
        self._limits = Limits(self.config, self._timer())
        self._serving = Serving(self.config, self._timer())
        # By hash: millions of prompts need not be kept.
        self._admitted: Counter[int] = Counter()
        self._systems: set[int] = set()
        self._injected = _Injected()

    def change(self, **changes: object) -> None:
        """Change settings in mid-run; what was charged to a limit stays charged.

        Raises:
            ValueError: for an unknown setting or a bad value.
        """
        self.config = self.config.changed(**changes)
        self._limits.reconfigure(self.config, self._timer())
        self._serving.change(self.config)

    def refuse(self, count: int, retry_after: float = 1.0) -> None:
        """Refuse the next `count` calls with a 429, whatever the limits say."""
        self._injected = _Injected(count, retry_after)

    def remembers(self, prefix: str) -> bool:
        """Whether an earlier call has left this prefix in the prompt cache; it does from now on."""
        known = hash(prefix) in self._systems
        self._systems.add(hash(prefix))
        return known

    def close(self) -> None:
        """Close the log file."""
        self._journal.close()

    def prompt_counts(self) -> Counter[str]:
        """How many calls of each prompt were answered with status 200, of those in `calls`."""
        return Counter(call.prompt for call in self.calls if call.status == 200)

    def cached_system_tokens(self, system: str) -> int:
        """Tokens of a system message that an earlier call has left in OpenAI's prompt cache."""
        tokens = count_tokens(system)
        if tokens < _SHORTEST_CACHED_PROMPT:
            return 0
        if hash(system) in self._systems:
            return tokens - tokens % _CACHED_STEP
        self._systems.add(hash(system))
        return 0

    async def answer(
        self, wire: str, request: GenerateRequest
    ) -> tuple[Call, Reply | QuotaRefusal]:
        """Admit or refuse the call, and wait as long as the answer takes."""
        refusal = self._refusal(request)
        if refusal is not None:
            return self._refused(wire, request, refusal), refusal
        chance = Chance(self.config.seed, request.prompt, -self.stats.calls)[0]
        if self._serving.is_full(self._timer(), chance):
            full = Reply(ReplyOutcome.ERROR, self.config.overload_status, 0.0)
            call = self._admit(wire, request, full, 0)
            call.finished = call.time
            return call, full
        attempt = self._admitted[hash(request.prompt)] + 1
        reply = decide(self.config, request, attempt)
        over = self._limits.admit(
            reply.input_tokens, reply.output_tokens + reply.thoughts_tokens, self._timer()
        )
        if over is not None:
            return self._refused(wire, request, over), over
        self._admitted[hash(request.prompt)] += 1
        return await self._serve(self._admit(wire, request, reply, attempt), reply), reply

    def reject(
        self, wire: str, model: str, status: int, body: Mapping[str, Any] | None = None
    ) -> None:
        """Count a request for an answer that is wrong in itself."""
        call = Call(0, 0, wire, model, "", 0, status, ReplyOutcome.REJECTED)
        call.body = body if self.config.keep_bodies else None
        self._arrive(call)

    def _refusal(self, request: GenerateRequest) -> QuotaRefusal | None:
        if self.config.billing_exhausted:
            return QuotaRefusal("billing", 0, 0)
        if self._injected.count > 0:
            self._injected.count -= 1
            return QuotaRefusal("injected", 0, self._injected.retry_after)
        most = self.config.max_concurrency
        if most is not None and self.stats.in_flight >= most:
            return QuotaRefusal("concurrency", most, self.config.latency or 1.0)
        return None

    def _refused(self, wire: str, request: GenerateRequest, refusal: QuotaRefusal) -> Call:
        return self._arrive(
            Call(
                number=0,
                time=0,
                wire=wire,
                model=request.model,
                prompt=request.prompt,
                attempt=0,
                status=429,
                outcome=ReplyOutcome.REFUSED,
                limit=refusal.limit_name,
                retry_after=refusal.retry_after,
                user=request.user,
                body=request.body if self.config.keep_bodies else None,
            )
        )

    def _admit(self, wire: str, request: GenerateRequest, reply: Reply, attempt: int) -> Call:
        call = Call(
            number=0,
            time=0,
            wire=wire,
            model=request.model,
            prompt=request.prompt,
            attempt=attempt,
            status=reply.status,
            outcome=reply.outcome,
            input_tokens=reply.input_tokens,
            output_tokens=reply.output_tokens + reply.thoughts_tokens,
            cached_tokens=reply.cached_tokens,
            user=request.user,
            body=request.body if self.config.keep_bodies else None,
        )
        return self._arrive(call)

    def _arrive(self, call: Call) -> Call:
        call.number = self.stats.calls + 1
        call.time = self.clock()
        form = self.config.rate_limit_headers
        if form is not None:
            call.headers = rate_limit_headers(form, self._limits.left(self._timer()), call.time)
        self.stats.count(call)
        self.calls.append(call)
        self._journal.arrived(call)
        return call

    async def _serve(self, call: Call, reply: Reply) -> Call:
        stats = self.stats  # a reset in the meantime must not make the new one's count negative
        stats.in_flight += 1
        stats.peak_in_flight = max(stats.peak_in_flight, stats.in_flight)
        try:
            await self._serving.serve(reply.latency, call.input_tokens, call.output_tokens)
        except asyncio.CancelledError:
            call.aborted = True
            call.finished = self.clock()
            stats.aborted += 1
            self._journal.aborted(call)
            raise
        finally:
            stats.in_flight -= 1
        call.finished = self.clock()
        return call

    def summary(self) -> dict[str, Any]:
        """The counts as a JSON object."""
        stats = self.stats
        counts = self.prompt_counts()
        return {
            "calls": stats.calls,
            "answered": stats.answered,
            "refused": stats.refused,
            "aborted": stats.aborted,
            "in_flight": stats.in_flight,
            "peak_in_flight": stats.peak_in_flight,
            "by_status": {str(status): count for status, count in stats.by_status.items()},
            "by_outcome": dict(stats.by_outcome),
            "by_limit": dict(stats.by_limit),
            "operations": dict(stats.operations),
            "tokens": {
                "input": stats.input_tokens,
                "output": stats.output_tokens,
                "cached": stats.cached_tokens,
            },
            "caches": {
                "live": len(self.caches.live()),
                "created": self.caches.created,
                "updated": self.caches.updated,
                "deleted": self.caches.deleted,
            },
            "prompts": {
                "answered": len(counts),
                "answered_again": sum(1 for count in counts.values() if count > 1),
            },
            "first_call": stats.first_call,
            "last_call": stats.last_call,
        }
