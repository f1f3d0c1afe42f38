"""Middlewares: order, skipping, replacing, and staying out of the way when they break."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from batchllm_celery.compat.middleware import Middleware, MiddlewareChain
from batchllm_celery.models import LLMWorkItem, WorkItemResult


def item(prompt: str = "p") -> LLMWorkItem[Any, Any, Any]:
    return LLMWorkItem(item_id="1", strategy="any", prompt=prompt)


class Adds(Middleware):
    """Appends its letter on the way in and on the way out."""

    def __init__(self, letter: str) -> None:
        self.letter = letter

    async def before_process(self, work_item: Any) -> Any:
        return item(work_item.prompt + self.letter)

    async def after_process(self, result: WorkItemResult[Any, Any]) -> WorkItemResult[Any, Any]:
        return result.model_copy(update={"output": result.output + self.letter})

    async def on_error(self, work_item: Any, error: Exception) -> Any:
        return WorkItemResult(item_id="1", success=True, output=self.letter)


class Broken(Middleware):
    async def before_process(self, work_item: Any) -> Any:
        raise RuntimeError("before")

    async def after_process(self, result: Any) -> Any:
        raise RuntimeError("after")

    async def on_error(self, work_item: Any, error: Exception) -> Any:
        raise RuntimeError("on_error")


class Skips(Middleware):
    async def before_process(self, work_item: Any) -> Any:
        return None


async def test_hooks_run_inwards_in_order_and_outwards_in_reverse() -> None:
    """The first middleware is the outermost layer."""
    chain = MiddlewareChain([Adds("a"), Adds("b")])
    before = await chain.before(item())
    assert before is not None
    assert before.prompt == "pab"
    after = await chain.after(WorkItemResult(item_id="1", success=True, output=""))
    assert after.output == "ba"


async def test_none_skips_the_item() -> None:
    """Later middlewares do not see it."""
    assert await MiddlewareChain([Skips(), Broken()]).before(item()) is None


async def test_the_first_rescue_wins() -> None:
    """of several middlewares that offer a result for a failed item."""
    rescued = await MiddlewareChain([Middleware(), Adds("a"), Adds("b")]).on_error(
        item(), ValueError()
    )
    assert rescued is not None
    assert rescued.output == "a"


async def test_a_broken_middleware_is_logged_and_passed_over(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The item goes on as if it were not there."""
    chain = MiddlewareChain([Broken()])
    given = WorkItemResult[Any, Any](item_id="1", success=True)
    with caplog.at_level(logging.WARNING):
        assert await chain.before(item()) is not None
        assert await chain.after(given) is given
        assert await chain.on_error(item(), ValueError()) is None
    assert [record.getMessage().split()[2] for record in caplog.records] == [
        "hook=before_process",
        "hook=after_process",
        "hook=on_error",
    ]
