"""batch-llm 0.3's surface as the seed plan describes it: 1.1, 2.1, 3.2 to 3.5, 4.1, 5.3, 6.1."""

from __future__ import annotations

import asyncio
import inspect
import logging
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

import batchllm_celery
from batchllm_celery import (
    FrameworkTimeoutError,
    GeminiCachedStrategy,
    LLMCallStrategy,
    LLMWorkItem,
    MetricsObserver,
    ProcessorConfig,
    RateLimitConfig,
    RetryConfig,
    RetryState,
    WorkItemResult,
)
from batchllm_celery.errors import ERROR_MESSAGE_MAX_LENGTH, describe
from batchllm_celery.limiter import ExponentialBackoffStrategy, FixedDelayStrategy, policy_from
from batchllm_celery.models import BatchResult, TokenUsage
from batchllm_celery.strategies.failures import extract_token_usage


def test_version_matches_package() -> None:
    """1.1: `__version__` is the installed package's."""
    assert batchllm_celery.__version__ == version("batchllm-celery")


def test_token_usage_defaults_to_four_zeros_of_its_own() -> None:
    """2.1: a result without tokens has all four names."""
    one = WorkItemResult[Any, Any](item_id="a", success=True)
    assert dict(one.token_usage.items()) == {
        "input_tokens": 0,
        "output_tokens": 0,
        "total_tokens": 0,
        "cached_input_tokens": 0,
    }


def test_the_package_imports_without_the_optional_sdks() -> None:
    """2.1: pydantic-ai and openai are extras; naming their strategies needs neither."""
    code = (
        "import sys; sys.modules['pydantic_ai'] = sys.modules['openai'] = None\n"
        "import batchllm_celery as b\n"
        "b.PydanticAIStrategy, b.OpenAICompatibleStrategy, b.GeminiStrategy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_token_extraction_never_raises(caplog: pytest.LogCaptureFixture) -> None:
    """3.2: it logs at DEBUG and gives zeros."""

    class Hostile(Exception):
        @property
        def usage(self) -> object:
            raise RuntimeError("no usage here")

    with caplog.at_level(logging.DEBUG):
        assert not extract_token_usage(Hostile())
    assert caplog.messages == [
        "Failed to extract token usage from Hostile: no usage here. Returning 0 tokens. "
        "This is normal for non-LLM exceptions."
    ]


def test_a_renewal_buffer_as_long_as_the_ttl_is_refused() -> None:
    """3.3: the message names both numbers and a typical value."""
    with pytest.raises(ValueError, match=r"\(300\).*must be less than.*\(300\)") as caught:
        GeminiCachedStrategy("m", None, str, [], cache_ttl_seconds=300)
    assert "Typical value: 5-10 minutes (300-600 seconds)" in str(caught.value)


def test_a_framework_timeout_carries_its_numbers() -> None:
    """3.4: keyword-only, None unless given, and a TimeoutError."""
    anything: Any = FrameworkTimeoutError
    bare = FrameworkTimeoutError("late")
    assert (bare.item_id, bare.elapsed, bare.timeout_limit) == (None, None, None)
    full = FrameworkTimeoutError("late", item_id="a", elapsed=1.5, timeout_limit=1.0)
    assert (full.item_id, full.elapsed, full.timeout_limit) == ("a", 1.5, 1.0)
    assert isinstance(full, TimeoutError)
    with pytest.raises(TypeError):
        anything("late", "a")


def test_retry_state_forgets_quietly_unless_told_otherwise() -> None:
    """3.5: `delete(key, raise_if_missing=False)`."""
    state = RetryState({"a": 1})
    state.delete("a")
    state.delete("a")
    assert "a" not in state
    with pytest.raises(KeyError):
        state.delete("a", raise_if_missing=True)


@pytest.mark.parametrize(
    "method",
    [
        MetricsObserver.reset,
        MetricsObserver.export_json,
        MetricsObserver.export_prometheus,
        ProcessorConfig.validate,
        RetryState.__contains__,
        RetryState.delete,
        LLMCallStrategy.prepare,
        LLMCallStrategy.cleanup,
        batchllm_celery.ParallelBatchProcessor.add_work,
        batchllm_celery.ParallelBatchProcessor.process_all,
        batchllm_celery.ParallelBatchProcessor.get_stats,
    ],
)
def test_public_methods_are_documented(method: Any) -> None:
    """4.1: among others those that the plan names."""
    assert inspect.getdoc(method)


@pytest.mark.parametrize("bad", ["", "   ", None, 7])
def test_an_item_needs_an_id(bad: Any) -> None:
    """5.3: a non-empty string."""
    with pytest.raises(ValueError, match="item_id must be a non-empty string") as caught:
        LLMWorkItem(item_id=bad, strategy="s")
    assert f"(got {type(bad).__name__}: {bad!r})" in str(caught.value)


def test_an_item_needs_a_strategy() -> None:
    """5.3: None is refused by name."""
    with pytest.raises(ValueError, match="strategy must not be None for a"):
        LLMWorkItem(item_id="a", strategy=None)


@pytest.mark.parametrize(("length", "warns"), [(1_000_000, False), (1_000_001, True)])
def test_a_huge_prompt_is_accepted_with_a_warning(
    length: int, warns: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """5.3: from one character over a million on."""
    with caplog.at_level(logging.WARNING):
        LLMWorkItem(item_id="a", strategy="s", prompt="x" * length)
    expected = f"Very large prompt for a: {length} chars. May exceed model context limits."
    assert (expected in caplog.messages) is warns


def test_error_messages_are_cut_at_one_constant() -> None:
    """6.1: 200 characters of the exception's text."""
    assert ERROR_MESSAGE_MAX_LENGTH == 200
    assert describe(ValueError("x" * 500)) == "ValueError: " + "x" * 200


def test_cache_hit_rate_and_effective_tokens() -> None:
    """Sums of a batch, with Gemini's discount."""
    usage = TokenUsage(input_tokens=100, cached_input_tokens=80)
    result = BatchResult[Any, Any]([WorkItemResult(item_id="a", success=True, token_usage=usage)])
    assert result.cache_hit_rate() == 80
    assert result.effective_input_tokens() == 28
    assert BatchResult[Any, Any]([]).cache_hit_rate() == 0


def test_cooldowns_and_slow_start_follow_batch_llms_formulas() -> None:
    """3.1: computed once, as data: 300, 450, 600 s; 2.0 s down to 0.1 s over 50 starts."""
    policy = policy_from(RateLimitConfig())
    assert policy.cooldowns == (300.0, 450.0, 600.0)
    assert [round(policy.ramp[i], 3) for i in (0, 1, 10, 25, 49)] == [2.0, 1.962, 1.62, 1.05, 0.138]
    assert sum(policy.ramp) == pytest.approx(53.45)
    assert policy_from(ExponentialBackoffStrategy()) == policy


def test_an_endless_slow_start_is_no_finite_list() -> None:
    """3.1's trap: a fixed delay has no `slow_start_items`, and its spacing never ends."""
    policy = policy_from(FixedDelayStrategy(cooldown=5, delay=0.5))
    assert policy.cooldowns == (5.0,)
    assert policy.ramp == (0.5,)
    assert policy.ramp_repeats


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ProcessorConfig(max_workers=0), "max_workers must be >= 1"),
        (lambda: RetryConfig(max_attempts=0), "max_attempts must be >= 1"),
        (lambda: RetryConfig(initial_wait=5, max_wait=1), "must be >= initial_wait"),
        (lambda: RateLimitConfig(backoff_multiplier=0.5), "backoff_multiplier must be >= 1"),
    ],
)
def test_a_wrong_configuration_says_what_is_wrong(make: Any, message: str) -> None:
    """Validated when it is built, and again by `validate()`."""
    with pytest.raises(ValueError, match=message):
        make()
    ProcessorConfig().validate()


def test_the_default_dry_run_is_batch_llms() -> None:
    """5.2: a text that shows the prompt's beginning, and 150 tokens."""

    class Any_(LLMCallStrategy[str]):
        async def execute(
            self, prompt: str, attempt: int, timeout: float, state: Any = None
        ) -> Any:
            raise AssertionError

    answer: Any = asyncio.run(Any_().dry_run("x" * 60))
    output, usage = answer
    assert output == f"[DRY-RUN] Mock output for prompt: {'x' * 50}..."
    assert TokenUsage.of(usage).total_tokens == 150
