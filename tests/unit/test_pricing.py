"""Cost of tokens: genai-prices' table, the user's overrides, no guessing."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import pytest
from genai_prices import Usage, calc_price
from genai_prices.data_snapshot import get_snapshot

from batchllm_celery.errors import UsageError
from batchllm_celery.execution.pricing import Prices, _from_table
from batchllm_celery.models import TokenUsage

USAGES = [
    TokenUsage(input_tokens=1_000, output_tokens=100, cached_input_tokens=800),
    TokenUsage(input_tokens=250_000, output_tokens=4_000, cached_input_tokens=200_001),
    TokenUsage(input_tokens=200_000, output_tokens=1),
    TokenUsage(output_tokens=7),
]


def test_cached_tokens_cost_a_tenth_at_gemini() -> None:
    """The 90 % discount of Gemini's context cache shows in the cost."""
    fresh = Prices().cost("gemini:gemini-2.5-flash", TokenUsage(input_tokens=1_000_000))
    cached = Prices().cost(
        "gemini:gemini-2.5-flash",
        TokenUsage(input_tokens=1_000_000, cached_input_tokens=1_000_000),
    )
    assert fresh is not None
    assert cached == pytest.approx(fresh / 10)


def test_our_arithmetic_is_that_of_the_price_library_for_every_model_it_knows() -> None:
    """We keep the prices and do the sums ourselves (40 times faster); the sums agree."""
    now = datetime.now(tz=UTC)
    checked = 0
    for provider in get_snapshot().providers:
        for model in provider.models:
            table = model.get_prices(now)
            prices = _from_table(table)
            if prices is None:
                continue
            for usage in USAGES:
                expected = table.calc_price(
                    Usage(
                        input_tokens=usage.input_tokens,
                        output_tokens=usage.output_tokens,
                        cache_read_tokens=usage.cached_input_tokens,
                    )
                )["total_price"]
                assert prices.cost(usage) == expected, (provider.id, model.id, usage)
                checked += 1
    assert checked > 1_000


@pytest.mark.parametrize(
    "model",
    [None, "openai:my-own-model", "nobody:gpt-4o", "simulated", "simulated:gemini-2.5-flash"],
)
def test_an_unknown_model_has_no_cost_rather_than_a_wrong_one(model: str | None) -> None:
    """None says that the price is not known; another provider's price is not borrowed."""
    assert Prices().cost(model, TokenUsage(input_tokens=10)) is None


@pytest.mark.parametrize(
    "model",
    [
        "gemini:gemini-2.5-flash",
        "gpt-4o",
        "openai:gpt-4o",
        "pydantic-ai:openai:gpt-4o",
        "openrouter:anthropic/claude-fable-5.1:batch",
    ],
)
def test_models_are_found_by_provider_and_name(model: str) -> None:
    """All ways in which our strategies name their models lead to a price."""
    assert Prices().cost(model, TokenUsage(input_tokens=10)) is not None


def test_the_users_file_overrides_the_table(tmp_path: Path) -> None:
    """Prices of a private model, or a negotiated one, come from a JSON file."""
    file = tmp_path / "prices.json"
    file.write_text(
        json.dumps(
            {
                "gemini:gemini-2.5-flash": {"input": 1, "cached_input": 0.5, "output": 10},
                "openai:mine": {"input": 2.5, "output": 0},
            }
        )
    )
    prices = Prices(file)
    usage = TokenUsage(input_tokens=1_000_000, output_tokens=100_000, cached_input_tokens=500_000)
    assert prices.cost("gemini:gemini-2.5-flash", usage) == 0.5 + 0.25 + 1
    assert prices.cost("openai:mine", usage) == 2.5
    assert prices.of("openai:mine") is not None


async def test_the_table_is_read_off_the_event_loop() -> None:
    """Loading it twice is harmless, and look-ups are at hand afterwards."""
    prices = Prices()
    assert not prices.loaded
    await prices.load("openai:gpt-5")
    assert prices.loaded
    assert prices.of("openai:gpt-4o") is not None


def test_money_is_added_exactly(tmp_path: Path) -> None:
    """A price of 0.1 is a tenth, not the nearest binary fraction."""
    file = tmp_path / "prices.json"
    file.write_text('{"m": {"input": 0.1, "output": 0.2}}')
    prices = Prices(file).of("m")
    assert prices is not None
    usage = TokenUsage(input_tokens=1, output_tokens=1)
    assert prices.cost(usage) == Decimal("0.3") / 1_000_000


@pytest.mark.parametrize(
    "content",
    ["", "[]", '{"m": {"output": 1}}', '{"m": {"input": "1", "output": 1}}',
     '{"m": {"input": -1, "output": 1}}', '{"m": {"input": 1, "output": 1, "inptu": 1}}'],
)  # fmt: skip
def test_a_bad_prices_file_is_refused_with_its_name(tmp_path: Path, content: str) -> None:
    """A typo must not make a batch look cheap."""
    file = tmp_path / "prices.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=r"prices\.json"):
        Prices(file)


def test_a_missing_prices_file_is_refused(tmp_path: Path) -> None:
    """One clear line, not a traceback."""
    with pytest.raises(UsageError, match="FileNotFoundError"):
        Prices(tmp_path / "absent.json")


def test_what_is_written_into_a_cache_has_its_own_price() -> None:
    """To the cent as genai-prices computes it: reads and writes are parts of the input."""
    ours = TokenUsage(input_tokens=30_000, output_tokens=500, cached_input_tokens=20_000)
    cost = Prices().cost("anthropic:claude-sonnet-4-5", ours, written=8_000)
    theirs = Usage(
        input_tokens=30_000, cache_read_tokens=20_000, cache_write_tokens=8_000, output_tokens=500
    )
    expected = calc_price(theirs, model_ref="claude-sonnet-4-5", provider_id="anthropic")
    assert cost == pytest.approx(float(expected.total_price))
