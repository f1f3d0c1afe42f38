"""One item of a strategy in this process: no server, no queue, no quota."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any, cast

from batchllm_celery.events import Events
from batchllm_celery.execution.item_runner import ItemRunner
from batchllm_celery.execution.job import ItemJob, OpenGate
from batchllm_celery.execution.pricing import Prices
from batchllm_celery.limiter import Estimate, Estimator, Limiter, Permit
from batchllm_celery.models import ProcessorConfig, TOutput, WorkItemResult
from batchllm_celery.strategies.base import LLMCallStrategy, ProcessResources
from batchllm_celery.strategies.registry import Registry


class FreeLimiter:
    """Lets every call start at once."""

    def __init__(self) -> None:
        self.settled: list[Any] = []
        """Outcomes of the calls, in their order."""

    async def acquire(
        self,
        quota: str,
        estimate: Estimate | Callable[[], Estimate],
        *,
        priority: int = 0,
        retry: bool = False,
        tried: int = 0,
    ) -> Permit:
        """A permit."""
        reserved = estimate() if callable(estimate) else estimate
        return Permit(quota, 0, time.monotonic(), len(self.settled), reserved)

    def may_start(self, permit: Permit) -> bool:
        """Always."""
        return True

    def is_void(self, permit: Permit) -> bool:
        """Never."""
        return False

    def beside_successes(self, quota: str) -> bool:
        """There is nobody else."""
        return False

    def settle(self, permit: Permit, outcome: Any, **_: Any) -> None:
        """Note how the call ended."""
        if not permit.settled:
            permit.settled = True
            self.settled.append(outcome)


async def run_alone(
    strategy: LLMCallStrategy[TOutput],
    prompt: str,
    *,
    item_id: str = "item",
    context: Any = None,
    config: ProcessorConfig | None = None,
    resources: ProcessResources | None = None,
    limiter: FreeLimiter | None = None,
    events: Events | None = None,
) -> WorkItemResult[TOutput, Any]:
    """Drive one item through its strategy's life: prepare, attempts, cleanup, close.

    Args:
        strategy: prepared and closed here.
        prompt: the text.
        item_id: of the result.
        context: comes back with the result.
        config: attempts and time limits.
        resources: what the strategy shares; default an own one, without Redis.
        limiter: default one that lets every call start at once.
        events: who is told.
    """
    chosen = config or ProcessorConfig()
    registry = Registry(resources or ProcessResources())
    runner = ItemRunner(
        cast(Limiter, limiter or FreeLimiter()), Estimator(), events or Events(), Prices(None)
    )
    job = ItemJob(
        batch_id="",
        item_id=item_id,
        index=0,
        prompt=prompt,
        context=context,
        strategy=strategy,
        prepare=partial(registry.prepare, strategy),
        quota=strategy.quota or strategy.model_name or "alone",
        config=chosen,
        gate=OpenGate(chosen.most_calls),
        parks=False,
    )
    try:
        outcome = await runner.run(job)
    finally:
        await registry.close()
    if isinstance(outcome, WorkItemResult):
        return outcome
    raise RuntimeError(f"the item did not end: {outcome}")
