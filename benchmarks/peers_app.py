"""The same call for every peer, and each peer's worker around it. Runs in the peers' venv, so it
imports nothing of ours. Configured by PEERS_NAME, _URL, _SLOTS, _ITEMS and _SOCKET.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

import aiohttp

NAME = os.environ.get("PEERS_NAME", "")
URL = os.environ.get("PEERS_URL", "")
SLOTS = int(os.environ.get("PEERS_SLOTS", "100"))
ITEMS = int(os.environ.get("PEERS_ITEMS", "0"))
SOCKET = os.environ.get("PEERS_SOCKET", "")
PROMPT = "Say in one sentence what this text is about. " * 5

_session: aiohttp.ClientSession | None = None


async def call(number: int) -> dict[str, Any]:
    """One POST over the process's one session."""
    global _session
    if _session is None:
        _session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
    async with _session.post(URL, json={"prompt": f"{number}: {PROMPT}"}) as response:
        return await response.json()


# -- async-batch-llm: no queue, one process


async def run_async_batch_llm() -> None:
    from async_batch_llm import (
        LLMCallStrategy,
        LLMWorkItem,
        ParallelBatchProcessor,
        ProcessorConfig,
    )

    class Post(LLMCallStrategy):
        async def execute(self, prompt, attempt, timeout, state=None):  # type: ignore[no-untyped-def]
            answer = await call(int(prompt))
            return answer["text"], {"input_tokens": answer["input"], "output_tokens": 10}

    post = Post()
    async with ParallelBatchProcessor(config=ProcessorConfig(max_workers=SLOTS)) as processor:
        for number in range(ITEMS):
            item = LLMWorkItem(item_id=str(number), strategy=post, prompt=str(number))
            await processor.add_work(item)
        result = await processor.process_all()
    assert result.succeeded == ITEMS, result.failed


# -- arq


async def arq_call(context: dict[str, Any], number: int) -> dict[str, Any]:
    return await call(number)


async def feed_arq() -> None:
    from arq import create_pool

    pool = await create_pool(_arq_settings())
    for first in range(0, ITEMS, 500):
        numbers = range(first, min(first + 500, ITEMS))
        await asyncio.gather(*(pool.enqueue_job("arq_call", number) for number in numbers))


def _arq_settings() -> Any:
    from arq.connections import RedisSettings

    return RedisSettings(unix_socket_path=SOCKET)


class ArqWorker:
    """What `arq benchmarks.peers_app.ArqWorker` runs."""

    functions = (arq_call,)
    max_jobs = SLOTS
    redis_settings = _arq_settings() if NAME == "arq" else None


# -- taskiq


def _taskiq_broker() -> Any:
    from taskiq_redis import ListQueueBroker

    return ListQueueBroker(f"unix://{SOCKET}")


if NAME == "taskiq":
    broker = _taskiq_broker()
    taskiq_call = broker.task(task_name="call")(call)


async def feed_taskiq() -> None:
    await broker.startup()
    for number in range(ITEMS):
        await taskiq_call.kiq(number)
    await broker.shutdown()


# -- saq


async def saq_call(context: dict[str, Any], *, number: int) -> dict[str, Any]:
    return await call(number)


def _saq_queue() -> Any:
    from redis.asyncio import Redis
    from saq.queue.redis import RedisQueue

    # (`Queue.from_url` knows no unix sockets.)
    return RedisQueue(Redis.from_url(f"unix://{SOCKET}"))


async def feed_saq() -> None:
    queue = _saq_queue()
    for number in range(ITEMS):
        await queue.enqueue("saq_call", number=number, timeout=60)
    await queue.disconnect()


if NAME == "saq":
    settings = {"queue": _saq_queue(), "functions": [saq_call], "concurrency": SLOTS}


# -- streaq


if NAME == "streaq":
    from streaq import Worker

    # `prefetch` is what it fetches beyond its slots; its default is as many again.
    streaq_worker = Worker(redis_url=f"unix://{SOCKET}", concurrency=SLOTS)
    streaq_call = streaq_worker.task()(call)


async def feed_streaq() -> None:
    async with streaq_worker:
        for first in range(0, ITEMS, 500):
            numbers = range(first, min(first + 500, ITEMS))
            await streaq_worker.enqueue_many([streaq_call.enqueue(number) for number in numbers])


# -- dramatiq: each async actor in flight takes one of its threads


if NAME == "dramatiq":
    import dramatiq
    from dramatiq.brokers.redis import RedisBroker
    from dramatiq.middleware import AsyncIO

    dramatiq_broker = RedisBroker(url=f"unix://{SOCKET}")
    dramatiq_broker.add_middleware(AsyncIO())
    dramatiq.set_broker(dramatiq_broker)
    dramatiq_call = dramatiq.actor(call, actor_name="call")


async def feed_dramatiq() -> None:
    for number in range(ITEMS):
        dramatiq_call.send(number)


if __name__ == "__main__":
    asyncio.run({
        "async-batch-llm": run_async_batch_llm,
        "arq": feed_arq,
        "taskiq": feed_taskiq,
        "saq": feed_saq,
        "streaq": feed_streaq,
        "dramatiq": feed_dramatiq,
    }[NAME]())  # fmt: skip
