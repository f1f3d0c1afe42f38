"""The worker's side of `pools.py`: a message of N items, each of which awaits a while.

Imported by workers in more than one venv, so nothing but Celery is imported at the top.
"""

from __future__ import annotations

import os
import time
from typing import Any

from celery import Celery, signals

KIND = os.environ["BENCH_KIND"]
SECONDS = float(os.environ["BENCH_SECONDS"])
SLOTS = int(os.environ["BENCH_SLOTS"])
SOCKET = os.environ["BENCH_SOCKET"]

OURS = {"amqp": "batchllm_celery.worker.broker:Amqp"} if KIND == "ours" else {}

app = Celery("pools", broker=f"redis+socket://{SOCKET}", **OURS)
app.conf.update(
    task_ignore_result=True,
    task_acks_late=True,
    worker_prefetch_multiplier=1,
    worker_hijack_root_logger=False,
    # gevent loses acknowledgements with fewer connections than greenlets.
    broker_transport_options={"max_connections": 4 * SLOTS},
    broker_pool_limit=None if KIND == "gevent" else 10,
)
if KIND == "ours":
    app.conf.worker_pool = "batchllm_celery.worker.pool:AsyncioPool"

_started = False
_semaphore: Any = None


@app.task
def run_items(count: int) -> None:
    """Run `count` items at once, within the process's slots."""
    _note_start()
    if KIND == "gevent":
        _run_greenlets(count)
    else:
        from batchllm_celery import event_loop

        event_loop.run(_run_coroutines(count))


def _note_start() -> None:
    global _started
    if not _started:
        _started = True
        import redis

        redis.Redis(unix_socket_path=SOCKET).set("bench:started", time.time(), nx=True)


async def _run_coroutines(count: int) -> None:
    import asyncio

    if count == 1:
        await asyncio.sleep(SECONDS)  # the pool's own limit is the slots
    else:
        await asyncio.gather(*(_item() for _ in range(count)))


async def _item() -> None:
    import asyncio

    global _semaphore
    if _semaphore is None:
        _semaphore = asyncio.Semaphore(SLOTS)
    async with _semaphore:
        await asyncio.sleep(SECONDS)


def _run_greenlets(count: int) -> None:
    import gevent

    if count == 1:
        gevent.sleep(SECONDS)
    else:
        gevent.joinall([gevent.spawn(_greenlet_item) for _ in range(count)])


def _greenlet_item() -> None:
    import gevent
    import gevent.lock

    global _semaphore
    if _semaphore is None:
        _semaphore = gevent.lock.BoundedSemaphore(SLOTS)
    with _semaphore:
        gevent.sleep(SECONDS)


@signals.worker_ready.connect
def _note_ready(**_: Any) -> None:
    import redis

    redis.Redis(unix_socket_path=SOCKET).set("bench:ready", 1)
