"""What a single item costs beside a batch's: own overhead, and CPU of producer and worker.

python -m benchmarks.single_items
"""

from __future__ import annotations

import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from batchllm_celery import AsyncProducer, CallableStrategy, LLMCallStrategy, Producer, strategy

ROOT = Path(__file__).parents[1]
ITEMS, ASKING, SECONDS = 1_000, 50, 0.05


async def _answer(prompt: str) -> str:
    await asyncio.sleep(SECONDS)
    return prompt.upper()


@strategy("bench-single")
def single() -> LLMCallStrategy[str]:
    """Stands in for a provider that takes 50 ms."""
    return CallableStrategy(_answer)


class Meter:
    """CPU seconds of this process and of the worker since it was made."""

    def __init__(self, worker: psutil.Process) -> None:
        self.worker = worker
        self.began = (time.process_time(), self._worker())

    def _worker(self) -> float:
        spent = self.worker.cpu_times()
        return spent.user + spent.system

    def show(self, name: str, more: str = "") -> None:
        mine, theirs = time.process_time() - self.began[0], self._worker() - self.began[1]
        per_item = (mine * 1000 / ITEMS, theirs * 1000 / ITEMS)
        print(f"{name:24} producer {per_item[0]:.2f} ms, worker {per_item[1]:.2f} ms an item{more}")


async def _ask(producer: AsyncProducer) -> list[float]:
    gate, spent = asyncio.Semaphore(ASKING), []

    async def one(number: int) -> None:
        async with gate:
            began = time.monotonic()
            result = await producer.ask(f"text {number}", strategy=single, timeout=120)
            assert result.output == f"TEXT {number}"
            spent.append(time.monotonic() - began - SECONDS)

    await asyncio.gather(*(one(number) for number in range(ITEMS)))
    return spent


def measure(worker: psutil.Process) -> None:
    """Three ways to have 1,000 prompts answered."""
    with Producer() as producer:
        producer.submit(["warm"] * 200, strategy=single, items_per_task=1).wait(timeout=120)
        meter = Meter(worker)
        batch = producer.submit(["text"] * ITEMS, strategy=single, items_per_task=1)
        assert sum(result.success for result in batch.results()) == ITEMS
        meter.show("batch, 1 a message")
    meter = Meter(worker)

    async def asking() -> list[float]:
        async with AsyncProducer() as producer:
            return await _ask(producer)

    spent = sorted(asyncio.run(asking()))
    overhead = f"; overhead p50 {statistics.median(spent) * 1000:.1f} ms"
    meter.show(f"ask, {ASKING} at once", f"{overhead}, p95 {spent[int(ITEMS * 0.95)] * 1000:.1f}")
    meter = Meter(worker)
    sent: list[Any] = [single.delay(f"text {number}") for number in range(ITEMS)]
    assert all(one.get(timeout=120) for one in sent)
    meter.show("delay and get")


def main() -> None:
    """Start a worker on a Valkey of its own, and measure."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"BATCHLLM_STATE_DIR": folder, "BATCHLLM_NAMESPACE": "bench"}
        command = ["-m", "batchllm_celery.cli", "worker", "--app", "benchmarks.single_items"]
        worker = subprocess.Popen(
            [sys.executable, *command, "--slots", "100", "--loglevel", "ERROR"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            with Producer() as producer:
                while not (found := producer.workers()):
                    time.sleep(0.1)
            measure(psutil.Process(found[0].pid))
        finally:
            worker.terminate()
            worker.wait()


if __name__ == "__main__":
    from benchmarks.single_items import main as run

    run()
