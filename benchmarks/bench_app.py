"""Strategies without a provider, for the benchmarks' workers (`BATCHLLM_APP`).

Each process notes the first call's start and the last call's end in its own file of the folder
BENCH_NOTES: `PID first_start cpu_at_first last_end calls most_in_flight`.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import time
from pathlib import Path

from batchllm_celery import LLMCallStrategy, RetryState, TokenUsage, strategy

_USAGE = TokenUsage(input_tokens=20, output_tokens=10, total_tokens=30)


class _Notes:
    """What this process did, written soon after it changed."""

    def __init__(self) -> None:
        self.first = self.cpu = self.last = 0.0
        self.calls = self.flying = self.most = 0
        self._soon: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        if not self.first:
            self.first, self.cpu = time.time(), time.process_time()
            atexit.register(self.write)
            self.write()
        self.flying += 1
        self.most = max(self.most, self.flying)

    def end(self) -> None:
        self.flying -= 1
        self.calls += 1
        self.last = time.time()
        if self._soon is None:  # one small write for many calls
            self._soon = asyncio.get_running_loop().call_later(0.2, self.write)

    def write(self) -> None:
        self._soon = None
        folder = os.environ.get("BENCH_NOTES")
        if folder is None:
            return
        fields = (os.getpid(), self.first, self.cpu, self.last, self.calls, self.most)
        path = Path(folder) / f"{os.getpid()}.notes"
        path.with_suffix(".new").write_text(" ".join(map(str, fields)))
        path.with_suffix(".new").rename(path)


notes = _Notes()


class Sleepy(LLMCallStrategy[str]):
    """Answers after `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> tuple[str, TokenUsage]:
        notes.begin()
        if self.seconds:
            await asyncio.sleep(self.seconds)
        notes.end()
        return "an answer of a few words", _USAGE


@strategy("sleepy", quota="bench")
def sleepy(seconds: float = 0.0) -> LLMCallStrategy[str]:
    return Sleepy(seconds)


class Post(LLMCallStrategy[str]):
    """The call that `peers.py` compares: one POST over the process's one session."""

    async def execute(
        self, prompt: str, attempt: int, timeout: float, state: RetryState | None = None
    ) -> tuple[str, TokenUsage]:
        from benchmarks import peers_app

        answer = await peers_app.call(int(prompt))
        usage = TokenUsage(input_tokens=answer["input"], output_tokens=answer["output"])
        return answer["text"], usage


@strategy("post", quota="bench")
def post() -> LLMCallStrategy[str]:
    return Post()
