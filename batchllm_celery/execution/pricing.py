"""What tokens cost in US dollars: genai-prices' bundled table, overridden by the user's file.

Never a network call. A model without a known price costs None, not 0.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

from batchllm_celery.errors import UsageError
from batchllm_celery.models import TokenUsage
from batchllm_celery.settings import Settings

_MILLION = Decimal(1_000_000)

#: PROVIDER of `PROVIDER:MODEL` -> genai-prices' name, where they differ.
_PROVIDERS = {"gemini": "google", "google-gla": "google", "google-vertex": "google"}

#: What the names of models begin with that have no price.
_SIMULATED = "simulated:"

#: Some prices depend on the hour of the day, so what was looked up is good for so many seconds.
_FRESH_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Tiers:
    """US dollars per million tokens; above a threshold of input tokens, all cost the tier's."""

    base: Decimal
    steps: tuple[tuple[int, Decimal], ...] = ()
    """(threshold, price), rising."""

    def at(self, input_tokens: int) -> Decimal:
        price = self.base
        for threshold, tier in self.steps:
            if input_tokens > threshold:
                price = tier
        return price


@dataclass(frozen=True, slots=True)
class ModelPrices:
    """The prices that a text call needs."""

    input: Tiers
    cached_input: Tiers
    output: Tiers
    per_call: Decimal = Decimal(0)
    """US dollars for the call itself, whatever its size."""
    cache_write: Tiers | None = None
    """Of input that a call has put into a cache; None: as other input."""

    def cost(self, usage: TokenUsage, written: int = 0) -> Decimal:
        """US dollars of one call. Cached tokens are part of the input, at their own price, and so
        are those `written` into a cache."""
        size = usage.input_tokens
        cached = min(usage.cached_input_tokens, size)
        dollars = (
            (size - cached) * self.input.at(size)
            + cached * self.cached_input.at(size)
            + usage.output_tokens * self.output.at(size)
            + min(written, size - cached) * self._for_writing(size)
        )
        return dollars / _MILLION + self.per_call

    def _for_writing(self, size: int) -> Decimal:
        """What a token costs more where it is put into a cache."""
        if self.cache_write is None:
            return Decimal(0)
        return self.cache_write.at(size) - self.input.at(size)


class Prices:
    """Looks prices up by `PROVIDER:MODEL` (a bare model name is looked for with every provider).

    Args:
        file: a JSON object that overrides the table, US dollars per million tokens:
            `{"openai:my-model": {"input": 0.3, "cached_input": 0.03, "output": 2.5}}`.
            Without `cached_input`, cached tokens cost what others do.

    Raises:
        UsageError: if the file can't be read or is not of this form.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._overrides = {} if file is None else _read(file)
        self.known: dict[str, tuple[float, ModelPrices | None]] = {}
        """Model -> until when (monotonic seconds) its prices are fresh, and the prices."""
        self.loaded = False
        """Whether the table has been read."""

    @classmethod
    def from_settings(cls, settings: Settings) -> Prices:
        """Prices with the overrides that this process's settings name."""
        return cls(settings.prices_file)

    async def load(self, model: str) -> None:
        """Read the table for `model` off the event loop: the first look-up would block it for a
        second. A simulated model has no price, so nothing is read for it."""
        if not model.startswith(_SIMULATED):
            await asyncio.to_thread(_look_up, "")
            self.loaded = True

    def cost(self, model: str | None, usage: TokenUsage, written: int = 0) -> float | None:
        """US dollars of a call with `usage`; None for an unknown model.

        `written` is how much of its input the call has put into a cache.
        """
        prices = self.of(model) if model else None
        return None if prices is None else float(prices.cost(usage, written))

    def of(self, model: str) -> ModelPrices | None:
        """The prices of a model; None if there are none."""
        override = self._overrides.get(model)
        if override is not None:
            return override
        now = time.monotonic()
        until, known = self.known.get(model, (0.0, None))
        if now >= until:
            known = None if model.startswith(_SIMULATED) else _look_up(model)
            self.known[model] = (now + _FRESH_SECONDS, known)
        return known


def given_prices(prices: Mapping[str, tuple[float, float]]) -> dict[str, ModelPrices]:
    """Model -> prices of a batch that brings its own: dollars per million tokens in and out."""
    found = {}
    for model, (read, written) in prices.items():
        normal = Tiers(Decimal(str(read)))
        found[model] = ModelPrices(normal, normal, Tiers(Decimal(str(written))))
    return found


def _read(file: Path) -> dict[str, ModelPrices]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_float=Decimal)
        return {name: _from_user(prices) for name, prices in content.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError) as error:
        raise UsageError(
            f"prices file {str(file)!r} can't be used ({type(error).__name__}: {error}); "
            'it must read {"PROVIDER:MODEL": {"input": 0.3, "output": 2.5}} (dollars per million)'
        ) from error


def _from_user(prices: Mapping[str, Any]) -> ModelPrices:
    if unknown := set(prices) - {"input", "cached_input", "output"}:
        raise ValueError(f"unknown names {sorted(unknown)}")
    normal = _amount(prices["input"])
    cached = _amount(prices.get("cached_input", prices["input"]))
    return ModelPrices(Tiers(normal), Tiers(cached), Tiers(_amount(prices["output"])))


def _amount(value: object) -> Decimal:
    if isinstance(value, bool) or not isinstance(value, int | Decimal) or value < 0:
        raise ValueError(f"a price must be a number >= 0 (got {value!r})")
    return Decimal(value)


def _look_up(model: str) -> ModelPrices | None:
    from genai_prices import Usage, calc_price  # 0.6 s and an HTTP library, so late

    provider, _, name = model.removeprefix("pydantic-ai:").rpartition(":")
    if ":" in provider:  # the model's own name has a colon: "openrouter:some/model:free"
        provider, _, name = model.partition(":")
    try:
        found = calc_price(
            Usage(), model_ref=name, provider_id=_PROVIDERS.get(provider, provider) or None
        )
    except LookupError:
        return None
    return _from_table(found.model_price)


def _from_table(prices: Any) -> ModelPrices | None:
    normal, output = _tiers(prices.input_mtok), _tiers(prices.output_mtok)
    if normal is None and output is None:
        return None  # priced by the hour, the page or the image
    free = Tiers(Decimal(0))
    cached, written = _tiers(prices.cache_read_mtok), _tiers(prices.cache_write_mtok)
    per_call = (prices.requests_kcount or Decimal(0)) / 1000
    plain = normal or free
    return ModelPrices(plain, cached or plain, output or free, per_call, written)


def _tiers(price: Any) -> Tiers | None:
    if price is None or isinstance(price, Decimal):
        return None if price is None else Tiers(price)
    return Tiers(price.base, tuple((tier.start, tier.price) for tier in price.tiers))
