"""Numbers that Redis' scripts can't reckon with are refused before they are written."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from batchllm_celery.models import (
    BatchSpec,
    ProcessorConfig,
    QuotaLimits,
    RetryConfig,
    StrategySpec,
)
from batchllm_celery.models.base import MOST, MOST_DOLLARS, MOST_SECONDS
from batchllm_celery.settings import Settings


def spec(**fields: Any) -> BatchSpec:
    return BatchSpec(batch_id="b", strategy=StrategySpec(name="s"), **fields)


@pytest.mark.parametrize(
    ("name", "most"),
    [("deadline", MOST_SECONDS), ("max_cost", MOST), ("token_budget", MOST)],
)
def test_a_bound_of_a_batch_is_within_reach(name: str, most: int) -> None:
    """The largest one is taken; more, infinity and NaN are refused by the field's name."""
    assert getattr(spec(**{name: most}), name) == most
    for value in (most * 2, math.inf, math.nan, 1e300):
        with pytest.raises(ValidationError, match=name):
            spec(**{name: value})


def test_a_price_is_within_reach() -> None:
    """A price whose sum no script could read would make the batch unreadable once it is paid."""
    assert spec(prices={"": (MOST_DOLLARS, 0)}).prices == {"": (MOST_DOLLARS, 0)}
    for price in (MOST_DOLLARS * 2, math.inf, math.nan, -1):
        with pytest.raises(ValidationError, match="prices"):
            spec(prices={"": (1, price)})


@pytest.mark.parametrize("value", [1e300, 1e-300, 10**30])
def test_a_limit_of_a_quota_is_within_reach(value: float) -> None:
    """Neither so large nor so small that a time leaves the numbers; infinity is a word."""
    with pytest.raises(ValidationError, match="or unlimited"):
        QuotaLimits(requests_per_minute=value)
    assert QuotaLimits(requests_per_minute=math.inf).requests_per_minute == math.inf


def test_attempts_times_and_settings_are_within_reach() -> None:
    """The same for what is written with a batch from its config and from the environment."""
    for wrong in (
        lambda: RetryConfig(max_attempts=10**22),
        lambda: ProcessorConfig(max_rate_limit_retries=10**22),
        lambda: ProcessorConfig(item_timeout=1e300),
        lambda: Settings(result_ttl_seconds=10**22),
        lambda: Settings(max_deliveries=10**22),
        lambda: Settings(max_payload_bytes=10**22),
    ):
        with pytest.raises(ValidationError, match="less than or equal"):
            wrong()
