"""Hooks around an item: change or skip it before, change its result after (batch-llm's API)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from batchllm_celery.errors import describe
from batchllm_celery.models import LLMWorkItem, WorkItemResult

logger = logging.getLogger("batchllm_celery")


class Middleware:
    """Override what you need; a hook that raises is logged and passed over."""

    async def before_process(
        self, work_item: LLMWorkItem[Any, Any, Any]
    ) -> LLMWorkItem[Any, Any, Any] | None:
        """The item to process in its place; None skips it (its result says so)."""
        return work_item

    async def after_process(self, result: WorkItemResult[Any, Any]) -> WorkItemResult[Any, Any]:
        """The result to report in its place."""
        return result

    async def on_error(
        self, work_item: LLMWorkItem[Any, Any, Any], error: Exception
    ) -> WorkItemResult[Any, Any] | None:
        """A result for an item that failed for good; None leaves it failed."""
        return None


BaseMiddleware = Middleware  # batch-llm has both names


class MiddlewareChain:
    """Calls `before_process` first to last and `after_process` last to first; of `on_error` the
    first answer wins."""

    def __init__(self, middlewares: Iterable[Middleware] = ()) -> None:
        self._middlewares = tuple(middlewares)

    async def before(self, item: LLMWorkItem[Any, Any, Any]) -> LLMWorkItem[Any, Any, Any] | None:
        """The item after all hooks; None if one of them skips it."""
        for middleware in self._middlewares:
            try:
                changed = await middleware.before_process(item)
            except Exception as error:
                _log(middleware, "before_process", error)
                continue
            if changed is None:
                return None
            item = changed
        return item

    async def after(self, result: WorkItemResult[Any, Any]) -> WorkItemResult[Any, Any]:
        """The result after all hooks."""
        for middleware in reversed(self._middlewares):
            try:
                result = await middleware.after_process(result)
            except Exception as error:
                _log(middleware, "after_process", error)
        return result

    async def on_error(
        self, item: LLMWorkItem[Any, Any, Any], error: Exception
    ) -> WorkItemResult[Any, Any] | None:
        """The first result that a hook offers."""
        for middleware in self._middlewares:
            try:
                offered = await middleware.on_error(item, error)
            except Exception as raised:
                _log(middleware, "on_error", raised)
                continue
            if offered is not None:
                return offered
        return None


def _log(middleware: Middleware, hook: str, error: Exception) -> None:
    logger.warning(
        "middleware_failed name=%s hook=%s error=%s",
        type(middleware).__name__,
        hook,
        describe(error),
    )
