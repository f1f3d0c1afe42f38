"""One worker process: takes messages, runs their items, owns the parts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchllm_celery.worker.tasks import install

__all__ = ["install"]


def __getattr__(name: str) -> Any:
    # Lazily: Celery imports this package for the pool alone (`-P custom`), which needs no runtime.
    if name == "install":
        from batchllm_celery.worker.tasks import install

        return install
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
