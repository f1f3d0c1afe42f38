"""Which existing cache is reused (seed plan 2.5): the real lookup of the real strategy with the
real google-genai client, against a provider that holds the caches."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("google.genai", reason="google-genai is not installed")

from google.genai import types

from batchllm_celery.errors import UsageError
from batchllm_celery.providers import GeminiCachedStrategy
from batchllm_celery.providers.gemini.cache import display_name_of, fingerprint_of, has_tags
from batchllm_celery.providers.simulated import open_simulated_client
from batchllm_celery.settings import Settings
from batchllm_celery.simulation import SimulatedProvider
from batchllm_celery.strategies import ProcessResources, Registry

MODEL = "gemini-2.0-flash"
CONTENT: list[Any] = ["You answer questions about the handbook.", "The handbook: always be kind."]
TAGS = {"customer": "acme", "version": "v1"}


def strategy_with(
    tags: dict[str, Any] | None, client: Any = None, content: Any = None, model: str = MODEL
) -> GeminiCachedStrategy[str]:
    return GeminiCachedStrategy(
        model=model,
        client=client,
        response_parser=lambda response: str(response.text),
        cached_content=CONTENT if content is None else content,
        cache_tags=tags,
    )


async def reused(
    existing: list[dict[str, Any] | str | None], wanted: dict[str, Any] | None, model: str = MODEL
) -> int | None:
    """The position of the existing cache that a strategy with tags `wanted` takes; None: it made
    one of its own. An existing cache is given by its tags, or by a whole display name."""
    async with SimulatedProvider() as provider:
        resources = ProcessResources(settings=Settings(simulated_url=provider.url))
        client = await open_simulated_client(resources)
        names = [
            await create(client, MODEL, tags if isinstance(tags, str) else name_for(tags))
            for tags in existing
        ]
        strategy = strategy_with(wanted, client, model=model)
        await Registry(resources).prepare(strategy)
        created = provider.provider.caches.created - len(existing)
        await resources.close()
        assert strategy._cache is not None
        chosen = strategy._cache.name
    assert created == (0 if chosen in names else 1)
    return names.index(chosen) if chosen in names else None


async def create(client: Any, model: str, display_name: str) -> str:
    config = types.CreateCachedContentConfig(
        contents=CONTENT, ttl="3600s", display_name=display_name or None
    )
    cache = await client.aio.caches.create(model=model, config=config)
    return str(cache.name)


def name_for(tags: dict[str, Any] | None) -> str:
    return display_name_of(fingerprint_of([None, CONTENT]), tags or {})


async def test_exactly_the_same_tags_match() -> None:
    """1. The cache of the same customer and version is reused."""
    assert await reused([TAGS], TAGS) == 0


async def test_a_subset_of_the_cache_s_tags_matches() -> None:
    """2. The cache may have tags that were not asked for."""
    assert await reused([{**TAGS, "extra": "x"}], {"customer": "acme"}) == 0


async def test_another_value_does_not_match() -> None:
    """3. One customer's cache never serves another."""
    assert await reused([TAGS], {"customer": "globex", "version": "v1"}) is None


async def test_a_missing_tag_does_not_match() -> None:
    """4. All tags asked for must be there."""
    assert await reused([{"customer": "acme"}], TAGS) is None


@pytest.mark.parametrize("display_name", ["", "somebody else's", "batchllm:0123", "batchllm:x{bad"])
async def test_a_cache_without_our_tags_does_not_match(display_name: str) -> None:
    """5. Neither does one that somebody else made, or whose name can't be read."""
    assert await reused([display_name], TAGS) is None


async def test_a_strategy_without_tags_matches_any() -> None:
    """6. Tags restrict; none, no restriction (of the same model and content)."""
    assert await reused([TAGS], None) == 0
    assert await reused([TAGS], {}) == 0


async def test_tags_are_case_sensitive() -> None:
    """7. In names and in values."""
    assert await reused([{"customer": "Acme"}], {"customer": "acme"}) is None
    assert await reused([{"Customer": "acme"}], {"customer": "acme"}) is None


async def test_tags_are_type_sensitive() -> None:
    """8. 1, "1", 1.5 and True are different."""
    assert await reused([{"version": "1"}], {"version": 1}) is None
    assert await reused([{"version": 1}], {"version": True}) is None
    assert await reused([{"version": 1}], {"version": 1}) == 0


async def test_the_right_one_is_picked_among_several() -> None:
    """9. Wherever it stands in the list, also beyond its first page."""
    caches: list[Any] = [{"customer": f"c{n}"} for n in range(120)]
    assert await reused(caches, {"customer": "c117"}) == 117
    assert await reused([{"customer": "globex"}, None, TAGS], TAGS) == 2


async def test_special_characters_survive_the_display_name() -> None:
    """10. Quotes, braces, colons, umlauts, emoji and new lines."""
    tags = {"kunde": 'Müller & "Söhne" {x:1}', "😀": "a\nb\\c"}
    assert await reused([{"kunde": "Muller"}, tags], tags) == 1


async def test_another_model_or_content_is_another_cache() -> None:
    """A model whose name merely ends alike is not it, and stale content is never reused."""
    assert await reused([TAGS], TAGS, model="2.0-flash") is None
    stale = display_name_of(fingerprint_of([None, ["old content"]]), TAGS)
    assert await reused([stale], TAGS) is None


def test_tags_that_don_t_fit_are_refused_at_once() -> None:
    """A display name has 128 characters; the message says how many are left."""
    with pytest.raises(UsageError, match=r"cache_tags take \d+ characters .* only 103 fit"):
        strategy_with({"note": "x" * 200})


def test_the_plan_s_own_example() -> None:
    """As printed in the plan (no client, no content), but asking the product and not itself."""
    strategy_a = GeminiCachedStrategy(
        model="gemini-2.0-flash",
        client=None,
        response_parser=lambda x: str(x),
        cached_content=[],
        cache_tags={"customer": "acme", "version": "v1"},
    )
    assert has_tags({"customer": "acme", "version": "v1"}, strategy_a.cache_tags)
    assert not has_tags({"customer": "globex", "version": "v1"}, strategy_a.cache_tags)
