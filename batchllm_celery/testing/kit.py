"""Your strategies under test: one item, or a whole pipeline in memory, without server or queue."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from batchllm_celery import event_loop
from batchllm_celery.errors import UsageError
from batchllm_celery.execution.alone import FreeLimiter, run_alone
from batchllm_celery.models import (
    ProcessorConfig,
    RetryConfig,
    StrategySpec,
    TOutput,
    WorkItemResult,
)
from batchllm_celery.producer import Producer
from batchllm_celery.producer.rows import spec_of
from batchllm_celery.settings import Settings
from batchllm_celery.strategies.base import LLMCallStrategy
from batchllm_celery.strategies.callable import CallableStrategy
from batchllm_celery.strategies.registered import TypedStrategy
from batchllm_celery.strategies.registry import Registration, catalog
from batchllm_celery.worker.process import Runtime

#: A kit's retries wait for nothing.
AT_ONCE = ProcessorConfig(retry=RetryConfig(initial_wait=0.001, max_wait=0.001, jitter=False))


async def arun_item(
    strategy: TypedStrategy[TOutput] | LLMCallStrategy[TOutput] | str,
    prompt: str,
    *,
    context: Any = None,
    params: dict[str, Any] | None = None,
    config: ProcessorConfig = AT_ONCE,
) -> WorkItemResult[TOutput, Any]:
    """Run one item of a strategy as a worker does: prepare, attempts, cleanup, close; its result.

    Args:
        strategy: what `@strategy` made, a registered name, or a strategy object.
        prompt: the text.
        context: comes back with the result.
        params: of a registered strategy's factory.
        config: attempts and time limits; by default retries wait a millisecond.

    Raises:
        UsageError: for a name that is not registered, or parameters that it does not take.
    """
    if isinstance(strategy, LLMCallStrategy):
        if params:
            raise UsageError("a strategy object has its parameters already")
        built = strategy
    else:
        spec = spec_of(strategy)
        spec = StrategySpec(name=spec.name, params={**spec.params, **(params or {})})
        built = catalog.lookup(spec.name).build(spec)
    return await run_alone(built, prompt, context=context, config=config)


def run_item(
    strategy: TypedStrategy[TOutput] | LLMCallStrategy[TOutput] | str,
    prompt: str,
    *,
    context: Any = None,
    params: dict[str, Any] | None = None,
    config: ProcessorConfig = AT_ONCE,
) -> WorkItemResult[TOutput, Any]:
    """`arun_item` for tests that are no coroutines."""
    return asyncio.run(arun_item(strategy, prompt, context=context, params=params, config=config))


@contextlib.contextmanager
def answers(
    strategy: TypedStrategy[Any] | str, function: Callable[[str], Any]
) -> Iterator[list[str]]:
    """Inside the block a registered strategy answers by `function`, and calls no provider.

        with answers("summarise", lambda prompt: prompt[:10]) as prompts:
            assert run_item("summarise", "A long text.").output == "A long tex"
        assert prompts == ["A long text."]

    Args:
        strategy: what `@strategy` made, or its name.
        function: prompt -> output; may be async, may return a `Completion` or `(output, usage)`,
            and may raise (`ProviderError`, for a 429 say).

    Yields:
        The prompts of all calls so far, retries included.
    """
    name = spec_of(strategy).name
    known = catalog.lookup(name)
    prompts: list[str] = []

    async def call(prompt: str) -> Any:
        prompts.append(prompt)
        answer = function(prompt)
        return await answer if asyncio.iscoroutine(answer) else answer

    def build(**_: Any) -> LLMCallStrategy[Any]:
        return CallableStrategy(call)

    with catalog.replaced(Registration(name, build, known.quota)):
        yield prompts


class _Unwatched(Runtime):
    """A worker's parts without a heartbeat: nobody else could take its items over."""

    def _start_heartbeat(self) -> None:
        pass


@contextlib.contextmanager
def pipeline(*, config: Settings | None = None) -> Iterator[Producer]:
    """A fleet in memory: ledger, a worker, a producer; no server, no queue, no quota.

        with answers("summarise", str.upper), pipeline() as producer:
            batch = producer.submit(["a", "b"], strategy="summarise")
            assert [result.output for result in batch.results()] == ["A", "B"]

    Everything goes through the ledger's own scripts, on fakeredis (the extra `testing`).

    Args:
        config: settings; the Redis in them is not used.

    Raises:
        UsageError: fakeredis is not installed.
    """
    try:
        fakeredis = importlib.import_module("fakeredis")
    except ImportError as error:
        words = "pipeline() needs fakeredis: pip install 'batchllm-celery[testing]'"
        raise UsageError(words) from error
    server = fakeredis.FakeServer()
    settings = (config or Settings()).model_copy(
        update={"redis_url": "redis://localhost:1/0", "offer_seconds": 0.02}
    )

    def deliver(batch_id: str, indexes: Sequence[int], *_: Any, **__: Any) -> bool:
        work = runtime.run_items(batch_id, list(indexes))
        asyncio.run_coroutine_threadsafe(work, event_loop.loop())
        return True

    def again(batch_id: str, indexes: Sequence[int], queue: str, priority: int) -> None:
        deliver(batch_id, indexes)

    async def begin() -> None:
        for services in (runtime.services, producer._session.open_services()):
            client = fakeredis.FakeAsyncRedis(server=server)
            vars(client)["info"] = _info
            services.connection.client = services.connection._subscribers = client
        vars(runtime.services)["limiter"] = _Free()
        await runtime.open()

    runtime = _Unwatched(settings, str(settings.redis_url), again)
    producer = Producer(settings)
    vars(producer._session)["publish"] = deliver
    event_loop.run(begin())
    try:
        yield producer
    finally:
        producer.close()
        event_loop.run(runtime.close())


async def _info(*_: Any) -> dict[str, Any]:
    """What fakeredis does not know, and a worker asks."""
    return {"run_id": "in memory"}


class _Free(FreeLimiter):
    async def __aenter__(self) -> _Free:
        return self

    async def __aexit__(self, *_: object) -> None:
        pass

    def begin_at_full_speed(self, quota: str) -> None:
        pass
