"""A Celery app that has nothing to do with LLMs, for tests of the pool with a real worker.

Configured by the environment: POOL_APP_BROKER, POOL_APP_NAMESPACE, POOL_APP_CONF (JSON),
POOL_APP_VISIBILITY (seconds).
Tasks report through a Redis list or hash of the namespace, with a client of their own.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import os
import time
from typing import Any

import redis
from celery import Celery, current_task
from celery.exceptions import SoftTimeLimitExceeded

from batchllm_celery import event_loop

URL = os.environ.get("POOL_APP_BROKER", "unix:///nowhere")
NAMESPACE = os.environ.get("POOL_APP_NAMESPACE", "pool")


def make_app(url: str, namespace: str) -> Celery:
    """The app for one broker; a test that only sends messages makes one too."""
    app = Celery("pool_app", set_as_current=False)
    celery_url = f"redis+socket://{url.removeprefix('unix://')}"
    prefix = f"{namespace}:celery:"
    app.conf.update(
        broker_url=celery_url,
        broker_transport_options={
            "global_keyprefix": prefix,
            "visibility_timeout": int(os.environ.get("POOL_APP_VISIBILITY", "60")),
            "unacked_restore_interval": 1,
            "unacked_restore_throttle": 1,
            "socket_timeout": 10,
        },
        broker_connection_retry_on_startup=True,
        result_backend=celery_url,
        result_backend_transport_options={"global_keyprefix": prefix},
        task_default_queue="pool",
        task_ignore_result=True,
        worker_prefetch_multiplier=1,
        worker_hijack_root_logger=False,
    )
    app.conf.update(json.loads(os.environ.get("POOL_APP_CONF", "{}")))
    return app


app = make_app(URL, NAMESPACE)
client = redis.Redis.from_url(URL, decode_responses=True)
marker: contextvars.ContextVar[int] = contextvars.ContextVar("marker", default=-1)


def tell(what: str, *values: Any) -> None:
    client.rpush(f"{NAMESPACE}:celery:told:{what}", json.dumps(values))


@app.task(bind=True)
async def identity(self: Any, number: int) -> None:
    """Three awaits; each time the request and the current task must still be this one's."""
    seen = {self.request.id}
    for _ in range(3):
        await asyncio.sleep(0.02)
        seen.add(self.request.id)
        seen.add(current_task.request.id)
    tell("identity", number, len(seen) == 1 and self.request.id == self.request.root_id)


@app.task
async def variable(number: int) -> None:
    """Set a context variable that no other task may see, nor lose over awaits."""
    before = marker.get()
    marker.set(number)
    async with asyncio.TaskGroup() as group:
        child = group.create_task(_read_marker())
    async with asyncio.timeout(10):
        await asyncio.sleep(0.01)
    tell("variable", before, marker.get() == number, child.result() == number)


async def _read_marker() -> int:
    await asyncio.sleep(0.01)
    return marker.get()


@app.task
async def nap(seconds: float, what: str = "nap") -> str:
    tell(f"{what}-started", seconds)
    await asyncio.sleep(seconds)
    tell(what, seconds)
    return "rested"


@app.task(acks_late=True)
async def late_nap(seconds: float) -> None:
    tell("late-started", os.getpid())
    await asyncio.sleep(seconds)
    tell("late", os.getpid())


@app.task(bind=True)
async def cancellable(self: Any) -> None:
    tell("cancellable-started", self.request.id)
    try:
        await asyncio.gather(asyncio.sleep(60), asyncio.sleep(60))
    except asyncio.CancelledError:
        tell("cancelled", self.request.id)
        raise


@app.task(bind=True, max_retries=3)
async def retried(self: Any) -> None:
    await asyncio.sleep(0)
    tell("retried", self.request.retries)
    if self.request.retries < 2:
        raise self.retry(countdown=0.05)


@app.task(bind=True, autoretry_for=(KeyError,), max_retries=2, default_retry_delay=0)
async def autoretried(self: Any) -> None:
    await asyncio.sleep(0)
    tell("autoretried", self.request.retries)
    if self.request.retries < 1:
        raise KeyError("again")


@app.task
async def soft_limited() -> None:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(_told_when_cancelled())
            group.create_task(asyncio.sleep(60))
    except* SoftTimeLimitExceeded:
        async with asyncio.timeout(5):
            await asyncio.sleep(0.01)  # it may still clean up
        tell("soft", True)


async def _told_when_cancelled() -> None:
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError:
        tell("soft-child", True)
        raise


@app.task
async def hard_limited() -> None:
    try:
        await asyncio.sleep(60)
    finally:
        tell("hard", True)


@app.task
def crossing(number: int) -> None:
    """A synchronous body that awaits."""
    tell("crossing", number, event_loop.run(_double(number)))


async def _double(number: int) -> int:
    await asyncio.sleep(0.02)
    return 2 * number


@app.task
async def failing(how: str) -> None:
    await asyncio.sleep(0)
    tell("failing", how)
    if how == "exit":
        raise SystemExit(3)
    if how == "cancel":
        raise asyncio.CancelledError("own doing")
    raise ValueError("wrong")


@app.task
async def calls_another() -> None:
    """Called directly, an `async def` task is a coroutine function as in any code."""
    await nap(0.01, "inner")
    tell("outer")


@app.task
async def blocking(seconds: float) -> None:
    time.sleep(seconds)  # what the watchdog is for
    tell("blocking", seconds)
