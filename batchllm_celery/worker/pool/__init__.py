"""An asyncio pool for Celery's worker, and a quicker Redis transport: for any Celery app.

asyncio_pool     runs tasks on the event loop, `async def` ones included
greenlet_bridge  synchronous code that awaits: a greenlet for each task
transport        which Redis transport an app has; redis_transport: ours
bad_messages     what is no message is dropped, counted and logged
task_events      Celery's task events, sent a few times a second
watchdog         names the code that blocks the loop

    celery -A app worker -P custom -c 1000    with CELERY_CUSTOM_WORKER_POOL set to
    batchllm_celery.worker.pool:AsyncioPool   or worker_pool = the same in the app's settings
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchllm_celery.worker.pool.asyncio_pool import AsyncioPool

__all__ = ["AsyncioPool"]


def __getattr__(name: str) -> Any:
    # Lazily: a producer needs the transport alone, and no part of Celery's worker.
    if name == "AsyncioPool":
        from batchllm_celery.worker.pool.asyncio_pool import AsyncioPool

        return AsyncioPool
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
