"""One context cache for a whole fleet: created once, renewed once, replaced once."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

from batchllm_celery.connection import Connection
from batchllm_celery.errors import FailureKind, ProviderError
from batchllm_celery.keys import Keys
from batchllm_celery.providers import GeminiCachedStrategy
from batchllm_celery.providers.gemini import cache as gemini_cache
from batchllm_celery.providers.simulated import open_simulated_client
from batchllm_celery.settings import Settings
from batchllm_celery.simulation import SimulatedProvider, answer_to
from batchllm_celery.strategies import ProcessResources, Registry, as_completion
from tests.support import wait_until_async

CONTENT = ["The handbook. " * 200]


class Cached(GeminiCachedStrategy[str]):
    """The real strategy, its client pointed at the simulated provider."""

    async def _open_client(self, resources: ProcessResources) -> Any:
        return await open_simulated_client(resources)


def cached(**options: Any) -> Cached:
    return Cached("m", cached_content=CONTENT, **options)


class Fleet:
    """Processes, as far as strategies can tell: a registry and a Redis connection each."""

    def __init__(self, provider: SimulatedProvider, registries: list[Registry]) -> None:
        self.provider = provider
        self.registries = registries

    @property
    def counts(self) -> tuple[int, int]:
        """Caches created and renewed, by the provider's own count."""
        caches = self.provider.provider.caches
        return caches.created, caches.updated

    async def prepare(self, per_process: int = 1, **options: Any) -> list[Cached]:
        """`per_process` strategies in each process, all prepared at once."""
        pairs = [(one, cached(**options)) for one in self.registries for _ in range(per_process)]
        await asyncio.gather(*(registry.prepare(strategy) for registry, strategy in pairs))
        return [strategy for _, strategy in pairs]


@asynccontextmanager
async def fleet(
    redis_url: str | None, namespace: str, processes: int = 2, **config: Any
) -> AsyncIterator[Fleet]:
    async with AsyncExitStack() as stack:
        provider = await stack.enter_async_context(SimulatedProvider(**config))
        registries = []
        for _ in range(processes):
            connection = None
            if redis_url is not None:
                connection = await stack.enter_async_context(Connection(redis_url))
            resources = ProcessResources(
                connection, Keys(namespace), Settings(simulated_url=provider.url)
            )
            registry = Registry(resources)
            stack.push_async_callback(registry.close)
            registries.append(registry)
        yield Fleet(provider, registries)


async def call_all(strategies: list[Cached], each: int = 20, label: str = "q") -> list[Any]:
    """`each` concurrent calls by every strategy."""
    calls = [
        strategy.execute(f"{label} {number} {n}", 1, 9)
        for number, strategy in enumerate(strategies)
        for n in range(each)
    ]
    return [as_completion(one) for one in await asyncio.gather(*calls)]


async def test_a_fleet_that_starts_at_once_creates_one_cache(
    redis_url: str, namespace: str
) -> None:
    """Two processes with four strategies each: one create, and every call uses its tokens."""
    async with fleet(redis_url, namespace) as running:
        strategies = await running.prepare(4)
        completions = await call_all(strategies)
        assert running.counts == (1, 0)
        assert all(one.usage.cached_input_tokens > 500 for one in completions)
        assert len({strategy._cache.name for strategy in strategies if strategy._cache}) == 1


async def test_without_redis_a_process_creates_one_cache(namespace: str) -> None:
    """Two strategies of one process share it by the process's own lock."""
    async with fleet(None, namespace, processes=1) as running:
        await call_all(await running.prepare(4))
        assert running.counts == (1, 0)


async def test_a_later_run_finds_the_cache_again(redis_url: str, namespace: str) -> None:
    """Same tags: no create, found through Redis or, with an empty Redis, at the provider. Other
    tags: one of their own."""
    async with fleet(redis_url, namespace) as running:
        await running.prepare(cache_tags={"v": 1})
        assert running.counts == (1, 0)
        for other_namespace in (namespace, f"{namespace}x"):
            async with Connection(redis_url) as connection:
                again = ProcessResources(
                    connection,
                    Keys(other_namespace),
                    Settings(simulated_url=running.provider.url),
                )
                registry = Registry(again)
                await registry.prepare(cached(cache_tags={"v": 1}))
                assert running.counts == (1, 0)
                await registry.close()
                if other_namespace != namespace:
                    keys = [key async for key in connection.client.scan_iter(f"{namespace}x:*")]
                    await connection.client.delete(*keys)
        await running.prepare(cache_tags={"v": 2})
        assert running.counts == (2, 0)


def test_another_server_project_or_key_is_another_cache() -> None:
    """What the fleet remembers of a cache is bound to the account that owns it, by a hash that
    gives no key away."""
    from google import genai

    def identity(key: str, url: str = "http://a") -> str:
        strategy = cached()
        strategy.client = genai.Client(api_key=key, http_options={"base_url": url})
        return strategy._identity()

    identities = [identity("KEY-1"), identity("KEY-2"), identity("KEY-1", "http://b")]
    assert len(set(identities)) == 3
    assert identity("KEY-1") == identities[0]
    assert not any("KEY" in one for one in identities)


async def test_a_cache_near_its_end_is_renewed_in_place_once(
    redis_url: str, namespace: str
) -> None:
    """Within the buffer the first call of the fleet extends it; nobody creates another, no call
    fails."""
    async with fleet(redis_url, namespace) as running:
        strategies = await running.prepare(
            2, cache_ttl_seconds=3.0, cache_renewal_buffer_seconds=1.0
        )
        names = {strategy._cache.name for strategy in strategies if strategy._cache}
        await call_all(strategies, label="early")
        assert running.counts == (1, 0)
        await until_renewal_is_due(strategies)
        assert all(strategy._is_cache_expired() for strategy in strategies)
        await call_all(strategies, label="due")
        assert running.counts == (1, 1)
        assert {strategy._cache.name for strategy in strategies if strategy._cache} == names


async def until_renewal_is_due(strategies: list[Cached]) -> None:
    await wait_until_async(lambda: all(one._is_cache_expired() for one in strategies))


@pytest.mark.parametrize("status", [403, 404])
@pytest.mark.parametrize("with_redis", [True, False])
async def test_a_cache_that_is_gone_is_replaced_once_and_no_call_fails(
    redis_url: str, namespace: str, status: int, with_redis: bool
) -> None:
    """Somebody deleted it at the provider: eighty calls notice at once, one creates another."""
    url = redis_url if with_redis else None
    processes = 2 if with_redis else 1
    async with fleet(url, namespace, processes, missing_cache_status=status) as running:
        strategies = await running.prepare(2)
        running.provider.provider.caches._live.clear()
        completions = await call_all(strategies)
        assert running.counts == (2, 0)
        assert all(one.usage.cached_input_tokens > 500 for one in completions)


async def test_an_expired_cache_is_replaced_when_renewal_is_off(
    redis_url: str, namespace: str
) -> None:
    """`auto_renew=False` lets it end; what the provider says then is not a failure."""
    async with fleet(redis_url, namespace) as running:
        strategies = await running.prepare(
            cache_ttl_seconds=1.0, cache_renewal_buffer_seconds=0.2, auto_renew=False
        )
        await wait_until_async(lambda: not running.provider.provider.caches.live())
        await call_all(strategies)
        assert running.counts == (2, 0)


async def test_a_cache_that_vanishes_again_at_once_is_a_failure(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One replacement per call, not a loop."""
    async with fleet(None, namespace, processes=1) as running:
        [strategy] = await running.prepare()
        caches = running.provider.provider.caches
        create = caches.create

        def short_lived(*arguments: Any) -> Any:
            made = create(*arguments)
            caches._live.clear()
            return made

        monkeypatch.setattr(caches, "create", short_lived)
        caches._live.clear()
        with pytest.raises(ProviderError, match="CachedContent not found"):
            await strategy.execute("q", 1, 9)
        assert running.counts == (2, 0)


async def test_a_403_about_anything_else_replaces_nothing(namespace: str) -> None:
    """It fails as what it is: the cache is not to blame."""
    config = {"error_rate": 1.0, "error_statuses": (403,)}
    async with fleet(None, namespace, processes=1) as running:
        [strategy] = await running.prepare()
        running.provider.change(**config)
        with pytest.raises(ProviderError) as caught:
            await strategy.execute("q", 1, 9)
        assert caught.value.kind is FailureKind.CONTENT_BLOCKED
        assert running.counts == (1, 0)


async def test_a_renewal_that_fails_does_not_fail_the_call(
    namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the provider can't renew, the cache serves on, and it is not asked at every call."""
    async with fleet(None, namespace, processes=1) as running:
        [strategy] = await running.prepare(cache_ttl_seconds=9.0, cache_renewal_buffer_seconds=8.9)
        await until_renewal_is_due([strategy])
        asked = 0

        async def update(**_: Any) -> Any:
            nonlocal asked
            asked += 1
            from google.genai import errors

            raise errors.ServerError(503, {"error": {"message": "overloaded"}})

        monkeypatch.setattr(strategy.client.aio.caches, "update", update)
        [first, *_] = await call_all([strategy])
        assert first.output == answer_to("q 0 0")
        assert asked == 1
        assert running.counts == (1, 0)


async def test_a_process_that_dies_while_creating_holds_up_nobody_for_long(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock is a lease."""
    monkeypatch.setattr(gemini_cache, "LOCK_LEASE", 0.5)
    async with fleet(redis_url, namespace, processes=1) as running:
        [registry] = running.registries
        strategy = cached()
        strategy.resources = registry._resources
        record = await strategy._record()
        assert isinstance(record, gemini_cache.FleetRecord)
        await record.connection.client.set(record.lock_key, b"the dead", px=500)
        await asyncio.wait_for(registry.prepare(strategy), 10)
        assert running.counts == (1, 0)


async def test_a_slow_creation_keeps_its_lock(
    redis_url: str, namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is renewed while its holder works: still one create."""
    monkeypatch.setattr(gemini_cache, "LOCK_LEASE", 0.3)
    create = Cached._create

    async def slow(self: Cached) -> Any:
        await asyncio.sleep(1.0)
        return await create(self)

    monkeypatch.setattr(Cached, "_create", slow)
    async with fleet(redis_url, namespace) as running:
        await running.prepare()
        assert running.counts == (1, 0)


async def test_delete_cache_deletes_it_for_the_fleet(redis_url: str, namespace: str) -> None:
    """At the provider and in Redis; the next call of anybody makes another. Twice is no error."""
    async with fleet(redis_url, namespace) as running:
        first, second = await running.prepare()
        await first.delete_cache()
        await first.delete_cache()
        assert running.provider.provider.caches.live() == []
        await call_all([first, second])
        assert running.counts == (2, 0)


async def test_closing_leaves_the_cache_to_the_others(redis_url: str, namespace: str) -> None:
    """Neither `cleanup` nor `close` deletes what the fleet uses."""
    async with fleet(redis_url, namespace) as running:
        first, second = await running.prepare()
        await first.cleanup()
        await running.registries[0].close()
        await call_all([second])
        assert running.counts == (1, 0)


async def test_a_content_that_is_too_small_says_so(namespace: str) -> None:
    """The provider's own words, as a request that no retry makes valid."""
    async with fleet(None, namespace, processes=1, min_cache_tokens=100_000) as running:
        with pytest.raises(ProviderError, match="too small") as caught:
            await running.prepare()
        assert caught.value.kind is FailureKind.INVALID_REQUEST


async def test_a_schema_and_a_system_text_work_with_a_cache(namespace: str) -> None:
    """The system text goes into the cache (the API refuses it beside one), the rest into the
    call."""
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    async with fleet(None, namespace, processes=1) as running:
        [strategy] = await running.prepare(system="Be brief.", schema=schema, temperature=0.0)
        completion = as_completion(await strategy.execute("q", 1, 9))
        assert isinstance(completion.output["n"], int)
        assert cached().fingerprint != strategy.fingerprint


# -- parameters (seed plan 3.3)


@pytest.mark.parametrize(("buffer", "ttl"), [(300, 300), (301, 300), (3600, 60)])
def test_the_renewal_buffer_must_be_less_than_the_ttl(buffer: int, ttl: int) -> None:
    """The message has both numbers and a typical value."""
    with pytest.raises(ValueError, match="must be less than") as caught:
        cached(cache_ttl_seconds=ttl, cache_renewal_buffer_seconds=buffer)
    assert str(caught.value) == (
        f"cache_renewal_buffer_seconds ({buffer}) must be less than cache_ttl_seconds ({ttl}). "
        "Typical value: 5-10 minutes (300-600 seconds)."
    )


def test_a_short_ttl_is_warned_about() -> None:
    """10 to 60 seconds is legal and hardly meant; none at all is not legal."""
    with pytest.warns(UserWarning, match="short"):
        cached(cache_ttl_seconds=30, cache_renewal_buffer_seconds=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cached(cache_ttl_seconds=60, cache_renewal_buffer_seconds=59)
    with pytest.raises(ValueError, match="greater than 0"):
        cached(cache_ttl_seconds=0, cache_renewal_buffer_seconds=-1)


def test_the_docstring_shows_right_and_wrong_use() -> None:
    """Seed plan 1.3: what an IDE shows on hover."""
    text = GeminiCachedStrategy.__doc__ or ""
    for words in ("CRITICAL FOR COST OPTIMIZATION", "CORRECT", "WRONG", "$10.00", "$3.00", "70 %"):
        assert words in text
